"""A node as the launcher sees it: its connection, and requests that it has not answered."""

import contextlib
import socket
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from expertlane.engine.ranks.messages import Channel, MessageError, MessageKind, encode
from expertlane.engine.ranks.node_messages import ChangeRanks
from expertlane.errors import CapacityError, no_room

_PING = encode(MessageKind.PING, None)
_ANSWERS = {
    MessageKind.BEGIN_EPOCH: MessageKind.EPOCH_BEGUN,
    MessageKind.START_RANKS: MessageKind.RANKS_STARTED,
}


GONE = "is gone"


def gone(error: Exception) -> str:
    """Describe the loss of a node whose connection broke."""
    why = getattr(error, "strerror", None)
    return f"is gone ({why})" if why else GONE


@dataclass(frozen=True, eq=False)
class NodeChange:
    """Ranks that a node ends and starts.

    Attributes:
        kind: of the message that requests the change.
        fenced: channels of those that end, open until they are dead: a rank of another node that
            sees the end of one would end its server.
    """

    kind: MessageKind
    starts: Collection[int]
    fenced: list[Channel]


class Node:
    """A node of the run.

    Args:
        control: a channel to the fork server of its ranks.
        name: of that server, as messages show it.

    Attributes:
        asked_s: when it was pinged, if it has not answered yet.
        changes: requested and not confirmed yet, in order.
    """

    def __init__(self, control: Channel, name: str) -> None:
        self.control, self.name = control, name
        self.asked_s: float | None = None
        self.changes: deque[NodeChange] = deque()

    def ping(self, now_s: float) -> None:
        """Ping it, unless the last ping is not answered yet.

        Raises:
            OSError: its end is noticed elsewhere.
        """
        if self.asked_s is None and self.control.fileno() >= 0:
            self.asked_s = now_s
            self.control.send(_PING)

    def change(self, change: NodeChange, asked: ChangeRanks, epoch: int) -> None:
        """Request a change; the node makes changes in order.

        Raises:
            BlockingIOError, OSError: it does not read, or is gone.
        """
        self.changes.append(change)
        self.control.send(encode(change.kind, asked, epoch))

    def take_changed(self, kind: MessageKind) -> NodeChange:
        """Confirm the first pending change; earlier messages of the node were about older ranks.

        Raises:
            MessageError: it was not asked for that.
        """
        if not self.changes or _ANSWERS[self.changes[0].kind] is not kind:
            raise MessageError(f"{kind.name} was not expected")
        change = self.changes.popleft()
        for channel in change.fenced:
            channel.close()
        return change

    def fence(self, channel: Channel) -> None:
        """Close a channel once a rank that is to end is dead."""
        if self.changes:
            self.changes[-1].fenced.append(channel)
        else:
            channel.close()

    @property
    def is_beginning(self) -> bool:
        """Whether it has not begun the requested epoch yet."""
        return any(change.kind is MessageKind.BEGIN_EPOCH for change in self.changes)

    def is_starting(self, rank: int) -> bool:
        """Whether its messages about a rank may concern an earlier process of that number."""
        return any(rank in change.starts for change in self.changes)

    def lose(self) -> None:
        """Close its connection and drop what it has not answered: it is lost."""
        self.close()
        self.asked_s = None
        self.changes.clear()

    def close(self) -> None:
        """Close its connection, on which its server and ranks end."""
        for channel in [self.control, *(each for c in self.changes for each in c.fenced)]:
            channel.close()


def socket_pair(on_failure: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection, which the stack closes.

    Raises:
        OSError: no descriptors are left.
    """
    ours, theirs = socket.socketpair()
    return on_failure.enter_context(ours), on_failure.enter_context(theirs)


def connections_for(ranks: Sequence[int]) -> list[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection for each rank.

    Raises:
        CapacityError: no descriptors are left.
    """
    with contextlib.ExitStack() as on_failure:
        try:
            pairs = [socket_pair(on_failure) for _ in ranks]
        except OSError as error:
            raise CapacityError(f"cannot start ranks {ranks}: {no_room(error)}") from None
        on_failure.pop_all()
    return pairs
