"""A GPU that is made up is calibrated: from points to laws, and to the steps that it takes.

Its operations take what the H100 profile says, its host launches and plans in times of its own.
"""

from dataclasses import replace

import numpy as np
import pytest

from expertlane.balance.holding import placements_of
from expertlane.calibrate import run as calibrate
from expertlane.calibrate import steps as of_steps
from expertlane.calibrate.run import GPU_GRID
from expertlane.calibrate.steps import phase_times
from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.profile import (
    DRIVER_S,
    GRAPH_LAUNCH_S,
    LAUNCH_S,
    OVERHEAD_S,
    Execution,
    ModelledCluster,
    Term,
    Terms,
    kernels_of,
    read_profile,
    write_profile,
)
from expertlane.cost.laws.times import Basis
from expertlane.cost.pricing import Pricing
from expertlane.cost.projector import Projector, Setting, StepSize
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.runner import CostRunner
from expertlane.cost.step.operation import NumberTypes, OpKind
from expertlane.cost.step.program import ProgramBuilder
from expertlane.cost.step.step_list import ENGINE_ON_GPUS, GPU_LIBRARIES
from expertlane.engine.ranks.commands import (
    DescribeMachine,
    MeasureLaunches,
    MeasureOperations,
    RankMachine,
)
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.names import Phase, Stage

DTYPE = "bfloat16"
LAUNCH, LEAST, GRAPH, DRIVER = 7e-6, 3e-6, 1.2e-5, 2.5e-4
GIB = 2**30


def made_up():
    """The profile that is the truth."""
    known = read_profile("h100")
    terms = {
        name: Term(value, value, value, Basis.MEASURED, "made up")
        for name, value in ((LAUNCH_S, LAUNCH), (GRAPH_LAUNCH_S, GRAPH), (DRIVER_S, DRIVER))
    }
    return replace(known, terms={**known.terms, **terms})


TRUTH = made_up()
TYPES = NumberTypes.all_of(DTYPE)


class MadeUpGpu:
    """Answers a calibration's commands as a pool of one rank would.

    Args:
        point_takes_s: to measure a point, on the calibration's clock.
    """

    def __init__(self, point_takes_s=0.01):
        self.now_s, self.point_takes_s = 0.0, point_takes_s
        self.num_measured = []
        self._device = DeviceModel(TRUTH)

    def call(self, command, ranks=None):
        if isinstance(command, DescribeMachine):
            return [
                RankMachine(
                    host="here",
                    num_cores=16,
                    cpus=[],
                    cpu_name="a CPU",
                    device="Made-up H100",
                    backend="nccl",
                    dtype=DTYPE,
                    kernels="torch and expertlane (triton 3.6.0)",
                    torch_version="2.11.0",
                    memory_bytes=80 * GIB,
                    free_bytes=78 * GIB,
                    ranks_per_node=1,
                    num_idle_gpus=0,
                    driver="580.1",
                )
            ]
        if isinstance(command, MeasureLaunches):
            return [(LEAST, GRAPH)]
        assert isinstance(command, MeasureOperations)
        self.num_measured.append(len(command.points))
        self.now_s += len(command.points) * self.point_takes_s
        return [[self._seconds(point) for point in command.points]]

    def _seconds(self, point):
        sizes = {name: np.array([float(size)]) for name, size in point.by_name.items()}
        return float(self._device.times(point.kind, point.dtype, sizes).seconds[0])


def made_up_steps(pool, num_ranks, step_seqs, step_layers):
    """What `measure_steps` would find on that GPU: stages are marked one after the other."""
    samples = []
    for deployment in of_steps.deployments_for(num_ranks):
        (model,) = of_steps._models(deployment, step_layers)
        for num_seqs in step_seqs:
            runner = cost_runner(model, deployment.layout, deployment.options, TRUTH)
            step_s = phase_times(of_steps._run(runner, deployment, num_seqs)).decode_s
            stage_s = np.zeros(len(Stage))
            stage_s[Stage.ATTENTION] = step_s - DRIVER
            samples.append(
                of_steps.StepSample(deployment, model.num_hidden_layers, num_seqs, step_s, stage_s)
            )
    return samples


def cost_runner(model, layout, options, profile, execution=Execution.EAGER):
    builder = ProgramBuilder(
        model,
        layout,
        placements_of(model, layout, options),
        types=TYPES,
        kernels=kernels_of(profile),
    )
    routing = PowerLawRouting(model.num_experts, model.num_experts_per_tok)
    return CostRunner(builder, routing, Pricing(profile, TYPES), Terms.of(profile, execution))


@pytest.fixture(scope="module")
def patched():
    """What a calibration would have of ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "measure_steps", made_up_steps)
        patch.setattr(calibrate, "describe_ranks", lambda pool: pool.call(DescribeMachine()))
        yield patch


def calibrated(patch, gpu, within_s=240.0):
    """All rounds, on the made-up clock."""
    patch.setattr(calibrate.time, "monotonic", lambda: gpu.now_s)
    calibration = calibrate.Calibration(gpu, 1, None, within_s)
    calibration.run()
    return calibration


@pytest.fixture(scope="module")
def profile(patched, tmp_path_factory):
    """As read from the file that a calibration wrote."""
    found = calibrated(patched, MadeUpGpu()).profile("made-up")
    path = tmp_path_factory.mktemp("profiles") / "made-up.toml"
    return read_profile(write_profile(found, path))


MODELS = {
    "grouped queries": ModelConfig(
        name="grouped queries",
        num_hidden_layers=6,
        hidden_size=3072,
        num_attention_heads=24,
        head_dim=128,
        num_key_value_heads=6,
        num_experts=12,
        num_experts_per_tok=2,
        moe_intermediate_size=1536,
        gated_mlp=True,
        hidden_act="silu",
        vocab_size=32_000,
        max_position_embeddings=8192,
    ),
    "paper": PRESETS["paper"].with_overrides(num_experts=4),
}
STEPS = {
    "decode, batch 1": StepSize(1, 1, 900),
    "decode, batch 24": StepSize(24, 1, 700),
    "decode, batch 100": StepSize(100, 1, 2000),
    "prompts": StepSize(3, 700, 0, phase=Phase.PREFILL),
}


@pytest.mark.full
@pytest.mark.parametrize("execution", [Execution.EAGER, Execution.GRAPH])
def test_steps_by_a_measured_profile_are_those_of_the_gpu(profile, execution):
    errors = {}
    for name, model in MODELS.items():
        of_profile, of_truth = (
            Projector(
                model,
                Layout(),
                Options(overlap=False),
                ModelledCluster(each, 1),
                Setting(TYPES, execution, PowerLawRouting.of(model, 0.0)),
            )
            for each in (profile, TRUTH)
        )
        for step, size in STEPS.items():
            took_s, takes_s = (each.step(size).round_s.value for each in (of_profile, of_truth))
            errors[name, step] = took_s / takes_s - 1
    print({key: f"{each:+.1%}" for key, each in errors.items()})
    assert max(map(abs, errors.values())) <= 0.1, errors


@pytest.mark.full
def test_the_profile_says_what_it_is_of(profile):
    assert kernels_of(profile) is ENGINE_ON_GPUS
    assert kernels_of(read_profile("h100")) is GPU_LIBRARIES
    assert OVERHEAD_S not in profile.terms
    assert profile.terms[LAUNCH_S].value == pytest.approx(LAUNCH, rel=0.1)
    assert profile.terms[LAUNCH_S].low == pytest.approx(LEAST)
    assert profile.terms[DRIVER_S].value == pytest.approx(DRIVER, rel=0.01)
    assert profile.terms[GRAPH_LAUNCH_S].value == pytest.approx(GRAPH)
    origin = profile.device.origin
    for word in ("Made-up H100, driver 580.1", "torch 2.11.0", "triton 3.6.0", "1 rank at once"):
        assert word in origin
    assert profile.device.memory_bytes == 80 * GIB
    peak = TRUTH.device.flops_per_s[DTYPE]
    assert 0.65 * peak <= profile.device.flops_per_s[DTYPE] <= peak


@pytest.mark.full
def test_where_time_is_short_a_coarser_grid_of_all_kinds_is_measured(patched, profile):
    gpu = MadeUpGpu(point_takes_s=1.0)
    calibration = calibrated(patched, gpu, within_s=120.0)
    assert gpu.num_measured == [16] * 4  # 40 % of the time, then the end of what is under way
    assert len(calibration.measured.operations) == 1
    assert calibration.took_s == pytest.approx(64, abs=1)
    assert set(calibration.profile("coarse").surfaces) == set(profile.surfaces)


def test_a_later_round_measures_what_the_first_did(patched):
    calibration = calibrated(patched, MadeUpGpu(point_takes_s=0.5), within_s=120.0)
    assert [len(each) for each in calibration.measured.operations] == [112, 112]


def test_every_kind_has_its_ends_first():
    points = GPU_GRID.points(DTYPE)
    gemms = [each.sizes for each in points if (each.kind, each.dtype) == (OpKind.GEMM, DTYPE)]
    least, most = min(gemms), max(gemms)
    assert gemms[:2] == [most, least]
    assert len(set(points)) == len(points)
    assert len({(each.kind, each.dtype) for each in points[:8]}) == 8
