"""An experiment's deployments on a modelled cluster."""

from dataclasses import replace

import pytest

from expertlane.compare.local_memory import memory_shortage
from expertlane.compare.projection import ExperimentProjector, usual_number_type
from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.profile_file import ModelledCluster, parse_cluster
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import UniformRouting
from expertlane.errors import CapacityError
from expertlane.plan.project import Projector, StepSize
from expertlane.plan.request import Setting
from expertlane.progress import Silent
from expertlane.results.projection import Projection
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Experiment, read_experiment, shipped_experiments
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

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


def project(experiment: Experiment, cluster: str) -> Projection:
    return ExperimentProjector(experiment, parse_cluster(cluster), "float16", 1.0).run(Silent())


@pytest.fixture(scope="module")
def projection() -> Projection:
    return project(SMALL, "h100x4")


def test_every_deployment_stands_under_every_condition(projection):
    assert projection.top_ks == (2,)
    assert projection.conditions == (
        (2, "graph", "balanced"),
        (2, "graph", "skewed"),
        (2, "eager", "balanced"),
        (2, "eager", "skewed"),
    )
    for conditions in projection.conditions:
        assert [row.name for row in projection.rows(conditions)] == ["tensor", "expert", "auto"]
    assert projection.contexts == (1, 128, 200)
    assert projection.context == 200
    assert projection.num_sequences == 64
    assert str(projection.cluster) == "h100x4"


def test_a_row_is_what_the_projector_says(projection):
    setting = Setting(NumberTypes.all_of("float16"), Execution.GRAPH, UniformRouting(16, 2))
    cluster = parse_cluster("h100x4")
    projector = Projector(SMALL.model, EXPERT.layout, EXPERT.options, cluster, setting)
    row = projection.usual(2)[1]
    assert row.decode_of(128, 64) == projector.step(StepSize(64, 1, 128))
    assert row.prefill is not None
    assert row.prefill.num_tokens == 64 * 200  # all prompts, they are short
    assert row.prefill == projector.step(StepSize(64, 200, 0))


def test_routing_is_no_matter_without_expert_parallelism(projection):
    by_conditions = {
        (row.name, row.conditions): row.decode[0].step_s for row in projection.deployments
    }
    for execution in ("graph", "eager"):
        for name, is_same in (("tensor", True), ("expert", False)):
            balanced, skewed = (
                by_conditions[name, (2, execution, routing)] for routing in ("balanced", "skewed")
            )
            assert (balanced == skewed) is is_same


def test_auto_takes_the_fastest_of_each_size(projection):
    _, expert, auto = projection.usual(2)
    for given, chosen in zip(expert.decode, auto.decode, strict=True):
        assert chosen.step_s.value <= given.step_s.value


def test_scaling_goes_on_beyond_the_experiments_ranks(projection):
    assert [each.layout.ep_size for each in projection.scaling] == [1, 2, 4, 8, 16, 32, 64]
    assert [each.num_slots_per_rank for each in projection.scaling] == [16, 8, 4, 2, 1, 1, 1]
    assert all(each.same_work.num_tokens == 64 for each in projection.scaling)
    assert [each.same_share.num_tokens for each in projection.scaling][:3] == [16, 32, 64]


def test_the_planners_best_is_at_least_as_good_as_all(projection):
    (planned,) = projection.planned
    assert planned.decode is not None
    best = planned.decode.decode_of(projection.context, 64)
    assert best is not None
    for row in projection.usual(2):
        step = row.decode_of(projection.context, 64)
        assert step is not None
        assert best.tps.value >= step.tps.value
    served = {each.name: each.tps.value for each in planned.served}
    assert {"tensor", "expert"} < {*served}
    assert max(served.values()) <= 1.02 * planned.served[0].tps.value


def test_the_planner_gives_activations_as_much_room_as_the_memory_table():
    cluster = parse_cluster("h200x4")
    workload = Workload(num_sequences=1024, prompt_len=10_000, output_len=4)
    experiment = replace(SMALL, model=PRESETS["paper"], workload=workload, scaling=())
    found = ExperimentProjector(experiment, cluster, "float16", 1.0).run(Silent())
    at_once = {each.name: each.num_seqs for each in found.planned[0].served}
    resident = {each.name: each.memory.num_resident for each in found.usual(2)}
    shared = at_once.keys() & resident.keys()
    assert {"tensor", "expert"} <= shared
    for name in shared:
        assert at_once[name] == resident[name] < 1024


def test_a_cluster_too_large_to_plan_for_is_projected_without_the_planner():
    alone = replace(SMALL, deployments=(EXPERT,), scaling=())
    found = ExperimentProjector(alone, parse_cluster("h100x4000"), "float16", 1.0).run(Silent())
    assert found.planned == ()
    assert found.deployments


def test_no_step_is_faster_than_its_floor(projection):
    for row in projection.deployments:
        for step in row.decode:
            assert step.step_s.low <= step.step_s.value <= step.step_s.high
            assert step.step_s.value >= step.floor_s


def test_a_cluster_with_too_few_devices():
    with pytest.raises(CapacityError) as caught:
        ExperimentProjector(SMALL, parse_cluster("h100x3"), "float16", 1.0)
    assert str(caught.value) == (
        "deployment 'tensor' needs 4 devices but cluster h100x3 has 3; take h100x4 or more"
    )


def test_sequences_that_do_not_fit_are_projected_both_ways():
    model = PRESETS["paper"]
    workload = Workload(num_sequences=1024, prompt_len=10_000, output_len=4)
    experiment = replace(SMALL, model=model, workload=workload, deployments=(EXPERT,), scaling=())
    cluster = parse_cluster("h200x4")
    projector = ExperimentProjector(experiment, cluster, "float16", 1.0)
    row = projector._rows(Silent())[0]
    late = [step for step in row.decode if step.context == 10_000]
    assert [step.fits for step in late] == [False, True]
    assert late[0].num_tokens == 1024
    assert 0 < late[1].num_tokens < 1024
    assert row.memory.num_resident == pytest.approx(late[1].num_tokens, rel=0.01)


def test_types_are_the_engines_choice():
    h100 = parse_cluster("h100x2")
    assert usual_number_type(h100) == "float16"
    terms = h100.profile.terms | {"overhead_s": h100.profile.terms["launch_s"]}
    cpu = ModelledCluster(replace(h100.profile, terms=terms), 2)
    assert usual_number_type(cpu) == "float32"


def test_memory_is_known_before_ranks_are_started(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("expertlane.compare.local_memory._ACCELERATORS", ())
    monkeypatch.setattr("expertlane.ops.host.memory_bytes", lambda: (10**9, 2 * 10**9))
    paper = read_experiment(shipped_experiments()["paper"])
    line = memory_shortage(paper, None)
    assert line is not None
    assert line.startswith("deployment 'TP 8 × PP 2': paper as pp=2,tp=8 needs 15.2 GB on a rank")
    assert "of memory are free for it" in line
    assert memory_shortage(SMALL, None) is None
    monkeypatch.setenv("WORLD_SIZE", "16")  # torchrun's ranks may be elsewhere
    assert memory_shortage(paper, None) is None
