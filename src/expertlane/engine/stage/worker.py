"""A rank's main loop: it reads commands, and runs the function of each on its stage."""

import contextlib
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from multiprocessing.connection import wait
from operator import or_
from pathlib import Path
from typing import Any

import torch

from expertlane.engine.comm.mesh import Meshes
from expertlane.engine.comm.progress import NO_LAYER, ProgressBoard, ProgressReporter
from expertlane.engine.comm.rank_profile import RankProfile
from expertlane.engine.comm.transport import EpochEndedError, PeerLostError
from expertlane.engine.ops.backend import (
    choose_platform,
)
from expertlane.engine.ops.device import memory_of
from expertlane.engine.ranks.commands import (
    Command,
    Deploy,
    DescribeMachine,
    DropPreparation,
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
    StartProfile,
    StopProfile,
    SumWeights,
    TimeOneMove,
    WrittenTrace,
)
from expertlane.engine.ranks.messages import (
    ANY_EPOCH,
    Channel,
    Decoder,
    Failure,
    FailureKind,
    Message,
    MessageKind,
    Ready,
    encode,
)
from expertlane.engine.ranks.processes import is_stopped
from expertlane.engine.ranks.rank_settings import RankSettings
from expertlane.engine.stage.context import Cores, RankContext
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
from expertlane.errors import UserError
from expertlane.spec.deployment import DISPATCH_FORMS
from expertlane.spec.names import Origin, Stage

_FAILED_S = 10.0
_LINGER_S = 3.0  # a server takes less to end its ranks

# The function that a rank runs for each command; its result is of the command's result type.
Handlers = Mapping[type[Command[Any]], Callable[[RankContext, Any], Any]]
Send = Callable[[MessageKind, object, int], None]


def _sender(channel: Channel) -> Send:
    """A thread-safe function that sends messages to the launcher; ignores a closed connection."""
    lock = threading.Lock()

    def send(kind: MessageKind, value: object, epoch: int) -> None:
        encoded = encode(kind, value, epoch)
        with lock, contextlib.suppress(OSError):
            channel.send(encoded)

    return send


def _end_with_launcher(channel: Channel) -> threading.Thread:
    """Start a thread that ends this rank if the launcher is gone and the server does not end it.

    A server that is stopped is killed, which ends all its ranks.

    Returns:
        The thread; it ends after the connection to the launcher.
    """
    server_pid, poll = os.getppid(), select.poll()
    poll.register(channel.fileno(), getattr(select, "POLLRDHUP", select.POLLHUP))

    def watch() -> None:
        poll.poll()
        time.sleep(_LINGER_S)
        if os.getppid() == server_pid:
            os.kill(server_pid if is_stopped(server_pid) else os.getpid(), signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def run_rank(channel: Channel, settings: RankSettings, handlers: Handlers) -> int:
    """Answer commands until the launcher is gone or a command fails; gives the exit code."""
    if settings.meeting is None:
        return _answer(channel, settings, handlers)
    watch = _end_with_launcher(channel)
    code = _answer(channel, settings, handlers)
    watch.join()  # the server ends this process, or the watch does
    return code


def _answer(channel: Channel, settings: RankSettings, handlers: Handlers) -> int:
    send = _sender(channel)
    board = ProgressBoard(settings.world_size, settings.board_fd)
    progress = board.reporter(settings.rank)
    try:
        context = _context(settings, board, progress)
        if not settings.is_ahead:
            with contextlib.suppress(EpochEndedError):
                context.join_epoch(settings.epoch)
        send(MessageKind.READY, Ready(os.getpid()), settings.epoch)
        _run_commands(channel, send, context, handlers)
        context.drop_graphs()
        context.meshes.leave()
        return 0
    except UserError as error:
        failure = Failure(FailureKind.USER, str(error))
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        failure = Failure(FailureKind.BUG, line, traceback.format_exc())
    failure = replace(failure, line=board.line(settings.rank))
    send(MessageKind.FAILURE, failure, board.epoch)
    # A rank that ends looks like the cause to others, so let the launcher end it.
    wait([channel.fileno()], _FAILED_S)
    return 1


def _context(
    settings: RankSettings, board: ProgressBoard, progress: ProgressReporter
) -> RankContext:
    cores = Cores(settings.local_rank, max(settings.num_local_ranks, 1 + settings.local_rank))
    platform = choose_platform(
        settings.local_rank,
        settings.num_local_ranks,
        settings.dtype,
        shares_memory=settings.memory_fd is not None,
        several_nodes=settings.meeting is not None,
        touch=progress.touch,
    )
    if settings.is_ahead:
        cores.stay_small()
    elif platform.device.type == "cpu":
        cores.take(settings.local_rank, settings.num_local_ranks)
    return RankContext(settings, platform, cores, board, progress, Meshes())


def _run_commands(channel: Channel, send: Send, context: RankContext, handlers: Handlers) -> None:
    """Run commands until the launcher is gone; those of an epoch that has ended get no answer."""
    commands: Decoder[Command[Any]] = Decoder(reduce(or_, handlers))
    board, ended = context.board, -1  # epochs up to this one came to nothing here
    while (message := _next_message(channel)) is not None:
        epoch = message.epoch
        if epoch <= ended or epoch < board.epoch:
            continue
        command = commands.decode(message)
        if epoch == ANY_EPOCH:
            send(MessageKind.RESULT, handlers[type(command)](context, command), epoch)
            continue
        try:
            if epoch != context.epoch:
                context.join_epoch(epoch)
            result = handlers[type(command)](context, command)
        except EpochEndedError:
            ended = epoch
        except PeerLostError as error:  # another rank is the cause: this one may go on
            line = board.line(context.rank)
            send(MessageKind.FAILURE, Failure(FailureKind.PEER, str(error), line=line), epoch)
            ended = epoch
        else:
            send(MessageKind.RESULT, result, epoch)


def _next_message(channel: Channel) -> Message | None:
    """The next message; None when the launcher has ended."""
    try:
        return channel.receive()
    except (EOFError, OSError):
        return None


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

    def run() -> RankOutcome:
        return deployed.run(command.step, command.placements)

    with torch.inference_mode():
        if context.profile is None:
            return run()
        recorder = deployed.stage.mesh.recorder
        return context.profile.run_step(recorder, command.step, run)


def start_profile(context: RankContext, command: StartProfile) -> str:
    """Begin a trace of this rank's steps."""
    try:
        context.profile = RankProfile(on_gpu=context.platform.device.type == "cuda")
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def stop_profile(context: RankContext, command: StopProfile) -> WrittenTrace:
    """Write the trace of this rank's steps, by the name of its place in the layout."""
    profile, context.profile = context.profile, None
    if profile is None:
        return WrittenTrace(why_not="it was started after the profile began")
    deployed: DeployedStage = context.deployed
    at, layout = deployed.stage.mesh.at, deployed.spec.layout
    dp_rank, rank = at.replica * layout.dp + at.dp_rank, deployed.spec.members.rank_of(context.rank)
    name = f"dp{dp_rank}_pp{at.pp_rank}_tp{at.tp_rank}_rank{rank}.pt.trace.json.gz"
    try:
        profile.write(Path(command.folder, name))
    except OSError as error:
        return WrittenTrace(why_not=f"cannot write to {command.folder}: {error.strerror}")
    return WrittenTrace(name, profile.num_steps)


HANDLERS: Handlers = {
    DescribeMachine: describe_machine,
    Deploy: deploy,
    Redeploy: redeploy,
    Prepare: prepare,
    DropPreparation: drop_prepared,
    LeaveCores: lambda context, _: context.cores.leave(),
    SetDispatch: lambda context, command: context.deployed.set_dispatch(command.table),
    RecordGraphs: record_graphs,
    RunStep: run_step,
    StartProfile: start_profile,
    StopProfile: stop_profile,
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
