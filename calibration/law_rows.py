"""Tables as rows of laws: which columns are the sizes that each kind is looked up by."""

from collections.abc import Mapping

import numpy as np
from compute import Sizes, Source
from skew import busiest_rank
from tables import Array, Columns, Table

ATTENTION = "{}/attention/{}/{}_attention_perf.parquet"
_HEADS = ("num_heads", "num_key_value_heads", "head_dim")
LATENT = {"key_dim": 576.0, "value_dim": 512.0}  # DeepSeek's rank 512 and rotated 64
WIDENED = {"key_dim": 192.0, "value_dim": 128.0}  # the same, keys and values of every head apart


def gemm_rows(path: str, where: Mapping[str, object]) -> Source:
    """Products."""
    return Source(
        Table(path, where, lambda c: c["m"] * c["n"] * c["k"]),
        lambda c: {"m": c["m"], "n": c["n"], "k": c["k"]},
        shape=("n", "k"),
        along=("m",),
    )


def _pairs(c: Columns) -> Array:
    """Token-expert pairs on one rank: `num_tokens` counts those of all `moe_ep_size` ranks."""
    return np.maximum(c["num_tokens"] * c["topk"] / c["moe_ep_size"], 1)


def _expert_sizes(c: Columns) -> Sizes:
    pairs = _pairs(c)
    active = np.minimum(c["num_experts"] / c["moe_ep_size"], pairs)
    if "alpha" in c:
        pairs, active = busiest_rank(c)
    return {
        "pairs": pairs,
        "active": active,
        "hidden": c["hidden_size"],
        "inner": c["inter_size"] / c["moe_tp_size"],
        "matrices": 3.0,
    }


def expert_rows(
    path: str,
    where: Mapping[str, object],
    shape: tuple[str, ...] = ("hidden_size", "inter_size", "topk", "num_experts"),
) -> Source:
    """Experts, gated: of three matrices each."""
    return Source(
        Table(
            path, where, lambda c: _pairs(c) * c["hidden_size"] * c["inter_size"] / c["moe_tp_size"]
        ),
        _expert_sizes,
        shape=shape,
        along=("num_tokens", "-moe_tp_size"),
    )


def _causal(c: Columns) -> dict[str, Array]:
    tokens = c["batch_size"] * c["isl"]
    return {
        "seqs": c["batch_size"],
        "query_key_pairs": tokens * (c["isl"] + 1) / 2,
        "tokens": tokens,
        "positions": tokens,
        "heads": c["num_heads"],
    }


def _one_token(c: Columns) -> dict[str, Array]:
    return {
        "seqs": c["batch_size"],
        "positions": c["batch_size"] * (c["step"] + 1),
        "heads": c["num_heads"],
    }


def _grouped(c: Columns) -> dict[str, Array]:
    return {"kv_heads": c["num_key_value_heads"], "head_dim": c["head_dim"]}


def prefill_rows(path: str, where: Mapping[str, object]) -> Source:
    """Prompts, causal."""
    return Source(
        Table(
            path,
            where,
            lambda c: _causal(c)["query_key_pairs"] * c["num_heads"] * c["head_dim"],
        ),
        lambda c: {**_causal(c), **_grouped(c)},
        shape=_HEADS,
        along=("isl",),
    )


def decode_rows(path: str, where: Mapping[str, object]) -> Source:
    """One token a sequence."""
    return Source(
        Table(path, where, lambda c: _one_token(c)["positions"] * c["num_heads"] * c["head_dim"]),
        lambda c: {**_one_token(c), **_grouped(c)},
        shape=_HEADS,
        along=("step",),
    )


def latent_prefill_rows(path: str, cache: str, dims: dict[str, float]) -> Source:
    """Prompts of latent attention."""
    return Source(
        Table(
            path,
            {"kv_cache_dtype": cache},
            lambda c: _causal(c)["query_key_pairs"] * c["num_heads"],
        ),
        lambda c: {**_causal(c), **dims},
        shape=("num_heads", "batch_size"),
        along=("isl",),
    )


def latent_decode_rows(path: str, cache: str) -> Source:
    """One token a sequence, in the latent."""
    return Source(
        Table(
            path,
            {"kv_cache_dtype": cache},
            lambda c: _one_token(c)["positions"] * c["num_heads"],
        ),
        lambda c: {**_one_token(c), **LATENT},
        shape=("num_heads", "batch_size"),
        along=("step",),
    )


def scaling_rows(path: str) -> Source:
    """Rows that are read as bfloat16 and written as float8."""
    return Source(
        Table(path, {}, lambda c: c["m"] * c["k"]),
        lambda c: {"bytes": 3 * c["m"] * c["k"]},
        shape=("k",),
        along=("m",),
    )
