"""Which tables the laws of computation are fitted to, and over which knots."""

from collections.abc import Callable

from compute import Law, Source, fit_law
from law_rows import (
    ATTENTION,
    LATENT,
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
from laws_of_others import laws_of_others
from quality import Fitted
from sheet import Card, Generation

from expertlane.cost.step.operation import Kind

_TRTLLM = "trtllm/1.3.0rc20"
_VLLM, _SGLANG = "vllm/0.24.0", "sglang/0.5.14"
# What vLLM chooses; on Blackwell another kernel computes the fewest prompts.
_ATTENTION_KERNELS = {
    Generation.HOPPER: ("vllm_flash_attn_fa3",),
    Generation.BLACKWELL: ("vllm_flashinfer_trtllmprefill", "vllm_flashinfer_trtllmdecode"),
}
_ATTENTION_NAMES = {
    Generation.HOPPER: "FlashAttention 3",
    Generation.BLACKWELL: "TensorRT-LLM's kernels in FlashInfer",
}
# Decode on Hopper is SGLang's: of vLLM's kernels the one for heads of 512 takes 2 µs a sequence and
# kv head however short contexts are, and no layer of more than 8 kv heads was timed.
_HOPPERS_DECODE = ("fa3", "triton")  # Triton for heads of 512 alone


def _attention_rows(kernels: tuple[str, ...], cache: str) -> dict[str, object]:
    return {"kernel_source": kernels, "window_size": 0, "kv_cache_dtype": cache}


def _prefill(card: Card, cache: str) -> Source:
    path = ATTENTION.format(card.folder, _VLLM, "context")
    return prefill_rows(path, _attention_rows(_ATTENTION_KERNELS[card.generation], cache))


def _decode(card: Card, cache: str) -> Source:
    engine, kernels = _VLLM, _ATTENTION_KERNELS[card.generation]
    if card.generation is Generation.HOPPER:
        engine, kernels = _SGLANG, _HOPPERS_DECODE
    path = ATTENTION.format(card.folder, engine, "generation")
    return decode_rows(path, _attention_rows(kernels, cache))


def _latent_decode(card: Card, cache: str) -> Source:
    return latent_decode_rows(f"{card.folder}/mla/{_TRTLLM}/generation_mla_perf.parquet", cache)


def _latent_prefills(card: Card, cache: str) -> tuple[Source, ...]:
    """In the latent too where a framework does so: none on Blackwell, by the tables' times."""
    path = f"{card.folder}/mla/{{}}/context_mla_perf.parquet"
    widened = latent_prefill_rows(path.format(_TRTLLM), cache, WIDENED)
    if card.generation is Generation.BLACKWELL:
        return (widened,)
    return latent_prefill_rows(path.format("sglang/0.5.14"), cache, LATENT), widened


# Sizes of the experts of DeepSeek-V3, cut by tensor parallelism; Kimi-K2's are the same.
_OF_DEEPSEEK = {"hidden": (7168,), "inner": (16, 64, 128, 256, 512, 1024, 2048)}
# Beyond, time goes to tokens of other ranks, which a dispatch does not bring.
_UP_TO_64 = (1, 2, 4, 8, 16, 32, 64)


def _trtllm_experts(card: Card, kernel: str, dtype: str) -> Source:
    where = {"kernel_source": kernel, "moe_dtype": dtype, "moe_ep_size": _UP_TO_64}
    path = f"{card.folder}/moe/{_TRTLLM}/moe_perf.parquet"
    if "mxfp4" in dtype:  # of two models alone, gpt-oss, so whole layouts of them are left out
        return expert_rows(path, where, ("num_experts", "moe_tp_size", "moe_ep_size"))
    return expert_rows(path, where)


def _laws_of_products(card: Card) -> list[Law]:
    axes, is_hopper = axes_of(card.generation), card.generation is Generation.HOPPER
    grouped = "CUTLASS" if is_hopper else "DeepGEMM"
    of_trtllm = f"{card.folder}/gemm/{_TRTLLM}/gemm_perf.parquet"
    of_vllm = f"{card.folder}/gemm/vllm/0.24.0/gemm_perf.parquet"
    gemms = [
        (
            "bfloat16",
            gemm_rows(of_vllm, {"gemm_dtype": "bfloat16"}),
            "torch.nn.functional.linear (cuBLAS)",
        ),
        (
            "float8",
            gemm_rows(of_trtllm, {"gemm_dtype": "fp8_block"}),
            "TensorRT-LLM, scales by block",
        ),
    ]
    cutlass, by_block = "moe_torch_flow_cutlass", "scales by block, balanced"
    experts = [
        ("bfloat16", cutlass, "bfloat16", "CUTLASS grouped GEMM with routing around, balanced", ""),
        (
            "float8",
            cutlass if is_hopper else "deepgemm",
            "fp8_block",
            f"{grouped} grouped GEMM with routing around, {by_block}",
            "",
        ),
        (
            "mxfp4",
            "moe_torch_flow",
            "w4a16_mxfp4" if is_hopper else "w4a8_mxfp4_mxfp8",
            f"TensorRT-LLM, {'bfloat16' if is_hopper else 'mxfp8'} activations, balanced",
            "",
        ),
    ]
    if not is_hopper:
        where = {"gemm_dtype": "nvfp4"}
        gemms.append(("nvfp4", gemm_rows(of_trtllm, where), "TensorRT-LLM, scales by 16"))
        what = "grouped GEMM with routing around, scales by 16, balanced"
        experts.append(("nvfp4", cutlass, "nvfp4", f"CUTLASS {what}", ""))
        if card.has_min_latency:
            kernel = "moe_torch_flow_min_latency"
            experts.append(("nvfp4", kernel, "nvfp4", f"TensorRT-LLM's own {what}", "min_latency"))
    return [
        *(Law(Kind.GEMM, dtype, (rows,), axes["gemm"], what) for dtype, rows, what in gemms),
        *(
            Law(
                Kind.EXPERTS,
                dtype,
                (_trtllm_experts(card, kernel, rows),),
                axes["experts"],
                what,
                smoothness=1.0,
                library=library,
            )
            for dtype, kernel, rows, what, library in experts
        ),
        *(_triton(card) if is_hopper else _flashinfer(card)),
        _int4(card),
        _deepgemm(card),
    ]


def _flashinfer(card: Card) -> list[Law]:
    """What SGLang and vLLM run on Blackwell; far faster for few tokens than the others."""
    kernel = {"kernel_source": "sglang_flashinfer_trtllm_moe", "moe_ep_size": _UP_TO_64}
    path = f"{card.folder}/moe/sglang/0.5.14/moe_perf.parquet"
    return [
        Law(
            Kind.EXPERTS,
            dtype,
            (expert_rows(path, {**kernel, "moe_dtype": rows}),),
            axes_of(card.generation)["experts"],
            f"TensorRT-LLM's grouped GEMM in FlashInfer with routing around, {scales}, balanced",
            smoothness=1.0,
            library="flashinfer",
        )
        for dtype, rows, scales in (
            ("float8", "fp8_block", "scales by block"),
            ("nvfp4", "nvfp4", "scales by 16"),
        )
    ]


def _triton(card: Card) -> list[Law]:
    """What SGLang and vLLM run on Hopper; faster for few tokens than the others.

    DeepSeek's sizes, for which it was tuned, have a law of their own too: with those of all models
    TP 8 at 64 tokens would take 1.8 times as long as it was timed.
    """
    path = f"{card.folder}/moe/sglang/0.5.14/moe_perf.parquet"
    where: dict[str, object] = {
        "kernel_source": "sglang_fused_moe_triton",
        "moe_ep_size": _UP_TO_64,
        "moe_dtype": "fp8_block",
    }
    deepseek = {"hidden_size": 7168, "inter_size": 2048, "num_experts": 256, "topk": 8}
    axes = axes_of(card.generation)["experts"]
    what = "SGLang's fused kernel in Triton with routing around, scales by block, balanced"
    all_rows = expert_rows(path, where)
    rows = expert_rows(path, {**where, **deepseek}, shape=("moe_tp_size", "moe_ep_size"))
    return [
        Law(Kind.EXPERTS, "float8", (all_rows,), axes, what, smoothness=1.0, library="triton"),
        Law(
            Kind.EXPERTS,
            "float8",
            (rows,),
            {**axes, **_OF_DEEPSEEK},
            f"{what}; DeepSeek-V3's sizes",
            library="triton_deepseek",
        ),
    ]


def _int4(card: Card) -> Law:
    """Weights of four bits that are widened as they are read; timed for Kimi-K2's sizes alone."""
    kernel, what = "sglang_flashinfer_trtllm_moe", "TensorRT-LLM's grouped GEMM in FlashInfer"
    if card.generation is Generation.HOPPER:
        kernel, what = "sglang_marlin_moe", "Marlin's grouped GEMM"
    path = f"{card.folder}/moe/sglang/0.5.14/moe_perf.parquet"
    where = {"kernel_source": kernel, "moe_dtype": "int4_wo", "moe_ep_size": _UP_TO_64}
    return Law(
        Kind.EXPERTS,
        "int4",
        (expert_rows(path, where, ("moe_tp_size", "moe_ep_size")),),
        {**axes_of(card.generation)["experts"], **_OF_DEEPSEEK},
        f"{what} with routing around, scales by 32, balanced; Kimi-K2's sizes",
        smoothness=1.0,
    )


def _deepgemm(card: Card) -> Law:
    path = f"{card.folder}/moe/sglang/0.5.10/wideep_context_moe_perf.parquet"
    return Law(
        Kind.EXPERTS,
        "float8",
        (expert_rows(path, {}, shape=("moe_ep_size",)),),
        {**axes_of(card.generation)["experts"], "hidden": (7168,), "inner": (2048,)},
        "DeepGEMM's contiguous grouped GEMM with sorting around, scales by block, uniform",
        smoothness=0.3,
        library="deepgemm",
    )


def laws_of(card: Card) -> list[Law]:
    """Of all kinds and types that its tables have."""
    if card.generation not in _ATTENTION_KERNELS:
        return laws_of_others(card)
    axes = axes_of(card.generation)
    kernels, is_hopper = _ATTENTION_NAMES[card.generation], card.generation is Generation.HOPPER
    of_decode = f"{kernels}, SGLang's in Triton for heads of 512" if is_hopper else kernels
    in_latent = "key_dim 576 in the latent (FlashAttention 3), " if is_hopper else ""
    scaling = f"{card.folder}/quantize/{_TRTLLM}/scale_matrix_perf.parquet"
    moved = "rows read as bfloat16 and written as float8, small ones from the cache"
    laws = [
        *_laws_of_products(card),
        Law(Kind.MEMORY, "bfloat16", (scaling_rows(scaling),), axes["memory"], moved),
    ]
    of_attention: list[tuple[Kind, str, str, Callable[[Card, str], Source | tuple[Source, ...]]]]
    of_attention = [
        (Kind.PREFILL_ATTENTION, "prefill", kernels, _prefill),
        (Kind.DECODE_ATTENTION, "decode", of_decode, _decode),
        (
            Kind.LATENT_PREFILL,
            "latent_prefill",
            f"{in_latent}key_dim 192 with widened keys and values (TensorRT-LLM)",
            _latent_prefills,
        ),
        (Kind.LATENT_DECODE, "latent_decode", "TensorRT-LLM, in the latent", _latent_decode),
    ]
    for kind, name, what, rows_of in of_attention:
        for dtype, cache in (("bfloat16", "bfloat16"), ("float8", "fp8")):
            rows = rows_of(card, cache)
            sources = rows if isinstance(rows, tuple) else (rows,)
            suffix = "" if dtype == "bfloat16" else ", float8 cache"
            laws.append(Law(kind, dtype, sources, axes[name], what + suffix))
    return laws


def fit_computation(card: Card, with_judging: bool) -> Fitted:
    """All laws of computation of a card."""
    fitted = Fitted()
    for law in laws_of(card):
        surface, quality = fit_law(law, card.sheet, with_judging)
        fitted.surfaces[law.name] = surface
        fitted.qualities.append(quality)
    return fitted
