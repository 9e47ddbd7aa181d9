"""Forks the ranks of a node from one process that has imported torch and never computes in it.

So all ranks share one copy of torch's pages, and the program that starts them needs no `__main__`
guard. The server reports every rank that ends to the launcher. It ends all ranks when the launcher
has ended, for whatever reason: it watches the connection to it and also its own parent, since a
process that the launcher has forked may hold the other end of a socket.
"""

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

import msgspec

from expertlane.comm.progress import ProgressBoard
from expertlane.engine.messages import (
    BeginEpoch,
    Channel,
    Decoder,
    Exit,
    Failure,
    FailureKind,
    Heartbeat,
    MessageKind,
    Nodes,
    encode,
)
from expertlane.engine.processes import end_with_parent, is_stopped, unterminated
from expertlane.engine.rendezvous import Meeting, Place
from expertlane.engine.run_files import memory_file, unnamed_file
from expertlane.engine.store_host import StoreHost
from expertlane.errors import TerminatedError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from expertlane.engine.worker import Handlers

_POLL_MS = 50
_PR_SET_PDEATHSIG = 1

Reconnect = Callable[[int, Sequence[int]], list[int]]


@dataclass(frozen=True)
class RankSettings:
    """What a rank gets at its start.

    Attributes:
        board_fd: of the file with the node's progress board.
        memory_fd: of the memory that the node's ranks share for their messages; None where the
            system has none.
        wake_fds: eventfds for ranks that share it, one for each that there may be.
        store_path: the rendezvous file of ranks that are all on this node.
        meeting: where ranks of several nodes meet; None where all are on this one.
        timeout_s: the bound on any wait for other ranks.
        epoch: that it is started in; what it inherits belongs to that.
    """

    rank: int
    world_size: int
    local_rank: int
    num_local_ranks: int
    board_fd: int
    memory_fd: int | None
    wake_fds: list[int]
    store_path: str
    meeting: Meeting | None
    timeout_s: float
    dtype: str | None
    epoch: int = 0


@dataclass(frozen=True)
class ServerSettings:
    """What the server needs to start the ranks of its node.

    Attributes:
        parent_pid: the server ends with this process; None where its parent does not matter.
        control_fd: socket to the launcher; its end of file ends everything.
        rank_fds: a socket to the launcher for each rank.
        store_fd: of the ranks' rendezvous file; None where it has a name.
        first_rank: settings of the node's first rank; the others' are like them.
        launcher: to be told to other nodes; None where there are none, and on the others.
    """

    parent_pid: int | None
    control_fd: int
    rank_fds: list[int]
    store_fd: int | None
    first_rank: RankSettings
    launcher: Place | None = None

    def descriptors(self) -> list[int]:
        """All file descriptors that the server inherits from the launcher."""
        first = self.first_rank
        own = [self.control_fd, *self.rank_fds, *first.wake_fds, first.board_fd]
        shared = first.memory_fd, self.store_fd
        return own + [descriptor for descriptor in shared if descriptor is not None]

    def is_parent_alive(self) -> bool:
        """Whether there is still someone to serve, as far as the parent tells."""
        return self.parent_pid is None or os.getppid() == self.parent_pid


def python_command(module: str, arguments: Sequence[str]) -> list[str]:
    """A command that runs `main` of a module in a Python of its own.

    It imports from where this process does. `-P` keeps the working directory off Python's path: a
    file in it named like a module would be run.
    """
    paths = [path for path in sys.path if isinstance(path, str)]
    code = f"import sys; sys.path[:] = {paths!a}; from {module} import main; main()"
    return [sys.executable, "-P", "-c", code, *arguments]


def _end_with_server(server_pid: int) -> None:
    """Have a rank end when the server does; the server's main thread has forked it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        end_with_parent(server_pid)
    if os.getppid() != server_pid:  # it has ended in between
        os.kill(os.getpid(), signal.SIGKILL)


def _become_rank(
    settings: RankSettings,
    channel_fd: int,
    others: Sequence[int],
    handlers: "Handlers",
    server_pid: int,
) -> NoReturn:
    """In a process that was just forked: be a rank.

    Args:
        others: descriptors that are not for this rank.
    """
    code = 1
    try:
        from expertlane.engine.worker import run_rank

        _end_with_server(server_pid)
        os.setpgid(0, 0)  # torchrun signals its process's group: it is for the server alone
        # Ctrl-C, systemd and Slurm tell all processes to end; the launcher needs this one to drain.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        for fd in others:
            os.close(fd)
        code = run_rank(Channel(socket.socket(fileno=channel_fd)), settings, handlers)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # no clean-up that belongs to the server


class _Server:
    """The process that the ranks are forked from.

    Args:
        handlers: what ranks do for each command.
        reconnect: gives channels to the launcher for ranks of an epoch; None where the launcher
            sends them.
    """

    def __init__(
        self, settings: ServerSettings, handlers: "Handlers", reconnect: Reconnect | None
    ) -> None:
        self._settings, self._handlers = settings, handlers
        self._first, self._store_fd = settings.first_rank, settings.store_fd
        self._control = Channel(socket.socket(fileno=settings.control_fd))
        self._reconnect = reconnect or self._receive_channels
        self._poll = select.poll()
        self._poll.register(settings.control_fd, select.POLLIN)
        self._board = ProgressBoard(self._first.world_size, self._first.board_fd)
        self._rank_of_pid: dict[int, int] = {}
        self._store_host: StoreHost | None = None

    def meet(self) -> "Store | None":
        """Let the nodes of the run meet, from its first one.

        Returns:
            The store.
        """
        settings = self._settings
        meeting, launcher = settings.first_rank.meeting, settings.launcher
        if meeting is None or launcher is None:
            return None

        def go_on() -> bool:
            return settings.is_parent_alive() and not self._poll.poll(0)

        assert settings.parent_pid is not None, "the launcher"
        end_watch = end_with_parent(settings.parent_pid)  # it may wait minutes for the store
        if not meeting.is_hosted:
            self._store_host = StoreHost(meeting)
        store = meeting.open()
        end_watch()
        if hashes := meeting.publish(store, launcher, go_on):
            self._control.send(encode(MessageKind.NODES, Nodes(hashes)))
        return store

    def fork_all(self) -> None:
        """Start all ranks."""
        gc.collect()
        gc.freeze()  # keeps the collector from touching, and so copying, the shared pages
        first = self._first.rank
        self._fork({first + place: fd for place, fd in enumerate(self._settings.rank_fds)})

    def _fork(self, channels: Mapping[int, int]) -> None:
        """Start ranks, each with a channel to the launcher, as a descriptor that is closed here."""
        own_pid = os.getpid()
        for rank, fd in channels.items():
            settings = replace(self._first, rank=rank, local_rank=rank - self._first.rank)
            pid = os.fork()
            if pid == 0:
                others = [each for each in channels.values() if each != fd]
                others.append(self._control.fileno())
                if self._first.epoch and self._store_fd is not None:
                    others.append(self._store_fd)  # ranks open that of an epoch by the board
                _become_rank(settings, fd, others, self._handlers, own_pid)
            self._rank_of_pid[pid] = rank
        for fd in channels.values():
            os.close(fd)

    def watch(self) -> bool:
        """Report ranks that end and answer the launcher, until it or the parent has ended.

        Returns:
            Whether the launcher has said so before.
        """
        signal.signal(signal.SIGTERM, _terminate)
        with contextlib.suppress(EOFError, OSError, TerminatedError):  # the launcher has ended
            try:
                return self._answer_launcher()
            except TerminatedError as error:
                # The launcher ends this node: at once, or when what runs has finished.
                failure = Failure(FailureKind.TERMINATED, str(error))
                self._control.send(encode(MessageKind.FAILURE, failure))
                return self._answer_launcher()
        return False

    def _answer_launcher(self) -> bool:
        """Until it has ended; gives whether it has said so."""
        while self._settings.is_parent_alive():
            if self._poll.poll(_POLL_MS):
                message = self._control.receive()
                if message.kind is MessageKind.END:
                    return True
                if message.kind is MessageKind.BEGIN_EPOCH:
                    self._begin_epoch(message.epoch, Decoder(BeginEpoch).decode(message))
                else:
                    self._control.send(encode(MessageKind.HEARTBEAT, self._heartbeat()))
            self._report_ended()
        return False

    def _begin_epoch(self, epoch: int, asked: BeginEpoch) -> None:
        """End ranks for certain, and start others in their places.

        Raises:
            EOFError, OSError: the launcher has ended, or there is no room; it is told so.
        """
        ranks, first = asked.ranks, self._first
        with unterminated():
            surplus = [r for r in self._rank_of_pid.values() if r >= first.rank + asked.num_ranks]
            self._fence([*ranks, *surplus])
            if asked.num_ranks != first.num_local_ranks:
                others = first.world_size - first.num_local_ranks
                self._first = replace(
                    first,
                    num_local_ranks=asked.num_ranks,
                    world_size=others + asked.num_ranks,
                )
            try:
                self._renew_files(epoch)
                for rank in ranks:
                    self._board.reporter(rank)  # writes "setting up"
                channels = self._reconnect(epoch, ranks)
                self._fork(dict(zip(ranks, channels, strict=True)))
            except OSError as error:
                text = f"{socket.gethostname()}: cannot replace ranks {ranks}: {error.strerror}"
                self._control.send(encode(MessageKind.FAILURE, Failure(FailureKind.USER, text)))
                raise
            self._control.send(encode(MessageKind.EPOCH_BEGUN, None, epoch))

    def _fence(self, ranks: Sequence[int]) -> None:
        """Kill ranks, and wait until they are dead."""
        pids = [pid for pid, rank in self._rank_of_pid.items() if rank in ranks]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # of a stopped process, too
        for pid in pids:
            os.waitpid(pid, 0)
            del self._rank_of_pid[pid]

    def _renew_files(self, epoch: int) -> None:
        """Other files for what ranks share in an epoch; no message of an older one is in them."""
        old = [fd for fd in (self._first.memory_fd, self._store_fd) if fd is not None]
        memory_fd = store_fd = -1
        self._first = replace(self._first, epoch=epoch)
        if self._first.memory_fd is not None:
            memory_fd = memory_file(self._first.num_local_ranks)
            self._first = replace(self._first, memory_fd=memory_fd)
        if self._store_fd is not None:
            store_fd = self._store_fd = unnamed_file()
        num_ranks = self._first.num_local_ranks
        self._board.begin_epoch(epoch, os.getpid(), memory_fd, store_fd, num_ranks)
        for fd in old:  # ranks look at the board before they trust what they have opened
            os.close(fd)

    def _receive_channels(self, epoch: int, ranks: Sequence[int]) -> list[int]:
        return self._control.receive_descriptors(len(ranks))

    def _heartbeat(self) -> Heartbeat:
        first = self._first.rank
        lines = [self._board.line(first + place) for place in range(self._first.num_local_ranks)]
        stopped = [rank for pid, rank in self._rank_of_pid.items() if is_stopped(pid)]
        return Heartbeat(lines, stopped)

    def _report_ended(self) -> None:
        while self._rank_of_pid:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if (rank := self._rank_of_pid.pop(pid, None)) is None:
                continue  # the host of the store: whoever needs it fails, and says so
            report = Exit(rank, os.waitstatus_to_exitcode(status), self._board.line(rank))
            self._control.send(encode(MessageKind.EXIT, report))

    def end_all(self) -> None:
        """Leave no rank, and no file."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already
        for pid in self._rank_of_pid:
            os.kill(pid, signal.SIGKILL)
        for pid in self._rank_of_pid:
            os.waitpid(pid, 0)
        if self._store_host is not None:
            self._store_host.end()
        if self._settings.store_fd is None:  # the launcher may have been killed
            with contextlib.suppress(OSError):
                os.unlink(self._settings.first_rank.store_path)


def _terminate(number: int, frame: object) -> NoReturn:
    raise TerminatedError(f"{socket.gethostname()} was told to end by SIGTERM")


def serve(
    settings: ServerSettings, handlers: "Handlers | None", reconnect: Reconnect | None = None
) -> bool:
    """Start the ranks of a node, watch them, replace some, and end them.

    Args:
        handlers: what ranks do for each command; None for the engine's own.
        reconnect: of an epoch, gives channels to the launcher for ranks that replace others; None
            where the launcher sends them.

    Returns:
        Whether all was well in the end.
    """
    if handlers is None:
        from expertlane.engine.stage import HANDLERS  # torch, and what ranks run, for all ranks

        handlers = HANDLERS
    server = _Server(settings, handlers, reconnect)
    try:
        store = server.meet()
    except BrokenPipeError:  # the launcher has ended
        return False
    try:
        server.fork_all()
        return server.watch()
    finally:
        server.end_all()
        del store


def main(handlers: "Handlers | None" = None) -> None:
    """Serve the launcher's own node. The command line holds `ServerSettings` as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    settings = msgspec.json.decode(sys.argv[1], type=ServerSettings)
    for fd in settings.descriptors():
        os.set_inheritable(fd, False)  # by programs that ranks start
    serve(settings, handlers)
