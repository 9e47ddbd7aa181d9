"""From one arrangement of ranks to another: what each process keeps, receives, reads and drops.

Lost ranks that are replaced, smaller and larger layouts, moved experts, joining nodes: all are two
arrangements and the processes that live. What a process needs and has, it keeps. What it needs and
has not, a process of its stage sends that has it; if there is none, it is read. Only processes
whose place stays send: the others use their memory for the stage that they make.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from expertlane.balance.holding import Placements
from expertlane.balance.placement import Move, between_ranks, moves
from expertlane.spec.layout import DpRank, Layout, Members


@dataclass(frozen=True)
class Arrangement:
    """The processes of a layout's ranks, and the placements of its experts.

    Attributes:
        placements: [replicas][num_hidden_layers].
        ranks_per_node: consecutive processes whose traffic counts as inside a node.
    """

    members: Members
    placements: tuple[Placements, ...]
    ranks_per_node: int

    @classmethod
    def alike(cls, members: Members, placements: Placements, ranks_per_node: int) -> "Arrangement":
        """An arrangement with the same placements in all replicas."""
        return cls(members, (placements,) * members.layout.replicas, ranks_per_node)

    def moved(self, replica: int, placements: Placements) -> "Arrangement":
        """The arrangement with other placements in one replica."""
        of_replicas = list(self.placements)
        of_replicas[replica] = placements
        return replace(self, placements=tuple(of_replicas))

    @property
    def layout(self) -> Layout:
        """The members' layout."""
        return self.members.layout

    @property
    def ep_per_node(self) -> int:
        """Ranks of an `ep` group that count as on one node."""
        return max(1, min(self.ranks_per_node // self.layout.etp, self.layout.ep))

    def parts_of(self, number: int) -> frozenset["Part"]:
        """The weights that a process holds; none if it has no place."""
        rank = self.members.rank_of(number)
        if rank is None:
            return frozenset()
        layout, at = self.layout, self.layout.coordinates(rank)
        placements, tp = self.placements[at.replica], (layout.tp, at.tp_rank)
        parts = []
        for layer in layout.layers_of_stage(len(placements), at.pp_rank):
            parts += [Part(layer, PartKind.COMMON), Part(layer, PartKind.SLICE, tp)]
            if (placement := placements[layer]) is not None:
                etp, experts = (layout.etp, at.etp_rank), placement.experts_of_rank[at.ep_rank]
                parts += [Part(layer, PartKind.EXPERT, etp, expert) for expert in experts]
        if at.pp_rank == 0:
            parts.append(Part(None, PartKind.EMBEDDING))
        if at.pp_rank == layout.pp - 1:
            parts += [Part(None, PartKind.COMMON), Part(None, PartKind.SLICE, tp)]
        return frozenset(parts)


class PartKind(StrEnum):
    """Ranks of a stage that hold the same part of a layer's weights."""

    COMMON = "common"  # the same on all ranks of a stage: norms, the router
    SLICE = "slice"  # a tensor-parallel rank's: heads, dense and shared MLPs; outside layers, head
    EXPERT = "expert"
    EMBEDDING = "embedding"


class Part(NamedTuple):
    """Weights that a process has, or lacks, as a whole.

    Attributes:
        layer: None outside layers.
        cut: into how many slices it is cut, and which one this is.
        expert: of an expert alone.
    """

    layer: int | None
    kind: PartKind
    cut: tuple[int, int] = (1, 0)
    expert: int = 0


@dataclass(frozen=True)
class Change:
    """The weights of one process in a transition.

    Attributes:
        keeps: what it has and needs.
        receives: what it gets, each from the process that sends it.
        reads: what it reads from the checkpoint, or draws.
    """

    keeps: frozenset[Part]
    receives: Mapping[Part, int]
    reads: frozenset[Part]


class Transition:
    """Changes of weights and caches between two arrangements, computed for a process when asked.

    Args:
        alive: processes that live and have what their place in `before` holds; others are lost,
            or new. A new process may have the number of a lost one.
        beside: parts that processes hold beside those of their place in `before`: made ahead, or
            of a place that they had earlier.
    """

    def __init__(
        self,
        before: Arrangement,
        after: Arrangement,
        alive: Collection[int],
        beside: Mapping[int, Collection[Part]] | None = None,
    ) -> None:
        self.before, self.after = before, after
        self._alive, self._beside = frozenset(alive), beside or {}
        self._moves: dict[tuple[int, int, int], dict[tuple[int | None, int, int], Move]] = {}

    @property
    def lost(self) -> frozenset[int]:
        """Processes that had a place and do not live."""
        return frozenset(self.before.members.numbers) - self._alive

    @property
    def joining(self) -> frozenset[int]:
        """Processes that get a place and had none, or are new."""
        had_place = self._alive & {*self.before.members.numbers}
        return frozenset(self.after.members.numbers) - had_place

    @property
    def caches(self) -> dict[DpRank, DpRank]:
        """The data-parallel ranks whose sequences go on, by their new place the old one."""
        before = self.before.members
        gone = before.dp_ranks_of(self.lost)
        kept = self.after.members.kept_caches(before)
        return {new: old for new, old in kept.items() if old not in gone}

    def of(self, number: int) -> Change:
        """The change of one process."""
        has = frozenset(self._beside.get(number, ()))
        if number in self._alive:
            has |= self.before.parts_of(number)
        needs = self.after.parts_of(number)
        lacks = needs - has
        found = {part: self.sender(part, number) for part in lacks}
        receives = {part: sender for part, sender in found.items() if sender is not None}
        return Change(has & needs, receives, lacks - receives.keys())

    def sender(self, part: Part, number: int) -> int | None:
        """The process that sends a part to another; None if no process of its stage can."""
        if self.before.members != self.after.members:
            return None
        layout, members = self.after.layout, self.after.members
        at = layout.coordinates(members.numbers.index(number))
        stage = _stage(members, at.replica, at.pp_rank)
        if part.kind is PartKind.EXPERT:
            found = self._moves_of(at.replica, at.pp_rank, at.etp_rank)
            move = found.get((part.layer, part.expert, at.ep_rank))
            return None if move is None else stage[move.source * layout.etp + at.etp_rank]
        if part.kind is PartKind.SLICE:
            stage = stage[at.tp_rank :: layout.tp]
        senders = [each for each in stage if each in self._alive]
        return senders[(part.layer or 0) % len(senders)] if senders else None

    def moves(self, replica: int) -> list[Move]:
        """The experts that ranks of a replica get from others; `Move.layer` is a hidden layer.

        They are those of the first slice of each expert, and alike for the others.
        """
        stages = range(self.after.layout.pp)
        return between_ranks(
            [move for stage in stages for move in self._moves_of(replica, stage, 0).values()]
        )

    def _moves_of(
        self, replica: int, pp_rank: int, etp_rank: int
    ) -> dict[tuple[int | None, int, int], Move]:
        """The moves in a slice of a stage, by layer, expert, and the ep rank that lacks it."""
        key = replica, pp_rank, etp_rank
        if key not in self._moves:
            layout, after = self.after.layout, self.after.placements[replica]
            then = {
                layer: placed
                for layer in layout.layers_of_stage(len(after), pp_rank)
                if (placed := after[layer]) is not None
            }
            before = self.before.placements[replica]
            now = [placed for layer in then if (placed := before[layer]) is not None]
            of_slice = _stage(self.after.members, replica, pp_rank)[etp_rank :: layout.etp]
            living = [ep_rank for ep_rank, each in enumerate(of_slice) if each in self._alive]
            layers = [*then]
            found = moves(now, [*then.values()], self.after.ep_per_node, living)
            in_model = [replace(move, layer=layers[move.layer]) for move in found]
            self._moves[key] = {(each.layer, each.expert, each.rank): each for each in in_model}
        return self._moves[key]


def _stage(members: Members, replica: int, pp_rank: int) -> tuple[int, ...]:
    """The processes of a pipeline stage."""
    size = members.layout.stage_size
    return members.of_replica[replica][pp_rank * size : (pp_rank + 1) * size]
