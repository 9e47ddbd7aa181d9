"""Operations of engine/ops/cuda at models' sizes, on tensors without data: what is compiled.

Each runs under a FakeTensorMode, and checks shape, type and device of what it gives.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from expertlane.engine.ops.cuda import attention
from expertlane.engine.ops.cuda.backend import CudaBackend
from expertlane.engine.ops.cuda.parts import CudaExperts, CudaMlp, CudaNarrowLinear
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch, PagedSequences
from expertlane.engine.ops.narrow import Mxfp4Weight, NarrowWeight
from expertlane.engine.ops.products import Activation, Expert, Linear, grouped_mm
from expertlane.engine.ops.step import MlpWeights
from expertlane.schedule.plan import Batch

CUDA = torch.device("cuda")
# Of weights; the last with inputs in float8 too.
Kind = Literal["plain", "int8", "float8", "mxfp4", "float8 inputs"]


def equal_sequences(num_seqs: int, computed: int, new: int, block_size: int = 16) -> Batch:
    """Sequences of one length, their blocks in random order."""
    width = -(-(computed + new) // block_size)
    blocks = np.random.default_rng(0).permutation(num_seqs * width)
    return Batch(
        seq_ids=np.arange(num_seqs),
        num_scheduled_tokens=np.full(num_seqs, new),
        num_computed_tokens=np.full(num_seqs, computed),
        token_ids=np.zeros(num_seqs * new, dtype=np.int64),
        block_tables=blocks.reshape(num_seqs, width).astype(np.int32),
        yields_token=np.ones(num_seqs, dtype=np.bool_),
    )


def batch_of(num_seqs: int, computed: int, new: int) -> PagedBatch:
    """Of those, on a GPU that is not there."""
    batch = equal_sequences(num_seqs, computed, new)
    paged = PagedBatch(batch, 16, CUDA)
    # A torch for CPUs alone copies nothing to "cuda", not even in a FakeTensorMode.
    num, shape = batch.num_tokens, batch.block_tables.shape
    of_seqs = ((num_seqs, shape[1]), (num_seqs,), (num_seqs,), (num_seqs,))
    paged.__dict__["sequences"] = PagedSequences(*(_whole_numbers(*each) for each in of_seqs))
    paged.__dict__["positions"], paged.__dict__["slots"] = (_whole_numbers(num) for _ in range(2))
    return paged


def _whole_numbers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=CUDA)


def attend(
    batch: PagedBatch,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    window: int | None = None,
    has_sinks: bool = False,
    in_keys: bool = False,
    is_float8: bool = False,
) -> None:
    """Attention; `dims` are of keys and values, which `in_keys` are a part of them."""
    num_tokens = batch.batch.num_tokens
    sizes = 64, batch.block_size, heads[1], dims[0], 0 if in_keys else dims[1]
    cache = KVCache(*sizes, dtype, CUDA, is_float8=is_float8)
    query = torch.empty(num_tokens, heads[0], dims[0], dtype=dtype, device=CUDA)
    sinks = torch.empty(heads[0], device=CUDA) if has_sinks else None
    params = AttentionParams(dims[1], dims[0] ** -0.5, window, sinks)
    out = attention.attend(query, cache, batch, params)
    _expect(out, (num_tokens, heads[0], dims[1]), dtype)


def _expect(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (tuple(x.shape), x.dtype, x.device.type) == (shape, dtype, "cuda"), (x.shape, x.dtype)


def linear(
    n: int,
    k: int,
    kind: Kind = "plain",
    dtype: torch.dtype = torch.bfloat16,
    scales: tuple[int, int] = (128, 128),
) -> Linear:
    """A weight of a kind; one byte has a scale for so many inputs and outputs."""

    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=CUDA)

    if kind == "plain":
        return Linear(of(dtype, n, k))
    if kind == "mxfp4":
        weight = Mxfp4Weight(of(torch.uint8, n, k // 2), of(torch.uint8, n, k // 32), dtype)
        return CudaNarrowLinear(weight, None)
    values = of(torch.int8 if kind == "int8" else torch.float8_e4m3fn, n, k)
    group, rows = scales
    narrow = NarrowWeight(values, of(torch.float32, n, k // group), group, 0, dtype, rows)
    return CudaNarrowLinear(narrow, None, takes_float8=kind == "float8 inputs")


def product(
    num_tokens: int, n: int, k: int, kind: Kind, scales: tuple[int, int] = (128, 128)
) -> None:
    """One matrix alone."""
    x = torch.empty(num_tokens, k, dtype=torch.bfloat16, device=CUDA)
    own = linear(n, k, kind, scales=scales)
    _expect(own(x), (num_tokens, n), torch.bfloat16)


def experts(
    num_tokens: int,
    top_k: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    kind: Kind = "plain",
    is_gated: bool = True,
    by_torch: bool = False,
) -> None:
    """Pairs by expert, grouped products, and the sum; `sizes` are experts, hidden and inner."""
    num, hidden, inner = sizes
    held = [
        Expert(
            gate=linear(inner, hidden, kind, dtype) if is_gated else None,
            up=linear(inner, hidden, kind, dtype),
            down=linear(hidden, inner, kind, dtype),
        )
        for _ in range(num)
    ]
    activation = Activation("silu" if is_gated else "gelu")
    of_layer = CudaExperts(held, activation, grouped_mm if by_torch else None)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=CUDA)
    pairs = CudaBackend().group_pairs(ids, 0, 1, num, ids.numel())
    _expect(pairs.counts, (num,), torch.int64)
    _expect(pairs.numbers, (num_tokens, top_k), torch.int64)
    x = torch.empty(num_tokens, hidden, dtype=dtype, device=CUDA)
    results = of_layer(x, pairs)
    _expect(results, (num_tokens * top_k, hidden), dtype)
    weights = torch.empty(num_tokens, top_k, device=CUDA)
    summed = CudaBackend().gather_sum(results, pairs.numbers, weights)
    _expect(summed, (num_tokens, hidden), dtype)


def parts(
    num_tokens: int,
    hidden: int,
    heads: tuple[int, int],
    dim: int,
    inner: int,
    kind: Kind = "plain",
) -> None:
    """The products of a layer's attention, and its MLP."""

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, device=CUDA)

    x = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=CUDA)
    projected = linear((heads[0] + 2 * heads[1]) * dim, hidden, kind)(x)
    _expect(projected, (num_tokens, (heads[0] + 2 * heads[1]) * dim), torch.bfloat16)
    attended = torch.empty(num_tokens, heads[0] * dim, dtype=torch.bfloat16, device=CUDA)
    _expect(linear(hidden, heads[0] * dim, kind)(attended), (num_tokens, hidden), torch.bfloat16)
    gate, up, down = (linear(*each, kind) for each in ((inner, hidden),) * 2 + ((hidden, inner),))
    dense = Expert(gate=gate, up=up, down=down)
    scale = torch.empty(1, hidden, dtype=torch.bfloat16, device=CUDA)
    mlp = CudaMlp(MlpWeights(dense, Activation("silu"), floats(hidden), 1e-6, scale))
    _expect(mlp(x), (num_tokens, hidden), torch.bfloat16)


FLOAT32 = torch.float32
# By name, with sizes of: the paper's model (heads of 512), Qwen3 (normed heads), DeepSeek-V3
# (latents), GPT-OSS (sinks and windows).
CASES: dict[str, Callable[[], None]] = {
    "experts, decode": lambda: experts(64, 8, (32, 7168, 2048)),
    "experts, prompt": lambda: experts(8192, 8, (32, 7168, 2048)),
    "experts, paper": lambda: experts(128, 1, (1, 8192, 32768), is_gated=False),
    "experts, some tokens": lambda: experts(256, 8, (32, 4096, 1536)),
    "experts by torch": lambda: experts(64, 8, (32, 7168, 2048), by_torch=True),
    "experts in float32": lambda: experts(64, 8, (32, 7168, 2048), FLOAT32),
    "float8 experts, decode": lambda: experts(64, 8, (32, 7168, 2048), kind="float8"),
    "float8 experts, some tokens": lambda: experts(256, 8, (32, 7168, 2048), kind="float8"),
    "float8 experts, prompt": lambda: experts(8192, 8, (32, 7168, 2048), kind="float8"),
    "float8 inputs, decode": lambda: experts(64, 8, (32, 7168, 2048), kind="float8 inputs"),
    "float8 inputs, some tokens": lambda: experts(256, 8, (32, 7168, 2048), kind="float8 inputs"),
    "float8 inputs, prompt": lambda: experts(8192, 8, (32, 7168, 2048), kind="float8 inputs"),
    "float8 inputs, a scale a row": lambda: product(4096, 4096, 4096, "float8 inputs", (4096, 1)),
    "float8 inputs, by column": lambda: product(4096, 4096, 4096, "float8 inputs", (128, 1)),
    "float8 inputs, a layer": lambda: parts(16, 2048, (32, 4), 128, 6144, "float8 inputs"),
    "int8 experts, decode": lambda: experts(64, 8, (32, 7168, 2048), kind="int8"),
    "int8 experts, prompt": lambda: experts(8192, 8, (32, 7168, 2048), kind="int8"),
    "MXFP4 experts, decode": lambda: experts(64, 4, (32, 2880, 2880), kind="mxfp4"),
    "MXFP4 experts, some tokens": lambda: experts(512, 4, (32, 2880, 2880), kind="mxfp4"),
    "MXFP4 experts, prompt": lambda: experts(8192, 4, (32, 2880, 2880), kind="mxfp4"),
    "float8 product, decode": lambda: product(64, 1536, 7168, "float8"),
    "a float8 layer": lambda: parts(16, 2048, (32, 4), 128, 6144, "float8"),
    "a layer of Qwen3": lambda: parts(64, 2048, (32, 4), 128, 6144),
    "decode, paper": lambda: attend(batch_of(64, 2000, 1), (16, 16), (512, 512)),
    "decode, Qwen3": lambda: attend(batch_of(64, 8000, 1), (32, 4), (128, 128)),
    "decode, GPT-OSS": lambda: attend(
        batch_of(64, 8000, 1), (64, 8), (64, 64), window=128, has_sinks=True
    ),
    "decode, DeepSeek": lambda: attend(batch_of(64, 8000, 1), (128, 1), (576, 512), in_keys=True),
    "one long sequence": lambda: attend(batch_of(1, 8000, 1), (64, 8), (64, 64), has_sinks=True),
    "prompt, paper": lambda: attend(batch_of(4, 0, 2000), (16, 16), (512, 512)),
    "prompt, Qwen3": lambda: attend(batch_of(4, 0, 2000), (32, 4), (128, 128)),
    "prompt, DeepSeek": lambda: attend(batch_of(4, 0, 2000), (128, 128), (192, 128)),
    "prompt, heads of 256": lambda: attend(batch_of(4, 0, 2000), (16, 2), (256, 256)),
    "prompt in the latent": lambda: attend(
        batch_of(4, 4000, 16), (128, 1), (576, 512), in_keys=True
    ),
    "decode in float32, paper": lambda: attend(
        batch_of(64, 2000, 1), (16, 16), (512, 512), FLOAT32
    ),
    "float8 cache, decode, Qwen3": lambda: attend(
        batch_of(64, 8000, 1), (32, 4), (128, 128), is_float8=True
    ),
    "float8 cache, decode, paper": lambda: attend(
        batch_of(64, 2000, 1), (16, 16), (512, 512), is_float8=True
    ),
    "float8 cache, decode, DeepSeek": lambda: attend(
        batch_of(64, 8000, 1), (128, 1), (576, 512), in_keys=True, is_float8=True
    ),
    "float8 cache, prompt, Qwen3": lambda: attend(
        batch_of(4, 0, 2000), (32, 4), (128, 128), is_float8=True
    ),
    "float8 cache, prompt, paper": lambda: attend(
        batch_of(4, 0, 2000), (16, 16), (512, 512), is_float8=True
    ),
    "prompt in float32": lambda: attend(batch_of(4, 0, 2000), (32, 4), (128, 128), FLOAT32),
}
