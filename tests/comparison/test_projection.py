"""An experiment's deployments on a modelled cluster."""

from dataclasses import replace

import pytest

from cli.screen import telling
from expertlane.comparison.projection import ExperimentProjector, usual_number_type
from expertlane.comparison.virtual import VirtualSettings
from expertlane.cost.laws.profile import Execution, parse_cluster, read_profile
from expertlane.cost.projector import Projector, Setting, StepSize
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.operation import NumberTypes
from expertlane.errors import CapacityError, UserError
from expertlane.progress import Progress
from expertlane.results.record import BEST, EXPERIMENT, FASTEST, SCALING, DeploymentRecord
from expertlane.results.results import Results
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Experiment
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload

FLOAT16 = NumberTypes.all_of("float16")
TENSOR = Deployment("tensor", Layout(tp=2, pp=2), is_baseline=True)
EXPERT = Deployment("expert", Layout(dp=4, ep=4))
AUTO = Deployment("auto", Layout(dp=4, ep=4), Options(dispatch="auto", overlap="auto"))
SMALL = Experiment(
    name="small",
    model=PRESETS["paper-small"],
    workload=Workload(num_sequences=64, prompt_len=200, output_len=8),
    deployments=(TENSOR, EXPERT, AUTO),
    scaling=(Deployment("EP 2", Layout(dp=2, ep=2)), Deployment("EP 1", Layout())),
)


def project(experiment: Experiment, cluster: str) -> Results:
    return ExperimentProjector(experiment, parse_cluster(cluster), FLOAT16, 1.0).run(Progress(), "")


@pytest.fixture(scope="module")
def projection() -> Results:
    return project(SMALL, "h100x4")


def usual(found: Results) -> tuple[DeploymentRecord, ...]:
    """Under the conditions that are spoken of."""
    return found.select("projected", EXPERIMENT, found.conditions[0])


@pytest.mark.full
def test_every_deployment_stands_under_every_condition(projection):
    assert {each.top_k for each in projection.conditions} == {2}
    assert [(each.execution, each.routing) for each in projection.conditions] == [
        ("graph", "skewed"),
        ("graph", "balanced"),
        ("eager", "skewed"),
        ("eager", "balanced"),
    ]
    for conditions in projection.conditions:
        rows = projection.select("projected", EXPERIMENT, conditions)
        assert [row.name for row in rows] == ["tensor", "expert", "auto"]
        assert all(row.conditions.dtype == "float16" for row in rows)
    assert [step.context for step in rows[0].steps_of(Phase.DECODE)] == [1, 128, 200]
    assert projection.context == 200
    assert projection.question["experiment"]["workload"]["num_sequences"] == 64
    assert projection.cluster.name == "h100x4"


@pytest.mark.full
def test_a_row_is_what_the_projector_says(projection):
    routing = PowerLawRouting(16, 2, 1.0)
    setting = Setting(FLOAT16, Execution.GRAPH, routing)
    cluster = parse_cluster("h100x4")
    projector = Projector(SMALL.model, EXPERT.layout, EXPERT.options, cluster, setting)
    row = usual(projection)[1]
    assert row.decode_of(128, 64) == projector.step(StepSize(64, 1, 128))
    assert row.prefill is not None
    assert row.prefill.num_tokens == 64 * 200  # all prompts, they are short
    prefill = projector.step(StepSize(64, 200, 0, phase=Phase.PREFILL))
    assert replace(row.prefill, timeline=None) == prefill


@pytest.mark.full
def test_usual_conditions_are_seen_closer(projection):
    for row in projection.select("projected", EXPERIMENT):
        is_usual = row.conditions == projection.conditions[0]
        fewer = [step.num_seqs for step in row.steps_of(Phase.DECODE) if step.num_seqs < 64]
        assert fewer == ([1, 4, 16] if is_usual else [])
        kept = [(step.phase, step.context) for step in row.steps if step.timeline is not None]
        assert kept == ([(Phase.PREFILL, 0), (Phase.DECODE, 200)] if is_usual else [])


def test_routing_is_no_matter_without_expert_parallelism(projection):
    by_conditions = {
        (row.name, row.conditions.execution, row.conditions.routing): row.decode.wall_s
        for row in projection.select("projected", EXPERIMENT)
    }
    for execution in ("graph", "eager"):
        for name, is_same in (("tensor", True), ("expert", False)):
            balanced, skewed = (
                by_conditions[name, execution, routing] for routing in ("balanced", "skewed")
            )
            assert (balanced == skewed) is is_same


def test_experts_that_move_are_where_the_load_wants_them():
    """Under skewed routing, where copies are of hot experts."""
    seconds = {}
    for name, more in (("moving", {"rebalance_steps": 64}), ("in order", {})):
        options = Options(num_redundant_experts=4, **more)
        moving = Deployment(name, EXPERT.layout, options)
        experiment = replace(SMALL, deployments=(moving,), scaling=())
        projector = ExperimentProjector(experiment, parse_cluster("h100x4"), FLOAT16, 1.2)
        seconds[name] = projector._rows(Progress())[0].prefill.wall_s.value
    assert seconds["moving"] < seconds["in order"]


def test_auto_takes_the_fastest_of_each_size(projection):
    _, expert, auto = usual(projection)
    for given, chosen in zip(expert.steps, auto.steps, strict=True):
        assert chosen.round_s.value <= given.round_s.value


def test_scaling_goes_on_beyond_the_experiments_ranks(projection):
    scaling = projection.select("projected", SCALING)
    assert [each.layout.ep for each in scaling] == [1, 2, 4, 8, 16, 32, 64]
    assert [each.pools[0].num_slots_per_rank for each in scaling] == [16, 8, 4, 2, 1, 1, 1]
    assert all(each.steps[0].num_tokens == 64 for each in scaling)
    assert [each.steps[-1].num_tokens for each in scaling][:3] == [16, 32, 64]


def test_the_planners_best_is_at_least_as_good_as_all(projection):
    (plan,) = projection.plans
    assert plan.num_candidates > plan.num_too_large
    (fastest,) = projection.select("projected", FASTEST)
    best = fastest.decode_of(projection.context, 64)
    assert best is not None
    for row in usual(projection):
        step = row.decode_of(projection.context, 64)
        assert step is not None
        assert best.tps.value >= step.tps.value
    (first,) = projection.select("projected", BEST)
    own = {each.name: each for each in usual(projection) if each.serving}
    assert {"tensor", "expert"} <= {*own}
    most = max(each.serving[0].output_tps.value for each in own.values())
    assert most <= 1.02 * first.serving[0].output_tps.value


@pytest.mark.full
def test_the_planner_gives_activations_as_much_room_as_the_memory_table():
    cluster = parse_cluster("h200x4")
    workload = Workload(num_sequences=1024, prompt_len=10_000, output_len=4)
    experiment = replace(SMALL, model=PRESETS["paper"], workload=workload, scaling=())
    found = ExperimentProjector(experiment, cluster, FLOAT16, 1.0).run(Progress(), "")
    own = {each.name: each for each in usual(found) if each.serving}
    assert {"tensor", "expert"} <= own.keys()
    for each in own.values():
        assert each.serving[0].num_running == each.pools[0].num_resident < 1024


def test_a_cluster_too_large_to_plan_for_is_projected_without_the_planner():
    alone = replace(SMALL, deployments=(EXPERT,), scaling=())
    found = ExperimentProjector(alone, parse_cluster("h100x4000"), FLOAT16, 1.0).run(Progress(), "")
    assert found.plans == ()
    assert found.deployments


def test_no_step_is_faster_than_its_floor(projection):
    for row in projection.deployments:
        for step in row.steps:
            assert step.wall_s.low <= step.wall_s.value <= step.wall_s.high
            assert step.round_s.value >= step.floor_s


def test_int8_weights_are_not_projected():
    narrow = replace(SMALL.deployments[0], options=Options(weights="int8"))
    experiment = replace(SMALL, deployments=(narrow,), scaling=())
    text = telling(f"{narrow.name} int8 weights")
    with pytest.raises(UserError, match=text):
        ExperimentProjector(experiment, parse_cluster("h100x8"), FLOAT16, 1.0)
    with pytest.raises(UserError, match=text):
        VirtualSettings(None, compute=read_profile("h100")).check([narrow])


def test_a_cluster_with_too_few_devices():
    with pytest.raises(CapacityError, match=telling("tensor 4 h100x3 3 h100x4")):
        ExperimentProjector(SMALL, parse_cluster("h100x3"), FLOAT16, 1.0)


def test_sequences_that_do_not_fit_are_projected_both_ways():
    model = PRESETS["paper"]
    workload = Workload(num_sequences=1024, prompt_len=10_000, output_len=4)
    experiment = replace(SMALL, model=model, workload=workload, deployments=(EXPERT,), scaling=())
    cluster = parse_cluster("h200x4")
    projector = ExperimentProjector(experiment, cluster, FLOAT16, 1.0)
    row = projector._rows(Progress())[0]
    late = [step for step in row.steps if step.context == 10_000]
    assert [step.fits for step in late] == [False, True]
    assert late[0].num_tokens == 1024
    assert 0 < late[1].num_tokens < 1024
    assert row.pools[0].num_resident == pytest.approx(late[1].num_tokens, rel=0.01)


def test_types_are_the_engines_choice():
    h100 = parse_cluster("h100x2")
    assert usual_number_type(h100.profile) == "float16"
    terms = h100.profile.terms | {"overhead_s": h100.profile.terms["launch_s"]}
    cpu = replace(h100.profile, terms=terms)
    assert usual_number_type(cpu) == "float32"
