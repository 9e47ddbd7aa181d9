"""Runs under torchrun, or anything that sets its environment variables on several nodes.

Every process runs the same command. On each node only the one with LOCAL_RANK 0 stays. That of the
first node becomes the launcher; those of the others become *supervisors*: they connect to it and
fork the ranks of their nodes. Nodes find the launcher through torchrun's own store.
"""

import os
import sys
from dataclasses import dataclass
from typing import NoReturn

from expertlane.engine.ranks.processes import end_with_parent
from expertlane.engine.ranks.rank_settings import rank_environment
from expertlane.engine.ranks.rendezvous import Meeting
from expertlane.engine.ranks.supervisor import SupervisorSettings, supervisor_command
from expertlane.errors import CapacityError, UserError
from expertlane.spec.names import CpuIsa

_PARENT = os.getppid()  # as early as possible: it may end at any time


def is_under_torchrun() -> bool:
    """Whether this process is one of several that run the same command."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def num_nodes() -> int:
    """The number of nodes of the run.

    Raises:
        UserError: torchrun's variables do not fit together.
    """
    return TorchrunNode.from_environment().num_nodes if is_under_torchrun() else 1


@dataclass(frozen=True)
class TorchrunNode:
    """This process's node, by torchrun's environment variables.

    Attributes:
        number: the node's, from 0.
        is_supervisor: whether this process stays, as one on each node does.
        num_processes: processes that torchrun has started on each node.
        meeting: the rendezvous of the nodes; None for a single node.

    Raises:
        UserError: a variable is missing, or they do not fit together.
    """

    number: int
    is_supervisor: bool
    num_nodes: int
    num_processes: int
    meeting: Meeting | None

    @classmethod
    def from_environment(cls) -> "TorchrunNode":
        """Read torchrun's environment variables."""
        rank, world_size = _number("RANK"), _number("WORLD_SIZE")
        local_rank, num_processes = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
        if num_processes < 1 or world_size % num_processes:
            raise UserError(
                f"{num_processes} of {world_size} processes are on this node; start equally many "
                "on all nodes"
            )
        num_nodes, meeting = world_size // num_processes, None
        if num_nodes > 1:
            meeting = Meeting(
                os.environ.get("MASTER_ADDR", ""),
                _number("MASTER_PORT"),
                os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                "",
                num_nodes,
            )
        return cls(rank // num_processes, local_rank == 0, num_nodes, num_processes, meeting)

    def num_ranks(self, needed: int) -> int:
        """The ranks of each node: one for each process, or as many as needed if there is one.

        Args:
            needed: ranks of the run.

        Raises:
            CapacityError: torchrun has started several processes on each node, but too few.
        """
        if self.num_processes == 1:
            return -(-needed // self.num_nodes)
        started = self.num_nodes * self.num_processes
        if started < needed:
            raise CapacityError(
                f"the experiment needs {needed} ranks but torchrun started {started} processes; "
                f"start {needed} in all, or one per node, which starts as many ranks as are needed"
            )
        return self.num_processes


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name} is {value!r}; torchrun sets it to a number, set it likewise")
    return int(value)


def _watched_parent() -> int | None:
    """The pid of torchrun's agent, which outlives its processes unless killed; else None."""
    return _PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None


def end_with_torchrun() -> None:
    """From now on, end this process when torchrun has ended."""
    if (parent := _watched_parent()) is not None:
        end_with_parent(parent)


def become_supervisor(
    node: TorchrunNode,
    num_ranks: int,
    timeout_s: float,
    dtype: str | None,
    *,
    oversubscribe: bool,
    cpu_isa: CpuIsa | None,
    rejoin_s: float,
) -> NoReturn:
    """Replace this process by the supervisor of its node.

    It is a new program, since ranks are forked from it: no state of this one is left there.

    Args:
        num_ranks: ranks of the node.
        rejoin_s: see `SupervisorSettings`.
    """
    assert node.meeting is not None, "the first node has the launcher"
    parent = _watched_parent()
    settings = SupervisorSettings(
        *(node.number, num_ranks, node.meeting, parent),
        *(timeout_s, dtype, oversubscribe, rejoin_s),
    )
    command = supervisor_command(settings)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what libraries print in ranks must not mix with results
    os.execve(command[0], command, rank_environment(cpu_isa, on_one_node=False))
