"""Which tables the laws of computation are fitted to, and over which knots.

What a card's tables lack is taken over from another card's, as a bound (`sheet.CARDS`).
"""

from collections.abc import Mapping, Sequence

from compute import Law, Source, fit_law
from law_rows import (
    ATTENTION,
    LATENT,
    WIDENED,
    axes_of,
    choose_rows,
    compressed_rows,
    convolution_rows,
    decode_rows,
    expert_rows,
    gemm_rows,
    index_decode_rows,
    index_rows,
    latent_decode_rows,
    latent_prefill_rows,
    prefill_rows,
    scaling_rows,
    sparse_rows,
    state_rows,
)
from quality import Fitted
from sheet import Card, Generation

from expertlane.cost.step.operation import OpKind

_TRTLLM = "trtllm/1.3.0rc20"
_VLLM, _SGLANG, _SGLANG_ON_AMPERE = "vllm/0.24.0", "sglang/0.5.14", "sglang/0.5.10"
_LINEAR = "torch.nn.functional.linear (cuBLAS)"
_BY_BLOCK = "TensorRT-LLM, scales by block"
# Kernels of experts.
_CUTLASS, _TRITON = "moe_torch_flow_cutlass", "sglang_fused_moe_triton"
_MARLIN, _FLASHINFER = "sglang_marlin_moe", "sglang_flashinfer_trtllm_moe"
_OF_CUTLASS = "CUTLASS grouped GEMM with routing around"
_OF_TRITON = "SGLang's fused kernel in Triton with routing around"
_OF_MARLIN = "Marlin's grouped GEMM with routing around, scales by 32, balanced"
_OF_FLASHINFER = "TensorRT-LLM's grouped GEMM in FlashInfer"
# By a cache's type, its name in the tables and what is said of it.
_CACHES = (("bfloat16", "bfloat16", ""), ("float8", "fp8", ", float8 cache"))
# Ranks that the experts were spread over. Beyond 64, time goes to tokens of other ranks, which a
# dispatch does not bring. In the tables of Triton and Marlin it always does: of 8,192 tokens an
# eighth of the experts takes 0.2 to 1.0 times as long as all of them, and 0.13 in those of CUTLASS.
_OF_ONE_RANK, _UP_TO_64 = (1,), (1, 2, 4, 8, 16, 32, 64)
# Columns by which rows are left out together: of all models, of one or two, or of one alone.
_BY_MODEL = ("hidden_size", "inter_size", "topk", "num_experts")
_BY_LAYOUT, _BY_CUT = ("num_experts", "moe_tp_size", "moe_ep_size"), ("moe_tp_size", "moe_ep_size")
# Of models with gated experts; the tables of Triton have others too.
_GATED = (512, 704, 768, 1024, 1536, 2048, 2560, 3072, 8192, 14336, 16384)
# Sizes of the experts of DeepSeek-V3, cut by tensor parallelism; Kimi-K2's are the same.
_OF_DEEPSEEK = {"hidden": (7168,), "inner": (16, 64, 128, 256, 512, 1024, 2048)}


def fit_computation(card: Card, with_judging: bool) -> Fitted:
    """All laws of computation of a card."""
    fitted = Fitted()
    for law in laws_of(card):
        surface, quality = fit_law(law, card.sheet, with_judging)
        fitted.surfaces[law.name] = surface
        fitted.qualities.append(quality)
    return fitted


def laws_of(card: Card) -> list[Law]:
    """Of all kinds and types that its tables have."""
    match card.generation:
        case Generation.HOPPER:
            laws = [*_hopper(card), _memory(card), *_serving_attention(card)]
            return [*laws, *_states(card), *_indexed(card)]
        case Generation.BLACKWELL:
            laws = [*_blackwell(card), _memory(card), *_serving_attention(card)]
            return [*laws, *_states(card), *_indexed(card)]
        case Generation.AMPERE:
            return [*_ampere(card), *_latent(card, "1.0.0"), *_states_on_ampere(card)]
        case Generation.ADA:
            laws = [*_ada(card), *_attention_with_windows(card), *_latent(card, "1.0.0")]
        case Generation.RTX_BLACKWELL:
            laws = [*_rtx_blackwell(card), *_attention_with_windows(card)]
            laws += _latent(card, "1.3.0rc20")
    return [*laws, _memory(card), *_states(card)]


def _gemm(card: Card, dtype: str, engine: str, rows: str, what: str) -> Law:
    path = f"{card.folder}/gemm/{engine}/gemm_perf.parquet"
    source = gemm_rows(path, {"gemm_dtype": rows})
    return Law(OpKind.GEMM, dtype, (source,), axes_of(card.generation)["gemm"], what)


def _experts(
    card: Card,
    dtype: str,
    table: tuple[str, str, str],
    what: str,
    *,
    library: str = "",
    smoothness: float = 1.0,
    shape: tuple[str, ...] = _BY_MODEL,
    axes: Mapping[str, Sequence[float]] | None = None,
    **where: object,
) -> Law:
    """Of an engine's table of experts, a kernel, and the type as it is called there.

    Args:
        where: further columns with the values of the rows that are meant.
    """
    engine, kernel, rows = table
    path = f"{card.folder}/moe/{engine}/moe_perf.parquet"
    of_kernel = {"kernel_source": kernel, "moe_dtype": rows, "moe_ep_size": _UP_TO_64}
    return Law(
        OpKind.EXPERTS,
        dtype,
        (expert_rows(path, {**of_kernel, **where}, shape),),
        {**axes_of(card.generation)["experts"], **(axes or {})},
        what,
        smoothness,
        library,
    )


def _memory(card: Card) -> Law:
    path = f"{card.folder}/quantize/{_TRTLLM}/scale_matrix_perf.parquet"
    what = "rows read as bfloat16 and written as float8, small ones from the cache"
    axes = axes_of(card.generation)["memory"]
    return Law(OpKind.MEMORY, "bfloat16", (scaling_rows(path),), axes, what)


def _hopper(card: Card) -> list[Law]:
    """Products and experts; SGLang and vLLM run Triton's, faster for few tokens than the others.

    DeepSeek's sizes, for which it was tuned, have a law of their own too: with those of all models
    TP 8 at 64 tokens would take 1.8 times as long as it was timed.
    """
    cutlass, triton = f"{_OF_CUTLASS}, ", f"{_OF_TRITON}, scales by block, balanced"
    of_triton = _SGLANG, _TRITON, "fp8_block"
    deepseek = {"hidden_size": 7168, "inter_size": 2048, "num_experts": 256, "topk": 8}
    by_block = f"{cutlass}scales by block, balanced"
    of_mxfp4 = "TensorRT-LLM, bfloat16 activations, balanced"
    mxfp4 = _TRTLLM, "moe_torch_flow", "w4a16_mxfp4"
    return [
        _gemm(card, "bfloat16", _VLLM, "bfloat16", _LINEAR),
        _gemm(card, "float8", _TRTLLM, "fp8_block", _BY_BLOCK),
        _experts(card, "bfloat16", (_TRTLLM, _CUTLASS, "bfloat16"), f"{cutlass}balanced"),
        _experts(card, "float8", (_TRTLLM, _CUTLASS, "fp8_block"), by_block),
        _experts(card, "mxfp4", mxfp4, of_mxfp4, shape=_BY_LAYOUT),
        _experts(card, "float8", of_triton, triton, library="triton"),
        _experts(
            card,
            "float8",
            of_triton,
            f"{triton}; DeepSeek-V3's sizes",
            library="triton_deepseek",
            smoothness=0.3,
            shape=_BY_CUT,
            axes=_OF_DEEPSEEK,
            **deepseek,
        ),
        _int4(card, _MARLIN, "Marlin's grouped GEMM with routing around"),
        _deepgemm(card),
    ]


def _blackwell(card: Card) -> list[Law]:
    """Products and experts; SGLang and vLLM run FlashInfer's, far faster for few tokens."""
    by_16 = "grouped GEMM with routing around, scales by 16, balanced"
    by_block = "DeepGEMM grouped GEMM with routing around, scales by block, balanced"
    mxfp4 = _TRTLLM, "moe_torch_flow", "w4a8_mxfp4_mxfp8"
    laws = [
        _gemm(card, "bfloat16", _VLLM, "bfloat16", _LINEAR),
        _gemm(card, "float8", _TRTLLM, "fp8_block", _BY_BLOCK),
        _gemm(card, "nvfp4", _TRTLLM, "nvfp4", "TensorRT-LLM, scales by 16"),
        _experts(card, "bfloat16", (_TRTLLM, _CUTLASS, "bfloat16"), f"{_OF_CUTLASS}, balanced"),
        _experts(card, "float8", (_TRTLLM, "deepgemm", "fp8_block"), by_block),
        _experts(
            card, "mxfp4", mxfp4, "TensorRT-LLM, mxfp8 activations, balanced", shape=_BY_LAYOUT
        ),
        _experts(card, "nvfp4", (_TRTLLM, _CUTLASS, "nvfp4"), f"CUTLASS {by_16}"),
    ]
    if card.has_min_latency:
        few = _TRTLLM, "moe_torch_flow_min_latency", "nvfp4"
        what = f"TensorRT-LLM's own {by_16}"
        laws.append(_experts(card, "nvfp4", few, what, library="min_latency"))
    for dtype, rows, scales in (("float8", "fp8_block", "by block"), ("nvfp4", "nvfp4", "by 16")):
        what = f"{_OF_FLASHINFER} with routing around, scales {scales}, balanced"
        laws.append(_experts(card, dtype, (_SGLANG, _FLASHINFER, rows), what, library="flashinfer"))
    return [
        *laws,
        _int4(card, _FLASHINFER, f"{_OF_FLASHINFER} with routing around"),
        _deepgemm(card),
    ]


def _int4(card: Card, kernel: str, what: str, **where: object) -> Law:
    """Weights of four bits that are widened as they are read; timed for Kimi-K2's sizes alone."""
    what = f"{what}, scales by 32, balanced; Kimi-K2's sizes"
    table = _SGLANG, kernel, "int4_wo"
    return _experts(card, "int4", table, what, shape=_BY_CUT, axes=_OF_DEEPSEEK, **where)


def _deepgemm(card: Card) -> Law:
    path = f"{card.folder}/moe/sglang/0.5.10/wideep_context_moe_perf.parquet"
    return Law(
        OpKind.EXPERTS,
        "float8",
        (expert_rows(path, {}, shape=("moe_ep_size",)),),
        {**axes_of(card.generation)["experts"], "hidden": (7168,), "inner": (2048,)},
        "DeepGEMM's contiguous grouped GEMM with sorting around, scales by block, uniform",
        smoothness=0.3,
        library="deepgemm",
    )


def _ampere(card: Card) -> list[Law]:
    engine, vllm = _SGLANG_ON_AMPERE, "vllm/0.14.0"
    alone = {"moe_ep_size": _OF_ONE_RANK, "inter_size": _GATED}
    triton = engine, _TRITON, "bfloat16"
    return [
        _gemm(card, "bfloat16", vllm, "bfloat16", _LINEAR),
        _experts(card, "bfloat16", triton, f"{_OF_TRITON}, balanced", **alone),
        _experts(card, "int4", (engine, _MARLIN, "int4_wo"), _OF_MARLIN, **alone),
        *_attention(
            card,
            "bfloat16",
            vllm,
            {"kernel_source": "vllm_flash_attn"},
            "FlashAttention 2, heads of 128",
        ),
    ]


def _ada(card: Card) -> list[Law]:
    vllm = _VLLM, "vllm_fp8moe_triton_tritonexperts", "fp8_block"
    alone = {"moe_ep_size": _OF_ONE_RANK}
    return [
        _gemm(card, "bfloat16", _VLLM, "bfloat16", _LINEAR),
        _gemm(card, "float8", _TRTLLM, "fp8_block", _BY_BLOCK),
        _experts(
            card,
            "bfloat16",
            (_TRTLLM, _CUTLASS, "bfloat16"),
            f"{_OF_CUTLASS}, balanced",
            inter_size=_GATED,
        ),
        _experts(
            card,
            "float8",
            vllm,
            "vLLM's fused kernel in Triton with routing around, scales by block, balanced",
            inter_size=_GATED,
            **alone,
        ),
        _experts(
            card,
            "mxfp4",
            (_SGLANG, _TRITON, "w4a16_mxfp4"),
            f"{_OF_TRITON}, bfloat16 activations, balanced; gpt-oss's sizes",
            shape=_BY_LAYOUT,
            **alone,
        ),
        _int4(card, _MARLIN, "Marlin's grouped GEMM with routing around", **alone),
    ]


def _rtx_blackwell(card: Card) -> list[Law]:
    alone = {"moe_ep_size": _OF_ONE_RANK}
    return [
        _gemm(card, "bfloat16", _VLLM, "bfloat16", _LINEAR),
        _gemm(card, "float8", _TRTLLM, "fp8_block", _BY_BLOCK),
        _gemm(card, "nvfp4", _TRTLLM, "nvfp4", "TensorRT-LLM, scales by 16"),
        _experts(
            card,
            "bfloat16",
            (_TRTLLM, _CUTLASS, "bfloat16"),
            f"{_OF_CUTLASS}, balanced",
            inter_size=_GATED,
        ),
        _experts(
            card,
            "float8",
            (_SGLANG, _TRITON, "fp8_block"),
            f"{_OF_TRITON}, scales by block, balanced",
            inter_size=_GATED,
            **alone,
        ),
        _experts(
            card,
            "nvfp4",
            (_TRTLLM, _CUTLASS, "nvfp4"),
            f"{_OF_CUTLASS}, scales by 16, balanced",
            inter_size=_GATED,
        ),
        _experts(
            card,
            "mxfp4",
            (_TRTLLM, _CUTLASS, "w4a8_mxfp4_mxfp8"),
            f"{_OF_CUTLASS}, mxfp8 activations, balanced",
            shape=_BY_LAYOUT,
        ),
        _int4(card, _MARLIN, "Marlin's grouped GEMM with routing around", **alone),
    ]


def _attention(
    card: Card,
    dtype: str,
    engine: str,
    where: Mapping[str, object],
    what: str,
    decode: tuple[str, Mapping[str, object], str] | None = None,
) -> list[Law]:
    """Attention of prompts, and of tokens, where `decode` says otherwise, by the same kernels."""
    axes = axes_of(card.generation)
    of_tokens, of_decode, decode_what = decode or (engine, where, what)
    prefill = prefill_rows(ATTENTION.format(card.folder, engine, "context"), where)
    tokens = decode_rows(ATTENTION.format(card.folder, of_tokens, "generation"), of_decode)
    return [
        Law(OpKind.PREFILL_ATTENTION, dtype, (prefill,), axes["prefill"], what),
        Law(OpKind.DECODE_ATTENTION, dtype, (tokens,), axes["decode"], decode_what),
    ]


def _of_kernels(kernels: tuple[str, ...], cache: str) -> dict[str, object]:
    return {"kernel_source": kernels, "window_size": 0, "kv_cache_dtype": cache}


def _serving_attention(card: Card) -> list[Law]:
    """What vLLM chooses; on Blackwell another kernel computes the fewest prompts.

    Decode on Hopper is SGLang's: of vLLM's kernels the one for heads of 512 takes 2 µs a sequence
    and kv head however short contexts are, and no layer of more than 8 kv heads was timed.
    """
    laws = []
    for dtype, cache, suffix in _CACHES:
        if card.generation is Generation.HOPPER:
            what = "FlashAttention 3"
            kernels = _of_kernels(("vllm_flash_attn_fa3",), cache)
            of_decode = _of_kernels(("fa3", "triton"), cache)  # Triton for heads of 512 alone
            decode_what = f"{what}, SGLang's in Triton for heads of 512{suffix}"
            decode = _SGLANG, of_decode, decode_what
            laws += _attention(card, dtype, _VLLM, kernels, f"{what}{suffix}", decode)
        else:
            of_blackwell = ("vllm_flashinfer_trtllmprefill", "vllm_flashinfer_trtllmdecode")
            what = f"TensorRT-LLM's kernels in FlashInfer{suffix}"
            laws += _attention(card, dtype, _VLLM, _of_kernels(of_blackwell, cache), what)
    laws += _latent(card, "1.3.0rc20")
    return sorted(laws, key=lambda law: list(OpKind).index(law.kind))


def _attention_with_windows(card: Card) -> list[Law]:
    """vLLM's kernels, by the cache's type; rows of whole contexts."""
    wide = _of_kernels(("vllm_flash_attn_fa2",), "bfloat16")
    narrow = _of_kernels(("vllm_flashinfer_fiprefill", "vllm_flashinfer_fidecode"), "fp8")
    return [
        *_attention(card, "bfloat16", _VLLM, wide, "FlashAttention 2"),
        *_attention(card, "float8", _VLLM, narrow, "FlashInfer, float8 cache"),
    ]


def _latent(card: Card, version: str) -> list[Law]:
    """TensorRT-LLM's; prompts in the latent too where a framework does so: on Hopper."""
    path, axes = f"{card.folder}/mla/trtllm/{version}", axes_of(card.generation)
    laws = []
    for dtype, cache, suffix in _CACHES:
        what = f"key_dim 192 with widened keys and values (TensorRT-LLM){suffix}"
        widened = latent_prefill_rows(f"{path}/context_mla_perf.parquet", cache, WIDENED)
        sources: tuple[Source, ...] = (widened,)
        if card.generation is Generation.HOPPER:
            of_sglang = f"{card.folder}/mla/{_SGLANG}/context_mla_perf.parquet"
            sources = latent_prefill_rows(of_sglang, cache, LATENT), widened
            what = f"key_dim 576 in the latent (FlashAttention 3), {what}"
        decode = latent_decode_rows(f"{path}/generation_mla_perf.parquet", cache)
        in_latent = f"TensorRT-LLM, in the latent{suffix}"
        laws += [
            Law(OpKind.LATENT_PREFILL, dtype, sources, axes["latent_prefill"], what),
            Law(OpKind.LATENT_DECODE, dtype, (decode,), axes["latent_decode"], in_latent),
        ]
    return laws


_CHUNKED = "{} of prompts, SGLang's kernels in Triton; float32 states"
_STEPPED = "{} of single tokens, SGLang's packed kernel in Triton; float32 states"


def _states(card: Card) -> list[Law]:
    """Delta rules and the convolutions before them; of Mamba-2 no scan was timed."""
    gated = f"{card.folder}/linear_attention/{_SGLANG}/gdn_perf.parquet"
    kimi = f"{card.folder}/kda/sglang/0.5.16/kda_perf.parquet"
    prefill, decode = (axes_of(card.generation)[f"state_{each}"] for each in ("prefill", "decode"))
    laws = [_convolution(card, gated)]
    for kind, title, path, chunked, packed in (
        (
            "gated_delta",
            "Gated DeltaNet",
            gated,
            "chunk_gated_delta_rule",
            "fused_recurrent_gated_delta_rule_packed_decode",
        ),
        (
            "kimi_delta",
            "Kimi Delta Attention",
            kimi,
            "chunk_kda",
            "fused_recurrent_kda_packed_decode",
        ),
    ):
        of_prompts = state_rows(kind, path, chunked, is_prefill=True)
        of_tokens = state_rows(kind, path, packed, is_prefill=False)
        kinds = [OpKind(f"{kind}_{phase}") for phase in ("prefill", "decode")]
        laws += [
            Law(kinds[0], "bfloat16", (of_prompts,), prefill, _CHUNKED.format(title)),
            Law(kinds[1], "bfloat16", (of_tokens,), decode, _STEPPED.format(title)),
        ]
    return laws


def _states_on_ampere(card: Card) -> list[Law]:
    """Single tokens; rows of convolutions contradict each other, and prompts were not timed."""
    path = f"{card.folder}/linear_attention/{_SGLANG_ON_AMPERE}/gdn_perf.parquet"
    kernel = "fused_recurrent_gated_delta_rule"
    rows = state_rows("gated_delta", path, kernel, is_prefill=False)
    axes = axes_of(card.generation)["state_decode"]
    what = _STEPPED.format("Gated DeltaNet").replace("packed ", "")
    return [Law(OpKind.GATED_DELTA_DECODE, "bfloat16", (rows,), axes, what)]


def _convolution(card: Card, path: str) -> Law:
    lengths = tuple(2**power for power in range(4, 16))
    sources = (
        convolution_rows(path, "causal_conv1d_fn", lengths),
        convolution_rows(path, "causal_conv1d_update", (1,)),
    )
    what = "causal convolutions of four tokens, SGLang's"
    axes = axes_of(card.generation)["convolution"]
    return Law(OpKind.CONVOLUTION, "bfloat16", sources, axes, what)


def _indexed(card: Card) -> list[Law]:
    """An indexer's scores, the choice of the best, and attention of prompts to these; of GLM-5.

    The kernel of attention computes 64 heads at least, on Blackwell 128.
    """
    folder = f"{card.folder}/sparse_attention/{_SGLANG}"
    path = f"{folder}/glm5_{{}}_module_perf.parquet"
    paged = index_decode_rows(f"{folder}/dsv4_paged_mqa_logits_module_perf.parquet")
    decode = "DeepGEMM's fp8_paged_mqa_logits"
    axes = axes_of(card.generation)
    heads = (64.0, 128.0) if card.generation is Generation.BLACKWELL else (64.0,)
    attention = tuple(sparse_rows(path.format("dsa_attn"), each) for each in heads)
    scored, chosen = index_rows(path.format("mqa_logits")), choose_rows(path.format("topk"))
    compressed = compressed_rows(
        f"{card.folder}/sparse_attention/{_VLLM}/dsv4_hca_attn_module_perf.parquet"
    )
    of_entries = "FlashMLA's kernel of prompts over DeepSeek-V4's window and entries"
    padded = "; 64 heads are computed as 128" if len(heads) > 1 else ""
    what = f"FlashMLA's kernel of prompts over chosen positions{padded}"
    return [
        Law(OpKind.INDEX, "float8", (scored,), axes["index"], "DeepGEMM's fp8_mqa_logits"),
        Law(OpKind.INDEX_DECODE, "float8", (paged,), axes["index_decode"], decode),
        Law(OpKind.CHOOSE, "float8", (chosen,), axes["choose"], "SGLang's fused top-k"),
        Law(OpKind.SPARSE, "bfloat16", attention, axes["sparse"], what),
        Law(OpKind.COMPRESSED, "float8", (compressed,), axes["compressed"], of_entries),
    ]
