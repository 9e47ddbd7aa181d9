"""Decode steps as graphs give the tokens that steps without graphs give.

Without a GPU a double records operations and does them again (`ops.cuda.replayed`).
"""

from collections import deque
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from engine.ops.cuda.near import DEVICE, needs_kernels
from engine.ops.cuda.replayed import ReplayedGraphs
from engine.ops.cuda.tiny_models import MODELS
from engine.stage.one_rank import OneRank, passed, stage_of
from expertlane.engine.comm.transport import EpochEndedError
from expertlane.engine.model import decode_graphs
from expertlane.engine.model.decode_graphs import (
    NO_SEQS,
    DecodeGraphs,
    padded,
    places_in,
)
from expertlane.engine.ops.kv_cache import PagedBatch
from expertlane.schedule.plan import Batch
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler, DriveLoop
from expertlane.spec.deployment import GraphLimits, Options
from expertlane.spec.layout import Layout, partition
from expertlane.spec.sampling import SamplingParams

pytestmark = needs_kernels

PARAMS = (
    None,
    SamplingParams(temperature=0, repetition_penalty=1.8),
    SamplingParams(temperature=0.8, frequency_penalty=0.7, presence_penalty=-0.3),
    SamplingParams(top_k=5, top_p=0.9, logprobs=2),
)


def limits_of(model, num_blocks=5, max_num_seqs=3):
    return Limits(
        vocab_size=model.vocab_size,
        max_model_len=24,
        num_blocks=num_blocks,
        block_size=4,
        max_num_batched_tokens=16,
        max_num_seqs=max_num_seqs,
    )


def requests_of(model, num, max_tokens):
    rng = np.random.default_rng(0)
    return [
        Request(
            str(number),
            rng.integers(0, model.vocab_size, rng.integers(2, 5)),
            max_tokens=int(rng.integers(max_tokens // 2, max_tokens + 1)),
            sampling=PARAMS[rng.integers(len(PARAMS))],
            sampling_seed=number,
        )
        for number in range(num)
    ]


def play(
    model, graphs, monkeypatch, *, num=3, max_tokens=8, ahead=lambda stage: None, until=passed
):
    """Tokens of requests that come while others run, logits of each step, and preemptions.

    Args:
        ahead: called with the stage before them.
        until: waits for the device.
    """
    limits, options = limits_of(model), Options()
    given = model, limits, graphs, monkeypatch, DEVICE, torch.float32, options
    stage = stage_of(*given, until=until)
    ahead(stage)
    runner = OneRank(stage)
    requests = requests_of(model, num, max_tokens)
    logits = drive(runner, Layout(), options, limits, requests, arrivals(num))
    tokens = [request.output_token_ids for request in requests]
    return tokens, logits, sum(each.num_preemptions for each in requests), runner


def arrivals(num, rate=0.6):
    """[num]; the steps before which requests come, some of them together."""
    rng, step, found = np.random.default_rng(0), 0, []
    while len(found) < num:
        if rng.random() < rate:
            found.append(step)
        else:
            step += 1
    return found


def drive(runner, layout, options, limits, requests, comes_at):
    """Run requests, which come while others run; gives logits of each step."""
    scheduler = ContinuousScheduler(
        layout, options, limits, lookahead=layout.pp == 1, record=False, return_logits=True
    )
    loop, logits, step = DriveLoop(scheduler, runner), [], 0
    to_come = deque(zip(comes_at, requests, strict=True))
    while to_come or scheduler.has_unfinished:
        while to_come and to_come[0][0] <= step:
            scheduler.add(to_come.popleft()[1])
        loop.submit()
        if (finished := loop.commit_next()) is not None:
            logits.append(finished.outcome.logits)
        step += 1
    return logits


def difference(ours, theirs) -> float:
    """The largest of any logit, to the largest one."""
    worst = 0.0
    for of_step, of_other in zip(ours, theirs, strict=True):
        assert of_step.keys() == of_other.keys()
        for seq, each in of_step.items():
            worst = max(worst, np.abs(each - of_other[seq]).max() / np.abs(each).max())
    return worst


def test_numbers_of_sequences():
    def sizes_up_to(most):
        return GraphLimits(most, 1).sizes

    assert sizes_up_to(1) == (1,)
    assert sizes_up_to(6) == (1, 2, 4, 6)
    assert sizes_up_to(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert sizes_up_to(300)[-7:] == (192, 208, 224, 240, 256, 288, 300)
    for most in range(1, 1300):
        sizes = sizes_up_to(most)
        assert sizes[-1] == min(most, 1024)
        assert [*sizes] == sorted({*sizes})
        assert len(sizes) <= 43
        for smaller, size in pairwise(sizes):
            assert size - smaller <= max(8, size / 8)


def test_a_padded_batch():
    batch = Batch(
        seq_ids=np.array([7, 3]),
        num_scheduled_tokens=np.array([1, 1]),
        num_computed_tokens=np.array([5, 0]),
        token_ids=np.array([11, 12]),
        block_tables=np.array([[4, 2], [1, -1]], dtype=np.int32),
        yields_token=np.array([True, True]),
    )
    with_padding = padded(batch, places_in(4, 2), 4, scratch_block=9)
    assert with_padding.block_tables.tolist() == [[4, 2], [1, -1], [9, -1], [9, -1]]
    assert with_padding.num_computed_tokens.tolist() == [5, 0, 0, 0]
    assert with_padding.num_scheduled_tokens.tolist() == [1, 1, 1, 1]
    pages = PagedBatch(with_padding, 4, torch.device("cpu"))
    assert pages.slots.tolist() == [2 * 4 + 1, 1 * 4, 9 * 4, 9 * 4]
    assert pages.sequences.lengths.tolist() == [6, 1, 1, 1]
    in_parts = padded(batch, places_in(4, 2, num_parts=2), 4, scratch_block=9)
    assert in_parts.seq_ids.tolist() == [7, -1, 3, -1]
    assert in_parts.token_ids.tolist() == [11, 0, 12, 0]
    assert in_parts.num_computed_tokens.tolist() == [5, 0, 0, 0]
    assert in_parts.block_tables.tolist() == [[4, 2], [9, -1], [1, -1], [9, -1]]
    nothing = padded(batch.only(np.empty(0, dtype=np.intp)), places_in(1, 0), 1, scratch_block=9)
    assert (nothing.block_tables.tolist(), nothing.num_seqs) == ([[9, -1]], 1)
    nothing = padded(NO_SEQS, places_in(2, 0, 2), 2, scratch_block=9)
    assert nothing.block_tables.tolist() == [[9], [9]]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 6))
def test_sequences_stay_in_their_part(num, more, num_parts):
    size = num + more
    places = places_in(size, num, num_parts)
    own, rooms = partition(num, num_parts), partition(size, num_parts)
    for part, room in zip(own, rooms, strict=True):
        kept = places[part.start : part.stop].tolist()
        assert kept == [*range(room.start, room.start + len(part))]
        assert len(part) <= len(room)


@pytest.mark.parametrize(
    ("recorded", "kind", "expected"),
    [
        ([], "all_gather", [4, 2]),
        ([(4, 0), (2, 0)], "all_gather", [4, 2]),  # other ranks may have no layers yet
        ([(4, "static")], "all_gather", [2]),
        ([], 0, [4, 2]),
        ([(4, 0), (2, 0)], 1, [2]),
    ],
)
def test_all_ranks_record_the_same_whole_steps(recorded, kind, expected, monkeypatch):
    made = []

    class Part:
        def __init__(self, real, inputs, size, form):
            made.append(size)

        def fill(self):
            pass

    monkeypatch.setattr(decode_graphs, "PaddedBatch", Part)
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    graphs._sizes, graphs._launch = [1, 2, 4], dict.fromkeys(recorded)
    graphs._graphs = SimpleNamespace(capture=lambda run, until: run)
    graphs._inputs = graphs._await_device = None
    graphs._recorder = SimpleNamespace(meter=None)
    given = 2, "all_gather", kind, lambda padded: None
    assert graphs._prepare(*given)
    assert made == expected
    assert not graphs._prepare(*given)


QUICK = ("sinks, window, biases",)


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.full) for each in MODELS],
)
def test_graphs_on_and_off_are_equal(name, monkeypatch):
    """Batches grow, shrink, finish and are preempted; some sequences are sampled."""
    model, graphs = MODELS[name], ReplayedGraphs()
    expected, logits, num_preempted, _ = play(model, None, monkeypatch)
    found, others, again, runner = play(model, graphs, monkeypatch)
    assert found == expected
    assert num_preempted == again > 0
    assert difference(logits, others) <= 1e-5
    assert graphs.num_replayed == runner.num_decodes > 5
    assert 1 < graphs.num_recorded <= 3


SMALL = MODELS["normed heads, shared expert"].with_overrides(num_hidden_layers=1)
FEW = {"num": 2, "max_tokens": 4}


def record_all(stage, forms=("all_to_all",)):
    """All sizes; gives how many graphs each took."""
    return [stage.record_graphs(size, forms) for size in GraphLimits(3, 24).sizes[::-1]]


@pytest.mark.full
def test_an_epoch_that_ends_while_steps_are_recorded(monkeypatch):
    """What was not recorded to its end is recorded anew, and tokens are right."""
    graphs, waits = ReplayedGraphs(), []
    expected, *_ = play(SMALL, None, monkeypatch, **FEW)

    def end_epoch(event):
        waits.append(event)
        if len(waits) == 2:
            raise EpochEndedError("another epoch has begun")

    def ahead(stage):
        with pytest.raises(EpochEndedError):
            record_all(stage)
        assert graphs.num_recorded == 1
        stage.drop_graphs()
        assert record_all(stage) == [1, 1, 1]

    found, *_ = play(SMALL, graphs, monkeypatch, ahead=ahead, until=end_epoch, **FEW)
    assert found == expected
    assert len(waits) == 5
