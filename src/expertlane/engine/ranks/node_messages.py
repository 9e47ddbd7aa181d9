"""Messages between the launcher and its nodes about ranks."""

from dataclasses import dataclass

from expertlane.engine.comm.progress import Line


@dataclass(frozen=True)
class Heartbeat:
    """A node's answer to a ping; the launcher cannot read the progress board of another node.

    Attributes:
        lines: [num_local_ranks]; of its `ProgressBoard`.
        stopped: global ranks whose processes are stopped.
    """

    lines: list[Line]
    stopped: list[int]


@dataclass(frozen=True)
class Exit:
    """A rank of a node has ended.

    Attributes:
        code: negative for a signal.
        line: its last one of the node's `ProgressBoard`.
    """

    rank: int
    code: int
    line: Line


@dataclass(frozen=True)
class Nodes:
    """The answer to READ_NODES: what other nodes have told the store, as `Meeting.hashes`."""

    hashes: list[bytes]


@dataclass(frozen=True)
class ChangeRanks:
    """A node is to end ranks for certain, and to start others.

    With BEGIN_EPOCH those are of the epoch that begins, the message's own; with START_RANKS they
    are ahead of the next one. On the launcher's node the descriptors of the new ranks' channels
    follow, in the order of `starts`.

    Attributes:
        number: of the change, which the new ranks' connections name.
        ends: global ranks; those of `starts` that have a process end too.
        starts: global ranks of the node.
        num_ranks: that the node has in the epoch.
    """

    number: int
    ends: list[int]
    starts: list[int]
    num_ranks: int


@dataclass(frozen=True)
class RanksStarted:
    """The answer to START_RANKS.

    Attributes:
        missing: global ranks that could not be started.
        why: a line, if there are such.
    """

    missing: list[int]
    why: str = ""
