"""How the tokens of a stage spread over the ranks of their experts, on average and at the busiest.

Means come from a sample of routed tokens, counted as the engine routes them. The busiest rank of a
step has more than its share by chance too: of n ranks, about the expected largest of n normal
variables above the mean (P. Royston, "Expected Normal Order Statistics", Applied Statistics 31,
1982, gives exact ones; the median of the largest serves here).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist

import numpy as np

from expertlane.balance.placement import Placement
from expertlane.cost.routing import RoutingSource
from expertlane.cost.step.copies import CopyChoice
from expertlane.cost.step.dispatch_counts import count_dispatch
from expertlane.cost.step.operation import Floats
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.errors import SpecError
from expertlane.plan.scenario import Reals
from expertlane.spec.model import ModelConfig

_SAMPLE_TOKENS = 2048  # of a layer
_MOST_LAYERS = 4


@dataclass(frozen=True, eq=False)
class Spread:
    """Of one MoE layer on one stage; rows are copies of a token.

    Attributes:
        near, far: rows that a token's rank sends to other ranks on its node, and on others.
        own_node, other_nodes: how often a token reaches its own node, and how many others; 0 where
            a group lies unevenly on nodes.
        reached: ranks that a token reaches, its own too.
        hot: pairs of the busiest ep rank over the mean, in the long run.
        chosen: [slots of the busiest rank]; how likely a token of the stage has a pair there.
    """

    near: float
    far: float
    own_node: float
    other_nodes: float
    reached: float
    hot: float
    chosen: Floats


def spread_of(mesh: StageMesh, placement: Placement, routing: RoutingSource, layer: int) -> Spread:
    """Count a sample of tokens, equally many on each rank."""
    per_rank = max(1, _SAMPLE_TOKENS // mesh.size)
    owned = np.full(mesh.size, per_rank)
    num_tokens = per_rank * mesh.size
    topk_ids = routing.topk_ids(layer, 0, np.zeros_like(owned), owned)
    on_nodes = _lies_evenly(mesh)
    counts = count_dispatch(
        topk_ids, owned, CopyChoice(placement, mesh), mesh, by_node=on_nodes, fan_out=False
    )
    ep_ranks = np.arange(mesh.layout.ep)
    is_own = ep_ranks == mesh.ep_rank[:, None]
    is_near = (mesh.nodes_of_ep_group == mesh.node[:, None]) & ~is_own
    is_far = mesh.nodes_of_ep_group != mesh.node[:, None]
    own_node = other_nodes = 0.0
    if counts.node_rows is not None:
        is_own_node = np.arange(mesh.num_ep_nodes) == (mesh.ep_rank // mesh.ep_per_node)[:, None]
        own_node, other_nodes = (
            float(counts.node_rows[each].sum() / num_tokens) for each in (is_own_node, ~is_own_node)
        )
    pairs = counts.pairs_of_ep_rank
    busiest = int(pairs.argmax())
    held = list(placement.experts_of_rank[busiest])
    return Spread(
        near=float(counts.rows[is_near].sum() / num_tokens),
        far=float(counts.rows[is_far].sum() / num_tokens),
        own_node=own_node,
        other_nodes=other_nodes,
        reached=float(counts.rows.sum() / num_tokens),
        hot=_hotness(pairs, num_tokens * topk_ids.shape[1]),
        chosen=counts.num_tokens_per_expert[busiest, held] / num_tokens,
    )


def sampled_layers(model: ModelConfig, routing: RoutingSource) -> list[int]:
    """A few MoE layers that stand for all, evenly chosen; none twice of the same sample.

    A model without any stands for itself by its first layer.
    """
    of_sample: dict[Hashable, int] = {}
    for layer in range(model.num_hidden_layers):
        if not model.is_dense(layer):
            of_sample.setdefault(routing.sample_of(layer), layer)
    layers = list(of_sample.values()) or [0]
    places = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int)
    return [layers[place] for place in places]


def mean_spread(spreads: Sequence[Spread]) -> Spread:
    """Of some layers of one placement; `chosen` by place in descending order."""
    num_slots = max(len(each.chosen) for each in spreads)
    chosen = np.zeros((len(spreads), num_slots))
    for place, each in enumerate(spreads):
        chosen[place, : len(each.chosen)] = np.sort(each.chosen)[::-1]
    means = {
        each.name: float(np.mean([getattr(spread, each.name) for spread in spreads]))
        for each in fields(Spread)
        if each.name != "chosen"
    }
    return Spread(**means, chosen=chosen.mean(axis=0))


def busiest_of(mean: Reals, num_ranks: int) -> Reals:
    """What the busiest of ranks has if each has `mean` things on average, by chance alone."""
    return mean + largest_normal(num_ranks) * np.sqrt(mean)


def largest_normal(num: int) -> float:
    """The median of the largest of `num` standard normal variables."""
    return NormalDist().inv_cdf(0.5 ** (1 / num)) if num > 1 else 0.0


def _hotness(pairs: np.ndarray, num_pairs: int) -> float:
    """The sample's largest share over the mean, less what chance alone makes of an even one."""
    mean = num_pairs / len(pairs)
    excess = pairs.max() / busiest_of(np.array(mean), len(pairs))
    return float(max(1.0, excess))


def _lies_evenly(mesh: StageMesh) -> bool:
    try:
        return mesh.ep_per_node > 0
    except SpecError:
        return False
