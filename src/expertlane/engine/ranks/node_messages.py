"""Messages between the launcher and its nodes about ranks."""

from dataclasses import dataclass

from expertlane.engine.comm.progress import Line


@dataclass(frozen=True)
class Heartbeat:
    """A node's answer to a ping; the launcher cannot read the progress board of another node.

    Attributes:
        lines: [num_local_ranks]; the lines of its `ProgressBoard`.
        stopped: global ranks whose processes are stopped.
    """

    lines: list[Line]
    stopped: list[int]


@dataclass(frozen=True)
class Exit:
    """A rank of a node has ended.

    Attributes:
        code: exit code, negative for a signal.
        line: the rank's last line of the node's `ProgressBoard`.
    """

    rank: int
    code: int
    line: Line


@dataclass(frozen=True)
class Nodes:
    """The answer to READ_NODES: hashes that other nodes have put into the store.

    Attributes:
        hashes: [num_nodes - 1]; see `Meeting.hashes`.
    """

    hashes: list[bytes]


@dataclass(frozen=True)
class ChangeRanks:
    """The request to end ranks of a node for certain, and to start others.

    With BEGIN_EPOCH the new ranks are of the epoch that begins, the message's own; with START_RANKS
    they are for a later one. On the launcher's node the descriptors of the new ranks' channels
    follow, in the order of `starts`.

    Attributes:
        number: the change's, which the new ranks' connections claim.
        ends: global ranks to end; those of `starts` that have a process end too.
        starts: global ranks of the node to start.
        num_ranks: ranks of the node in the epoch.
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
        why: the reason in a line; empty if none is missing.
    """

    missing: list[int]
    why: str = ""
