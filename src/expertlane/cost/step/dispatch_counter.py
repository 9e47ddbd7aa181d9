"""Counts of tokens by rank, kept where the same tokens are asked for again."""

from collections import OrderedDict
from dataclasses import dataclass

from expertlane.balance.placement import Placement
from expertlane.cost.routing import RoutingSource
from expertlane.cost.step.copies import CopyChoice
from expertlane.cost.step.dispatch_counts import DispatchCounts, count_dispatch
from expertlane.cost.step.operation import Ints
from expertlane.cost.step.stage_mesh import StageMesh

_CHOICES_KEPT = 1024  # enough for every layer of a model placed by itself, on every stage


@dataclass(frozen=True, eq=False)
class PartRouting:
    """Where the tokens of a part of a micro-batch stand in their source of routing.

    Attributes:
        first, before, owned: as `RoutingSource.topk_ids` takes them.
    """

    source: RoutingSource
    first: int
    before: Ints
    owned: Ints


class DispatchCounter:
    """Counts how tokens spread, for builders that may share it.

    Args:
        num_kept: counts to keep at most; many candidate deployments of one planner have the same
            tokens on the same ranks, the steps of a simulation do not.
    """

    def __init__(self, num_kept: int = 0) -> None:
        self._num_kept = num_kept
        self._kept: OrderedDict[object, DispatchCounts] = OrderedDict()
        self._choices: OrderedDict[object, CopyChoice] = OrderedDict()
        self._sources: dict[int, RoutingSource] = {}  # alive, so that their ids stay theirs

    def count(
        self,
        layer: int,
        placement: Placement,
        mesh: StageMesh,
        part: PartRouting,
        *,
        by_node: bool,
        fan_out: bool,
    ) -> DispatchCounts:
        """As `count_dispatch`, of a layer's tokens."""
        if not self._num_kept:
            return self._count(layer, placement, mesh, part, by_node=by_node, fan_out=fan_out)
        self._sources[id(part.source)] = part.source
        key = (
            *(self._place(placement, mesh), id(part.source), part.source.sample_of(layer)),
            *(part.first, part.before.tobytes(), part.owned.tobytes(), by_node, fan_out),
        )
        counts = self._kept.pop(key, None)
        if counts is None:
            counts = self._count(layer, placement, mesh, part, by_node=by_node, fan_out=fan_out)
        self._kept[key] = counts
        if len(self._kept) > self._num_kept:
            self._kept.popitem(last=False)
        return counts

    def _count(
        self,
        layer: int,
        placement: Placement,
        mesh: StageMesh,
        part: PartRouting,
        *,
        by_node: bool,
        fan_out: bool,
    ) -> DispatchCounts:
        topk_ids = part.source.topk_ids(layer, part.first, part.before, part.owned)
        choice = self._choice(placement, mesh)
        return count_dispatch(topk_ids, part.owned, choice, mesh, by_node=by_node, fan_out=fan_out)

    def _choice(self, placement: Placement, mesh: StageMesh) -> CopyChoice:
        key = self._place(placement, mesh)
        choice = self._choices.pop(key, None)
        if choice is None:
            choice = CopyChoice(placement, mesh)
        self._choices[key] = choice
        if len(self._choices) > _CHOICES_KEPT:
            self._choices.popitem(last=False)
        return choice

    @staticmethod
    def _place(placement: Placement, mesh: StageMesh) -> object:
        """What choices turn on: ranks of a stage, and how they lie on nodes."""
        return placement, mesh.size, mesh.ranks_per_node, mesh.first_rank % mesh.ranks_per_node
