"""The launcher's side of `--check`: what ranks found in a step, and checksums of their weights."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from expertlane.engine.elastic.arrangement import Arranged
from expertlane.engine.ranks.commands import RankOutcome, SumWeights
from expertlane.engine.ranks.losses import Loss
from expertlane.engine.ranks.pool import RankPool
from expertlane.results.step_checks import first_found, named
from expertlane.schedule.plan import StepPlan


class Checking:
    """Looks at the ranks of a pool for silent errors.

    Ranks that may be the cause of one are lost, as dead ones are: of two that differ, both, since
    nothing tells which is right.

    Args:
        arranged: whom the ranks' own numbers in a layout are.

    Raises:
        RankError, RanksLostError: from any method, as of the pool; it names ranks and place.
    """

    def __init__(self, pool: RankPool, arranged: Arranged) -> None:
        self._pool, self._arranged = pool, arranged
        self._sums: dict[str, int] = {}  # of weights as they were loaded
        self._slices = 0, 0  # tp and etp of these
        self.check_weights()

    def check_step(self, plan: StepPlan, outcomes: Sequence[RankOutcome]) -> None:
        """Hold what the ranks of a replica have found in a step against each other.

        Args:
            outcomes: [num_ranks]; of the replica.
        """
        checks = [outcome.checks for outcome in outcomes if outcome.checks is not None]
        members = self._arranged.now.members
        found = first_found(members.layout.ranks_of_replica(plan.replica), checks)
        if found is not None:
            numbers = [members.numbers[rank] for rank in found.ranks]
            line = found.line(plan.step)
            if numbers != list(found.ranks):
                line = f"{line} (in layout {members.layout}; these are {named(numbers)})"
            self._lose(line, numbers)

    def check_weights(self, ranks: Collection[int] | None = None) -> None:
        """Hold the weights of ranks against each other, and against those that were loaded.

        Weights of the same name, such as the copies of an expert, are the same on all ranks that
        hold them, in all replicas. Where a layout has other slices, what ranks load is right.

        Args:
            ranks: processes; None for all, as when nothing is known yet.
        """
        members = self._arranged.now.members
        slices = members.layout.tp, members.layout.etp
        if slices != self._slices:
            self._sums, self._slices = {}, slices
        if not self._sums:
            ranks = None
        all_ranks = {*members.numbers}
        looked_at = sorted(all_ranks if ranks is None else all_ranks & {*ranks})
        by_rank = self._pool.call(SumWeights(), ranks=looked_at) if looked_at else []
        holders: defaultdict[str, dict[int, int]] = defaultdict(dict)
        for rank, sums in zip(looked_at, by_rank, strict=True):
            for name, total in sums.items():
                holders[name][rank] = total
        for name, of_rank in holders.items():
            if (loaded := self._sums.get(name)) is not None:
                wrong = tuple(rank for rank, total in of_rank.items() if total != loaded)
                if wrong:
                    self._lose(
                        f"{named(wrong)}, weights of {name}: changed since they were loaded", wrong
                    )
            elif len(set(of_rank.values())) > 1:
                total, most = Counter(of_rank.values()).most_common(1)[0]
                others = tuple(rank for rank in of_rank if of_rank[rank] != total)
                wrong = others if 2 * most > len(of_rank) else tuple(of_rank)
                self._lose(f"{named(wrong)}, weights of {name}: not the same on all ranks", wrong)
        self._sums |= {name: next(iter(of_rank.values())) for name, of_rank in holders.items()}

    def _lose(self, line: str, ranks: Collection[int]) -> None:
        self._pool.lose(Loss(frozenset(ranks), line))
