"""A small comparison on real ranks, from the experiment to the results on disk."""

import hashlib
import os
import re
import time
from dataclasses import replace
from statistics import median

import psutil
import pytest

from cli.screen import telling, tells
from distributed.on_ranks import Echo
from distributed.running import deployment, run_deployment
from expertlane.balance.holding import placements_of
from expertlane.comparison.run import check_memory, measure_peak, run_comparison
from expertlane.comparison.turns import Repeats
from expertlane.comparison.virtual import VirtualSettings
from expertlane.cost.laws.profile import read_profile
from expertlane.cost.memory import PlacedModel, workload_limits
from expertlane.cost.step.operation import NumberTypes
from expertlane.engine.launch import LoadPlan
from expertlane.engine.ranks.commands import DescribeMachine
from expertlane.errors import CapacityError, UserError
from expertlane.progress import Progress
from expertlane.report import markdown
from expertlane.report.compared import run, scaling
from expertlane.report.sections import report_of
from expertlane.results.file import read, write
from expertlane.results.record import EXPERIMENT as EXPERIMENT_ROLE
from expertlane.results.record import SCALING
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Cluster, Experiment, read_experiment, shipped_experiments
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Phase, Stage, Track
from expertlane.spec.ranges import DEFAULT_REPEAT
from expertlane.spec.workload import Workload

ROTATING = {"num_micro_batches": 2, "micro_batch_schedule": "rotating"}
EXPERIMENT = Experiment(
    name="four ranks",
    model=PRESETS["paper-tiny"],
    workload=Workload(num_sequences=9, prompt_len=5, output_len=4, seed=1),
    deployments=(
        replace(deployment("tp=2,pp=2"), is_baseline=True),
        replace(deployment("tp=2,pp=2", **ROTATING), name="rotating", is_baseline=True),
        deployment("dp=4,ep=4"),
        replace(deployment("dp=4,ep=4", overlap=True), name="overlap"),
    ),
    scaling=(deployment("dp=1"), deployment("dp=2,ep=2")),
    cluster=Cluster(ranks_per_node=2),
    seed=3,
)
SCALING_EP = [1, 2, 4]
LINK_SCALE = 300.0


class CountingProgress:
    """Keeps every task with the parts it was told of."""

    def __init__(self):
        self.tasks = {}

    def task(self, description, total):
        self.description = description
        self.tasks[description] = [0, total]

    def advance(self, amount=1):
        self.tasks[self.description][0] += amount

    def done(self):
        num_parts, total = self.tasks[self.description]
        assert num_parts == total, self.description


@pytest.fixture(scope="module")
def compared(pools):
    """Results, progress and traces of the experiment."""
    progress, traces = CountingProgress(), {}
    command = "expertlane compare four.toml"
    results = run_comparison(
        EXPERIMENT,
        pools.pool(4),
        progress,
        command=command,
        virtual=VirtualSettings(read_profile("h100"), LINK_SCALE),
        on_trace=traces.__setitem__,
    )
    return results, progress, traces


@pytest.fixture
def results(compared):
    return compared[0]


@pytest.mark.full
def test_a_prefill_and_a_decode_step_of_each_deployment_are_traced(compared):
    traces = compared[2]
    names = [each.name for each in EXPERIMENT.deployments]
    assert set(traces) == {each for name in names for each in (name, f"{name} virtual")}
    for each in EXPERIMENT.deployments:
        steps, options = traces[each.name], each.options
        num_kept = options.num_micro_batches if options.micro_batch_schedule == "rotating" else 1
        assert [step.phase for step in steps] == [
            *[Phase.PREFILL] * num_kept,
            *[Phase.DECODE] * num_kept,
        ]
        for step in steps:
            assert len(step.records) == 4
            for record in step.records:
                events = record.events
                assert (events.end_s > events.begin_s).all()
                assert (events.begin_s[1:] >= events.end_s[:-1]).all()  # one thread
                seconds_s = (events.end_s - events.begin_s).sum()
                idle_s = record.wall_s[..., Stage.IDLE].sum()
                assert seconds_s == pytest.approx(record.wall_s.sum() - idle_s)
                is_wait = events.track == list(Track).index(Track.NETWORK)
                waited_s = (events.end_s - events.begin_s)[is_wait].sum()
                blocked_s = record.blocked_s.sum() - record.blocked_s[..., Stage.IDLE].sum()
                assert waited_s <= blocked_s * (1 + 1e-9)  # what is left, a core was waited for


def test_every_deployment_is_there_and_measured(results):
    own = results.select("measured", EXPERIMENT_ROLE)
    assert [each.name for each in own] == ["tp=2,pp=2", "rotating", "dp=4,ep=4", "overlap"]
    assert {each.source for each in results.deployments} == {"measured", "virtual"}
    assert [each.is_baseline for each in own] == [True, True, False, False]
    assert results.machine.num_ranks == 4
    assert results.machine.ranks_per_node == 2
    assert results.machine.dtype == "float32"


def test_virtual_time_is_of_the_same_work(results):
    for role in (EXPERIMENT_ROLE, SCALING):
        both = zip(results.select("measured", role), results.select("virtual", role), strict=True)
        for wall, virtual in both:
            assert (virtual.name, virtual.held) == (wall.name, wall.held)
            for own, other in zip(virtual.steps, wall.steps, strict=True):
                for of_work in ("num_tokens", "num_seqs", "num_steps", "flops", "weight_bytes"):
                    assert getattr(own, of_work) == getattr(other, of_work)
                assert own.num_collectives == other.num_collectives
                assert own.traffic.sent_bytes == other.traffic.sent_bytes
                assert own.wall_s.value > 0


def test_virtual_time_on_links_of_other_speeds(results):
    found = results.virtual_time
    assert (found.links, found.scale) == ("h100", LINK_SCALE)
    scales = [each.scale for each in found.speeds]
    assert scales == [LINK_SCALE * factor for factor in (0, 0.25, 0.5, 1, 2, 4)]
    own = results.select("virtual", EXPERIMENT_ROLE)
    by_deployment = list(zip(*(each.tps for each in found.speeds), strict=True))
    for record, tps in zip(own, by_deployment, strict=True):
        assert list(tps) == sorted(tps, reverse=True)  # slower links, never faster
        assert tps[3] == pytest.approx(record.decode.tps.value)
    hidden = {each.name: each.decode.hidden_share for each in own}
    assert hidden["dp=4,ep=4"] == pytest.approx(0, abs=0.2)  # but for what is packed meanwhile
    assert 0 <= hidden["overlap"] <= 1
    shown = markdown.render(report_of(results))
    assert "in decode, virtual time." in shown
    assert "in decode, wall time." in shown


def test_all_compute_the_same_tokens(results, pools):
    model, workload = EXPERIMENT.model, EXPERIMENT.workload
    alone = run_deployment(pools.pool(1), model, deployment("tp=1"), workload, seed=3).tokens
    digest = hashlib.sha256(alone.astype("<i8").tobytes()).hexdigest()
    assert {each.tokens_sha256 for each in results.deployments} == {digest}


def num_runs(results):
    """Of each deployment, by its name: more of those that are compared, two of the others."""
    compared = {name for pair in results.pairs for name in (pair.name, pair.other)}
    names = [each.name for each in EXPERIMENT.deployments]
    return {name: DEFAULT_REPEAT if name in compared else 2 for name in names}


def test_tokens_are_counted_once(results):
    own = results.select("measured", EXPERIMENT_ROLE)
    for each in own:
        num = num_runs(results)[each.name]
        assert each.prefill.num_tokens == num * 9 * 5
        assert each.decode.num_tokens == num * 9 * 3
        assert each.decode.num_rounds == num * 3
        assert len(each.decode.tps_of_runs) == num
        loads = each.num_tokens_per_expert
        assert [sum(layer) for layer in loads] == [9 * (5 + 3) * 2] * 4
        assert loads == own[0].num_tokens_per_expert


def test_the_same_are_compared_on_every_clock(results):
    virtual, wall = results.pairs_of("virtual"), results.pairs_of("measured")
    assert [(e.name, e.other) for e in virtual] == [(e.name, e.other) for e in wall]
    by_name = {each.name: each for each in results.select("virtual", EXPERIMENT_ROLE)}
    one, first = by_name[virtual[0].name], EXPERIMENT.deployments[0].name
    assert not one.is_baseline
    assert by_name[virtual[0].other].is_baseline
    assert virtual[-1].other == first  # which may be the best baseline too
    for pair in (*virtual, *wall):
        for alike in (one, by_name[pair.other]):
            assert len(alike.decode.tps_of_runs) == DEFAULT_REPEAT
            assert alike.decode.tps.low < alike.decode.tps.value < alike.decode.tps.high
        assert pair.num_runs == DEFAULT_REPEAT
        assert pair.ratio.low <= pair.ratio.value <= pair.ratio.high
        assert set(pair.causes_s) == set(one.decode.breakdown_s)


def test_a_ratio_in_virtual_time_is_that_of_the_table(results):
    by_name = {each.name: each.decode for each in results.select("virtual", EXPERIMENT_ROLE)}
    for pair in results.pairs_of("virtual"):
        one, other = by_name[pair.name], by_name[pair.other]
        assert pair.ratio.value == pytest.approx(one.tps.value / other.tps.value)
        assert pair.step_s == pytest.approx(one.round_s.value)
        difference = sum(each.value for each in pair.causes_s.values())
        assert difference == pytest.approx(pair.step_s - pair.other_step_s)


def test_numbers_agree_with_each_other(results):
    for each in results.deployments:
        for phase in (each.prefill, each.decode):
            tps = phase.num_tokens / phase.wall_s.value
            if each.source == "measured":
                tps = median(phase.tps_of_runs)
            assert phase.tps.value == pytest.approx(tps)
            assert phase.critical_path.total_s > 0
            assert 0 < phase.flops_utilisation < 1
            assert 0 < phase.token_s.median.value <= phase.token_s.p95.value


def test_causes_add_up_to_the_wall_time(results):
    for each in results.deployments:
        for result in (each.prefill, each.decode):
            causes = result.breakdown_s
            assert all(seconds >= -1e-9 for seconds in causes.values()), causes
            share = sum(causes.values()) * result.num_rounds / result.wall_s.value
            assert share == pytest.approx(1)


def test_what_ranks_hold_is_what_was_predicted(results):
    for each in results.deployments:
        layout = each.layout
        assert [rank.rank for rank in each.held] == list(range(layout.world_size))
        for rank in each.held:
            limits = workload_limits(EXPERIMENT.workload, EXPERIMENT.model, layout)
            placements = placements_of(EXPERIMENT.model, layout, each.options)
            types = NumberTypes.all_of("float32")
            placed = PlacedModel(EXPERIMENT.model, layout, types, placements)
            need = placed.rank_memory(limits, rank.rank)
            assert rank.weight_bytes == need.weight_bytes
            assert rank.kv_bytes == need.kv_bytes


def test_overlap_and_scaling_are_there(results):
    (pair,) = run(results, "measured").overlapped
    assert (pair.off.name, pair.on.name) == ("dp=4,ep=4", "overlap")
    sizes = scaling(results, "measured")
    assert [each.record.layout.ep for each in sizes] == SCALING_EP
    assert [each.record.num_ranks for each in sizes] == SCALING_EP


def test_results_are_read_back_as_written(results, tmp_path):
    assert read(write(results, tmp_path)) == results
    again = report_of(read(tmp_path / "results.json"))
    assert markdown.render(again) == markdown.render(report_of(results))


def test_each_size_runs_again_with_as_many_sequences_a_rank(results):
    sizes = scaling(results, "measured")
    assert [each.record.layout.ep for each in sizes] == SCALING_EP
    assert [each.step.num_seqs for each in sizes[:2]] == [3 * 9] * 2  # 3 decode steps, once
    num_of_own = num_runs(results)["dp=4,ep=4"] * 3 * 9
    assert [each.share.num_seqs for each in sizes] == [3 * 2, 3 * 4, num_of_own]  # 9 // 4 a rank
    assert sizes[2].share is sizes[2].step
    for each in sizes:
        assert each.share_tps_per_rank > 0
        assert each.critical_path_share_tps_per_rank > 0


def test_progress_is_told_of_every_deployment(compared):
    _, progress, _ = compared
    assert {each.name for each in EXPERIMENT.deployments + EXPERIMENT.scaling} < {*progress.tasks}
    assert all(num_parts == total for num_parts, total in progress.tasks.values())


@pytest.mark.full
def test_a_cache_that_does_not_hold_the_workload(results, pools, monkeypatch):
    fit = LoadPlan.fit
    smaller = lambda plan, *given: replace(fit(plan, *given), num_blocks=3)  # noqa: E731
    monkeypatch.setattr(LoadPlan, "fit", smaller)
    experiment = replace(EXPERIMENT, deployments=EXPERIMENT.deployments[:1], scaling=())
    in_waves = run_comparison(experiment, pools.pool(4), Progress(), command="")
    found = {each.name: each.value for each in in_waves.assumptions}
    assert found["KV cache"] == "tp=2,pp=2: 48 of 288 tokens"
    assert tells(found["context"], "cache")
    (each,) = in_waves.deployments
    assert each.tokens_sha256 == results.deployments[0].tokens_sha256
    assert each.decode.num_steps > results.deployments[0].decode.num_steps


@pytest.mark.full
def test_nothing_to_decode(pools):
    experiment = replace(
        EXPERIMENT,
        workload=Workload(1, prompt_len=1, output_len=1),
        deployments=EXPERIMENT.deployments[:3],
        scaling=(),
    )
    results = run_comparison(experiment, pools.pool(4), Progress(), command="")
    assert [each.decode for each in results.deployments] == [None] * 3
    num_tokens = [each.prefill.num_tokens for each in results.deployments]
    assert all(num in (2, DEFAULT_REPEAT) for num in num_tokens)
    assert {pair.phase for pair in results.pairs_of("measured")} == {Phase.PREFILL}
    assert len({each.tokens_sha256 for each in results.deployments}) == 1


def rank_memory_bytes():
    """Resident bytes of all processes below this one."""
    return sum(child.memory_info().rss for child in psutil.Process().children(recursive=True))


def test_the_paper_s_model_is_refused_before_anything_is_allocated(pools):
    pool = pools.pool(4)
    pool.call(Echo(1))
    before = rank_memory_bytes()
    paper = read_experiment(shipped_experiments()["paper"])
    with pytest.raises(CapacityError) as caught:
        check_memory(paper, pool)
    line = str(caught.value)
    assert tells(line, "TP 8 × PP 2 paper GB rank")
    assert re.search(r"[\d.]+ GB of memory", line)
    assert "\n" not in line
    assert rank_memory_bytes() - before < 50e6
    assert not pool.is_closed
    check_memory(EXPERIMENT, pool)  # this one fits


def test_options_that_ranks_cannot_have_are_refused_by_the_deployment_s_name(pools):
    narrow = Options(activations="float8")  # the preset has no matrices in float8
    deployments = (*EXPERIMENT.deployments, Deployment("narrow", Layout(tp=2), narrow))
    with pytest.raises(UserError, match=telling("narrow activations float8 none")):
        check_memory(replace(EXPERIMENT, deployments=deployments), pools.pool(4))


def test_the_peak_is_measured_quickly(pools):
    pool = pools.pool(4)
    seen = pool.call(DescribeMachine())
    began_s = time.monotonic()
    peak = measure_peak(pool, seen)
    assert time.monotonic() - began_s < 5
    assert 1e8 < peak.gemm_flops_per_s < 1e15
    assert 1e8 < peak.read_bytes_per_s < 1e14
    assert peak.num_units <= (os.cpu_count() or 1)


@pytest.mark.full
def test_computing_by_a_profiles_laws(pools):
    h100 = read_profile("h100")
    experiment = replace(
        EXPERIMENT,
        deployments=(*EXPERIMENT.deployments[1:], deployment("dp=2,ep=2", dispatch="auto")),
        scaling=(),
    )
    found = run_comparison(
        experiment, pools.pool(4), Progress(), command="", virtual=VirtualSettings(h100, None, h100)
    )
    assert found.virtual_time.scale == 1
    values = {each.name: each.value for each in found.assumptions if each.source == "virtual"}
    assert tells(values["compute"], "h100 float16")
    for each in found.select("virtual"):
        assert 0 < each.decode.round_s.value < 0.01  # here it takes longer


@pytest.mark.smoke(1)
@pytest.mark.parametrize(("repeats", "num_runs"), [(Repeats(1), 1), (Repeats(2, 1e-9), 2)])
def test_too_few_repetitions_have_no_interval(pools, repeats, num_runs):
    experiment = replace(EXPERIMENT, deployments=EXPERIMENT.deployments[1:3], scaling=())
    found = run_comparison(
        experiment,
        pools.pool(4),
        Progress(),
        command="",
        virtual=VirtualSettings(None),
        repeats=repeats,
    )
    for source in ("measured", "virtual"):
        (pair,) = found.pairs_of(source)
        assert (pair.num_runs, pair.ratio.low, pair.ratio.high) == (num_runs, None, None)
    said = report_of(found).answer.headline
    assert f"({num_runs} run" in said
    assert tells(said, "too few")


def test_it_repeats_until_steps_took_so_long(pools):
    experiment = replace(EXPERIMENT, deployments=EXPERIMENT.deployments[2:3], scaling=())
    found = run_comparison(
        experiment, pools.pool(4), Progress(), command="", repeats=Repeats(3, least_s=1.0)
    )
    (only,) = found.deployments
    assert found.pairs == ()
    assert len(only.decode.tps_of_runs) >= 3
    assert only.decode.wall_s.value + only.prefill.wall_s.value >= 1.0


def test_laws_of_computing_take_no_experts_that_move():
    moving = deployment("dp=4,ep=4", rebalance_steps=3)
    with pytest.raises(UserError, match=telling("dp=4,ep=4 experts --compute")):
        VirtualSettings(None, None, read_profile("h100")).check([moving])


@pytest.mark.full
def test_virtual_time_where_nothing_is_decoded(pools):
    workload = replace(EXPERIMENT.workload, output_len=1)
    experiment = replace(EXPERIMENT, workload=workload, scaling=())
    h100 = read_profile("h100")
    found = run_comparison(
        experiment, pools.pool(4), Progress(), command="", virtual=VirtualSettings(h100)
    )
    assert found.virtual_time.speeds == ()
    assert all(each.prefill.wall_s.value > 0 for each in found.select("virtual"))
    shown = markdown.render(report_of(found))
    assert "in prefill, virtual time." in shown
    assert "by the speed of links" not in shown
