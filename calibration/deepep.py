"""DeepEP's measured dispatches and combines.

What the tables do not say was inferred and checked against them. Rows are DeepEP's own tests':
scores drawn evenly, 8 of 256 experts (or 288), hidden size 7168, in the normal test at most 4 nodes
a token; dispatch in float8 with a scale for every 128 values, combine in bfloat16: at twice the
width, dispatch over 4 nodes would need 94 GB/s of a 50 GB/s NIC. The low-latency test masks 10
random choices and counts all pairs, also those that stay: pairs times row bytes over the recorded
time is the recorded bandwidth, to 0.1 %. The newer tables, of one node, mask none.

H200's rows over nodes are H100's, number for number, so they are no measurement of an H200.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from loads import Source
from sheet import Card
from tables import Array, Table

_FAR_NODES = 8  # rows on this many nodes are for judging alone
COUNTS = "counts.inter_node"  # the exchange of counts; no law of its own
_OVER_NODES, _ON_ONE_NODE = "0.5.6.post2", "0.5.12"

_HIDDEN = 7168
_ROW_BYTES = {"dispatch": _HIDDEN + _HIDDEN // 128 * 4, "combine": _HIDDEN * 2}
_LOW_LATENCY_HEADER = {"dispatch": 16, "combine": 0}
_MASKED_CHOICES = 10
_TOP_K, _NUM_EXPERTS = 8, 256
_NORMAL_SMS = 20  # DeepEP's own default, and the only number of SMs measured on one node


def far_sources_of_laws(card: Card) -> dict[str, list[Source]]:
    """By law, rows over more nodes than any that was fitted: for judging alone."""
    if not _spans_nodes(card):
        return {}
    return {
        f"{stage}.{variant}.inter_node": [source(card, stage, _FAR_NODES)]
        for stage in ("dispatch", "combine")
        for variant, source in (("low_latency", low_latency), ("forwarded", forwarded))
    }


def low_latency(card: Card, stage: str, nodes: int) -> Source:
    """Every pair is sent to the rank of its expert."""
    row_bytes = _ROW_BYTES[stage] + _LOW_LATENCY_HEADER[stage]
    per_node, masked = card.measured_ranks[-1], _masked_choices(card)
    ranks = nodes * per_node

    def bytes_of(tokens: Array) -> tuple[Array, Array]:
        choices = tokens * _TOP_K
        sent = choices * (1 - 1 / choices) ** masked * row_bytes
        return sent * (nodes - 1) / nodes, sent * (per_node - 1) / ranks

    return Source(
        _table(card, "ll", {"node_num": nodes}, f"{stage}_avg_t_us"),
        size="num_token",
        ranks=ranks,
        nodes=nodes,
        bytes_of=bytes_of,
    )


def forwarded(card: Card, stage: str, nodes: int) -> Source:
    """A copy for every node reached, and inside it one for every rank reached."""
    per_node = card.measured_ranks[-1]
    nodes_reached, ranks_reached = copies(nodes, per_node)
    nic = _ROW_BYTES[stage] * nodes_reached * (nodes - 1) / nodes
    near = _ROW_BYTES[stage] * ranks_reached * (per_node - 1) / per_node
    return _normal(
        card,
        nodes,
        f"{stage}_transmit_us",
        lambda tokens: (tokens * nic, tokens * near),
        # Before a dispatch it exchanges counts, which is a transfer of its own.
        added_us="combine_notify_us" if stage == "combine" else None,
    )


def counts(card: Card, nodes: int) -> Source:
    """The exchange of counts before a dispatch over nodes."""
    return _normal(
        card,
        nodes,
        "dispatch_notify_us",
        lambda tokens: (np.zeros_like(tokens), np.zeros_like(tokens)),
    )


def _normal(
    card: Card,
    nodes: int,
    latency: str,
    bytes_of: Callable[[Array], tuple[Array, Array]],
    added_us: str | None = None,
) -> Source:
    where = {"node_num": nodes, "dispatch_sms": _NORMAL_SMS}
    return Source(
        _table(card, "normal", where, latency),
        size="num_token",
        ranks=nodes * card.measured_ranks[-1],
        nodes=nodes,
        bytes_of=bytes_of,
        added_us=added_us,
    )


def _masked_choices(card: Card) -> int:
    return _MASKED_CHOICES if _spans_nodes(card) else 0


def _spans_nodes(card: Card) -> bool:
    return len(card.deepep_nodes) > 1


def _table(card: Card, mode: str, where: Mapping[str, object], latency: str) -> Table:
    """Of the older tables all rows are of one model's sizes; so are these of the newer ones."""
    version = _OVER_NODES if _spans_nodes(card) else _ON_ONE_NODE
    path = f"{card.folder}/comm/sglang/{version}/wideep_deepep_{mode}_perf.parquet"
    if not _spans_nodes(card):
        sizes = {"hidden_size": _HIDDEN, "num_topk": _TOP_K, "num_experts": _NUM_EXPERTS}
        where = {**where, **sizes}
    return Table(path, where, lambda columns: columns["num_token"], 1e-6, latency)


@cache
def copies(nodes: int, ranks_per_node: int) -> tuple[float, float]:
    """Nodes and ranks that a token reaches on average, by drawing as DeepEP's normal test does."""
    random = np.random.default_rng(0)
    scores = np.abs(random.standard_normal((8192, _NUM_EXPERTS)))
    of_node = scores.reshape(len(scores), nodes, -1).max(axis=2)
    is_allowed = of_node >= np.sort(of_node, axis=1)[:, -min(nodes, 4)][:, None]
    scores = np.where(np.repeat(is_allowed, _NUM_EXPERTS // nodes, axis=1), scores, -1)
    chosen = np.argsort(-scores, axis=1)[:, :_TOP_K]
    of_rank = _NUM_EXPERTS // (nodes * ranks_per_node)
    return _num_distinct(chosen // (_NUM_EXPERTS // nodes)), _num_distinct(chosen // of_rank)


def _num_distinct(places: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """The mean over rows."""
    return 1 + float((np.diff(np.sort(places, axis=1), axis=1) > 0).sum(axis=1).mean())
