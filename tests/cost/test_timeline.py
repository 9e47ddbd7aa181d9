"""What the ranks do when, against times worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling
from cost.made_up import compute, halves, log, one_stage, part, run, seconds, send, terms
from expertlane.cost.laws.profile import (
    LIKELY,
    OF_TRANSFERS,
    Device,
    Execution,
    Profile,
    Term,
    Terms,
)
from expertlane.cost.laws.times import Basis
from expertlane.cost.pricing import StageWork
from expertlane.cost.step.operation import OUTSIDE
from expertlane.cost.timeline import Timeline, stage_seconds
from expertlane.errors import UserError
from expertlane.results.metrics import stage_time
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Stage
from records import rank_record, step_record


def ends(times):
    return times.end_s.tolist()


def test_one_part_is_in_sequence():
    work = one_stage(part(compute(2.0, 2.0), send(3.0, 3.0), compute(1.0, 1.0), send(1.0, 1.0)))
    times = run(work, 2, plan_s=10.0)
    assert log(times) == [
        "compute experts 0a 10-12",
        "network dispatch 0a 12-15",
        "compute experts 0a 15-16",
        "network dispatch 0a 16-17",
    ]
    assert ends(times) == [17.0] * 3
    assert times.idle_s[0].tolist() == [[10.0, 10.0]] * 3


def test_a_group_waits_for_its_last_member_and_its_longest_transfer():
    work = one_stage(part(compute(1.0, 4.0, 2.0), send(2.0, 1.0, 5.0, group=[0, 0, 1])))
    times = run(work, 3)
    assert log(times, 0) == ["compute experts 0a 0-1", "network dispatch 0a 4-6"]
    assert log(times, 2) == ["compute experts 0a 0-2", "network dispatch 0a 2-7"]
    (of_stage,) = stage_seconds(times, 1, count_idle=False)
    assert of_stage.blocked_s[:, 0, 0, Stage.DISPATCH].tolist() == [5.0, 2.0, 5.0]
    assert of_stage.wall_s[:, 0, 0, Stage.EXPERTS].tolist() == [1.0, 4.0, 2.0]


def test_overlap_hides_a_short_transfer():
    half = part(compute(4.0), send(3.0), compute(4.0))
    times = run(one_stage(half, half), 1)
    assert log(times) == [
        "compute experts 0a 0-4",
        "compute experts 0b 4-8",
        "network dispatch 0a 4-7",
        "compute experts 0a 8-12",
        "network dispatch 0b 8-11",
        "compute experts 0b 12-16",
    ]
    assert ends(times) == [16.0, 16.0, 4 * 4 + 2 * 3.0]  # at worst nothing is hidden


def test_overlap_hides_nothing_where_a_transfer_takes_the_whole_device():
    half = part(compute(4.0), send(3.0, contention=1.0), compute(4.0))
    assert ends(run(one_stage(half, half), 1)) == [16.0, 22.0, 22.0]


def test_overlap_hides_part_of_a_long_transfer():
    half = part(compute(4.0), send(6.0), compute(4.0))
    times = run(one_stage(half, half), 1)
    assert log(times) == [
        "compute experts 0a 0-4",
        "compute experts 0b 4-8",
        "network dispatch 0a 4-10",
        "compute experts 0a 10-14",
        "network dispatch 0b 10-16",  # posted at 8, behind the other half's
        "compute experts 0b 16-20",
    ]
    (of_stage,) = stage_seconds(times, 1, count_idle=False)
    assert of_stage.blocked_s[0, 0, 0, Stage.DISPATCH] == 2.0 + 2.0
    # Without overlap: the whole of the work, then the whole of the transfers.
    assert ends(times) == [20.0, 20.0, 4 * 4 + 2 * 6.0]


def test_contention_slows_what_computes_beside_a_transfer():
    a = part(compute(4.0), send(6.0, contention=0.25), compute(1.0))
    b = part(compute(3.0), send(1e-9), compute(0.0))
    times = run(one_stage(a, b), 1)
    # b's 3 s take 4 s at three quarters of the pace; then a waits for 2 more.
    assert log(times)[:4] == [
        "compute experts 0a 0-4",
        "compute experts 0b 4-8",
        "network dispatch 0a 4-10",
        "compute experts 0a 10-11",
    ]
    longer = part(compute(6.0), send(1e-9), compute(0.0))
    times = run(one_stage(a, longer), 1)
    # In the 6 s of the transfer 4.5 s of work get done, the other 1.5 s after it.
    assert "compute experts 0b 4-11.5" in log(times)


def test_steps_before_a_wait_run_beside_their_own_transfer():
    work = part(
        send(3.0, num_steps_before_wait=2, contention=0.5),
        compute(1.0),
        compute(0.25),
        compute(1.0),
    )
    assert log(run(one_stage(work), 1)) == [
        "compute experts 0a 0-2",
        "network dispatch 0a 0-3",
        "compute experts 0a 2-2.5",
        "compute experts 0a 3-4",
    ]


def test_a_network_takes_one_transfer_after_the_other():
    a = part(send(5.0), compute(1.0))
    b = part(compute(1.0), send(5.0), compute(1.0))
    assert [line for line in log(run(one_stage(a, b), 1)) if "network" in line] == [
        "network dispatch 0a 0-5",
        "network dispatch 0b 5-10",
    ]


def test_parts_without_tokens_are_left_out():
    half = part(compute(2.0), send(1.0))
    assert ends(run(one_stage(half, []), 1)) == ends(run(one_stage(half), 1)) == [3.0] * 3
    assert ends(run(one_stage(), 1, plan_s=4.0)) == [4.0] * 3
    no_token_here = part(compute(0.0, 2.0), send(0.0, 1.0))
    times = run(one_stage(no_token_here), 2)
    assert times.spans[0][0].end[LIKELY].tolist() == [3.0, 3.0]


def test_eager_launches_bound_small_kernels():
    work = one_stage(part(compute(1.0), compute(1.0, num_kernels=2), compute(10.0)))
    times = run(work, 1, terms(Execution.EAGER, 3.0))
    assert log(times) == [
        "compute experts 0a 3-4",
        "compute experts 0a 9-10",
        "compute experts 0a 12-22",
    ]
    (of_stage,) = stage_seconds(times, 1, count_idle=False)
    assert of_stage.wall_s.sum() == 22.0


def test_the_host_runs_ahead_of_the_device():
    work = one_stage(part(compute(10.0), compute(1.0), compute(1.0)))
    assert ends(run(work, 1, terms(Execution.EAGER, 3.0))) == [15.0] * 3


def test_a_host_that_needs_a_result_waits_for_it():
    work = one_stage(part(compute(10.0), send(1.0, syncs_host=True), compute(1.0)))
    assert ends(run(work, 1, terms(Execution.EAGER, 3.0))) == [3 + 10 + 1 + 3 + 1.0] * 3


def test_a_graph_is_one_launch():
    work = one_stage(part(compute(1.0), compute(1.0, num_kernels=2), compute(10.0)))
    assert ends(run(work, 1, terms(Execution.GRAPH, 3.0))) == [15.0] * 3


def test_on_a_cpu_every_operation_costs_its_overhead():
    work = one_stage(part(compute(1.0), send(2.0, num_kernels=2), compute(1.0)))
    flat = terms(Execution.SERIAL, 0.5)
    assert ends(run(work, 1, flat)) == [0.5 + 1 + 0.5 + 2 + 0.5 + 1] * 3
    of_places = {Stage.EXPERTS.label: np.full(3, 0.25), OF_TRANSFERS: np.full(3, 3.0)}
    by_place = replace(flat, in_series=of_places)
    assert ends(run(work, 1, by_place)) == [0.25 + 1 + 3 + 2 + 0.25 + 1] * 3


def test_what_a_transfer_adds_on_a_cpu_takes_nothing_from_what_computes_meanwhile():
    by_place = replace(terms(Execution.SERIAL, 0.0), in_series={OF_TRANSFERS: np.full(3, 3.0)})
    parts = [part(send(1.0, contention=1.0)), part(compute(10.0))]
    # In flight from 0 to 4; a quarter of the time, the transfer's own, is lost.
    assert ends(run([[StageWork(parts)]], 1, by_place))[LIKELY] == 11.0


def test_a_driver_takes_longer_with_every_rank():
    given = replace(Terms.free(), driver_s=np.full(3, 1.0), driver_per_rank_s=np.full(3, 0.5))
    assert given.step_s(Layout(tp=4)).tolist() == [2.5] * 3


STAGE_S = [[2.0, 3.0], [1.0, 4.0]]  # [stage][micro-batch]
HAND_OVER_S = 0.5


def pipeline(stage_s=STAGE_S):
    last = len(stage_s) - 1
    return [
        [
            StageWork(
                [part(compute(each, layer=stage))],
                None if stage == last else seconds([HAND_OVER_S]),
            )
            for each in of_stage
        ]
        for stage, of_stage in enumerate(stage_s)
    ]


def recurrence(free, begin, stage_s=STAGE_S):
    """finish[m, s] = max(finish[m - 1, s], arrival[m, s]) + t[m, s]; changes `free`."""
    for of_micro_batch in zip(*stage_s, strict=True):
        arrival = begin
        for stage, each in enumerate(of_micro_batch):
            free[stage] = max(free[stage], arrival, begin) + each
            arrival = free[stage] + HAND_OVER_S
    return free[-1]


def test_a_drained_pipeline():
    times = run(pipeline(), 1)
    assert log(times) == [
        "compute experts 0a 0-2",
        "compute experts 0a 2-5",
        "network PP send/recv -a 2-2.5",
        "compute experts 1a 2.5-3.5",
        "network PP send/recv -a 5-5.5",
        "compute experts 1a 5.5-9.5",
    ]
    first, second = stage_seconds(times, 2, count_idle=False)
    assert second.blocked_s[0, :, 2, Stage.HAND_OVER].tolist() == [2.5, 2.0]
    assert first.blocked_s.sum() == 0.0
    timeline, free, clock = Timeline(Terms.free(), 2, 1), [0.0, 0.0], 0.0
    for _ in range(3):
        finished = timeline.run(pipeline(), clock).end_s[LIKELY]
        assert finished == recurrence(free, clock)
        clock = finished  # the next begins when this one has ended


def test_a_rotating_pipeline_runs_full():
    timeline, free = Timeline(Terms.free(), 2, 1), [0.0, 0.0]
    groups = [[[2.0], [1.0]], [[3.0], [4.0]]]  # a step of each group: [stage][its micro-batch]
    ready = [0.0, 0.0]
    for step in range(6):
        group = step % 2
        times = timeline.run(pipeline(groups[group]), ready[group])
        ready[group] = recurrence(free, ready[group], groups[group])
        assert times.end_s[LIKELY] == ready[group]


def test_metrics_see_what_was_put_in():
    steps = part(
        compute(1.0, 4.0),
        send(2.0, 2.0),
        compute(3.0, 3.0, stage=Stage.ATTENTION),
        send(1.0, 1.0, stage=Stage.COMBINE),
        compute(0.5, 0.5, stage=Stage.HEAD, layer=OUTSIDE),
    )
    times = run(one_stage(steps), 2)
    (of_stage,) = stage_seconds(times, 1, count_idle=False)
    records = []
    for rank in range(2):
        made = rank_record(rank, world_size=2)
        records.append(
            replace(made, wall_s=of_stage.wall_s[rank], blocked_s=of_stage.blocked_s[rank])
        )
    wall_s = float(times.end_s[LIKELY])
    steps_seen = [step_record(0.0, wall_s, [0], records)]
    seen = stage_time(Layout(dp=2, ep=2), steps_seen)
    assert wall_s == 10.5
    assert seen.waiting_s.tolist() == [3.0, 0.0]
    assert seen.exposed_s == (5.0 + 2.0) / 2 + 1.0
    breakdown_s = {cause: s for cause, s in seen.breakdown_s(wall_s, 1).items() if s}
    assert breakdown_s == {
        Cause.EXPERTS: 2.5,
        Cause.WAITING: 1.5,
        Cause.DISPATCH_COMBINE: 3.0,
        Cause.ATTENTION: 3.0,
        Cause.HEAD: 0.5,
    }


def test_idle_time_between_steps_counts_if_asked_for():
    timeline = Timeline(Terms.free(), 1, 2)
    work = one_stage(part(compute(1.0, 2.0)))
    timeline.run(work, 0.0)
    times = timeline.run(work, 5.0)
    for count_idle, expected in ((True, [4.0, 3.0]), (False, [0.0, 0.0])):
        (of_stage,) = stage_seconds(times, 1, count_idle=count_idle)
        assert of_stage.wall_s[:, 0, 1, Stage.IDLE].tolist() == expected
        assert of_stage.blocked_s[:, 0, 1, Stage.IDLE].tolist() == expected


@settings(max_examples=150, deadline=None)
@given(parts=halves(), execution=st.sampled_from(Execution), launch_s=st.floats(0.0, 2.0))
def test_bounds_and_conservation(parts, execution, launch_s):
    given_terms = Terms(execution, launch_s * np.array([0.5, 1.0, 2.0]), np.zeros(3))
    times = run(one_stage(*parts), 3, given_terms, plan_s=1.0)
    low, likely, high = times.spans[0][0].end
    assert (low <= likely * (1 + 1e-9)).all()
    assert (likely <= high * (1 + 1e-9)).all()
    (of_stage,) = stage_seconds(times, 1, count_idle=False)
    assert (of_stage.blocked_s <= of_stage.wall_s + 1e-9).all()
    # All of a rank's time is in its record.
    np.testing.assert_allclose(of_stage.wall_s.sum(axis=(1, 2, 3)), likely - 1.0, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(parts=halves())
def test_overlap_lies_between_the_larger_and_the_sum(parts):
    times = run(one_stage(*parts), 3)
    steps = [timed for blocks in parts for block in blocks for timed in block.steps]
    computing = [t.times.seconds for t in steps if t.step.stage is Stage.EXPERTS]
    sending = [t.times.seconds for t in steps if t.step.stage is Stage.DISPATCH]
    least = max(np.sum(each, axis=0).max() if each else 0.0 for each in (computing, sending))
    most = sum(each.max() for each in (*computing, *sending))
    assert least - 1e-9 <= times.end_s[LIKELY] <= most + 1e-9


def profile(**values):
    made = {name: Term(each, each / 2, each * 2, Basis.BOUND, "") for name, each in values.items()}
    return Profile("mine", Device("it", 1.0, 1.0, {}, ""), 8, {}, terms=made)


def test_terms_come_from_the_profile():
    gpu = profile(launch_s=1.0, graph_launch_s=2.0, driver_s=3.0)
    eager, graph = (Terms.of(gpu, each) for each in (Execution.EAGER, Execution.GRAPH))
    assert eager.launch_s.tolist() == [0.5, 1.0, 2.0]
    assert graph.launch_s.tolist() == [1.0, 2.0, 4.0]
    assert eager.driver_s.tolist() == [1.5, 3.0, 6.0]
    cpu = Terms.of(profile(overhead_s=1.0, driver_s=1.0), Execution.GRAPH)
    assert cpu.execution is Execution.SERIAL
    with pytest.raises(UserError, match=telling("mine driver_s overhead_s")):
        Terms.of(profile(overhead_s=1.0), Execution.EAGER)
