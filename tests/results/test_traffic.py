import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import example_results as example
from cli.screen import telling
from expertlane.results.file import read, write
from expertlane.results.traffic import by_link, last_arrivals, sent_matrix, traffic_record
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link, Stage, Traffic
from records import rank_record, step_record

TWO = Layout(dp=2, ep=2)
FOUR = Layout(dp=4, ep=4)


def step(*records):
    return step_record(0.0, 1.0, [0], records)


def sends(rank, to_rank, num_bytes, *, stage=Stage.DISPATCH, kind=Traffic.PAYLOAD, world_size=4):
    return rank_record(rank, sent={(stage, kind, to_rank): num_bytes}, world_size=world_size)


def test_matrix_of_a_step():
    record = rank_record(
        0,
        sent={
            (Stage.DISPATCH, Traffic.PAYLOAD, 1): 10,
            (Stage.DISPATCH, Traffic.METADATA, 1): 2,
            (Stage.COMBINE, Traffic.PADDING, 1): 7,
        },
        world_size=2,
    )
    other = sends(1, 0, 20, stage=Stage.COMBINE, world_size=2)
    matrix = sent_matrix(TWO, step(record, other))
    assert matrix.shape == (len(Stage), 3, 2, 2)
    assert matrix[Stage.DISPATCH, Traffic.PAYLOAD].tolist() == [[0, 10], [0, 0]]
    assert matrix[Stage.DISPATCH, Traffic.METADATA].tolist() == [[0, 2], [0, 0]]
    assert matrix[Stage.COMBINE, Traffic.PADDING].tolist() == [[0, 7], [0, 0]]
    assert matrix[Stage.COMBINE, Traffic.PAYLOAD].tolist() == [[0, 0], [20, 0]]
    assert matrix.sum() == 39


def test_steps_of_different_replicas_are_summed_at_global_ranks():
    layout = Layout(replicas=2, dp=2, ep=2)
    steps = [step(sends(0, 1, 5), sends(1, 0, 6)), step(sends(2, 3, 7), sends(3, 2, 8))]
    seen = traffic_record(layout, steps, ranks_per_node=2)
    assert seen.sent_bytes["payload"] == (
        (0, 5, 0, 0), (6, 0, 0, 0), (0, 0, 0, 7), (0, 0, 8, 0),
    )  # fmt: skip
    assert seen.payload_bytes_of_step == {"intra-node": (11, 15), "inter-node": (0, 0)}


@settings(derandomize=True, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda size: st.lists(
            st.lists(st.integers(0, 99), min_size=size, max_size=size),
            min_size=size,
            max_size=size,
        )
    ),
    st.integers(1, 7),
)
def test_links_hold_every_byte_once(cells, ranks_per_node):
    matrix = np.array(cells)
    intra = sum(
        value
        for source, row in enumerate(cells)
        for to, value in enumerate(row)
        if source // ranks_per_node == to // ranks_per_node
    )
    of_link = by_link(matrix, ranks_per_node)
    assert of_link[Link.INTRA_NODE] == intra
    assert of_link.sum() == matrix.sum()


def test_fan_out():
    # Two layers. Rank 0: three tokens a layer; rank 1: one token in the first layer alone.
    records = [
        rank_record(
            0,
            tokens=[[4, 0], [0, 4]],
            world_size=4,
            by_ranks_reached=(0, 2, 3, 1),
            by_nodes_reached=(0, 4, 2),
            num_remote_copies=(5, 2),
        ),
        rank_record(
            1,
            tokens=[[2, 2], [2, 0]],
            world_size=4,
            by_ranks_reached=(0, 0, 1),
            by_nodes_reached=(0, 1),
        ),
    ]
    fan_out = traffic_record(FOUR, [step(*records)], ranks_per_node=2).fan_out
    assert fan_out.tokens_by_ranks_reached == (0, 2, 4, 1, 0)
    assert fan_out.tokens_by_nodes_reached == (0, 5, 2, 0, 0)
    assert fan_out.experts_per_token == 14 / 7
    assert fan_out.ranks_per_token == (2 * 1 + 4 * 2 + 1 * 3) / 7
    assert fan_out.nodes_per_token == (5 * 1 + 2 * 2) / 7
    assert (fan_out.num_remote_rank_copies, fan_out.num_remote_node_copies) == (5, 2)


def test_nothing_at_all():
    seen = traffic_record(Layout(), [step(rank_record(0))], ranks_per_node=1)
    assert seen.sent_bytes == dict.fromkeys(("payload", "metadata", "padding"), ((0,),))
    assert seen.fan_out is seen.receiver is seen.busiest is seen.expert is seen.layer is None
    assert seen.num_meetings == (0,)


def test_steps_without_records():
    for steps in ([], [step(rank_record(0)), step_record(0.0, 1.0, [0], [])]):
        with pytest.raises(ValueError, match=telling("without rank records")):
            traffic_record(Layout(), steps, ranks_per_node=1)


def test_hottest_receiver_counts_all_kinds():
    records = [
        sends(0, 1, 30),
        sends(1, 2, 20),
        sends(2, 1, 5, kind=Traffic.METADATA),
        sends(3, 1, 5, kind=Traffic.PADDING, stage=Stage.COMBINE),
    ]
    receiver = traffic_record(FOUR, [step(*records)], ranks_per_node=4).receiver
    assert (receiver.rank, receiver.amount, receiver.over_mean) == (1, 40, 40 / 15)


def test_hottest_expert_layer_and_rank():
    # Expert by share (layer 1: 6 of 8), not by count (layer 0: 9 of 20).
    records = [
        rank_record(0, tokens=[[5, 9, 0, 0], [1, 6, 0, 0]], world_size=2),
        rank_record(1, tokens=[[0, 0, 3, 3], [0, 0, 1, 0]], world_size=2),
    ]
    seen = traffic_record(TWO, [step(*records)], ranks_per_node=2)
    assert (seen.expert.layer, seen.expert.expert, seen.expert.share) == (1, 1, 0.75)
    assert (seen.layer.layer, seen.layer.max_over_mean) == (1, 6 / 2)
    assert (seen.busiest.rank, seen.busiest.amount) == (0, 21)
    assert seen.busiest.over_mean == 21 / 14


def test_a_rank_that_leaves_reporting_to_another_is_no_idle_rank():
    # ep=2 of expert tensor-parallel pairs: ranks 1 and 3 report nothing by construction.
    tokens = [[[6, 0]], [[0, 0]], [[0, 2]], [[0, 0]]]
    records = [rank_record(r, tokens=each, world_size=4) for r, each in enumerate(tokens)]
    busiest = traffic_record(Layout(dp=4, ep=2), [step(*records)], ranks_per_node=4).busiest
    assert (busiest.rank, busiest.amount, busiest.over_mean) == (0, 6, 6 / 4)


def blocked(rank, seconds, num_micro_batches=1, layers=2):
    return rank_record(
        rank,
        blocked=seconds,
        num_micro_batches=num_micro_batches,
        tokens=[[0, 0]] * layers,
        world_size=4,
    )


def test_last_arrivals_by_hand():
    steps = [
        step(
            blocked(0, {(0, 0, Stage.DISPATCH): 1.0, (0, 1, Stage.COMBINE): 3.0}),
            blocked(1, {(0, 0, Stage.DISPATCH): 4.0, (0, 1, Stage.COMBINE): 2.0}),
        ),
        # Other stages do not count; in layer 1 nobody waits longer than the other.
        step(
            blocked(0, {(0, 0, Stage.COLLECTIVES): 1.0, (0, 1, Stage.DISPATCH): 1.0}),
            blocked(1, {(0, 0, Stage.COMBINE): 0.5, (0, 1, Stage.DISPATCH): 1.0}),
        ),
    ]
    num_last, num_meetings = last_arrivals(TWO, steps)
    assert num_last.tolist() == [2, 1]
    assert num_meetings.tolist() == [3, 3]


def test_pipeline_stages_and_micro_batches_meet_by_themselves():
    layout = Layout(pp=2, dp=2, ep=2)
    records = [
        blocked(0, {(0, 0, Stage.DISPATCH): 1.0, (1, 0, Stage.DISPATCH): 1.0}, 2),
        blocked(1, {(0, 0, Stage.DISPATCH): 2.0, (1, 0, Stage.DISPATCH): 0.5}, 2),
        blocked(2, {(0, 1, Stage.DISPATCH): 9.0}, 2),
        blocked(3, {(0, 1, Stage.DISPATCH): 8.0}, 2),
    ]
    num_last, num_meetings = last_arrivals(layout, [step(*records)])
    assert num_last.tolist() == [1, 1, 0, 1]
    assert num_meetings.tolist() == [2, 2, 1, 1]


def test_the_section_of_a_phase(tmp_path):
    results = example.usual()
    path = write(results, tmp_path)
    prefill, decode = json.loads(path.read_text())["deployments"][2]["steps"]
    seen = decode["traffic"]
    # Two steps of 100 bytes of payload to each of 15 others; padding goes to rank 0.
    matrix = seen["sent_bytes"]["payload"]
    assert matrix == [[0 if to == rank else 200 for to in range(16)] for rank in range(16)]
    assert [row[0] for row in seen["sent_bytes"]["padding"]] == [0] + [10] * 15
    assert seen["payload_bytes_of_step"] == {
        "intra-node": [16 * 7 * 100] * 2,
        "inter-node": [16 * 8 * 100] * 2,
    }
    of_dispatch = {"payload": 2 * 16 * 8 * 100, "metadata": 2 * 16 * 8 * 8, "padding": 8 * 10}
    assert seen["by_stage"].keys() == {"dispatch"}
    assert seen["by_stage"]["dispatch"]["inter-node"] == of_dispatch
    assert seen["by_link"] == seen["by_stage"]["dispatch"]
    assert seen["fan_out"]["tokens_by_ranks_reached"] == [0, 32, 96, *[0] * 14]
    assert results.deployments[2].decode.traffic.fan_out.nodes_per_token == 1.25
    assert seen["expert"] == {"layer": 0, "expert": 0, "share": 1 / 16}
    assert seen["num_last_arrivals"] == [2, *[0] * 15]
    assert seen["num_meetings"] == [2] * 16
    assert len(prefill["traffic"]["payload_bytes_of_step"]["intra-node"]) == 1
    assert read(path) == results


def test_the_straggler_is_found_by_share():
    seen = example.usual().deployments[2].decode.traffic
    changed = replace(seen, num_last_arrivals=(5, 1, 3, 0), num_meetings=(10, 10, 4, 0))
    assert (changed.straggler, changed.last_share(2)) == (2, 0.75)
