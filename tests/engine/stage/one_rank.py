"""A deployed stage that is alone, in this process, with our Triton kernels; and what drives it."""

from types import SimpleNamespace

from engine.ops.cuda.tiny_models import USERS
from expertlane.balance.holding import placements_of
from expertlane.engine.comm.mesh import Meshes
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.model_runner import outcome_of
from expertlane.engine.ops.backend import Platform
from expertlane.engine.ops.cuda.backend import CudaBackend
from expertlane.engine.ranks.commands import Deploy, StageSpec
from expertlane.engine.stage.deployed_stage import DeployedStage
from expertlane.spec.deployment import GraphLimits, Options
from expertlane.spec.layout import Layout


class KernelsWithGraphs(CudaBackend):
    """Our kernels, and a double of graphs; None for without."""

    def __init__(self, graphs) -> None:
        self._graphs = graphs

    def graphs(self):
        return self._graphs


def passed(event) -> None:
    """Wait until the device has come there."""
    event.synchronize()


def stage_of(
    model, limits, graphs, monkeypatch, device, dtype, options=None, until=passed
) -> DeployedStage:
    """Of the only rank of a layout, ready for steps."""
    compute_with(KernelsWithGraphs(graphs), monkeypatch)
    board = ProgressBoard(1)
    stage = stage_on(
        *(board, 0, Meshes(), Layout(), model, limits, options or Options(), device, dtype),
        until=until,
    )
    stage.board = board
    return stage


def compute_with(ops, monkeypatch):
    """Have everything computed by a backend."""
    for user in USERS:
        monkeypatch.setattr(user, "backend_for", lambda device: ops)


def stage_on(
    board,
    rank,
    meshes,
    layout,
    model,
    limits,
    options,
    device,
    dtype,
    *,
    transport="none",
    until=passed,
) -> DeployedStage:
    """Of one rank of a layout, ready for steps."""
    context = SimpleNamespace(
        rank=rank,
        platform=Platform(device, transport, dtype, "double", "double"),
        progress=board.reporter(rank),
        meshes=meshes,
        core_token=lambda: None,
        await_device=until,
    )
    placements = placements_of(model, layout, options)
    spec = StageSpec(model, layout, placements, 0, layout.world_size)
    stage = DeployedStage(context, spec)
    graphs = GraphLimits(limits.max_num_seqs, limits.max_model_len)
    stage.start(Deploy(spec, options, limits.num_blocks, limits.block_size, graphs))
    return stage


class OneRank:
    """Runs every step at once."""

    def __init__(self, stage: DeployedStage) -> None:
        self.stage = stage
        self.num_decodes = 0

    def submit(self, plan):
        (step,) = plan.of_dp_ranks()
        self.num_decodes += all(
            (batch.own.num_scheduled_tokens == 1).all() for batch in step.micro_batches
        )
        return self.stage.run(step)

    def first_done(self, handles):
        return handles[0]

    def collect(self, handle):
        return outcome_of([handle], 0.0, 0.0)
