"""Smaller layouts after a loss, in which the other ranks serve until lost ranks are back."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from expertlane.balance.holding import Placements, over_survivors
from expertlane.balance.transition import Arrangement
from expertlane.engine.elastic.scaling import Scaling
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.commands import PreparationProgress, Prepare, Ticket
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import CapacityError, UserError
from expertlane.schedule.plan import StepPlan
from expertlane.spec.layout import Members

_MOST_WAIT_S = 30.0  # the longest wait before a rank that is lost repeatedly starts again


class Shrinking:
    """Implements `engine.elastic.recovery.Shrinker`, in the thread that has the pool.

    Experts stay where they are; those that only lost ranks had go to others, until all members are
    back with their former placements.

    Args:
        scaling: gives options, machine and free memory.
        log: called with a line when lost ranks cannot be started.
    """

    def __init__(
        self, pool: RankPool, runner: ModelRunner, scaling: Scaling, log: Callable[[str], None]
    ) -> None:
        self._pool, self._runner, self._scaling, self._log = pool, runner, scaling, log
        self._arranged = runner.arranged
        self._arranged.follow(self)
        self._preparing: dict[int, Ticket[PreparationProgress]] = {}  # by process
        self._prepared: set[int] = set()
        self._num_starts: Counter[int] = Counter()
        self._start_s = 0.0  # not before

    def smaller(self, members: Members, lost: Collection[int]) -> Members:
        """The members of a smaller layout, without those that are lost.

        Raises:
            UserError: no data-parallel rank is left, the form of dispatch needs whole nodes, or the
                lost ranks' experts do not fit into memory beside the others and the new ranks.
        """
        left = members.without(lost)
        if left == members:
            return left
        options, machine = self._scaling.deployment.options, self._scaling.machine[0]
        if options.is_by_node:
            if self._pool.is_of_nodes:  # nodes hold consecutive ranks of a layout
                raise UserError("hierarchical dispatch needs all ranks of each node")
            left.layout.ep_ranks_per_node(self._arranged.now.ranks_per_node)
        whole = self._arranged.whole.layout.world_size
        free_bytes: float = machine.free_bytes
        if not (machine.on_gpu or self._pool.is_of_nodes):
            free_bytes = self._scaling.free_bytes
        if not machine.on_gpu:  # ranks that replace lost ones need as much
            per_node = machine.ranks_per_node
            free_bytes *= min(left.layout.world_size, per_node) / min(whole, per_node)
        seen = replace(machine, free_bytes=int(free_bytes))
        for placements in self._over_survivors(left):
            self._scaling.check_room(left.layout, placements, seen)
        return left

    def _over_survivors(self, left: Members) -> list[Placements]:
        """Placements over the remaining members, [replicas]."""
        found, layout, now = [], left.layout, self._arranged.now
        before = now.members
        rebalancer = self._runner.rebalancer
        for replica in range(layout.replicas):
            numbers = left.of_replica[replica][: layout.stage_size : layout.etp]
            ranks = [before.numbers.index(number) for number in numbers]
            at = [before.layout.coordinates(rank) for rank in ranks]
            survivors, of_replica = [each.ep_rank for each in at], at[0].replica
            loads = {} if rebalancer is None else rebalancer.loads_of(of_replica)
            found.append(
                tuple(
                    placed and over_survivors(placed, survivors, loads.get(layer))
                    for layer, placed in enumerate(now.placements[of_replica])
                )
            )
        return found

    def arrange(self, members: Members) -> Arrangement:
        """An arrangement of these members, a part of the present ones; moves were abandoned."""
        placements = tuple(self._over_survivors(members))
        return Arrangement(members, placements, self._arranged.now.ranks_per_node)

    def abandon(self, plans: Sequence[StepPlan]) -> None:
        """Do nothing: no state here depends on steps."""

    def reshape(self, arrangement: Arrangement) -> None:
        """Forget preparations once the whole arrangement serves again."""
        if arrangement is self._arranged.whole:
            self._prepared.clear()
            self._preparing.clear()
            self._num_starts.clear()

    def is_ready(self, members: Members) -> bool:
        """Whether all members are up, with their weights; starts those that are not.

        Raises:
            RanksLostError: ranks were lost.
        """
        pool = self._pool
        there = pool.present | pool.ahead
        missing = {number for number in members.numbers if number not in there}
        self._prepared -= missing
        to_start = missing - pool.starting - pool.away
        if to_start and time.monotonic() >= self._start_s:
            self._start(to_start)
        ahead = pool.ahead & {*members.numbers}
        for number in sorted(ahead - self._prepared):
            self._prepare(number, members)
        return not missing and not ahead - self._prepared

    def _start(self, numbers: Collection[int]) -> None:
        self._num_starts.update(numbers)
        most = max(self._num_starts[number] for number in numbers)
        self._start_s = time.monotonic() + min(_MOST_WAIT_S, 2.0 ** (most - 1))
        try:
            self._pool.start(numbers)
        except CapacityError as error:
            self._log(f"lost ranks cannot be started yet: {error}")

    def _prepare(self, number: int, members: Members) -> None:
        ticket = self._preparing.pop(number, None)
        if ticket is None or ticket.is_lost:
            place = members.numbers.index(number)
            replica = members.layout.coordinates(place).replica
            spec = self._runner.spec_of(self._arranged.whole, replica)
            self._preparing[number] = self._pool.submit(Prepare(spec, place), ranks=[number])
        elif not ticket.is_done:
            self._preparing[number] = ticket
        elif ticket.results[number].share == 1:
            self._prepared.add(number)
