"""Which tables the laws of computation are fitted to, and over which knots."""

import numpy as np
from compute import Law, Sizes, Source, fitter
from skew import busiest_rank
from tables import Array, Columns, Table

from expertlane.cost.step.operation import Kind

_ATTENTION = "attention/vllm/0.24.0/{}_attention_perf.parquet"
_FLASH = {"kernel_source": "vllm_flash_attn_fa3", "window_size": 0}
_HEADS = ("num_heads", "num_key_value_heads", "head_dim")
_LATENT = {"key_dim": 576.0, "value_dim": 512.0}  # DeepSeek's rank 512 and rotated 64
_WIDENED = {"key_dim": 192.0, "value_dim": 128.0}  # the same, keys and values of every head apart


def _gemm(path: str, where: dict[str, object]) -> Source:
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


def _experts(
    path: str,
    where: dict[str, object],
    shape: tuple[str, ...] = ("hidden_size", "inter_size", "topk", "num_experts"),
) -> Source:
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


def _prefill(cache: str) -> Source:
    return Source(
        Table(
            _ATTENTION.format("context"),
            {**_FLASH, "kv_cache_dtype": cache},
            lambda c: _causal(c)["query_key_pairs"] * c["num_heads"] * c["head_dim"],
        ),
        lambda c: {**_causal(c), **_grouped(c)},
        shape=_HEADS,
        along=("isl",),
    )


def _decode(cache: str) -> Source:
    return Source(
        Table(
            _ATTENTION.format("generation"),
            {**_FLASH, "kv_cache_dtype": cache},
            lambda c: _one_token(c)["positions"] * c["num_heads"] * c["head_dim"],
        ),
        lambda c: {**_one_token(c), **_grouped(c)},
        shape=_HEADS,
        along=("step",),
    )


def _latent_prefill(path: str, cache: str, dims: dict[str, float]) -> Source:
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


def _latent_decode(cache: str) -> Source:
    return Source(
        Table(
            "mla/trtllm/1.3.0rc20/generation_mla_perf.parquet",
            {"kv_cache_dtype": cache},
            lambda c: _one_token(c)["positions"] * c["num_heads"],
        ),
        lambda c: {**_one_token(c), **_LATENT},
        shape=("num_heads", "batch_size"),
        along=("step",),
    )


def _scaling(path: str) -> Source:
    return Source(
        Table(path, {}, lambda c: c["m"] * c["k"]),
        lambda c: {"bytes": 3 * c["m"] * c["k"]},
        shape=("k",),
        along=("m",),
    )


def _both_latent_prefills(cache: str) -> tuple[Source, ...]:
    return (
        _latent_prefill("mla/sglang/0.5.14/context_mla_perf.parquet", cache, _LATENT),
        _latent_prefill("mla/trtllm/1.3.0rc20/context_mla_perf.parquet", cache, _WIDENED),
    )


_MEMORY_AXES = {"bytes": (1e2, 1e5, 1e6, 3e6, 1e7, 3e7, 4e7, 5e7, 1e9)}
# The first and last knots become the tables' extremes.
_GEMM_AXES = {
    "m": (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4352, 32768),
    "n": (32, 128, 512, 1024, 2048, 4096, 8192, 16384, 65536),
    "k": (32, 128, 512, 1024, 2048, 4096, 8192, 16384, 65536),
}
_EXPERT_AXES = {
    "pairs_per_expert": (1, 2, 8, 32, 128, 512, 4096),
    "active": (1, 4, 16, 64, 512),
    "hidden": (2048, 4096, 7168),
    "inner": (16, 128, 512, 1024, 4096, 16384),
}
_PREFILL_AXES = {
    "keys_per_query": (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 16384),
    "query_heads": (16, 128, 1024, 8192, 65536, 524288, 8388608),
    "group": (1, 4, 16, 64),
    "head_dim": (64, 128, 256),
}
_DECODE_AXES = {
    "positions_per_seq": (2, 64, 256, 1024, 4096, 16384, 131072),
    "seq_kv_heads": (1, 8, 64, 256, 1024, 4096, 16384),
    "group": (1, 4, 8, 16, 64),
    "head_dim": (64, 128, 256),
}
_LATENT_PREFILL_AXES = {
    "keys_per_query": (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 16384),
    "query_heads": (16, 128, 1024, 8192, 65536, 524288, 8388608),
    "key_dim": (192, 576),
}
_LATENT_DECODE_AXES = {
    "positions_per_seq": (2, 64, 256, 1024, 4096, 16384, 131072),
    "seqs": (1, 4, 16, 64, 256, 1024),
    "heads": (1, 4, 16, 64, 128),
    "key_dim": (576,),
}

_TRTLLM_EXPERTS = "moe/trtllm/1.3.0rc20/moe_perf.parquet"
_DEEPGEMM_EXPERTS = "moe/sglang/0.5.10/wideep_context_moe_perf.parquet"
_UP_TO_64 = {
    "kernel_source": "moe_torch_flow_cutlass",
    # Beyond, time goes to tokens of other ranks, which a dispatch does not bring.
    "moe_ep_size": (1, 2, 4, 8, 16, 32, 64),
}

LAWS = (
    Law(
        Kind.GEMM,
        "bfloat16",
        (_gemm("gemm/vllm/0.24.0/gemm_perf.parquet", {"gemm_dtype": "bfloat16"}),),
        _GEMM_AXES,
        "torch.nn.functional.linear (cuBLAS)",
    ),
    Law(
        Kind.GEMM,
        "float8",
        (_gemm("gemm/trtllm/1.3.0rc20/gemm_perf.parquet", {"gemm_dtype": "fp8_block"}),),
        _GEMM_AXES,
        "TensorRT-LLM, scales by block",
    ),
    Law(
        Kind.EXPERTS,
        "bfloat16",
        (_experts(_TRTLLM_EXPERTS, {**_UP_TO_64, "moe_dtype": "bfloat16"}),),
        _EXPERT_AXES,
        "CUTLASS grouped GEMM with routing around, balanced",
        smoothness=1.0,
    ),
    Law(
        Kind.EXPERTS,
        "float8",
        (_experts(_TRTLLM_EXPERTS, {**_UP_TO_64, "moe_dtype": "fp8_block"}),),
        _EXPERT_AXES,
        "CUTLASS grouped GEMM with routing around, scales by block, balanced",
        smoothness=1.0,
    ),
    Law(
        Kind.EXPERTS,
        "float8",
        (_experts(_DEEPGEMM_EXPERTS, {}, shape=("moe_ep_size",)),),
        {**_EXPERT_AXES, "hidden": (7168,), "inner": (2048,)},
        "DeepGEMM's contiguous grouped GEMM with sorting around, scales by block, uniform",
        smoothness=0.3,
        library="deepgemm",
    ),
    Law(
        Kind.MEMORY,
        "bfloat16",
        (_scaling("quantize/trtllm/1.3.0rc20/scale_matrix_perf.parquet"),),
        _MEMORY_AXES,
        "rows read as bfloat16 and written as float8, up to 50 MB from the cache",
    ),
    Law(
        Kind.PREFILL_ATTENTION,
        "bfloat16",
        (_prefill("bfloat16"),),
        _PREFILL_AXES,
        "FlashAttention 3",
    ),
    Law(
        Kind.PREFILL_ATTENTION,
        "float8",
        (_prefill("fp8"),),
        _PREFILL_AXES,
        "FlashAttention 3, float8 cache",
    ),
    Law(
        Kind.DECODE_ATTENTION,
        "bfloat16",
        (_decode("bfloat16"),),
        _DECODE_AXES,
        "FlashAttention 3",
    ),
    Law(
        Kind.DECODE_ATTENTION,
        "float8",
        (_decode("fp8"),),
        _DECODE_AXES,
        "FlashAttention 3, float8 cache",
    ),
    Law(
        Kind.LATENT_PREFILL,
        "bfloat16",
        _both_latent_prefills("bfloat16"),
        _LATENT_PREFILL_AXES,
        "key_dim 576 in the latent (FlashAttention 3), 192 with widened keys and values",
    ),
    Law(
        Kind.LATENT_PREFILL,
        "float8",
        _both_latent_prefills("fp8"),
        _LATENT_PREFILL_AXES,
        "as bfloat16, float8 cache",
    ),
    Law(
        Kind.LATENT_DECODE,
        "bfloat16",
        (_latent_decode("bfloat16"),),
        _LATENT_DECODE_AXES,
        "TensorRT-LLM, in the latent",
    ),
    Law(
        Kind.LATENT_DECODE,
        "float8",
        (_latent_decode("fp8"),),
        _LATENT_DECODE_AXES,
        "TensorRT-LLM, in the latent, float8 cache",
    ),
)

FITTERS = [fitter(law) for law in LAWS]
