"""Presence of ranks: the rank numbers that have a process, and those of the epoch."""

from collections.abc import Collection
from typing import NamedTuple


class Change(NamedTuple):
    """Processes that end and start.

    Attributes:
        ends: numbers whose processes end and are not replaced.
        starts: numbers that get a new process; one that they may have ends.
    """

    ends: frozenset[int]
    starts: frozenset[int]


class Presence:
    """The state of each rank number: of this epoch, ahead of it, or without a process.

    Attributes:
        num_ranks: how many numbers this epoch has, those without a process included.
        present: ranks of this epoch.
        early: ranks started for a later epoch; below `num_ranks` or above.
        starting: ranks of both kinds whose processes are not up yet.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.present = frozenset(range(num_ranks))
        self.early: frozenset[int] = frozenset()
        self.starting = self.present

    @property
    def absent(self) -> frozenset[int]:
        """Numbers below `num_ranks` without a process."""
        return frozenset(range(self.num_ranks)) - self.present - self.early

    @property
    def ahead(self) -> frozenset[int]:
        """Ranks that are up and not of this epoch."""
        return self.early - self.starting

    def begin_epoch(
        self,
        lost: Collection[int],
        num_ranks: int,
        *,
        replaces: bool = True,
        joining: Collection[int] | None = None,
    ) -> Change:
        """Begin another epoch; for the arguments see `RankPool.begin_epoch`.

        Raises:
            ValueError: a number cannot join: it has no process ahead, or is not of the epoch.
        """
        new = frozenset(range(self.num_ranks, num_ranks))
        if joining is None:
            able = self.early if replaces else self.ahead
            joining = [rank for rank in able if rank < num_ranks]
        elif wrong := [r for r in joining if r not in self.early or r >= num_ranks]:
            raise ValueError(f"ranks {sorted(wrong)} are not ahead of an epoch of {num_ranks}")
        lost, joined = frozenset(lost), frozenset(joining) - frozenset(lost)
        starts: frozenset[int] = frozenset()
        if replaces:
            starts = frozenset(r for r in lost if r < num_ranks) | (new - self.early)
        stay = frozenset(r for r in self.present if r < num_ranks) - lost
        ends = (self.present - stay) | (self.early & lost)
        self.num_ranks = num_ranks
        self.present = stay | joined | starts
        self.early = self.early - lost - joined
        self.starting = (self.starting - ends) & (self.present | self.early) | starts
        return Change(ends - starts, starts)

    def start(self, ranks: Collection[int], most: int) -> None:
        """Register processes that begin to start.

        Raises:
            ValueError: a number has a process, or is not below `most`.
        """
        taken = self.present | self.early
        if wrong := [rank for rank in ranks if rank in taken or not 0 <= rank < most]:
            raise ValueError(f"ranks {sorted(wrong)} have a process, or are not below {most}")
        self.early |= frozenset(ranks)
        self.starting |= frozenset(ranks)

    def is_up(self, rank: int) -> None:
        """Register that a rank is up."""
        self.starting -= {rank}

    def drop(self, rank: int) -> None:
        """Register the end of an early rank's process."""
        self.early -= {rank}
        self.starting -= {rank}
