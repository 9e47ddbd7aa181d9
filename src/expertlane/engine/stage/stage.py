"""The handlers of a rank's commands: build its stage of a deployment, and run step plans on it."""

from pathlib import Path

import torch

from expertlane.engine.comm.progress import NO_LAYER
from expertlane.engine.model.checkpoint import Checkpoint, Int8Cache, write_int8_cache
from expertlane.engine.ops.device import memory_of
from expertlane.engine.ranks.commands import (
    CacheInt8,
    Deploy,
    DescribeMachine,
    DiscardSteps,
    DropPrepared,
    FinishMoves,
    HeldBytes,
    LeaveCores,
    MeasureContention,
    MeasureLaunches,
    MeasureOperations,
    MeasureRates,
    MeasureStep,
    MeasureTransfers,
    Prepare,
    RankOutcome,
    ReadTotals,
    RecordGraphs,
    Redeploy,
    RunStep,
    SetDispatch,
    StartMoves,
    SumWeights,
    TimeOneMove,
)
from expertlane.engine.stage.deployed_stage import DeployedStage
from expertlane.engine.stage.measure.machine import describe_machine, measure_rates
from expertlane.engine.stage.measure.operations import (
    measure_contention,
    measure_launches,
    measure_operations,
    measure_transfers,
)
from expertlane.engine.stage.preparing import drop_prepared, prepare
from expertlane.engine.stage.rank_checks import sum_weights
from expertlane.engine.stage.weight_copies import Role, WeightCopies
from expertlane.engine.stage.worker import Handlers, RankContext
from expertlane.spec.deployment import DISPATCH_FORMS
from expertlane.spec.names import Origin, Stage


def measure_step(context: RankContext, command: MeasureStep) -> int:
    """Peak bytes of a step, beyond those allocated before; the most over all dispatch tables."""
    deployed, memory = context.deployed, memory_of(context.platform.device)
    memory.begin()
    with torch.inference_mode():
        for table in command.tables:
            deployed.set_dispatch(table)
            deployed.run_crowded(command.step)
    return memory.peak_bytes()


def deploy(context: RankContext, command: Deploy) -> HeldBytes:
    """Build this rank's stage, or keep it if only options changed."""
    spec = command.spec
    if context.deployed is not None:
        context.deployed.migration.finish_moves()  # transfers still use its buffers
    context.progress.enter(Stage.SETUP, NO_LAYER)
    _connect(context, command)
    held = HeldBytes(0, 0)
    if context.rank >= spec.layout.world_size:
        context.deployed = None
    else:
        if context.deployed is None or not context.deployed.is_as_at_first(spec):
            context.deployed = None  # frees the old weights before the new ones are drawn
            context.deployed = DeployedStage(context, spec)
        else:
            context.deployed.rejoin(())  # another epoch may have begun
        context.deployed.start(command)
        held = context.deployed.held
    context.progress.enter(Stage.IDLE, NO_LAYER)
    return held


def redeploy(context: RankContext, command: Redeploy) -> HeldBytes:
    """Join a new epoch, with the stage that this rank has, or one that it builds."""
    deploy, spec = command.deploy, command.deploy.spec
    members = spec.members
    context.progress.enter(Stage.SETUP, NO_LAYER)
    _connect(context, deploy)
    before: DeployedStage | None = context.deployed
    has_stage = False
    if before is not None and before.spec.members == members:
        before.rejoin(command.discard)
        has_stage = before.is_placed(spec.placements)
    rank = members.rank_of(context.rank)
    role = Role.SENDS if has_stage else Role.RECEIVES
    if not has_stage and (before is not None or context.preparation is not None):
        role = Role.MAKES
    copies = None if rank is None else WeightCopies(context, spec, rank, role)
    if before is not None and has_stage:
        if copies is not None:
            copies.send(before.stage)
        context.progress.enter(Stage.IDLE, NO_LAYER)
        return before.held
    left, context.deployed = None, None
    if before is not None:
        left = before.leave(spec.arrangement, command.discard)
        context.parked, before = left.weights, None
    held = HeldBytes(0, 0)
    if copies is not None:
        given = {Origin.COPIED: copies.receive()}  # no wait for other ranks from here on
        if context.preparation is not None:
            given = {Origin.AHEAD: (context.preparation.take(), 0.0), **given}
        if context.parked is not None:
            given = {Origin.KEPT: (context.parked, 0.0), **given}
        context.preparation = context.parked = None
        # Weights that are no longer needed are freed before more are read.
        deployed = context.deployed = DeployedStage(context, spec, given)
        deployed.start(deploy, left)
        if command.dispatch_table is not None:
            deployed.set_dispatch(command.dispatch_table)
        held = deployed.held
    context.progress.enter(Stage.IDLE, NO_LAYER)
    return held


def _connect(context: RankContext, deploy: Deploy) -> None:
    """Make the groups of a deployment; collective over all ranks."""
    spec = deploy.spec
    forms = deploy.options.forms(spec.layout, spec.ranks_per_node)
    by_node = any(DISPATCH_FORMS[form].by_node for form in forms)
    context.meshes.make(spec.layout, spec.ranks_per_node if by_node else 0, spec.members)


def cache_int8(context: RankContext, command: CacheInt8) -> bool:
    """Write the file of int8 matrices if it is missing or out of date; gives whether it was."""
    context.progress.enter(Stage.SETUP, NO_LAYER)
    checkpoint = Checkpoint(Path(command.checkpoint), command.model)
    is_missing = Int8Cache.find(checkpoint) is None
    if is_missing:
        write_int8_cache(checkpoint, context.progress.touch)
    context.progress.enter(Stage.IDLE, NO_LAYER)
    return is_missing


def record_graphs(context: RankContext, command: RecordGraphs) -> int:
    """Record decode steps of a size as graphs; gives the number of new graphs."""
    deployed: DeployedStage = context.deployed
    with torch.inference_mode():
        num_graphs = deployed.record_graphs(command.size, command.forms)
    context.progress.enter(Stage.IDLE, NO_LAYER)
    return num_graphs


def run_step(context: RankContext, command: RunStep) -> RankOutcome:
    """Execute one step plan on this rank's stage."""
    deployed: DeployedStage = context.deployed
    with torch.inference_mode():
        return deployed.run(
            command.step, command.placements, balances_copies=command.balances_copies
        )


HANDLERS: Handlers = {
    DescribeMachine: describe_machine,
    CacheInt8: cache_int8,
    Deploy: deploy,
    Redeploy: redeploy,
    Prepare: prepare,
    DropPrepared: drop_prepared,
    LeaveCores: lambda context, _: context.cores.leave(),
    SetDispatch: lambda context, command: context.deployed.set_dispatch(command.table),
    RecordGraphs: record_graphs,
    RunStep: run_step,
    DiscardSteps: lambda context, command: context.deployed.discard(command.steps),
    ReadTotals: lambda context, _: context.deployed.totals(),
    SumWeights: lambda context, _: sum_weights(context.deployed.stage),
    StartMoves: lambda context, command: context.deployed.migration.start_moves(command.parts),
    FinishMoves: lambda context, _: context.deployed.migration.finish_moves(),
    TimeOneMove: lambda context, _: context.deployed.migration.time_one_move(),
    MeasureRates: measure_rates,
    MeasureOperations: measure_operations,
    MeasureLaunches: measure_launches,
    MeasureTransfers: measure_transfers,
    MeasureContention: measure_contention,
    MeasureStep: measure_step,
}
