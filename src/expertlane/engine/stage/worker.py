"""A rank's main loop: take a command, run it, answer."""

import contextlib
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from multiprocessing.connection import wait
from operator import or_
from typing import Any

from expertlane.engine.comm.core_token import CoreToken
from expertlane.engine.comm.device import Event, await_event
from expertlane.engine.comm.epoch import Epoch
from expertlane.engine.comm.mesh import Meshes
from expertlane.engine.comm.progress import NO_LAYER, ProgressBoard, ProgressReporter
from expertlane.engine.comm.transport import EpochEndedError, PeerLostError
from expertlane.engine.ops.backend import Platform, choose_platform
from expertlane.engine.ops.cores import Share
from expertlane.engine.ranks.commands import Command
from expertlane.engine.ranks.connection import bound_s, connect
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
from expertlane.engine.ranks.rank_cores import Cores
from expertlane.engine.ranks.rank_settings import RankSettings
from expertlane.errors import UserError
from expertlane.spec.names import Stage

_FAILED_S = 10.0
_LINGER_S = 3.0  # a server takes less to end its ranks


@dataclass(eq=False)
class RankContext:
    """What lives in a rank between commands.

    Attributes:
        settings: as at its start, but for the numbers of ranks.
        cores: that it computes on.
        board: of this node.
        meshes: process groups of this epoch; made once, since making them is collective and slow.
        deployed: what `engine.stage` put here; None before.
        parked: weights of a rank that has no place in a smaller layout, until it has one again.
        preparation: what `engine.preparing` did; None where no other layout is prepared for.
        epoch: that the rank has joined; -1 before the first.
    """

    settings: RankSettings
    platform: Platform
    cores: Cores
    board: ProgressBoard
    progress: ProgressReporter
    meshes: Meshes
    deployed: Any = None
    parked: Any = None
    preparation: Any = None
    epoch: int = -1

    @property
    def share(self) -> Share:
        """Of the cores that the ranks of its node have."""
        return self.cores.share

    @property
    def is_pinned(self) -> bool:
        """Whether its threads stay on the hardware threads of its share."""
        return self.cores.is_pinned

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.settings.rank

    def join_epoch(self, epoch: int) -> None:
        """From now on talk to the ranks of an epoch, and not to those of an older one.

        Raises:
            EpochEndedError: a later one has begun.
        """
        if epoch != self.settings.epoch:
            self._count_ranks(self.board.files(epoch).num_ranks)
        connected = connect(self.settings, self.platform, self.share, self.board, epoch)
        self.drop_graphs()
        self.meshes.renew(connected)
        self.epoch = epoch
        self.progress.set_waiting(False)  # a command that was left may have said that it waits
        self.progress.enter(Stage.IDLE, NO_LAYER)

    def _count_ranks(self, num_local_ranks: int) -> None:
        """Share this node with so many; `connect` finds out if this was of an epoch that ended."""
        settings, is_same = self.settings, num_local_ranks == self.settings.num_local_ranks
        others = settings.world_size - settings.num_local_ranks
        self.settings = replace(
            settings, num_local_ranks=num_local_ranks, world_size=others + num_local_ranks
        )
        if self.platform.device.type == "cpu" and not (is_same and self.cores.are_taken):
            self.cores.take(settings.local_rank, num_local_ranks)

    def drop_graphs(self) -> None:
        """Before the epoch is left: nccl does not end a group that a graph refers to."""
        if self.deployed is not None:
            self.deployed.drop_graphs()

    def await_device(self, event: Event) -> None:
        """Wait for a GPU, which may wait for other ranks.

        Raises:
            EpochEndedError, PeerLostError: as `await_event`.
        """
        self.progress.set_waiting(True)
        await_event(event, Epoch(self.board, self.epoch), bound_s(self.settings))
        self.progress.set_waiting(False)

    def core_token(self) -> CoreToken | None:
        """The right to compute on a core of this node; None where ranks have GPUs."""
        settings = self.settings
        if self.platform.device.type != "cpu" or settings.board_fd is None:
            return None
        return CoreToken(settings.board_fd, settings.local_rank, self.share.num_cores)


# What a rank does for each command; the answer is of the command's own result type.
Handlers = Mapping[type[Command[Any]], Callable[[RankContext, Any], Any]]
Send = Callable[[MessageKind, object, int], None]


def _sender(channel: Channel) -> Send:
    """Sends messages to the launcher, from several threads too; its end is noticed elsewhere."""
    lock = threading.Lock()

    def send(kind: MessageKind, value: object, epoch: int) -> None:
        encoded = encode(kind, value, epoch)
        with lock, contextlib.suppress(OSError):
            channel.send(encoded)

    return send


def _end_with_launcher(channel: Channel) -> threading.Thread:
    """End this rank when its server does not although the launcher is gone, or has given it up.

    A server that is stopped is killed, and so are all its ranks then.

    Returns:
        What does it; it ends after the launcher.
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
    """Answer commands until the launcher goes away or one fails; returns the exit code."""
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
    # A rank that has ended looks like the cause to others, so leave it to the launcher.
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
    """Until the launcher is done, or gone. A command of an epoch that has ended is not answered."""
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
    """None when the launcher is done, or gone."""
    try:
        return channel.receive()
    except (EOFError, OSError):
        return None
