"""Expected counts of dispatch: of one rank that stands for all of a stage, over many scenarios.

Means come from a sample of routed tokens, counted as the engine routes them. The busiest rank of a
step has more than its share by chance too: of n ranks, about the expected largest of n normal
variables above the mean (P. Royston, "Expected Normal Order Statistics", Applied Statistics 31,
1982, gives exact ones; the median of the largest serves here). Where tokens of
one prompt choose similar experts, it also has as much more as in a sample of so many prompts. The
two excesses are independent, so their squares add up. Experts with any pair are counted as if
tokens were independent, which is 3 % too many for a prompt of 512 tokens and 256 experts.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist

import numpy as np

from expertlane.balance.copies import CopyChoice
from expertlane.balance.placement import Placement
from expertlane.cost.routing import RoutingSource
from expertlane.cost.step.batch_sizes import Scenarios
from expertlane.cost.step.counts import (
    Axis,
    DispatchCounts,
    Exchange,
    NodeCounts,
    StageMesh,
    computing,
    count_dispatch,
)
from expertlane.cost.step.operation import Floats, Ints, RowsByLink
from expertlane.errors import SpecError
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig

_SAMPLE_TOKENS = 2048  # tokens sampled of a layer
_MOST_LAYERS = 4
_LEAST_TOKENS, _MOST_PARTS = 8, 8
_NUM_PROMPTS, _PROMPT_TOKENS = 256, 32  # sampled where tokens of a prompt are alike


@dataclass(frozen=True, eq=False)
class ExpectedFanOut:
    """Expected rows and pairs of a token in one MoE layer, for `DispatchCounts` per token.

    Attributes:
        top_k, pairs_of_token: choices of a token, and those that compute on average.
        reached, nodes_reached: rows that a token becomes, to ep ranks and to nodes, its own too.
        rows, pairs, node_rows, forwarded: [num_links]; rows sent to other ranks of the groups.
            Those of hierarchical dispatch are 0 where a group lies unevenly on nodes.
        hot: pairs of the busiest ep rank over the mean, in the long run.
        num_slots: slots of the busiest rank.
        chosen: [ep, most slots]; how likely a token of the stage has a pair there; the busiest rank
            and each rank's most popular expert first.
        of_prompts: [sizes]; pairs of the busiest ep rank over the mean in steps of 1, 2, 4 … long
            prompts, where tokens of one choose similar experts; else none.
    """

    top_k: int
    pairs_of_token: float
    reached: float
    nodes_reached: float
    rows: Floats
    pairs: Floats
    node_rows: Floats
    forwarded: Floats
    hot: float
    num_slots: int
    chosen: Floats
    of_prompts: Floats

    @classmethod
    def of_sample(
        cls,
        mesh: StageMesh,
        placement: Placement,
        routing: RoutingSource,
        layer: int,
    ) -> "ExpectedFanOut":
        """Count a sample of a layer's tokens, equally many on each rank."""
        owned = np.full(mesh.size, max(1, _SAMPLE_TOKENS // mesh.size))
        topk_ids = routing.topk_ids(layer, 0, np.zeros_like(owned), owned)
        num_tokens = len(topk_ids)
        choice = CopyChoice(placement, mesh.ep_rank, mesh.nodes_of_ep_group)
        counts = count_dispatch(topk_ids, owned, choice, mesh, by_node=_lies_evenly(mesh))

        def by_link(axis: Axis, rows: Exchange) -> Floats:
            """[num_links]; of a token, to other ranks of a group."""
            assert isinstance(rows, np.ndarray), "of all ranks"
            groups = mesh.groups(axis)
            to_others = rows * groups.is_peer
            near = (to_others * groups.is_near).sum()
            return np.array([near, to_others.sum() - near]) / num_tokens

        nodes_reached, node_rows, forwarded = 0.0, np.zeros(2), np.zeros(2)
        if counts.by_node is not None:
            nodes_reached = counts.by_node.rows_sent.sum() / num_tokens
            node_rows = by_link("ep_inter", counts.by_node.rows)
            forwarded = by_link("ep_intra", counts.by_node.forwarded)
        pairs_of_rank = counts.pairs_of_ep_rank
        per_expert = counts.num_tokens_per_expert[np.argsort(-pairs_of_rank, kind="stable")]
        num_slots = [len(experts) for experts in placement.experts_of_rank]
        return cls(
            top_k=topk_ids.shape[1],
            pairs_of_token=float(pairs_of_rank.sum() / num_tokens),
            reached=counts.rows_sent.sum() / num_tokens,
            nodes_reached=nodes_reached,
            rows=by_link("ep", counts.rows),
            pairs=by_link("ep", counts.pairs),
            node_rows=node_rows,
            forwarded=forwarded,
            hot=_hotness(pairs_of_rank, int(pairs_of_rank.sum())),
            num_slots=num_slots[int(pairs_of_rank.argmax())],
            chosen=-np.sort(-per_expert, axis=1)[:, : max(num_slots)] / num_tokens,
            of_prompts=_fullest_by_prompts(choice, routing, layer, mesh),
        )

    @classmethod
    def mean(cls, layers: Sequence["ExpectedFanOut"]) -> "ExpectedFanOut":
        """The mean of some layers of one placement, or of placements with as many slots."""
        most = max(each.chosen.shape[1] for each in layers)
        of_layers = np.zeros((len(layers), layers[0].chosen.shape[0], most))
        for chosen, each in zip(of_layers, layers, strict=True):
            chosen[:, : each.chosen.shape[1]] = each.chosen
        means = {
            field.name: np.mean([getattr(each, field.name) for each in layers], axis=0)
            for field in fields(cls)
            if field.name not in ("top_k", "num_slots", "chosen")
        }
        num_slots = max(each.num_slots for each in layers)
        top_k = layers[0].top_k
        return cls(**means, top_k=top_k, num_slots=num_slots, chosen=of_layers.mean(axis=0))


def _fullest_by_prompts(
    choice: CopyChoice, routing: RoutingSource, layer: int, mesh: StageMesh
) -> Floats:
    """`of_prompts` of `ExpectedFanOut`, from a sample of prompts."""
    if not routing.likeness:
        return np.zeros(0)
    ep, num, length = mesh.layout.ep, _NUM_PROMPTS, _PROMPT_TOKENS
    rank = np.arange(num * length) * mesh.size // (num * length)
    owned = np.bincount(rank, minlength=mesh.size)
    ids = routing.topk_ids(layer, 0, np.zeros_like(owned), owned, np.full(num, length))
    prompt = np.arange(num).repeat(length)
    ids, token = computing(ids)
    at = prompt[token] * ep + choice.ep_ranks(ids, rank[token[:, 0]])
    loads = np.bincount(at.ravel(), minlength=num * ep).reshape(num, ep)
    fullest = []
    while len(loads) >= _MOST_PARTS:
        fullest.append((loads.max(axis=1) / loads.mean(axis=1)).mean())
        loads = loads[: len(loads) // 2] + loads[len(loads) // 2 :]
    return np.array(fullest)


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


def mean_counts(
    fan_out: ExpectedFanOut, part: Scenarios, layout: Layout, *, by_node: bool = False
) -> DispatchCounts:
    """Counts of a rank with a mean load; sampled counts of all ranks are as much on average."""
    tokens = part.stage_tokens.astype(np.float64)
    has_any = _has_any(fan_out.chosen.ravel(), tokens)
    pairs = tokens * (fan_out.pairs_of_token / layout.ep)
    rows = tokens * (fan_out.reached / layout.ep)
    active = has_any.sum(axis=1) / layout.ep
    own = rows, pairs, rows / layout.etp, pairs / layout.etp, active
    return _counts(fan_out, part, layout, own, np.ones(part.size), by_node)


def busiest_counts(
    fan_out: ExpectedFanOut,
    part: Scenarios,
    layout: Layout,
    *,
    by_node: bool = False,
    num_new: Ints | None = None,
) -> DispatchCounts:
    """Counts of the rank whose experts have most to do, rounded up: it has whole pairs.

    Args:
        num_new: [S]; tokens of each sequence, if not as the part has it.
    """
    tokens = part.stage_tokens.astype(np.float64)
    mean = tokens * (fan_out.pairs_of_token / layout.ep)
    pairs = np.where(mean > 0, _busiest_of(mean * fan_out.hot, layout.ep), 0)
    if len(fan_out.of_prompts):
        length = part.num_new if num_new is None else num_new
        pairs = _with_prompts(fan_out, pairs, mean, tokens, length)
    pairs = np.minimum(pairs, tokens * min(fan_out.top_k, fan_out.num_slots))
    hot = np.divide(pairs, mean, out=np.ones_like(mean), where=mean > 0)
    rows = np.minimum(hot * tokens * (fan_out.reached / layout.ep), pairs)
    has_any = _has_any(fan_out.chosen[0], tokens)
    deviation = np.sqrt((has_any * (1 - has_any)).sum(axis=1))
    active = has_any.sum(axis=1) + largest_normal(layout.ep) * deviation
    active = np.minimum(active, fan_out.num_slots)
    rows, pairs = np.ceil(rows), np.ceil(pairs)
    own = rows, pairs, np.ceil(rows / layout.etp), np.ceil(pairs / layout.etp), np.ceil(active)
    return _counts(fan_out, part, layout, own, hot, by_node)


def _with_prompts(
    fan_out: ExpectedFanOut, pairs: Floats, mean: Floats, tokens: Floats, num_new: Ints
) -> Floats:
    """[S]; pairs of the busiest rank, where tokens of a prompt choose similar experts.

    Of sequences with n tokens, n (n - 1) of the n² ordered pairs are of two different tokens; only
    these are similar. The excess of more prompts than were sampled falls with their root.

    Args:
        pairs, mean: [S]; as they would be of independent tokens, of the busiest and on average.
        tokens: [S]; of the stage.
        num_new: [S]; n.
    """
    num_new = np.maximum(num_new, 1)
    num_prompts, num_sizes = np.maximum(tokens / num_new, 1), len(fan_out.of_prompts)
    over_mean = np.interp(np.log2(num_prompts), np.arange(num_sizes), fan_out.of_prompts)
    excess = mean * np.maximum(over_mean - fan_out.hot, 0) * np.sqrt(1 - 1 / num_new)
    excess /= np.sqrt(np.maximum(num_prompts / 2 ** (num_sizes - 1), 1))
    by_chance = np.maximum(pairs - mean * fan_out.hot, 0)
    busiest: Floats = pairs + (np.hypot(by_chance, excess) - by_chance)
    return busiest


def _counts(
    fan_out: ExpectedFanOut,
    part: Scenarios,
    layout: Layout,
    own: tuple[Floats, Floats, Floats, Floats, Floats],
    hot: Floats,
    by_node: bool,
) -> DispatchCounts:
    """The counts that follow from the rank's own rows and pairs.

    Args:
        own: [S] each; rows and pairs that the rank computes, rows and pairs that arrive, and active
            experts.
        hot: [S]; traffic of the rank's links over the mean.
    """
    rows, pairs, rows_arriving, pairs_arriving, active = own
    owned = part.owned.astype(np.float64)

    def sent(of_token: Floats) -> RowsByLink:
        return RowsByLink(*(owned * hot * each for each in of_token))

    of_nodes = None
    if by_node:
        node_rows = owned * fan_out.nodes_reached
        handed_on = fan_out.forwarded / fan_out.reached
        of_nodes = NodeCounts(
            rows_sent=node_rows,
            rows=sent(fan_out.node_rows),
            rows_arriving=node_rows,
            rows_forwarded=rows_arriving,
            forwarded=RowsByLink(*(each * rows_arriving for each in handed_on)),
        )
    return DispatchCounts(
        stage_tokens=part.stage_tokens,
        rows_sent=owned * fan_out.reached,
        rows=sent(fan_out.rows),
        pairs=sent(fan_out.pairs),
        rows_arriving=rows_arriving,
        pairs_arriving=pairs_arriving,
        capacity_arriving=np.maximum(part.stage_tokens / layout.etp, rows_arriving),
        rows_computed=rows,
        pairs_computed=pairs,
        active_experts=active,
        by_node=of_nodes,
    )


def _has_any(chosen: Floats, stage_tokens: Floats) -> Floats:
    """[S, slots]; how likely any of the stage's tokens has a pair in a slot."""
    has_any: Floats = 1 - (1 - np.minimum(chosen, 1)) ** stage_tokens[:, None]
    return has_any


def _busiest_of(mean: Floats, num_ranks: int) -> Floats:
    """The largest of `num_ranks` independent counts with this mean: the excess of chance alone."""
    return mean + largest_normal(num_ranks) * np.sqrt(mean)


def largest_normal(num: int) -> float:
    """The median of the largest of `num` standard normal variables."""
    return NormalDist().inv_cdf(0.5 ** (1 / num)) if num > 1 else 0.0


def _hotness(pairs: Ints, num_pairs: int) -> float:
    """The sample's largest load over what chance alone gives the busiest rank; 1 at least."""
    mean = num_pairs / len(pairs)
    excess = pairs.max() / _busiest_of(np.array(mean), len(pairs))
    return float(max(1.0, excess))


def _lies_evenly(mesh: StageMesh) -> bool:
    try:
        return mesh.ep_per_node > 0
    except SpecError:
        return False
