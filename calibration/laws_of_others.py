"""Laws of cards that run other kernels than the Hoppers and Blackwells of NVLink: A100, L40S and
RTX PRO 6000. What a table lacks is taken over from the H100, as a bound.
"""

from collections.abc import Mapping, Sequence

from compute import Law, Source
from law_rows import (
    ATTENTION,
    WIDENED,
    axes_of,
    decode_rows,
    expert_rows,
    gemm_rows,
    latent_decode_rows,
    latent_prefill_rows,
    prefill_rows,
    scaling_rows,
)
from sheet import Card, Generation

from expertlane.cost.step.operation import Kind

_LINEAR = "torch.nn.functional.linear (cuBLAS)"
_TRITON = "SGLang's fused kernel in Triton with routing around"
_MARLIN = "Marlin's grouped GEMM with routing around, scales by 32, balanced"
# Of models with gated experts; the tables of Triton have others too.
_GATED = (512, 704, 768, 1024, 1536, 2048, 2560, 3072, 8192, 14336, 16384)
# Ranks that the experts were spread over. In the tables of Triton and Marlin a rank's time goes to
# tokens of other ranks too, which an all-to-all does not bring: of 8,192 tokens an eighth of the
# experts takes 0.2 to 1.0 times as long as all of them, and 0.13 in those of CUTLASS.
_OF_ONE_RANK, _UP_TO_64 = (1,), (1, 2, 4, 8, 16, 32, 64)
_LAYOUTS = ("num_experts", "moe_tp_size", "moe_ep_size")  # left out together: of one or two models


def laws_of_others(card: Card) -> list[Law]:
    """Of all kinds and types that its tables have."""
    if card.generation is Generation.AMPERE:
        return [*_ampere(card), *_latent(card, "1.0.0")]
    newest = "1.3.0rc20"
    is_ada = card.generation is Generation.ADA
    return [
        *(_ada(card) if is_ada else _rtx_blackwell(card)),
        *_attention_with_windows(card),
        *_latent(card, "1.0.0" if is_ada else newest),
        Law(
            Kind.MEMORY,
            "bfloat16",
            (scaling_rows(f"{card.folder}/quantize/trtllm/{newest}/scale_matrix_perf.parquet"),),
            axes_of(card.generation)["memory"],
            "rows read as bfloat16 and written as float8, small ones from the cache",
        ),
    ]


def _gemm(card: Card, dtype: str, engine: str, rows: str, what: str) -> Law:
    path = f"{card.folder}/gemm/{engine}/gemm_perf.parquet"
    where: dict[str, object] = {"gemm_dtype": rows}
    axes = axes_of(card.generation)["gemm"]
    return Law(Kind.GEMM, dtype, (gemm_rows(path, where),), axes, what)


def _experts(
    card: Card,
    dtype: str,
    table: tuple[str, str, str],
    what: str,
    *,
    shape: tuple[str, ...] | None = None,
    axes: Mapping[str, Sequence[float]] | None = None,
) -> Law:
    """Of an engine's table of experts, a kernel, and the type as it is called there."""
    engine, kernel, rows = table
    path = f"{card.folder}/moe/{engine}/moe_perf.parquet"
    where: dict[str, object] = {
        "kernel_source": kernel,
        "moe_dtype": rows,
        "moe_ep_size": _UP_TO_64 if "cutlass" in kernel else _OF_ONE_RANK,
    }
    if shape is None:
        source = expert_rows(path, {**where, "inter_size": _GATED})
    else:
        source = expert_rows(path, where, shape)
    known = axes_of(card.generation)["experts"]
    return Law(
        Kind.EXPERTS,
        dtype,
        (source,),
        {**known, **(axes or {})},
        what,
        smoothness=1.0,
    )


def _kimi(card: Card) -> Law:
    """Timed for Kimi-K2's sizes alone."""
    return _experts(
        card,
        "int4",
        ("sglang/0.5.14", "sglang_marlin_moe", "int4_wo"),
        f"{_MARLIN}; Kimi-K2's sizes",
        shape=("moe_tp_size", "moe_ep_size"),
        axes={"hidden": (7168,), "inner": (16, 64, 128, 256, 512, 1024, 2048)},
    )


def _ampere(card: Card) -> list[Law]:
    engine, vllm = "sglang/0.5.10", "vllm/0.14.0"
    axes, kernel = axes_of(card.generation), {"kernel_source": "vllm_flash_attn"}
    what = "FlashAttention 2, heads of 128"
    return [
        _gemm(card, "bfloat16", vllm, "bfloat16", _LINEAR),
        _experts(
            card,
            "bfloat16",
            (engine, "sglang_fused_moe_triton", "bfloat16"),
            f"{_TRITON}, balanced",
        ),
        _experts(card, "int4", (engine, "sglang_marlin_moe", "int4_wo"), _MARLIN),
        Law(
            Kind.PREFILL_ATTENTION,
            "bfloat16",
            (prefill_rows(ATTENTION.format(card.folder, vllm, "context"), {**kernel}),),
            axes["prefill"],
            what,
        ),
        Law(
            Kind.DECODE_ATTENTION,
            "bfloat16",
            (decode_rows(ATTENTION.format(card.folder, vllm, "generation"), {**kernel}),),
            axes["decode"],
            what,
        ),
    ]


def _ada(card: Card) -> list[Law]:
    trtllm, vllm, sglang = "trtllm/1.3.0rc20", "vllm/0.24.0", "sglang/0.5.14"
    cutlass, triton = "moe_torch_flow_cutlass", "sglang_fused_moe_triton"
    return [
        _gemm(card, "bfloat16", vllm, "bfloat16", _LINEAR),
        _gemm(card, "float8", trtllm, "fp8_block", "TensorRT-LLM, scales by block"),
        _experts(
            card,
            "bfloat16",
            (trtllm, cutlass, "bfloat16"),
            "CUTLASS grouped GEMM with routing around, balanced",
        ),
        _experts(
            card,
            "float8",
            (vllm, "vllm_fp8moe_triton_tritonexperts", "fp8_block"),
            "vLLM's fused kernel in Triton with routing around, scales by block, balanced",
        ),
        _experts(
            card,
            "mxfp4",
            (sglang, triton, "w4a16_mxfp4"),
            f"{_TRITON}, bfloat16 activations, balanced; gpt-oss's sizes",
            shape=_LAYOUTS,
        ),
        _kimi(card),
    ]


def _rtx_blackwell(card: Card) -> list[Law]:
    trtllm, vllm, sglang = "trtllm/1.3.0rc20", "vllm/0.24.0", "sglang/0.5.14"
    cutlass, triton = "moe_torch_flow_cutlass", "sglang_fused_moe_triton"
    grouped = "CUTLASS grouped GEMM with routing around"
    return [
        _gemm(card, "bfloat16", vllm, "bfloat16", _LINEAR),
        _gemm(card, "float8", trtllm, "fp8_block", "TensorRT-LLM, scales by block"),
        _gemm(card, "nvfp4", trtllm, "nvfp4", "TensorRT-LLM, scales by 16"),
        _experts(card, "bfloat16", (trtllm, cutlass, "bfloat16"), f"{grouped}, balanced"),
        _experts(
            card,
            "float8",
            (sglang, triton, "fp8_block"),
            f"{_TRITON}, scales by block, balanced",
        ),
        _experts(card, "nvfp4", (trtllm, cutlass, "nvfp4"), f"{grouped}, scales by 16, balanced"),
        _experts(
            card,
            "mxfp4",
            (trtllm, cutlass, "w4a8_mxfp4_mxfp8"),
            f"{grouped}, mxfp8 activations, balanced",
            shape=_LAYOUTS,
        ),
        _kimi(card),
    ]


def _attention_with_windows(card: Card) -> list[Law]:
    """vLLM's kernels, by the cache's type; rows of whole contexts."""
    axes = axes_of(card.generation)
    kernels: dict[str, tuple[str, tuple[str, ...], str]] = {
        "bfloat16": ("bfloat16", ("vllm_flash_attn_fa2",), "FlashAttention 2"),
        "float8": (
            "fp8",
            ("vllm_flashinfer_fiprefill", "vllm_flashinfer_fidecode"),
            "FlashInfer, float8 cache",
        ),
    }
    laws = []
    for dtype, (cache, names, what) in kernels.items():
        where: dict[str, object] = {
            "kernel_source": names,
            "window_size": 0,
            "kv_cache_dtype": cache,
        }
        of_prompts, of_tokens = (
            ATTENTION.format(card.folder, "vllm/0.24.0", phase)
            for phase in ("context", "generation")
        )
        prefill, decode = prefill_rows(of_prompts, where), decode_rows(of_tokens, where)
        laws += [
            Law(Kind.PREFILL_ATTENTION, dtype, (prefill,), axes["prefill"], what),
            Law(Kind.DECODE_ATTENTION, dtype, (decode,), axes["decode"], what),
        ]
    return laws


def _latent(card: Card, version: str) -> list[Law]:
    """TensorRT-LLM's."""
    path, axes = f"{card.folder}/mla/trtllm/{version}", axes_of(card.generation)
    laws = []
    for dtype, cache, suffix in (("bfloat16", "bfloat16", ""), ("float8", "fp8", ", float8 cache")):
        prefill: Source = latent_prefill_rows(f"{path}/context_mla_perf.parquet", cache, WIDENED)
        decode = latent_decode_rows(f"{path}/generation_mla_perf.parquet", cache)
        widened = f"key_dim 192 with widened keys and values (TensorRT-LLM){suffix}"
        in_latent = f"TensorRT-LLM, in the latent{suffix}"
        laws += [
            Law(Kind.LATENT_PREFILL, dtype, (prefill,), axes["latent_prefill"], widened),
            Law(Kind.LATENT_DECODE, dtype, (decode,), axes["latent_decode"], in_latent),
        ]
    return laws
