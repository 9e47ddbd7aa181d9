"""Measured transfers: read, split into what may be fitted and what judges, cleaned.

From the package aiconfigurator-core 0.12.0: NCCL 2.29.2 and a custom all-reduce inside a node, and
DeepEP (low-latency and normal kernels) on 1, 2, 4 and 8 nodes of 8 H100s.

What the tables do not say was inferred and checked against them. `message_size` counts elements,
of the gathered or scattered total: were they a rank's part, 8 ranks would move bytes five times
faster than their links. DeepEP's rows are its own tests': scores drawn evenly, 8 of 256 experts (or
288), hidden size 7168, in the normal test at most 4 nodes a token; dispatch in float8 with a scale
for every 128 values, combine in bfloat16: at twice the width, dispatch over 4 nodes would need
94 GB/s of a 50 GB/s NIC. The low-latency test masks 10 random choices, and counts all pairs, also
those that stay: pairs times row bytes over the recorded time is the recorded bandwidth, to 0.1 %
(`recorded_bandwidth_gap`).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

GPUS_PER_NODE = 8
JUDGING_NODES = 8  # DeepEP rows on this many nodes judge
_SPIKE = 1.1  # times slower than a larger message

_ROW_BYTES = {"dispatch": 7168 + 7168 // 128 * 4, "combine": 7168 * 2}
_LOW_LATENCY_HEADER = {"dispatch": 16, "combine": 0}
_MASKED_CHOICES = 10
_NORMAL_SMS = 20  # DeepEP's own default, and the only number of SMs measured on one node


@dataclass(frozen=True)
class Sample:
    """One measured transfer.

    Attributes:
        law: the surface it belongs to.
        series: rows of one series differ in size alone.
        size: as in the table; a message size or a number of tokens.
        nic_bytes, near_bytes: of a rank, in its busier direction; between nodes and inside one.
    """

    law: str
    series: tuple[Any, ...]
    size: int
    ranks: int
    nodes: int
    nic_bytes: float
    near_bytes: float
    seconds: float


@dataclass(frozen=True)
class Split:
    """Rows by what they are for: `largest` and `far` (8 nodes) only judge."""

    fitted: list[Sample]
    largest: list[Sample]
    far: list[Sample]
    num_spikes: int


def read_split(folder: Path, *, judge: bool = False) -> dict[str, Split]:
    """By law. Without `judge`, rows that judge are gone before anything else sees them.

    Args:
        folder: `systems/data/h100_sxm/comm`.
    """
    by_law = defaultdict(list)
    for sample in _read(folder):
        by_law[sample.law].append(sample)
    return {law: _split(samples, judge) for law, samples in by_law.items()}


def _split(samples: Sequence[Sample], judge: bool) -> Split:
    far = [each for each in samples if each.nodes == JUDGING_NODES]
    by_series = defaultdict(list)
    for each in samples:
        if each.nodes != JUDGING_NODES:
            by_series[each.series].append(each)
    fitted: list[Sample] = []
    largest: list[Sample] = []
    num_spikes = 0
    for series in by_series.values():
        sizes = sorted({each.size for each in series})
        cut = sizes[len(sizes) - math.ceil(len(sizes) / 10) - 1]
        largest += [each for each in series if each.size > cut]
        kept = _without_spikes([each for each in series if each.size <= cut])
        num_spikes += sum(each.size <= cut for each in series) - len(kept)
        fitted += kept
    return Split(fitted, largest if judge else [], far if judge else [], num_spikes)


def _without_spikes(series: Sequence[Sample]) -> list[Sample]:
    """Without rows that are much slower than a larger message of their series."""
    kept = []
    fastest_after = math.inf
    for each in sorted(series, key=lambda each: each.size, reverse=True):
        if each.seconds <= _SPIKE * fastest_after:
            kept.append(each)
        fastest_after = min(fastest_after, each.seconds)
    return kept[::-1]


def _read(folder: Path) -> Iterable[Sample]:
    yield from _nccl(folder / "nccl/2.29.2/nccl_perf.parquet")
    sglang = folder / "sglang/0.5.6.post2"
    yield from _custom(sglang / "custom_allreduce_perf.parquet")
    yield from _low_latency(sglang / "wideep_deepep_ll_perf.parquet")
    yield from _normal(sglang / "wideep_deepep_normal_perf.parquet")


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _nccl(path: Path) -> Iterable[Sample]:
    for row in _rows(path):
        kind = {"alltoall": "all_to_all"}.get(row["op_name"], row["op_name"])
        itemsize = {"half": 2, "int8": 1}[row["nccl_dtype"]]
        yield _inside(f"{kind}.intra_node", row, row["nccl_dtype"], itemsize)


def _custom(path: Path) -> Iterable[Sample]:
    for row in _rows(path):
        yield _inside("all_reduce.custom.intra_node", row, row["allreduce_dtype"], 2)


def _inside(law: str, row: dict[str, Any], dtype: str, itemsize: int) -> Sample:
    ranks = row["num_gpus"]
    share = (ranks - 1) / ranks * (2 if law.startswith("all_reduce") else 1)
    return Sample(
        law=law,
        series=(law, dtype, ranks),
        size=row["message_size"],
        ranks=ranks,
        nodes=1,
        nic_bytes=0,
        near_bytes=row["message_size"] * itemsize * share,
        seconds=row["latency"] * 1e-3,
    )


def _low_latency(path: Path) -> Iterable[Sample]:
    for row in _rows(path):
        nodes = row["node_num"]
        choices = row["num_token"] * row["num_topk"]
        pairs = choices * (1 - 1 / choices) ** _MASKED_CHOICES
        for stage in ("dispatch", "combine"):
            sent = pairs * (_ROW_BYTES[stage] + _LOW_LATENCY_HEADER[stage])
            yield Sample(
                law=f"{stage}.low_latency.{_span(nodes)}",
                series=(stage, nodes, row["num_experts"]),
                size=row["num_token"],
                ranks=nodes * GPUS_PER_NODE,
                nodes=nodes,
                nic_bytes=sent * (nodes - 1) / nodes,
                near_bytes=sent * (GPUS_PER_NODE - 1) / (nodes * GPUS_PER_NODE),
                seconds=row[f"{stage}_avg_t_us"] * 1e-6,
            )


def recorded_bandwidth_gap(folder: Path) -> float:
    """The median of |pairs · row bytes / (recorded time · recorded bandwidth) − 1|."""
    gaps = []
    path = folder / "sglang/0.5.6.post2/wideep_deepep_ll_perf.parquet"
    rows = [row for row in _rows(path) if row["node_num"] != JUDGING_NODES]
    cut = np.quantile([row["num_token"] for row in rows], 0.9)
    for row in rows:
        choices = row["num_token"] * row["num_topk"]
        pairs = choices * (1 - 1 / choices) ** _MASKED_CHOICES
        if row["num_token"] < cut:
            for stage in ("dispatch", "combine"):
                sent = pairs * (_ROW_BYTES[stage] + _LOW_LATENCY_HEADER[stage])
                recorded = row[f"{stage}_bandwidth_gbps"] * 1e3 * row[f"{stage}_avg_t_us"]
                gaps.append(abs(sent / recorded - 1))
    return float(np.median(gaps))


def _normal(path: Path) -> Iterable[Sample]:
    for row in _rows(path):
        if row["dispatch_sms"] != _NORMAL_SMS:
            continue
        nodes, tokens = row["node_num"], row["num_token"]
        ranks = nodes * GPUS_PER_NODE
        nodes_reached, ranks_reached = copies(nodes, row["num_topk"], row["num_experts"])
        near = ranks_reached * (GPUS_PER_NODE - 1) / GPUS_PER_NODE
        for stage in ("dispatch", "combine"):
            row_bytes = _ROW_BYTES[stage] * tokens
            transmit, notify = row[f"{stage}_transmit_us"], row[f"{stage}_notify_us"]
            sample = Sample(
                law=f"{stage}.forwarded.{_span(nodes)}",
                series=(stage, nodes),
                size=tokens,
                ranks=ranks,
                nodes=nodes,
                nic_bytes=row_bytes * nodes_reached * (nodes - 1) / nodes,
                near_bytes=row_bytes * near,
                seconds=(transmit + (notify if stage == "combine" else 0)) * 1e-6,
            )
            yield sample
            if stage == "dispatch" and nodes > 1:
                yield replace(
                    sample,
                    law="counts.inter_node",
                    series=("counts", nodes),
                    nic_bytes=0,
                    near_bytes=0,
                    seconds=notify * 1e-6,
                )


def _span(nodes: int) -> str:
    return "inter_node" if nodes > 1 else "intra_node"


@cache
def copies(nodes: int, top_k: int, num_experts: int) -> tuple[float, float]:
    """Nodes and ranks that a token reaches on average, by drawing as DeepEP's normal test does."""
    random = np.random.default_rng(0)
    scores = np.abs(random.standard_normal((8192, num_experts)))
    of_node = scores.reshape(len(scores), nodes, -1).max(axis=2)
    is_allowed = of_node >= np.sort(of_node, axis=1)[:, -min(nodes, 4)][:, None]
    scores = np.where(np.repeat(is_allowed, num_experts // nodes, axis=1), scores, -1)
    chosen = np.argsort(-scores, axis=1)[:, :top_k]
    return _num_distinct(chosen, num_experts // nodes), _num_distinct(
        chosen, num_experts // (nodes * GPUS_PER_NODE)
    )


def _num_distinct(chosen: np.ndarray[Any, Any], experts_each: int) -> float:
    places = np.sort(chosen // experts_each, axis=1)
    return 1 + float((np.diff(places, axis=1) > 0).sum(axis=1).mean())
