"""The least seconds an operation can take, from its sizes and a datasheet, by kind.

Two legs: FLOPs over the peak and bytes over the bandwidth, whichever is longer. What a device
really takes is this times a fitted correction, which is looked up at sizes derived here too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from expertlane.cost.laws.profile import Device
from expertlane.cost.number_types import ITEM_BYTES, WEIGHT_BYTES
from expertlane.cost.step.operation import ATTENTION, Floats, Kind, flops_of
from expertlane.errors import SpecError

Sizes = Mapping[str, Floats | float]

_Work = tuple[Floats | float, dict[str, Floats | float]]  # bytes, and `Roofline.at`


@dataclass(frozen=True, eq=False)
class Roofline:
    """An operation against a device's peaks.

    Attributes:
        seconds: [R]; 0 where there is nothing to do.
        at: sizes by which a law may be looked up, 1 or more where there is anything to do.
    """

    seconds: Floats
    at: Sizes


def roofline(
    device: Device, kind: Kind, dtype: str, sizes: Sizes, floor_s: float = 0.0
) -> Roofline:
    """The roofline of an operation.

    Args:
        dtype: number type of the weights; for attention, of keys and values.
        sizes: the sizes that `SIZES` names for the kind; each [R] or one for all.
        floor_s: fixed time of an operation, however small it is.

    Raises:
        SpecError: the datasheet has no figure for the type.
    """
    num_bytes, at = _WORK[kind](sizes, _item_bytes(kind, dtype))
    memory_s = np.asarray(num_bytes) / device.memory_bytes_per_s
    if kind is Kind.MEMORY:
        return Roofline(np.where(memory_s > 0, memory_s + floor_s, 0.0), at)
    compute_s = np.asarray(flops_of(kind, sizes)) / peak_flops_per_s(device, kind, dtype)
    busy_s = np.maximum(compute_s, memory_s) + floor_s
    return Roofline(busy_s if compute_s.all() else np.where(compute_s > 0, busy_s, 0.0), at)


def moved_bytes(kind: Kind, dtype: str, sizes: Sizes) -> Floats | float:
    """The least bytes that an operation reads and writes."""
    return _WORK[kind](sizes, _item_bytes(kind, dtype))[0]


def _item_bytes(kind: Kind, dtype: str) -> float:
    return ITEM_BYTES[dtype] if kind in ATTENTION else WEIGHT_BYTES[dtype]


def looked_up_by(kind: Kind, sizes: Sizes) -> Sizes:
    """The sizes by which a law of the kind may be looked up, as `Roofline.at` has them."""
    return _WORK[kind](sizes, 1)[1]


def peak_flops_per_s(device: Device, kind: Kind, dtype: str) -> float:
    """The dense peak that a kind of operation computes at.

    Raises:
        SpecError: the datasheet has none.
    """
    is_float8 = kind in ATTENTION and dtype == "float8"
    computes_in = device.float8_attention if is_float8 else dtype
    peak = device.flops_per_s.get(computes_in)
    if peak is None:
        known = ", ".join(device.flops_per_s)
        raise SpecError(f"{device.name} has no peak for {computes_in}, only for {known}")
    return peak


def _gemm(sizes: Sizes, item: float) -> _Work:
    m, n, k = sizes["m"], sizes["n"], sizes["k"]
    return item * (n * k + m * k) + max(item, 2) * m * n, {"m": m, "n": n, "k": k}


def _experts(sizes: Sizes, item: float) -> _Work:
    pairs, active, hidden = sizes["pairs"], sizes["active"], sizes["hidden"]
    inner, matrices = sizes["inner"], sizes["matrices"]
    activations = pairs * (2 * hidden + matrices * inner)
    at = {
        "pairs_per_expert": pairs / np.maximum(active, 1),
        "active": active,
        "hidden": hidden,
        "inner": inner,
    }
    return item * active * (hidden * inner * matrices) + max(item, 2) * activations, at


def _attention(sizes: Sizes, item: float) -> _Work:
    is_prefill, is_latent = "tokens" in sizes, "key_dim" in sizes
    queries, heads = sizes["tokens" if is_prefill else "seqs"], sizes["heads"]
    positions = sizes["positions"]
    if is_latent:
        key_dim, both = sizes["key_dim"], sizes["key_dim"] + sizes["value_dim"]
        num_bytes = item * positions * key_dim + max(item, 2) * queries * heads * both
        widths = {"key_dim": key_dim}
    else:
        head_dim, kv_heads = sizes["head_dim"], sizes["kv_heads"]
        rows = item * positions * kv_heads + max(item, 2) * queries * heads
        num_bytes = 2 * head_dim * rows
        widths = {"group": heads / kv_heads, "head_dim": head_dim}
    if is_prefill:
        keys_per_query = sizes["query_key_pairs"] / np.maximum(queries, 1)
        at = {"keys_per_query": keys_per_query, "query_heads": queries * heads}
    elif is_latent:
        at = {"seqs": queries, "heads": heads}
    else:
        at = {"seq_kv_heads": queries * kv_heads}
    if not is_prefill:
        at["positions_per_seq"] = positions / np.maximum(queries, 1)
    return num_bytes, at | widths


def _memory(sizes: Sizes, item: float) -> _Work:
    return sizes["bytes"], {"bytes": sizes["bytes"]}


_WORK: dict[Kind, Callable[[Sizes, float], _Work]] = {
    Kind.GEMM: _gemm,
    Kind.EXPERTS: _experts,
    **dict.fromkeys(ATTENTION, _attention),
    Kind.MEMORY: _memory,
}
