"""The processes that are a layout's ranks; after a loss, a part of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import lcm

from expertlane.errors import SpecError
from expertlane.spec.layout import Layout

DpRank = tuple[int, int]  # replica, and data-parallel rank of it


@dataclass(frozen=True)
class Members:
    """The processes of a layout.

    A process is known by its number, which stays as it is when the layout changes.

    Attributes:
        numbers: [world_size]; the process of each rank; by default each rank's own number.
    """

    layout: Layout
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.numbers:
            object.__setattr__(self, "numbers", tuple(range(self.layout.world_size)))
        assert len(set(self.numbers)) == self.layout.world_size, "each rank is a process"

    def rank_of(self, number: int) -> int | None:
        """The rank that a process is; None if it is none of this layout."""
        return self.numbers.index(number) if number in self.numbers else None

    def of_replica(self, replica: int) -> tuple[int, ...]:
        """The processes of a replica, in the order of its ranks."""
        ranks = self.layout.ranks_of_replica(replica)
        return self.numbers[ranks.start : ranks.stop]

    def of_dp_rank(self, replica: int, dp_rank: int) -> list[int]:
        """The processes that compute a data-parallel rank's sequences, in the order of ranks."""
        return [self.numbers[rank] for rank in self.layout.ranks_of_dp_rank(replica, dp_rank)]

    def dp_ranks_of(self, numbers: Collection[int]) -> set[DpRank]:
        """The data-parallel ranks that any of these processes has a part in."""
        places = [
            self.layout.coordinates(r) for r, each in enumerate(self.numbers) if each in numbers
        ]
        return {(at.replica, at.dp_rank) for at in places}

    def kept_caches(self, before: "Members") -> Mapping[DpRank, DpRank]:
        """The data-parallel ranks whose keys and values their processes have, and where from.

        Args:
            before: the members until now.

        Returns:
            By (replica, data-parallel rank), its former place.
        """
        if (self.layout.pp, self.layout.tp) != (before.layout.pp, before.layout.tp):
            return {}
        old = {tuple(before.of_dp_rank(*each)): each for each in before.dp_ranks}
        own = {each: tuple(self.of_dp_rank(*each)) for each in self.dp_ranks}
        return {each: old[numbers] for each, numbers in own.items() if numbers in old}

    @property
    def dp_ranks(self) -> list[DpRank]:
        """All data-parallel ranks, of all replicas."""
        layout = self.layout
        return [(r, d) for r in range(layout.replicas) for d in range(layout.dp)]

    @property
    def ep_ranks_kept(self) -> int:
        """Consecutive data-parallel ranks that share experts, so that none of them goes alone."""
        return lcm(self.layout.tp, self.layout.etp) // self.layout.tp

    def without(self, lost: Collection[int]) -> "Members":
        """The largest part of these that needs no lost process, with the same slices of weights.

        Replicas that lost a process are dropped, if another lost none. Else data-parallel ranks are
        dropped, the same number in each replica; the last ones take the free numbers.

        Raises:
            SpecError: there is none.
        """
        layout = self.layout
        hit = self.dp_ranks_of(lost)
        replicas = [r for r in range(layout.replicas) if r not in {replica for replica, _ in hit}]
        if replicas:
            smaller = replace(layout, replicas=len(replicas))
            order = _filled(layout.replicas, replicas)
            return Members(smaller, tuple(n for r in order for n in self.of_replica(r)))
        return self._with_fewer_dp_ranks(hit)

    def _with_fewer_dp_ranks(self, hit: set[DpRank]) -> "Members":
        layout, unit = self.layout, self.ep_ranks_kept
        num_units = layout.dp // unit
        whole = [
            [u for u in range(num_units) if not hit & {(r, u * unit + i) for i in range(unit)}]
            for r in range(layout.replicas)
        ]
        most = min(map(len, whole))
        if not most:
            raise SpecError(f"layout {layout}: every data-parallel rank has lost a rank")
        smaller = replace(layout, dp=most * unit, ep=most * unit * layout.tp // layout.etp)
        numbers: list[int] = []
        for replica, units in enumerate(whole):
            order = _filled(num_units, units)[:most]
            dp_ranks = [u * unit + i for u in order for i in range(unit)]
            of_ranks = [self.of_dp_rank(replica, dp_rank) for dp_rank in dp_ranks]
            for stage in range(layout.pp):
                part = slice(stage * layout.tp, (stage + 1) * layout.tp)
                numbers += [number for each in of_ranks for number in each[part]]
        return Members(smaller, tuple(numbers))


def _filled(num: int, left: list[int]) -> list[int]:
    """The numbers in `left`: those below its length in their places, the others in the gaps."""
    first = [each for each in left if each < len(left)]
    last = [each for each in left if each >= len(left)]
    return [each if each in first else last.pop() for each in range(len(left))]
