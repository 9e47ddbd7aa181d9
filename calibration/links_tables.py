"""Measured transfers: NCCL and a custom all-reduce inside a node, and DeepEP on 1 … 8 nodes.

What the tables do not say was inferred and checked against them. `message_size` counts elements, of
the gathered or scattered total: were they a rank's part, 8 ranks would move bytes five times faster
than their links. DeepEP's rows are its own tests': scores drawn evenly, 8 of 256 experts (or 288),
hidden size 7168, in the normal test at most 4 nodes a token; dispatch in float8 with a scale for
every 128 values, combine in bfloat16: at twice the width, dispatch over 4 nodes would need 94 GB/s
of a 50 GB/s NIC. The low-latency test masks 10 random choices and counts all pairs, also those that
stay: pairs times row bytes over the recorded time is the recorded bandwidth, to 0.1 %.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from cleaning import without_spikes
from tables import Array, Columns, Part, Table, read

GPUS_PER_NODE = 8
FITTED_NODES = (1, 2, 4)
FAR_NODES = 8  # DeepEP rows on this many nodes are for judging alone
COUNTS = "counts.inter_node"  # DeepEP's exchange of counts; no law of its own

_NCCL = "comm/nccl/2.29.2/nccl_perf.parquet"
_SGLANG = "comm/sglang/0.5.6.post2/{}_perf.parquet"
_CUSTOM = _SGLANG.format("custom_allreduce")
_LOW_LATENCY = _SGLANG.format("wideep_deepep_ll")
_NORMAL = _SGLANG.format("wideep_deepep_normal")

_ROW_BYTES = {"dispatch": 7168 + 7168 // 128 * 4, "combine": 7168 * 2}
_LOW_LATENCY_HEADER = {"dispatch": 16, "combine": 0}
_MASKED_CHOICES = 10
_TOP_K, _NUM_EXPERTS = 8, 256
_NORMAL_SMS = 20  # DeepEP's own default, and the only number of SMs measured on one node


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


def sources_of_laws() -> dict[str, list[Source]]:
    """By law, what it is fitted to."""
    laws = {
        f"{kind}.intra_node": [
            _inside_node(_NCCL, {"op_name": name, "nccl_dtype": dtype}, ranks, item_bytes)
            for dtype, item_bytes in (("half", 2), ("int8", 1))
            for ranks in (2, 4, 8)
        ]
        for kind, name in {
            "all_gather": "all_gather",
            "reduce_scatter": "reduce_scatter",
            "all_reduce": "all_reduce",
            "all_to_all": "alltoall",
        }.items()
    }
    laws["all_reduce.custom.intra_node"] = [
        _inside_node(_CUSTOM, {"op_name": "all_reduce"}, ranks, 2) for ranks in (2, 4, 8)
    ]
    for span, numbers in (("intra_node", (1,)), ("inter_node", FITTED_NODES[1:])):
        for stage in ("dispatch", "combine"):
            laws[f"{stage}.low_latency.{span}"] = [_low_latency(stage, n) for n in numbers]
            laws[f"{stage}.forwarded.{span}"] = [_forwarded(stage, n) for n in numbers]
    laws[COUNTS] = [_counts(nodes) for nodes in FITTED_NODES[1:]]
    return laws


def far_sources_of_laws() -> dict[str, list[Source]]:
    """By law, rows over more nodes than any that was fitted: for judging alone."""
    return {
        f"{stage}.{variant}.inter_node": [source(stage, FAR_NODES)]
        for stage in ("dispatch", "combine")
        for variant, source in (("low_latency", _low_latency), ("forwarded", _forwarded))
    }


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


def _num_tokens(columns: Columns) -> Array:
    return columns["num_token"]


def _low_latency(stage: str, nodes: int) -> Source:
    """Every pair is sent to the rank of its expert."""
    row_bytes = _ROW_BYTES[stage] + _LOW_LATENCY_HEADER[stage]
    ranks = nodes * GPUS_PER_NODE

    def bytes_of(tokens: Array) -> tuple[Array, Array]:
        choices = tokens * _TOP_K
        sent = choices * (1 - 1 / choices) ** _MASKED_CHOICES * row_bytes
        return sent * (nodes - 1) / nodes, sent * (GPUS_PER_NODE - 1) / ranks

    return Source(
        Table(_LOW_LATENCY, {"node_num": nodes}, _num_tokens, 1e-6, f"{stage}_avg_t_us"),
        size="num_token",
        ranks=ranks,
        nodes=nodes,
        bytes_of=bytes_of,
    )


def _forwarded(stage: str, nodes: int) -> Source:
    """A copy for every node reached, and inside it one for every rank reached."""
    nodes_reached, ranks_reached = copies(nodes)
    nic = _ROW_BYTES[stage] * nodes_reached * (nodes - 1) / nodes
    near = _ROW_BYTES[stage] * ranks_reached * (GPUS_PER_NODE - 1) / GPUS_PER_NODE
    return _normal(
        nodes,
        f"{stage}_transmit_us",
        lambda tokens: (tokens * nic, tokens * near),
        # Before a dispatch it exchanges counts, which is a transfer of its own.
        added_us="combine_notify_us" if stage == "combine" else None,
    )


def _counts(nodes: int) -> Source:
    return _normal(
        nodes, "dispatch_notify_us", lambda tokens: (np.zeros_like(tokens), np.zeros_like(tokens))
    )


def _normal(
    nodes: int,
    latency: str,
    bytes_of: Callable[[Array], tuple[Array, Array]],
    added_us: str | None = None,
) -> Source:
    where = {"node_num": nodes, "dispatch_sms": _NORMAL_SMS}
    return Source(
        Table(_NORMAL, where, _num_tokens, 1e-6, latency),
        size="num_token",
        ranks=nodes * GPUS_PER_NODE,
        nodes=nodes,
        bytes_of=bytes_of,
        added_us=added_us,
    )


@cache
def copies(nodes: int) -> tuple[float, float]:
    """Nodes and ranks that a token reaches on average, by drawing as DeepEP's normal test does."""
    random = np.random.default_rng(0)
    scores = np.abs(random.standard_normal((8192, _NUM_EXPERTS)))
    of_node = scores.reshape(len(scores), nodes, -1).max(axis=2)
    is_allowed = of_node >= np.sort(of_node, axis=1)[:, -min(nodes, 4)][:, None]
    scores = np.where(np.repeat(is_allowed, _NUM_EXPERTS // nodes, axis=1), scores, -1)
    chosen = np.argsort(-scores, axis=1)[:, :_TOP_K]
    of_rank = _NUM_EXPERTS // (nodes * GPUS_PER_NODE)
    return _num_distinct(chosen // (_NUM_EXPERTS // nodes)), _num_distinct(chosen // of_rank)


def _num_distinct(places: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """The mean over rows."""
    return 1 + float((np.diff(np.sort(places, axis=1), axis=1) > 0).sum(axis=1).mean())
