"""Forks the ranks of a node from one process that has imported torch and never computes with it.

So all ranks share one copy of torch's pages, and the program that starts them needs no `__main__`
guard. The server reports every rank that ends to the launcher. It ends all ranks when the launcher
has ended, for whatever reason: it watches the connection to it and also its own parent, since a
process that the launcher has forked may hold the other end of a socket.

It also starts the process that hosts the rendezvous store of several nodes' ranks.
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, NoReturn

import msgspec

from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.ranks.messages import (
    ChangeRanks,
    Channel,
    Decoder,
    Exit,
    Failure,
    FailureKind,
    Heartbeat,
    Message,
    MessageKind,
    Nodes,
    StartResult,
    encode,
)
from expertlane.engine.ranks.processes import (
    end_with_parent,
    import_numpy,
    is_stopped,
    unterminated,
)
from expertlane.engine.ranks.rank_settings import (
    RankSettings,
    ServerSettings,
    memory_file,
    unnamed_file,
)
from expertlane.errors import TerminatedError, no_room

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from expertlane.engine.stage.worker import Handlers
from expertlane.engine.ranks.rendezvous import Meeting

_IS_UP, _MOST_BYTES = b"up", 4096


class StoreHost:
    """A process that hosts the rendezvous store.

    It ends with this process and with those that this one forks afterwards.

    Raises:
        RuntimeError: the store cannot be hosted.
    """

    def __init__(self, meeting: Meeting) -> None:
        self._connection, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            _host(meeting, theirs)
        theirs.close()
        answer = self._connection.recv(_MOST_BYTES)
        if answer != _IS_UP:
            raise RuntimeError(answer.decode(errors="replace") or "the host of the store has ended")

    def end(self) -> None:
        """End the host; no process that was forked from here may still run."""
        self._connection.close()
        with contextlib.suppress(ChildProcessError):  # somebody has seen it end already
            os.waitpid(self._pid, 0)


def _host(meeting: Meeting, connection: socket.socket) -> NoReturn:
    """Host the store until the other end of the connection is closed."""
    try:
        os.setpgid(0, 0)  # torchrun signals its process's group: it is for the server alone
        os.closerange(3, connection.fileno())  # a launcher waits for the end of these connections
        os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        try:
            store = meeting.open(as_host=True)
            connection.sendall(_IS_UP)
        except RuntimeError as error:
            connection.sendall(str(error).splitlines()[0].encode()[:_MOST_BYTES])
        connection.recv(1)
        del store
    finally:
        os._exit(0)


_POLL_MS = 50
_PR_SET_PDEATHSIG = 1


class End(Enum):
    """The reason why a node's part in a run ended."""

    SAID = "said"  # the launcher was done and said so
    TERMINATED = "terminated"  # the node was told to end, as by torchrun or a batch system
    LOST = "lost"  # the launcher, or the connection to it


Reconnect = Callable[[int, Sequence[int]], list[int]]


def python_command(module: str, arguments: Sequence[str]) -> list[str]:
    """A command that runs `main` of a module in a new Python process, with this one's `sys.path`.

    `-P` keeps the working directory off that path: a file in it named like a module would be run.
    """
    paths = [path for path in sys.path if isinstance(path, str)]
    code = (
        f"import sys; sys.path[:] = {paths!a}; from {import_numpy.__module__} import import_numpy; "
        f"import_numpy(); from {module} import main; main()"
    )
    return [sys.executable, "-P", "-c", code, *arguments]


def _end_with_server(server_pid: int) -> None:
    """Have a rank end when the server does; the server's main thread has forked it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        end_with_parent(server_pid)
    if os.getppid() != server_pid:  # it has ended in between
        os.kill(os.getpid(), signal.SIGKILL)


def _show_as(name: str) -> None:
    """Name this process in `ps` and in the kernel's log, of which Linux keeps 15 letters."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


def _become_rank(
    settings: RankSettings,
    channel_fd: int,
    others: Collection[int],
    handlers: "Handlers",
    server_pid: int,
) -> NoReturn:
    """Run a rank in the process that was just forked, and exit.

    Args:
        others: descriptors that are not for this rank; they are closed.
    """
    code = 1
    try:
        from expertlane.engine.stage.worker import run_rank

        _end_with_server(server_pid)
        _show_as(f"expertlane r{settings.rank}")
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
        handlers: the function that ranks run for each command.
        reconnect: see `serve`.
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
        self._store: Store | None = None

    def meet(self) -> None:
        """Publish the launcher's place to the other nodes; does nothing elsewhere."""
        settings = self._settings
        meeting, launcher = settings.first_rank.meeting, settings.launcher
        if meeting is None or launcher is None:
            return
        assert settings.parent_pid is not None, "the launcher"
        end_watch = end_with_parent(settings.parent_pid)  # it may wait minutes for the store
        if not meeting.is_hosted:
            self._store_host = StoreHost(meeting)
        self._store = meeting.open()
        end_watch()
        meeting.publish(self._store, launcher)

    def fork_all(self) -> bool:
        """Start all ranks; gives whether there is room for them, and tells the launcher if not."""
        gc.collect()
        gc.freeze()  # keeps the collector from touching, and so copying, the shared pages
        first = self._first.rank
        try:
            self._fork({first + place: fd for place, fd in enumerate(self._settings.rank_fds)})
        except OSError as error:
            self._tell_no_room("cannot start the ranks", error)
            return False
        return True

    def _tell_no_room(self, what: str, error: OSError) -> None:
        text = f"{socket.gethostname()}: {what}: {no_room(error)}"
        with contextlib.suppress(OSError):  # the launcher has ended
            self._control.send(encode(MessageKind.FAILURE, Failure(FailureKind.USER, text)))

    def _fork(self, channels: Mapping[int, int], *, ahead: bool = False) -> None:
        """Start ranks, each with a channel to the launcher, as a descriptor that is closed here.

        Raises:
            OSError: there is no room for more processes; some may have started.
        """
        own_pid, first = os.getpid(), self._first
        try:
            for rank, fd in channels.items():
                settings = replace(first, rank=rank, local_rank=rank - first.rank, is_ahead=ahead)
                pid = os.fork()
                if pid == 0:
                    others = {*channels.values(), *self._not_for_ranks(ahead=ahead)} - {fd}
                    _become_rank(settings, fd, others, self._handlers, own_pid)
                self._rank_of_pid[pid] = rank
        finally:
            for fd in channels.values():
                os.close(fd)

    def _not_for_ranks(self, *, ahead: bool) -> Iterator[int]:
        """Descriptors that ranks close."""
        yield self._control.fileno()
        if self._store_fd is not None and (ahead or self._first.epoch):
            yield self._store_fd  # ranks open that of an epoch by the board
        if self._first.memory_fd is not None and ahead:
            yield self._first.memory_fd

    def watch(self) -> End:
        """Report ranks that end and answer the launcher, until it or the parent has ended."""
        signal.signal(signal.SIGTERM, _terminate)
        end = End.LOST
        with contextlib.suppress(EOFError, OSError, TerminatedError):  # the launcher has ended
            try:
                return self._answer_launcher()
            except TerminatedError as error:
                # The launcher ends this node: at once, or when what runs has finished.
                end = End.TERMINATED
                failure = Failure(FailureKind.TERMINATED, str(error))
                self._control.send(encode(MessageKind.FAILURE, failure))
                return self._answer_launcher()
        return end

    def _answer_launcher(self) -> End:
        """Handle messages and exits until the launcher or the parent has ended."""
        while self._settings.is_parent_alive():
            if self._poll.poll(_POLL_MS):
                message = self._control.receive()
                if message.kind is MessageKind.END:
                    return End.SAID
                if message.kind in (MessageKind.BEGIN_EPOCH, MessageKind.START_RANKS):
                    self._change(message)
                elif message.kind is MessageKind.READ_NODES:
                    self._control.send(encode(MessageKind.NODES, Nodes(self._hashes())))
                else:
                    self._control.send(encode(MessageKind.HEARTBEAT, self._heartbeat()))
            self._report_ended()
        return End.LOST

    def _hashes(self) -> list[bytes]:
        """Hashes of the other nodes' secrets; empty ones while the store cannot be reached."""
        meeting = self._first.meeting
        assert meeting is not None, "there are other nodes"
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                return meeting.hashes(self._store)
        return [b""] * (meeting.num_nodes - 1)

    def _change(self, message: Message) -> None:
        """End ranks for certain, and start others in their places.

        Raises:
            EOFError, OSError: the launcher has ended, or there is no room to begin an epoch; it is
                told so.
        """
        asked = Decoder(ChangeRanks).decode(message)
        with unterminated():
            self._fence([*asked.ends, *asked.starts])
            if message.kind is MessageKind.BEGIN_EPOCH:
                self._begin_epoch(message.epoch, asked)
            else:
                self._start_ahead(asked)

    def _begin_epoch(self, epoch: int, asked: ChangeRanks) -> None:
        first = self._first
        others = first.world_size - first.num_local_ranks
        world_size = others + asked.num_ranks
        self._first = replace(first, num_local_ranks=asked.num_ranks, world_size=world_size)
        channels = self._connect(asked)
        try:
            self._renew_files(epoch)
            self._fork(channels)
        except OSError as error:
            self._tell_no_room(f"cannot replace ranks {asked.starts}", error)
            raise
        self._control.send(encode(MessageKind.EPOCH_BEGUN, None, epoch))

    def _start_ahead(self, asked: ChangeRanks) -> None:
        """Start ranks for a later epoch, without effect on the others."""
        answer = StartResult([])
        try:
            self._fork(self._connect(asked), ahead=True)
        except OSError as error:
            missing = sorted({*asked.starts} - {*self._rank_of_pid.values()})
            answer = StartResult(missing, f"{socket.gethostname()}: {no_room(error)}")
        self._control.send(encode(MessageKind.RANKS_STARTED, answer))

    def _connect(self, asked: ChangeRanks) -> dict[int, int]:
        """Channels for new ranks."""
        for rank in asked.starts:
            self._board.reporter(rank)  # writes "setting up"
        return dict(zip(asked.starts, self._reconnect(asked.number, asked.starts), strict=True))

    def _fence(self, ranks: Sequence[int]) -> None:
        """Kill ranks, and wait until they are dead."""
        pids = [pid for pid, rank in self._rank_of_pid.items() if rank in ranks]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # of a stopped process, too
        for pid in pids:
            os.waitpid(pid, 0)
            del self._rank_of_pid[pid]

    def _renew_files(self, epoch: int) -> None:
        """Make new files for the epoch, so that none holds messages of an older one."""
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

    def _receive_channels(self, number: int, ranks: Sequence[int]) -> list[int]:
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
                continue  # the host of the store: processes that need it fail, and say so
            report = Exit(rank, os.waitstatus_to_exitcode(status), self._board.line(rank))
            self._control.send(encode(MessageKind.EXIT, report))

    def end_all(self) -> None:
        """End all ranks and close files and connections."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already
        for pid in self._rank_of_pid:
            os.kill(pid, signal.SIGKILL)
        for pid in self._rank_of_pid:
            os.waitpid(pid, 0)
        self._control.close()
        for fd in (self._first.memory_fd, self._store_fd):
            if fd is not None:
                os.close(fd)
        self._store = None
        if self._store_host is not None:
            self._store_host.end()
        if self._settings.store_fd is None:  # the launcher may have been killed
            with contextlib.suppress(OSError):
                os.unlink(self._settings.first_rank.store_path)


def _terminate(number: int, frame: object) -> NoReturn:
    raise TerminatedError(f"{socket.gethostname()} was told to end by SIGTERM")


def serve(
    settings: ServerSettings, handlers: "Handlers | None", reconnect: Reconnect | None = None
) -> End:
    """Start the ranks of a node, watch them, replace some, and end them.

    Args:
        handlers: the function that ranks run for each command; None for the engine's own.
        reconnect: called with the number of a change and the ranks that it starts; gives their
            channels to the launcher, as descriptors. None where the launcher sends them.
    """
    if handlers is None:
        from expertlane.engine.stage.worker import (
            HANDLERS,  # torch, and what ranks run, for all ranks
        )

        handlers = HANDLERS
    server = _Server(settings, handlers, reconnect)
    try:
        server.meet()
        return server.watch() if server.fork_all() else End.LOST
    finally:
        server.end_all()


def main(handlers: "Handlers | None" = None) -> None:
    """Serve the launcher's own node. The command line holds `ServerSettings` as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    settings = msgspec.json.decode(sys.argv[1], type=ServerSettings)
    for fd in settings.descriptors():
        os.set_inheritable(fd, False)  # by programs that ranks start
    serve(settings, handlers)
