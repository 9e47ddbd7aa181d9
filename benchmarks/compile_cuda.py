"""Compile the Triton kernels of ops/cuda ahead of time, without a GPU: registers and spills.

Operations of ops/cuda run at models' sizes on tensors that have shapes and no data (FakeTensorMode
on "cuda"), and what they give must have the right shape, type and device. Each kernel that they
would launch is compiled instead, with the very arguments of the launch, for the cards asked for.
Printed for each: registers a thread, bytes a thread that are
spilled to memory, bytes of shared memory. Exit code 1 where one spills over its bound, or takes
more shared memory than the card has.

    PYTHONPATH=src python benchmarks/compile_cuda.py [--target 90 100] [--only TEXT …] [--json]
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

from expertlane.ops.cuda import attention, rotate
from expertlane.ops.cuda.activation import activate
from expertlane.ops.cuda.experts import CudaExperts
from expertlane.ops.cuda.norm import add_rms_norm, rms_norm
from expertlane.ops.cuda.parts import CudaAttention, CudaMlp
from expertlane.ops.cuda.permute import gather_sum, group_pairs
from expertlane.ops.kv_cache import AttentionParams, KVCache, PagedBatch, PagedSequences
from expertlane.ops.products import Activation, Expert, Linear, grouped_mm
from expertlane.ops.step import AttentionWeights
from expertlane.schedule.plan import Batch

CUDA = torch.device("cuda")
MOST_SPILLED_BYTES = 32  # a thread
# CUDA C++ programming guide, table of technical specifications: of a block, at most.
SHARED_BYTES = {90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Compiled:
    """A kernel for a card."""

    case: str
    kernel: str
    target: int
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def is_within(self) -> bool:
        """Whether it keeps the bounds."""
        fits = self.shared_bytes <= SHARED_BYTES[self.target]
        return fits and self.spilled_bytes <= MOST_SPILLED_BYTES


class CompilingDriver:
    """Stands for a card that is not there."""

    def __init__(self, target: int) -> None:
        self._target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> GPUTarget:
        """The card's architecture."""
        return self._target

    def get_current_device(self) -> int:
        """Kernels are kept by device."""
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched."""
        return 0


@contextmanager
def compiling(target: int, found: Callable[[Any], None]) -> Iterator[None]:
    """Launches compile for `target`, and give what was compiled to `found`."""
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given = [
            MockTensor(each.dtype, each.shape) if isinstance(each, Tensor) else each
            for each in args
        ]
        kernel = launch(self, *given, grid=grid, warmup=True, **kwargs)
        found(kernel)
        return kernel

    driver.set_active(CompilingDriver(target))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = launch


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes a thread of stack, where spilled values are kept."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


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
) -> None:
    """Write and attend; `dims` are of keys and values, which `in_keys` are a part of them."""
    num_tokens = batch.batch.num_tokens
    cache = KVCache(64, batch.block_size, heads[1], dims[0], 0 if in_keys else dims[1], dtype, CUDA)
    query = torch.empty(num_tokens, heads[0], dims[0], dtype=dtype, device=CUDA)
    key, value = (
        torch.empty(num_tokens, heads[1], x.shape[-1], dtype=dtype, device=CUDA)
        for x in (cache.keys, cache.values)
    )
    sinks = torch.empty(heads[0], device=CUDA) if has_sinks else None
    params = AttentionParams(dims[1], dims[0] ** -0.5, window, sinks)
    rotate.write(cache, batch.slots, key, value)
    out = attention.attend(query, cache, batch, params)
    _expect(out, (num_tokens, heads[0], dims[1]), dtype)


def _expect(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (tuple(x.shape), x.dtype, x.device.type) == (shape, dtype, "cuda"), (x.shape, x.dtype)


def rows(num_tokens: int, hidden: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Norms and activations."""
    x, weight = (
        torch.empty(num_tokens, hidden, dtype=dtype, device=CUDA),
        torch.empty(hidden, device=CUDA),
    )
    _expect(rms_norm(x, weight, 1e-5), (num_tokens, hidden), dtype)
    for out in add_rms_norm(x, x, weight, 1e-5):
        _expect(out, (num_tokens, hidden), dtype)
    for is_gated, activation in (
        (True, Activation("silu")),
        (False, Activation("gelu")),
        (True, Activation("silu", swiglu_limit=7.0)),
    ):
        x = torch.empty(num_tokens, inner * (1 + is_gated), dtype=dtype, device=CUDA)
        _expect(activate(x, activation, is_gated=is_gated), (num_tokens, inner), dtype)


def turn(
    num_tokens: int,
    heads: tuple[int, int],
    dim: int,
    rotary_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    interleave: bool = False,
    has_norms: bool = False,
) -> None:
    """Rotation alone, and with the write to the cache."""
    (num_heads, num_kv_heads), batch = heads, batch_of(num_tokens, 100, 1)
    x = torch.empty(num_tokens, num_heads + 2 * num_kv_heads, dim, dtype=dtype, device=CUDA)
    cos, sin = torch.empty(2, num_tokens, 1, rotary_dim, device=CUDA).unbind()
    norms = torch.empty(num_heads + num_kv_heads, dim, device=CUDA) if has_norms else None
    cache = KVCache(64, 16, num_kv_heads, dim, dim, dtype, CUDA)
    turned = rotate.rotate(x, cos, sin, interleave=interleave)
    _expect(turned, tuple(x.shape), dtype)
    angles = batch.positions, cos, sin
    query = rotate.rotate_and_write(
        x, num_heads, angles, norms, 1e-5, batch.slots, cache, interleave=interleave
    )
    _expect(query, (num_tokens, num_heads, dim), dtype)


def experts(
    num_tokens: int,
    top_k: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    is_gated: bool = True,
    by_torch: bool = False,
) -> None:
    """Pairs by expert, grouped products, and the sum; `sizes` are experts, hidden and inner."""
    num, hidden, inner = sizes

    def linear(n: int, k: int) -> Linear:
        return Linear(torch.empty(n, k, dtype=dtype, device=CUDA))

    held = [
        Expert(
            gate=linear(inner, hidden) if is_gated else None,
            up=linear(inner, hidden),
            down=linear(hidden, inner),
        )
        for _ in range(num)
    ]
    activation = Activation("silu" if is_gated else "gelu")
    of_layer = CudaExperts(held, activation, grouped_mm if by_torch else None)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=CUDA)
    pairs = group_pairs(ids, 0, 1, num, ids.numel())
    _expect(pairs.counts, (num,), torch.int64)
    _expect(pairs.numbers, (num_tokens, top_k), torch.int64)
    x = torch.empty(num_tokens, hidden, dtype=dtype, device=CUDA)
    results = of_layer(x, pairs)
    _expect(results, (num_tokens * top_k, hidden), dtype)
    weights = torch.empty(num_tokens, top_k, device=CUDA)
    _expect(gather_sum(results, pairs.numbers, weights, None), (num_tokens, hidden), dtype)


def parts(num_tokens: int, hidden: int, heads: tuple[int, int], dim: int, inner: int) -> None:
    """A layer's attention and an MLP as layers call them."""

    def linear(n: int, k: int) -> Linear:
        return Linear(torch.empty(n, k, dtype=torch.bfloat16, device=CUDA))

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, device=CUDA)

    num_heads, num_kv_heads = heads
    of_attention = CudaAttention(
        AttentionWeights(
            norm=floats(hidden),
            eps=1e-6,
            query_key_value=linear((num_heads + 2 * num_kv_heads) * dim, hidden),
            head_norms=floats(num_heads + num_kv_heads, dim),
            output=linear(hidden, num_heads * dim),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=dim,
            cos=floats(4096, 1, dim),
            sin=floats(4096, 1, dim),
            interleave=False,
            params=AttentionParams(dim, dim**-0.5),
        )
    )
    cache = KVCache(64, 16, num_kv_heads, dim, dim, torch.bfloat16, CUDA)
    x = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=CUDA)
    for adds_input in (False, True):
        out = of_attention(x, cache, batch_of(num_tokens, 100, 1), adds_input=adds_input)
        _expect(out, (num_tokens, hidden), torch.bfloat16)
    dense = Expert(gate=linear(inner, hidden), up=linear(inner, hidden), down=linear(hidden, inner))
    scale = torch.empty(1, hidden, dtype=torch.bfloat16, device=CUDA)
    mlp = CudaMlp(dense, Activation("silu"), floats(hidden), 1e-6, scale)
    _expect(mlp(x), (num_tokens, hidden), torch.bfloat16)


FLOAT32 = torch.float32
# By name, with sizes of: the paper's model (heads of 512), Qwen3 (normed heads), DeepSeek-V3
# (latents), GPT-OSS (sinks and windows).
CASES: dict[str, Callable[[], None]] = {
    "rows of 7168": lambda: rows(64, 7168, 2048),
    "experts, decode": lambda: experts(64, 8, (32, 7168, 2048)),
    "experts, prompt": lambda: experts(8192, 8, (32, 7168, 2048)),
    "experts, paper": lambda: experts(128, 1, (1, 8192, 32768), is_gated=False),
    "experts, some tokens": lambda: experts(256, 8, (32, 4096, 1536)),
    "experts by torch": lambda: experts(64, 8, (32, 7168, 2048), by_torch=True),
    "experts in float32": lambda: experts(64, 8, (32, 7168, 2048), FLOAT32),
    "a layer of Qwen3": lambda: parts(64, 2048, (32, 4), 128, 6144),
    "rotation, Qwen3": lambda: turn(64, (32, 4), 128, 128, has_norms=True),
    "rotation, DeepSeek": lambda: turn(64, (128, 1), 192, 64, interleave=True),
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
    "prompt in float32": lambda: attend(batch_of(4, 0, 2000), (32, 4), (128, 128), FLOAT32),
}


def check_shapes() -> None:
    """Run all cases, and compile nothing."""
    launch = JITFunction.run
    JITFunction.run = lambda *_, **__: None
    try:
        with FakeTensorMode():
            for case in CASES.values():
                case()
    finally:
        JITFunction.run = launch


def compile_case(name: str, target: int) -> list[Compiled]:
    """The kernels that a case launches, each once."""
    kernels: list[Any] = []
    with compiling(target, kernels.append), FakeTensorMode():
        CASES[name]()
    found = []
    for kernel in {kernel.hash: kernel for kernel in kernels}.values():
        meta = kernel.metadata
        usage = resources(kernel.asm["cubin"])
        found.append(Compiled(name, meta.name, target, meta.num_warps, *usage, meta.shared))
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--target", type=int, nargs="+", default=[90, 100], choices=SHARED_BYTES)
    options.add_argument("--only", nargs="+", default=[""], help="cases whose names contain one")
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    check_shapes()
    found = []
    if not given.json:
        print(f"triton {triton.__version__}, torch {torch.__version__}")
        print(f"bound: {MOST_SPILLED_BYTES} spilled bytes a thread")
        print(f"{'case':26} {'kernel':20} {'sm':>4} warps  regs  spilled  shared")
    for target in given.target:
        for name in CASES:
            if not any(text in name for text in given.only):
                continue
            for each in compile_case(name, target):
                found.append(each)
                if not given.json:
                    print(
                        f"{each.case:26} {each.kernel.strip('_'):20} {target:4} "
                        f"{each.num_warps:5} {each.registers:5} {each.spilled_bytes:8} "
                        f"{each.shared_bytes:7}{'' if each.is_within else '  over'}",
                        flush=True,
                    )
    if given.json:
        print(json.dumps([asdict(each) for each in found]))
    return int(not all(each.is_within for each in found))


if __name__ == "__main__":
    sys.exit(main())
