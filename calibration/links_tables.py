"""What the laws of a card's transfers are fitted to: NCCL and a serving engine's own all-reduce
inside a node, DeepEP, and TensorRT-LLM's all-to-all over an NVLink domain.

`message_size` counts elements, of the gathered or scattered total: were they a rank's part, 8 ranks
would move bytes five times faster than their links.

DeepEP. What the tables do not say was inferred and checked against them. Rows are DeepEP's own
tests': scores drawn evenly, 8 of 256 experts (or 288), hidden size 7168, in the normal test at most
4 nodes a token; dispatch in float8 with a scale for every 128 values, combine in bfloat16: at twice
the width, dispatch over 4 nodes would need 94 GB/s of a 50 GB/s NIC. The low-latency test masks 10
random choices and counts all pairs, also those that stay: pairs times row bytes over the recorded
time is the recorded bandwidth, to 0.1 %. The newer tables, of one node, mask none.

H200's rows over nodes are H100's, number for number, so they are no measurement of an H200.

TensorRT-LLM. The table says 8 of 256 experts, hidden size 7168, balanced. That a token is sent once
to each rank that has any of its experts follows from its times: from 8 to 64 ranks they grow by a
fifth, as the ranks reached do, not as bytes to 56 more ranks would. `prepare` tells counts before
every dispatch that is not one-sided. Combine returns one row for each of those ranks; its bytes are
counted here as the flat form has them, a row for every pair, so that the law holds for what it is
looked up by.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from sheet import Card
from tables import Array, Columns, Part, Table, read, without_spikes


@dataclass(frozen=True)
class Loads:
    """Measured transfers of one law, as the links see them; [N] each.

    Attributes:
        nic_bytes, near_bytes: of a rank, in its busier direction; between nodes and inside one.
        shape: rows of equal numbers are left out of a fit together: those of one size.
    """

    ranks: Array
    nodes: Array
    nic_bytes: Array
    near_bytes: Array
    seconds: Array
    shape: np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Source:
    """Rows of one table that differ in size (and number of experts) alone.

    Attributes:
        size: the column that says how much is sent.
        added_us: a column of microseconds that belong to the time too.
        added: a table of other times, of rows of the same sizes, that do.
        ranks, nodes: of the group.
        bytes_of: from `size` to bytes between nodes and inside one.
        shape_unit: what sizes are multiplied by to be those of other sources of the law.
    """

    table: Table
    size: str
    ranks: int
    nodes: int
    bytes_of: Callable[[Array], tuple[Array, Array]]
    added_us: str | None = None
    added: Table | None = None
    shape_unit: int = 1


def read_loads(sources: Sequence[Source], part: Part) -> tuple[Loads, int]:
    """All rows of a law that are for `part`, without spikes where they are to be fitted.

    Returns:
        The loads, and how many rows were dropped as spikes.
    """
    found, num_spikes = [], 0
    for source in sources:
        columns = read(source.table, part)
        seconds = columns["seconds"]
        if source.added_us is not None:
            seconds = seconds + columns[source.added_us] * 1e-6
        if source.added is not None:
            others = read(source.added, part)
            of_size = dict(zip(others[source.size], others["seconds"], strict=True))
            seconds = seconds + [of_size[size] for size in columns[source.size]]
        columns = {
            "size": columns[source.size],
            "num_experts": columns.get("num_experts", np.zeros_like(seconds)),
            "seconds": seconds,
        }
        if part is Part.FITTED:
            columns, dropped = without_spikes(columns, "size")
            num_spikes += dropped
        found.append(_loads(source, columns))
    fields = Loads.__dataclass_fields__
    joined = {name: np.concatenate([getattr(each, name) for each in found]) for name in fields}
    return Loads(**joined), num_spikes


def _loads(source: Source, columns: Columns) -> Loads:
    size = columns["size"]
    nic_bytes, near_bytes = source.bytes_of(size)
    return Loads(
        ranks=np.full_like(size, source.ranks),
        nodes=np.full_like(size, source.nodes),
        nic_bytes=nic_bytes,
        near_bytes=near_bytes,
        seconds=columns["seconds"],
        shape=(size * source.shape_unit).astype(np.int64),
    )


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


_RANKS = {"two_sided": (2, 4, 8, 16, 32, 64), "one_sided": (2, 4, 8, 16, 32)}
_KERNELS = {"two_sided": "NVLinkTwoSided", "one_sided": "NVLinkOneSided"}
_DTYPES = {"two_sided": ("bfloat16", "fp8", "nvfp4"), "one_sided": ("nvfp4",)}
_ITEM_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "nvfp4": 1 / 2 + 1 / 16}


def exchange_sources(card: Card) -> dict[str, list[Source]]:
    """By law, what it is fitted to."""
    return {
        f"{stage}.{variant}.intra_node": [
            _exchange_source(card, stage, variant, dtype, ranks)
            for dtype in (dtypes if stage == "dispatch" else dtypes[:1])
            for ranks in _RANKS[variant]
        ]
        for variant, dtypes in _DTYPES.items()
        for stage in ("dispatch", "combine")
    }


def ranks_reached(ranks: int) -> float:
    """Ranks that have any of a token's experts, on average."""
    elsewhere = _NUM_EXPERTS - _NUM_EXPERTS // ranks
    return ranks * (1 - math.comb(elsewhere, _TOP_K) / math.comb(_NUM_EXPERTS, _TOP_K))


def _exchange_source(card: Card, stage: str, variant: str, dtype: str, ranks: int) -> Source:
    rows, row_bytes = ranks_reached(ranks), _HIDDEN * _ITEM_BYTES[dtype]
    if stage == "combine":
        rows, row_bytes = _TOP_K, _ROW_BYTES["combine"]
    near_bytes = rows * row_bytes * (ranks - 1) / ranks
    table = partial(_exchange_table, card, variant, dtype, ranks)
    has_counts = stage == "dispatch" and variant == "two_sided"
    return Source(
        table(stage),
        size="num_tokens",
        ranks=ranks,
        nodes=1,
        bytes_of=lambda tokens: (0 * tokens, tokens * near_bytes),
        added=table("prepare") if has_counts else None,
    )


def _exchange_table(card: Card, variant: str, dtype: str, ranks: int, stage: str) -> Table:
    return Table(
        f"{card.folder}/comm/trtllm/1.3.0rc10/trtllm_alltoall_perf.parquet",
        {
            "op_name": f"alltoall_{stage}",
            "kernel_source": _KERNELS[variant],
            "moe_dtype": dtype,
            "moe_ep_size": ranks,
        },
        lambda columns: columns["num_tokens"],
    )


_COLLECTIVES = {
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all": "alltoall",
}


def sources_of_laws(card: Card) -> dict[str, list[Source]]:
    """By law, what it is fitted to."""
    nccl = f"{card.folder}/comm/nccl/{card.nccl}/nccl_perf.parquet"
    laws = {
        f"{kind}.intra_node": [
            _inside_node(nccl, {"op_name": name, "nccl_dtype": dtype}, ranks, item_bytes)
            for dtype, item_bytes in (("half", 2), ("int8", 1))
            for ranks in card.measured_ranks
        ]
        for kind, name in _COLLECTIVES.items()
    }
    for library, (engine, version) in card.all_reduces.items():
        path = f"{card.folder}/comm/{engine}/{version}/custom_allreduce_perf.parquet"
        where = {"op_name": "all_reduce", "backend": f"{engine}_graph"}
        laws[f"all_reduce.{library}.intra_node"] = [
            _inside_node(path, where, ranks, 2) for ranks in card.measured_ranks
        ]
    over_nodes = card.deepep_nodes[1:]
    for span, numbers in (("intra_node", card.deepep_nodes[:1]), ("inter_node", over_nodes)):
        for stage in ("dispatch", "combine") if numbers else ():
            laws[f"{stage}.low_latency.{span}"] = [low_latency(card, stage, n) for n in numbers]
            laws[f"{stage}.forwarded.{span}"] = [forwarded(card, stage, n) for n in numbers]
    if over_nodes:
        laws[COUNTS] = [counts(card, nodes) for nodes in over_nodes]
    return laws | (exchange_sources(card) if card.has_nvlink_exchange else {})


def _inside_node(path: str, where: Mapping[str, object], ranks: int, item_bytes: int) -> Source:
    share = item_bytes * (ranks - 1) / ranks * (2 if where["op_name"] == "all_reduce" else 1)
    return Source(
        Table(path, {**where, "num_gpus": ranks}, lambda columns: columns["message_size"]),
        size="message_size",
        ranks=ranks,
        nodes=1,
        bytes_of=lambda elements: (np.zeros_like(elements), elements * share),
        shape_unit=item_bytes,
    )
