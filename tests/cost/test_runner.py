"""Step plans on the virtual clock: times, records, and the loop around them."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cost.projected import DRIVER_S, MODEL, PROFILE, TYPES, at_bound, make_runner, make_scheduler
from expertlane.cost.breakdown import BreakdownTable
from expertlane.cost.laws.profile import BOUNDS, LIKELY, Execution
from expertlane.cost.runner import MADE_UP_TOKEN, KnownWork, StepSharing
from expertlane.results.hardware import MachinePeak
from expertlane.results.metrics import latency, phase_record
from expertlane.results.timeline import trace_text
from expertlane.schedule.scheduler import drive, step_records
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase, Stage, Track

PEAK = MachinePeak(1e12, 1e9, 1, "GPU", "bfloat16")
ROTATING = Options(num_micro_batches=2, micro_batch_schedule="rotating")
DEPLOYMENTS = [
    ("tp=1", Options()),
    ("tp=2,pp=2", Options(num_micro_batches=2)),
    ("tp=2,pp=2", ROTATING),
    ("dp=4,ep=4", Options(overlap=True)),
    ("dp=8,ep=8", Options(dispatch="hierarchical")),
    ("replicas=2,dp=2,ep=2", Options()),
]


def project(layout, options, *, num_requests=8, flags=None, runner_flags=None, **sizes):
    """Runner and finished steps."""
    runner = make_runner(layout, options, **(runner_flags or {}))
    sizes = {"phases_apart": True, "prefix_caching": False} | sizes
    scheduler = make_scheduler(layout, options, num_requests=num_requests, flags=flags, **sizes)
    steps = list(drive(scheduler, runner))
    assert not scheduler.has_unfinished
    return runner, steps


@pytest.mark.parametrize(("layout", "options"), DEPLOYMENTS, ids=str)
def test_metrics_take_what_it_gives(layout, options):
    _, steps = project(layout, options)
    records = list(step_records(steps))
    of_phase = {phase: [record for record in records if record.phase is phase] for phase in Phase}
    layout = Layout.parse(layout)
    prefill, decode = (
        phase_record(layout, steps, PEAK, ranks_per_node=4) for steps in of_phase.values()
    )
    for phase in (prefill, decode):
        assert sum(phase.breakdown_s.values()) == pytest.approx(phase.round_s.value)
        assert phase.tps.value > 0
    assert decode.num_tokens == 8 * 2
    assert prefill.num_tokens == 8 * 5
    for record in records:
        assert len(record.records) == layout.replica_size
        for rank in record.records:
            assert rank.wall_s.shape[1:] == (MODEL.num_hidden_layers + 1, len(Stage))
            assert (rank.blocked_s <= rank.wall_s + 1e-15).all()
            assert rank.events is None


def test_records_are_what_the_clock_says():
    runner, steps = project("tp=2", Options(), num_requests=3)
    for _, outcome in steps:
        begin_s = outcome.submitted_s + DRIVER_S
        assert outcome.finished_s > begin_s
        for record in outcome.records:
            wall_s = record.wall_s.copy()
            wall_s[..., Stage.IDLE] = 0.0
            assert wall_s.sum() == pytest.approx(outcome.finished_s - begin_s)
        assert set(outcome.token_ids.values()) == {MADE_UP_TOKEN}
    assert runner.now_s[LIKELY] == steps[-1].outcome.finished_s
    # Drained, the next step is submitted when this one has finished.
    for before, after in pairwise(steps):
        assert after.outcome.submitted_s == before.outcome.finished_s


def test_rotating_steps_are_in_flight_together():
    _, steps = project("tp=2,pp=2", ROTATING)
    outcomes = [outcome for plan, outcome in steps if plan.phase is Phase.DECODE]
    assert len(outcomes) == 4  # two groups, two tokens each
    assert outcomes[1].submitted_s < outcomes[0].finished_s


@pytest.mark.parametrize(("layout", "options"), DEPLOYMENTS, ids=str)
def test_bounds(layout, options):
    runner, steps = project(layout, options)
    found = [latency(list(step_records(at_bound(runner, steps, b)))) for b in range(len(BOUNDS))]
    walls = [each.wall_s.value for each in found]
    assert walls == sorted(walls)
    assert walls[0] < walls[2]
    assert walls[LIKELY] == pytest.approx(latency(list(step_records(steps))).wall_s.value)


def test_records_only_where_asked_for():
    _, steps = project("tp=2", Options(), flags={"record": False})
    assert all(outcome.records == () for _, outcome in steps)


def test_events_where_asked_for():
    _, steps = project("tp=2,pp=2", Options(), flags={"record_events": True})
    for _, outcome in steps:
        tracks = set()
        for record in outcome.records:
            events = record.events
            assert (events.end_s > events.begin_s).all()
            assert len(events.flops) == len(events.num_bytes) == len(events.begin_s)
            is_compute = events.track == list(Track).index(Track.COMPUTE)
            assert events.flops[is_compute].sum() == record.flops.sum()
            assert set(events.layer.tolist()) <= {-1, *range(MODEL.num_hidden_layers)}
            tracks |= set(events.track.tolist())
        assert tracks == {0, 1}


def test_steps_may_share_their_work():
    apart, all_steps = project("tp=1", Options(), max_num_seqs=8)
    sharing, steps = project("tp=1", Options(), runner_flags={"sharing": StepSharing(64, 1)})
    assert apart.num_priced == len(all_steps) == len(steps)
    assert sharing.num_priced == len(steps) - 1  # both decode steps are one
    assert steps[-1].outcome.finished_s == pytest.approx(all_steps[-1].outcome.finished_s, rel=0.05)


def test_prompts_share_their_work_too():
    sharing, steps = project(
        "dp=2,ep=2",
        Options(),
        num_requests=12,
        max_num_seqs=2,
        runner_flags={"sharing": StepSharing(64, 2)},
    )
    assert sum(plan.phase is Phase.PREFILL for plan, _ in steps) == 3
    assert sharing.num_priced == 2  # prompts, and decodes


@pytest.mark.parametrize("num_seqs", [128, 192, 256])
def test_steps_with_many_sequences_share_with_about_as_many_alone(num_seqs):
    flags = {"max_num_seqs": 256, "num_blocks": 4096}
    few, many = (
        next(plan for plan, _ in project("tp=1", Options(), num_requests=num, **flags)[1][1:])
        for num in (64, num_seqs)
    )
    assert [plan.micro_batches[0][0].num_seqs for plan in (few, many)] == [64, num_seqs]
    sharing, made = StepSharing(64, 1), []
    for plan in (few, many):
        sharing.find(plan, lambda: made.append(1) or KnownWork(None, []))
    assert len(made) == 2


def test_steps_used_least_lately_are_forgotten():
    sharing = StepSharing(1, num_ranks=1 << 20)
    plans = [plan for plan, _ in project("tp=1", Options(), max_num_seqs=1, num_requests=70)[1]]
    assert len(plans) == 70 * 3
    made = []
    for plan in plans[:3] * 2:
        sharing.find(plan, lambda: made.append(1) or KnownWork(None, []))
    assert len(made) == 3
    for number in range(64):
        sharing.find(replace(plans[0], replica=number + 1), lambda: KnownWork(None, []))
    sharing.find(plans[0], lambda: made.append(1) or KnownWork(None, []))
    assert len(made) == 4


class Breakdowns:
    """Of the last spell of each phase, on the first replica."""

    def __init__(self):
        self.of_phase = {}
        self._phase = None

    def observe(self, step):
        if step.plan.replica:
            return
        phase = step.plan.phase
        if phase is not self._phase:
            self.of_phase[phase] = BreakdownTable(PROFILE.device, TYPES)
        self._phase = phase
        self.of_phase[phase].add(step.times)


class NoneAlike(StepSharing):
    """Every step has routing of its own."""

    def find(self, plan, make):
        return make()


@pytest.mark.smoke(4)
@pytest.mark.parametrize("execution", [Execution.GRAPH, Execution.EAGER])
@pytest.mark.parametrize(("layout", "options"), DEPLOYMENTS, ids=str)
def test_a_step_from_rest_goes_as_it_would_at_its_own_time(layout, options, execution):
    tables, tables_again = Breakdowns(), Breakdowns()
    flags = {"execution": execution, "observe": tables.observe}
    _, steps = project(layout, options, runner_flags=flags)
    flags |= {"sharing": NoneAlike(1, 1), "observe": tables_again.observe}
    _, again = project(layout, options, runner_flags=flags)
    for (_, one), (_, other) in zip(steps, again, strict=True):
        assert other.submitted_s == pytest.approx(one.submitted_s, rel=1e-12)
        assert other.finished_s == pytest.approx(one.finished_s, rel=1e-12)
        for mine, its in zip(one.records, other.records, strict=True):
            np.testing.assert_allclose(its.wall_s, mine.wall_s, atol=1e-15)
            np.testing.assert_allclose(its.blocked_s, mine.blocked_s, atol=1e-15)
    for phase in Phase:
        mine, its = tables.of_phase[phase].result(), tables_again.of_phase[phase].result()
        assert its.seconds == pytest.approx(mine.seconds)
        assert its.shares == pytest.approx(mine.shares, abs=1e-9)


def test_time_passes_until_a_moment():
    runner = make_runner()
    runner.wait_until(2.0)
    runner.wait_until(1.0)
    assert runner.now_s.tolist() == [2.0] * 3
    runner.wait_until(np.array([1.0, 3.0, 4.0]))
    assert runner.now_s.tolist() == [2.0, 3.0, 4.0]


def test_a_projected_trace_has_the_rows_of_a_measured_one():
    _, steps = project("dp=2,ep=2", Options(overlap=True), flags={"record_events": True})
    events = json.loads(trace_text(list(step_records(steps))))["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert rows == {"compute", "network", "copy", "descheduled"}
    for rank in range(2):
        for row in range(2):
            of_row = [
                (event["ts"], event["ts"] + event["dur"])
                for event in events
                if event["ph"] == "X" and (event["pid"], event["tid"]) == (rank, row)
            ]
            assert of_row
            for (_, end), (begin, _) in pairwise(sorted(of_row)):
                assert begin >= end - 2e-3  # rounded
