"""One way to get ranks, from a laptop to a cluster."""

from expertlane.engine.commands import DescribeMachine, RankMachine
from expertlane.engine.local_ranks import LocalRanks, check_num_ranks
from expertlane.engine.pool import RankPool
from expertlane.engine.torchrun import TorchrunRanks, is_under_torchrun, own_rank, run_torchrun_rank
from expertlane.errors import CapacityError, UserError


def start_pool(
    num_ranks: int, *, timeout_s: float, dtype: str | None = None, oversubscribe: bool = False
) -> RankPool | None:
    """Local ranks, or under torchrun the ranks it has started.

    Returns:
        The pool; None in those processes of torchrun that were ranks themselves until now.

    Raises:
        CapacityError: more local ranks than this machine should run, or fewer under torchrun
            than needed.
        RankError: the ranks did not start.
    """
    if not is_under_torchrun():
        check_num_ranks(num_ranks, oversubscribe=oversubscribe)
        return RankPool(LocalRanks(num_ranks, timeout_s, dtype), timeout_s)
    if own_rank() != 0:
        code = run_torchrun_rank(timeout_s, dtype)
        if code:
            raise SystemExit(code)  # the launcher says why
        return None
    pool = RankPool(TorchrunRanks(timeout_s, dtype), timeout_s)
    if pool.num_ranks < num_ranks:
        pool.close()
        raise CapacityError(
            f"the experiment needs {num_ranks} ranks but torchrun started {pool.num_ranks}; "
            f"start it with {num_ranks} processes in all"
        )
    return pool


def describe_ranks(pool: RankPool) -> list[RankMachine]:
    """What each rank sees of its machine.

    Raises:
        UserError: they do not all use the same kernels. Experts move between ranks in their
            memory layout, which our kernels and torch do not share.
    """
    machines = pool.call(DescribeMachine())
    for rank, machine in enumerate(machines):
        ours, theirs = machines[0].kernels, machine.kernels
        if ours.split()[0] != theirs.split()[0]:
            raise UserError(
                f"rank 0 on {machines[0].host} computes with {ours}, but rank {rank} on "
                f"{machine.host} with {theirs}; set EXPERTLANE_BACKEND=torch on all nodes, or "
                "make them alike"
            )
    return machines
