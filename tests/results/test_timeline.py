"""Timelines of reports: one axis for all ranks, cut where there is too much."""

from dataclasses import replace

import numpy as np
import pytest

from example_timelines import COMPUTE, NETWORK, events
from expertlane.results import timeline as module
from expertlane.results.timeline import timeline_of, timelines_of
from expertlane.spec.names import Phase, Stage
from records import rank_record, step_record


def step(phase, start_s, ranks=(0, 1)):
    """Each rank computes for a second; rank r begins r/10 seconds late."""
    records = [
        replace(
            rank_record(rank),
            events=events([(COMPUTE, Stage.EXPERTS, 2, 0.0, 1.0)], start_s=start_s + rank / 10),
        )
        for rank in ranks
    ]
    return step_record(start_s, start_s + 2, [0, 1], records, phase=phase, num_tokens=2)


def test_all_ranks_are_on_one_axis_that_begins_with_the_first():
    found = timelines_of([step(Phase.DECODE, 100.0)])
    assert list(found) == [Phase.DECODE]
    of_step = found[Phase.DECODE]
    assert [rank.rank for rank in of_step.ranks] == [0, 1]
    assert [rank.begin_us for rank in of_step.ranks] == [(0.0,), (1e5,)]
    assert {rank.duration_us for rank in of_step.ranks} == {(1e6,)}
    assert {rank.layer for rank in of_step.ranks} == {(2,)}
    assert of_step.end_us == of_step.shown_us == 1.1e6
    assert (of_step.num_tokens, of_step.num_seqs, of_step.num_ranks) == (2, 2, 2)
    assert of_step.stages[of_step.ranks[0].stage[0]] == "experts"
    assert of_step.tracks[of_step.ranks[0].track[0]] == "compute"


def test_steps_of_one_phase_are_micro_batches_of_a_round():
    found = timelines_of([step(Phase.DECODE, 1.0), step(Phase.PREFILL, 5.0), step(Phase.DECODE, 3)])
    first, _ = found[Phase.DECODE].ranks
    assert first.begin_us == (0.0, 2e6)
    assert first.micro_batch == (0, 1)
    assert found[Phase.DECODE].num_tokens == 4
    assert found[Phase.PREFILL].end_us == 1.1e6


def test_steps_without_events_have_none():
    bare = step_record(0, 1, [0], [rank_record(0)])
    assert timelines_of([bare]) == {}
    assert timelines_of([]) == {}


def test_a_rank_without_events_beside_one_with_some():
    sent = events([(NETWORK, Stage.COMBINE, 0, 0.0, 1.0)])
    half = step_record(0, 1, [0], [rank_record(0), replace(rank_record(1), events=sent)])
    (rank,) = timelines_of([half])[Phase.DECODE].ranks
    assert rank.rank == 1


def test_many_ranks_are_thinned_evenly_and_the_last_stays():
    rows = [(COMPUTE, Stage.HEAD, -1, 0.0, 1.0)]
    found = timeline_of([(rank, 0, events(rows)) for rank in range(100)], num_tokens=1, num_seqs=1)
    ranks = [rank.rank for rank in found.ranks]
    assert len(ranks) == module.MOST_RANKS
    assert (ranks[0], ranks[-1], found.num_ranks) == (0, 99, 100)
    assert set(np.diff(ranks)) <= {3, 4}


@pytest.mark.parametrize("num_more", [0, 1])
def test_many_events_are_cut_at_a_moment_that_is_told(monkeypatch, num_more):
    monkeypatch.setattr(module, "MOST_EVENTS", 10)
    num = 10 + num_more
    rows = [(COMPUTE, Stage.HEAD, -1, float(at), at + 1.0) for at in range(num)]
    found = timeline_of([(0, 0, events(rows))], num_tokens=1, num_seqs=1)
    assert len(found.ranks[0].begin_us) == 10
    assert found.end_us == num * 1e6
    assert found.shown_us == 10e6
