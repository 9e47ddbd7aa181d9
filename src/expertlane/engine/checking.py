"""The launcher's side of `--check`: what ranks found in a step, and checksums of their weights."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from expertlane.engine.commands import RankOutcome, SumWeights
from expertlane.engine.losses import Loss
from expertlane.engine.pool import RankPool
from expertlane.results.step_checks import first_found, named


class Checking:
    """Looks at the ranks of a pool for silent errors.

    Ranks that may be the cause of one are lost, as dead ones are: of two that differ, both, since
    nothing tells which is right.

    Args:
        num_ranks: of the layout.

    Raises:
        RankError, RanksLostError: from any method, as of the pool; it names ranks and place.
    """

    def __init__(self, pool: RankPool, num_ranks: int) -> None:
        self._pool, self._ranks = pool, range(num_ranks)
        self._sums: dict[str, int] = {}  # of weights as they were loaded
        self.check_weights()

    def reshape(self, num_ranks: int) -> None:
        """Look at other ranks, which have other parts of the weights; what they loaded is right."""
        self._ranks, self._sums = range(num_ranks), {}

    def check_step(self, step: int, ranks: Sequence[int], outcomes: Sequence[RankOutcome]) -> None:
        """Hold what the ranks of a replica have found in a step against each other.

        Args:
            ranks: [num_ranks]; global.
            outcomes: [num_ranks].
        """
        checks = [outcome.checks for outcome in outcomes if outcome.checks is not None]
        found = first_found(ranks, checks)
        if found is not None:
            self._lose(found.line(step), found.ranks)

    def check_weights(self, ranks: Collection[int] | None = None) -> None:
        """Hold the weights of ranks against each other, and against those that were loaded.

        Weights of the same name, such as the copies of an expert, are the same on all ranks that
        hold them, in all replicas.

        Args:
            ranks: global; None for all, as when nothing is known yet.
        """
        if not self._sums:
            ranks = None
        looked_at = sorted({*self._ranks} if ranks is None else {*self._ranks} & {*ranks})
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
