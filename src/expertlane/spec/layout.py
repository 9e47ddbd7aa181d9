"""Layouts of ranks: replicas × pipeline × data × tensor, and experts across them.

`Members` are the processes that are a layout's ranks; after a loss, a part of them.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from math import gcd, isqrt, lcm
from typing import NamedTuple

from expertlane.errors import SpecError
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import MAX_RANKS, Strict, parse_sizes, shown, take_fields

_AXES_OF_ENGINE = ("replicas", "pp", "dp", "tp", "ep")
_AXES = (*_AXES_OF_ENGINE, "dcp")


class Coordinates(NamedTuple):
    """Coordinates of one rank in a layout."""

    replica: int
    pp_rank: int
    dp_rank: int
    tp_rank: int
    ep_rank: int
    etp_rank: int


@dataclass(frozen=True)
class Layout(Strict):
    """A parallel layout; rank = ((replica·pp + pp_rank)·dp + dp_rank)·tp + tp_rank.

    The experts of a pipeline stage are spread over its `dp × tp` ranks: `ep` groups of
    `etp = dp × tp / ep` ranks, each group holding different experts, each rank of a group
    1/`etp` of each of them. With i = dp_rank·tp + tp_rank: ep_rank = i // etp,
    etp_rank = i % etp.

    Decode context parallelism: `dcp` consecutive ranks of a `tp` group, which would hold the same
    keys and values, hold every `dcp`-th position each. The cluster model has it, the engine not.

    Raises:
        SpecError: a size or the number of ranks is out of range, `ep` does not divide `dp × tp`,
            or `dcp` does not divide `tp`.
    """

    replicas: int = 1
    pp: int = 1
    dp: int = 1
    tp: int = 1
    ep: int = 1
    dcp: int = 1

    def __post_init__(self) -> None:
        take_fields(self, "layout: {}".format)
        if self.world_size > MAX_RANKS:
            raise SpecError(
                f"layout {self} has {self.world_size:,} ranks; valid: {MAX_RANKS:,} at most"
            )
        if self.stage_size % self.ep:
            raise SpecError(
                f"layout {self}: ep={self.ep} does not divide dp × tp = {self.stage_size}; "
                f"valid ep: {_listed(divisors(self.stage_size))}"
            )
        if self.tp % self.dcp:
            raise SpecError(
                f"layout {self}: dcp={self.dcp} does not divide tp={self.tp}; "
                f"valid dcp: {_listed(divisors(self.tp))}"
            )

    @classmethod
    def parse(cls, text: str, *, is_modelled: bool = False) -> "Layout":
        """Read `tp=8,pp=2`; axes left out are 1.

        Args:
            is_modelled: it is only modelled; else an error lists only axes that the engine runs.

        Raises:
            SpecError: an unknown or repeated axis, a value no whole number, or a broken rule.
        """
        told = _AXES if is_modelled else _AXES_OF_ENGINE
        sizes = parse_sizes(f"layout {shown(text)}", "unknown axis", text, _AXES, told)
        if not sizes:
            raise SpecError(f"layout {shown(text)} names no axis; an example: tp=8,pp=2")
        return cls(**sizes)

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis in _AXES if (size := getattr(self, axis)) != 1]
        return ",".join(named) or "tp=1"

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage of one replica."""
        return self.dp * self.tp

    @property
    def replica_size(self) -> int:
        """Ranks of one replica."""
        return self.pp * self.stage_size

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.replicas * self.replica_size

    def places_of_rank(self, num_seqs: int, num_asked: int | None) -> int:
        """Sequences that a data-parallel rank has places for.

        Its share; where all that were asked for run at once, a quarter more. Requests do not end
        evenly over ranks: with exactly as many places some stay empty while requests wait for one.

        Args:
            num_seqs: sequences that run at once, over all ranks.
            num_asked: concurrent requests; None where they arrive at a rate.
        """
        num_ranks = self.replicas * self.dp
        share = -(-num_seqs // num_ranks)
        all_run = num_asked is not None and num_seqs >= num_asked
        return -(-5 * share // 4) if all_run and num_ranks > 1 else share

    @property
    def etp(self) -> int:
        """Expert tensor parallelism: ranks that share each expert."""
        return self.stage_size // self.ep

    def ep_ranks_per_node(self, ranks_per_node: int) -> int:
        """Ranks of an `ep` group per node, the same for every group.

        Args:
            ranks_per_node: consecutive ranks on one node.

        Raises:
            SpecError: the number differs between nodes.
        """
        size = self.stage_size
        firsts = range(0, self.world_size, size)[: ranks_per_node // gcd(size, ranks_per_node)]
        places = sorted({first % ranks_per_node for first in firsts})
        counts = set().union(*(_on_nodes(size, self.etp, each, ranks_per_node) for each in places))
        if len(counts) == 1:
            return counts.pop()
        counts = set()
        for first in range(0, self.world_size, self.stage_size):
            for etp_rank in range(self.etp):
                ranks = range(first + etp_rank, first + self.stage_size, self.etp)
                on_nodes = Counter(rank // ranks_per_node for rank in ranks)
                counts.update(on_nodes.values())
                if len(counts) > 1:
                    other = counts - set(on_nodes.values())
                    elsewhere = f", and {min(other)} in another stage or replica" if other else ""
                    raise SpecError(
                        f"layout {self}: hierarchical dispatch needs equally many of the "
                        f"ep={self.ep} ranks on each node, but nodes of {ranks_per_node} hold "
                        f"{_listed(list(on_nodes.values()))}{elsewhere}"
                    )
        raise AssertionError("some group lies unevenly")

    def coordinates(self, rank: int) -> Coordinates:
        """Replica, stage, data-parallel and tensor-parallel rank of a rank."""
        replica, in_replica = divmod(rank, self.replica_size)
        pp_rank, in_stage = divmod(in_replica, self.stage_size)
        dp_rank, tp_rank = divmod(in_stage, self.tp)
        ep_rank, etp_rank = divmod(in_stage, self.etp)
        return Coordinates(replica, pp_rank, dp_rank, tp_rank, ep_rank, etp_rank)

    def ranks_of_replica(self, replica: int) -> range:
        """All ranks of one replica."""
        return range(replica * self.replica_size, (replica + 1) * self.replica_size)

    def ranks_of_dp_rank(self, replica: int, dp_rank: int) -> list[int]:
        """Global ranks that compute one data-parallel rank's sequences, in order."""
        first = replica * self.replica_size + dp_rank * self.tp
        return [
            first + pp_rank * self.stage_size + tp_rank
            for pp_rank in range(self.pp)
            for tp_rank in range(self.tp)
        ]

    def layers_of_stage(self, num_hidden_layers: int, pp_rank: int) -> range:
        """The layers a pipeline stage holds; near-equal."""
        return part_of(num_hidden_layers, self.pp, pp_rank)

    def stage_of_layers(self, num_hidden_layers: int) -> list[int]:
        """[num_hidden_layers]; the pipeline stage of each layer."""
        stages = range(self.pp)
        return [i for i in stages for _ in self.layers_of_stage(num_hidden_layers, i)]

    def most_dcp(self, model: ModelConfig) -> int:
        """Ranks of a `tp` group that hold the same keys and values without `dcp`.

        1 with compressed attention, and where an indexer chooses for each key/value head: dcp is
        not priced there.
        """
        if model.compressed is not None:
            return 1
        if model.latent is not None:
            return self.tp
        if model.indexer is not None:
            return 1
        most_kv = max(heads.num_kv for heads in model.all_heads)
        return max(1, self.tp // most_kv)

    def check_model(self, model: ModelConfig) -> None:
        """Check that `model` can be laid out so.

        Raises:
            SpecError: `tp` does not divide the heads, or there are fewer layers than stages.
        """
        for heads, kv_heads, _ in model.all_heads:
            if heads % self.tp:
                raise SpecError(
                    f"layout {self}: tp={self.tp} does not divide the {heads} attention heads of "
                    f"{model.name}; valid tp: {_listed(divisors(heads))}"
                )
            if model.latent is None and kv_heads % self.tp and self.tp % kv_heads:
                raise SpecError(
                    f"layout {self}: tp={self.tp} and the {kv_heads} key/value heads of "
                    f"{model.name} do not divide each other"
                )
        state = model.state
        if state is not None and state.num_cuts % self.tp:
            what = "heads" if state.norm_groups is None else "groups of a norm"
            raise SpecError(
                f"layout {self}: tp={self.tp} does not divide the {state.num_cuts} {what} of "
                f"{state.title} of {model.name}; valid tp: {_listed(divisors(state.num_cuts))}"
            )
        if self.dcp > 1 and model.indexer is not None and model.indexer.by_group:
            raise SpecError(
                f"layout {self}: dcp is not priced for {model.name}, whose indexer chooses "
                "positions for each key/value head; valid dcp: 1"
            )
        if (compressed := model.compressed) is not None and compressed.o_groups % self.tp:
            raise SpecError(
                f"layout {self}: tp={self.tp} does not divide the {compressed.o_groups} output "
                f"groups (o_groups) of {model.name}; valid tp: "
                f"{_listed(divisors(compressed.o_groups))}"
            )
        if compressed is not None and self.dcp > 1:
            raise SpecError(
                f"layout {self}: dcp is not priced for the compressed attention of {model.name}; "
                "valid dcp: 1"
            )
        if self.most_dcp(model) % self.dcp:
            raise SpecError(
                f"layout {self}: dcp={self.dcp} ranks would share keys and values that tp ranks "
                f"of {model.name} hold {self.most_dcp(model)} times; valid dcp: "
                f"{_listed(divisors(self.most_dcp(model)))}"
            )
        if self.pp > model.num_hidden_layers:
            raise SpecError(
                f"layout {self}: pp={self.pp} is more stages than the {model.num_hidden_layers} "
                f"layers of {model.name}; valid pp: 1 to {model.num_hidden_layers}"
            )


@cache
def _on_nodes(stage_size: int, etp: int, first: int, ranks_per_node: int) -> frozenset[int]:
    """Numbers of ranks of an `ep` group on a node, over all groups of a stage and all nodes.

    Args:
        first: index of the stage's first rank in its node.
    """
    counts: set[int] = set()
    for etp_rank in range(etp):
        ranks = range(first + etp_rank, first + stage_size, etp)
        counts.update(Counter(rank // ranks_per_node for rank in ranks).values())
    return frozenset(counts)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


@lru_cache(4096)  # asked at every step
def partition(total: int, num_parts: int) -> tuple[range, ...]:
    """Cut `range(total)` into `num_parts` contiguous ranges whose sizes differ by at most one.

    The first `total % num_parts` parts are the longer ones; parts may be empty.
    """
    size, num_longer = divmod(total, num_parts)
    starts = [part * size + min(part, num_longer) for part in range(num_parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def part_of(total: int, num_parts: int, place: int) -> range:
    """One part of `partition`."""
    size, num_longer = divmod(total, num_parts)
    start = place * size + min(place, num_longer)
    return range(start, start + size + (place < num_longer))


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

    @cached_property
    def of_replica(self) -> list[tuple[int, ...]]:
        """[replicas]; the processes of each, in the order of its ranks."""
        parts = map(self.layout.ranks_of_replica, range(self.layout.replicas))
        return [self.numbers[part.start : part.stop] for part in parts]

    @cached_property
    def of_dp_rank(self) -> dict[DpRank, list[int]]:
        """The processes that compute a data-parallel rank's sequences, in the order of ranks."""
        ranks_of = self.layout.ranks_of_dp_rank
        return {each: [self.numbers[rank] for rank in ranks_of(*each)] for each in self.dp_ranks}

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
        old = {tuple(before.of_dp_rank[each]): each for each in before.dp_ranks}
        own = {each: tuple(self.of_dp_rank[each]) for each in self.dp_ranks}
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
            return Members(smaller, tuple(n for r in order for n in self.of_replica[r]))
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
            of_ranks = [self.of_dp_rank[replica, dp_rank] for dp_rank in dp_ranks]
            for stage in range(layout.pp):
                part = slice(stage * layout.tp, (stage + 1) * layout.tp)
                numbers += [number for each in of_ranks for number in each[part]]
        return Members(smaller, tuple(numbers))


def _filled(num: int, left: list[int]) -> list[int]:
    """The numbers in `left`: those below its length in their places, the others in the gaps."""
    first = [each for each in left if each < len(left)]
    last = [each for each in left if each >= len(left)]
    return [each if each in first else last.pop() for each in range(len(left))]
