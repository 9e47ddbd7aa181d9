"""The supervisor of a node after the first: forks its ranks, and rejoins after a lost connection.

It connects to the launcher, which then has it start ranks. When that connection ends, for whatever
reason, it first ends its ranks, so they are dead when it connects again.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from expertlane.engine.ranks.fork_server import End, python_command, serve
from expertlane.engine.ranks.messages import Channel, Failure, FailureKind, MessageKind, encode
from expertlane.engine.ranks.processes import end_with_parent
from expertlane.engine.ranks.rank_settings import (
    RankSettings,
    RunFiles,
    ServerSettings,
    check_num_ranks,
)
from expertlane.engine.ranks.rendezvous import Claim, Meeting, Place, connect, new_secret
from expertlane.errors import RankError, UserError

if TYPE_CHECKING:
    from expertlane.engine.stage.worker import Handlers

_RETRY_S = 1.0
_TRY_S = 3.0  # per attempt to connect


@dataclass(frozen=True)
class SupervisorSettings:
    """The start settings of a supervisor.

    Attributes:
        num_ranks: ranks of its node.
        parent_pid: it ends with this process; None where its parent does not matter.
        rejoin_s: how long it tries to reach the launcher again; 0 to end with the connection.
    """

    node: int
    num_ranks: int
    meeting: Meeting
    parent_pid: int | None
    timeout_s: float
    dtype: str | None
    oversubscribe: bool
    rejoin_s: float = 0.0


def supervisor_command(
    settings: SupervisorSettings, module: str = "expertlane.engine.ranks.supervisor"
) -> list[str]:
    """The command that runs a supervisor.

    Args:
        module: its `main` is run: this module's, or one that calls it.
    """
    return python_command(module, [msgspec.json.encode(settings).decode()])


def main(handlers: "Handlers | None" = None) -> None:
    """Run a supervisor until the launcher is done. The command line holds `SupervisorSettings`.

    Args:
        handlers: the function that ranks run for each command; None for the engine's own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    settings = msgspec.json.decode(sys.argv[1], type=SupervisorSettings)
    supervisor = _Supervisor(settings, handlers or _engine_handlers())
    connection: socket.socket | None = supervisor.join()
    try:
        check_num_ranks(settings.num_ranks, oversubscribe=settings.oversubscribe)
        while connection is not None:
            end = supervisor.serve(connection)
            if end is not End.LOST:
                # torchrun waits long for the first node where this one ended well and that did not.
                sys.exit(0 if end is End.SAID else RankError.exit_code)
            connection = supervisor.rejoin()
    except UserError as error:
        if connection is not None:
            failure = Failure(FailureKind.USER, f"{socket.gethostname()}: {error}")
            Channel(connection).send(encode(MessageKind.FAILURE, failure))
        sys.exit(error.exit_code)
    sys.exit(RankError.exit_code)


def _engine_handlers() -> "Handlers":
    """The engine's handlers; imports torch and the code of ranks, before the node connects."""
    from expertlane.engine.stage.worker import HANDLERS

    return HANDLERS


class _Supervisor:
    """The supervisor of one node, while the launcher runs."""

    def __init__(self, settings: SupervisorSettings, handlers: "Handlers") -> None:
        self._settings, self._handlers = settings, handlers
        self._secret = new_secret()
        self._launcher = Place("", 0)

    def join(self) -> socket.socket:
        """Make the first connection to the launcher; exit if it cannot be reached."""
        settings, parent = self._settings, self._settings.parent_pid
        end_watch = end_with_parent(parent) if parent is not None else None  # it may wait minutes
        try:
            self._launcher, connection = settings.meeting.join(settings.node, self._secret)
        except (OSError, RuntimeError) as error:  # of torch's store, too
            why = str(error).splitlines()[0]
            self._say(f"error: node {settings.node} cannot reach the launcher: {why}")
            sys.exit(RankError.exit_code)
        if end_watch is not None:
            end_watch()  # no thread while ranks are forked
        return connection

    def rejoin(self) -> socket.socket | None:
        """Connect again after a loss; None if the launcher has ended, or after `rejoin_s`."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        settings, parent = self._settings, self._settings.parent_pid
        until_s = time.monotonic() + settings.rejoin_s
        if settings.rejoin_s:
            self._say(
                f"node {settings.node} lost the launcher and ended its ranks; it tries to join it "
                f"again for {settings.rejoin_s:g} s"
            )
        while time.monotonic() < until_s and (parent is None or os.getppid() == parent):
            try:
                claim = Claim(settings.node, 0, 0)
                return connect(self._launcher, claim, self._secret, _TRY_S)
            except ConnectionRefusedError:
                return None  # the connection was refused: the launcher has ended
            except OSError:
                time.sleep(_RETRY_S)
        return None

    def serve(self, connection: socket.socket) -> End:
        """Fork ranks for the launcher, and end them all when the connection ends."""
        settings = self._settings
        num_ranks = settings.num_ranks
        files = RunFiles(settings.meeting.num_nodes * num_ranks, num_ranks)
        try:
            meeting = settings.meeting.of_run(self._launcher.run)
            given = meeting, settings.timeout_s, settings.dtype
            first_rank = RankSettings.of_first(settings.node, num_ranks, files, *given)
            control, store_fd = connection.detach(), files.store_fd
            files.leave_to_server(is_this_process=True)
            server = ServerSettings(settings.parent_pid, control, [], store_fd, first_rank)
            return serve(server, self._handlers, self._connect_ranks)
        finally:
            files.close()

    def _connect_ranks(self, number: int, ranks: Sequence[int]) -> list[int]:
        settings = self._settings
        first = settings.node * settings.num_ranks
        claims = [Claim(settings.node, 1 + rank - first, number) for rank in ranks]
        made = [connect(self._launcher, claim, self._secret) for claim in claims]
        return [connection.detach() for connection in made]

    @staticmethod
    def _say(line: str) -> None:
        print(f"expertlane: {line}", file=sys.stderr, flush=True)
