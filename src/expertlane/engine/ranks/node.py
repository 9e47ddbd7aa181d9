"""A node at the launcher: its connection, and the requests that it has not answered."""

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
    """A text for the loss of a node whose connection broke."""
    why = getattr(error, "strerror", None)
    return f"is gone ({why})" if why else GONE


@dataclass(frozen=True, eq=False)
class NodeChange:
    """Ranks that a node ends and starts.

    Attributes:
        kind: kind of the message that requests the change.
        fenced: channels of ranks that end, kept open until these are dead: a rank of another node
            that sees its channel closed would end its server.
    """

    kind: MessageKind
    starts: Collection[int]
    fenced: list[Channel]


class Node:
    """A node of the run.

    Args:
        control: a channel to the fork server of its ranks.
        name: that server's name in messages.

    Attributes:
        asked_s: time of the last ping, if it is not answered yet.
        changes: changes that are requested and not confirmed yet, in order.
    """

    def __init__(self, control: Channel, name: str) -> None:
        self.control, self.name = control, name
        self.asked_s: float | None = None
        self.changes: deque[NodeChange] = deque()

    def ping(self, now_s: float) -> None:
        """Ping it, unless the last ping is not answered yet.

        Raises:
            OSError: the connection is closed.
        """
        if self.asked_s is None and self.control.fileno() >= 0:
            self.asked_s = now_s
            self.control.send(_PING)

    def change(self, change: NodeChange, asked: ChangeRanks, epoch: int) -> None:
        """Request a change; the node makes changes in order.

        Raises:
            BlockingIOError, OSError: the node does not read, or is gone.
        """
        self.changes.append(change)
        self.control.send(encode(change.kind, asked, epoch))

    def take_changed(self, kind: MessageKind) -> NodeChange:
        """Confirm the first pending change; earlier messages of the node were about older ranks.

        Raises:
            MessageError: no such change was requested.
        """
        if not self.changes or _ANSWERS[self.changes[0].kind] is not kind:
            raise MessageError(f"{kind.name} was not expected")
        change = self.changes.popleft()
        for channel in change.fenced:
            channel.close()
        return change

    def fence(self, channel: Channel) -> None:
        """Close a rank's channel, but not before the pending changes have ended the rank."""
        if self.changes:
            self.changes[-1].fenced.append(channel)
        else:
            channel.close()

    @property
    def is_beginning(self) -> bool:
        """Whether the node has not begun the requested epoch yet."""
        return any(change.kind is MessageKind.BEGIN_EPOCH for change in self.changes)

    def is_starting(self, rank: int) -> bool:
        """Whether its messages about a rank may be about an earlier process of that number."""
        return any(rank in change.starts for change in self.changes)

    def lose(self) -> None:
        """Close the connection of a lost node, and drop its unanswered requests."""
        self.close()
        self.asked_s = None
        self.changes.clear()

    def close(self) -> None:
        """Close the connection, which ends the node's server and ranks."""
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
