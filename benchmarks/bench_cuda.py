"""Each kernel of engine/ops/cuda on a GPU, and its limit: bytes over bandwidth, or FLOPs over peak.

Bandwidth and peak are those of a large copy and of a large bfloat16 product on the same card in the
same run. A time is the median of repeated calls by CUDA events, with another buffer written between
them, so that nothing lies in the cache. Experts by our kernel and by torch's grouped product stand
side by side. docs/performance.md says which bytes and FLOPs are counted.

    PYTHONPATH=src python benchmarks/bench_cuda.py [--tiny] [--json FILE]

`--tiny` runs a little of each on any machine, without a GPU in Triton's interpreter, and times
nothing.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

if not torch.cuda.is_available():  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

from cuda_cases import Kind, equal_sequences

from expertlane.engine.ops.cuda.attention import attend
from expertlane.engine.ops.cuda.backend import CudaBackend
from expertlane.engine.ops.cuda.compiled import activate, add_rms_norm, norm_and_rotate, write
from expertlane.engine.ops.cuda.parts import CudaExperts, CudaNarrowLinear
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.narrow import Mxfp4Weight, NarrowWeight
from expertlane.engine.ops.products import Activation, Expert, Linear, grouped_mm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
BLOCK_SIZE, REPEATS = 16, 20
OPS = CudaBackend()


@dataclass(frozen=True)
class Case:
    """A call, and what it cannot do without: bytes of memory, and FLOPs.

    Attributes:
        peaks: how many times bfloat16's peak its products can have.
    """

    name: str
    call: Callable[[], object]
    num_bytes: int
    flops: int = 0
    peaks: int = 1


@dataclass(frozen=True)
class Measured:
    """A time, and the share of it that the limit would take; bytes and FLOPs as of `Case`."""

    name: str
    num_bytes: int
    flops: int
    seconds: float
    limit_s: float
    share: float


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)


def attention(
    name: str,
    sequences: tuple[int, int, int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    *,
    in_keys: bool = False,
) -> Case:
    """Of sequences, positions computed and new tokens of each."""
    (num_seqs, computed, new), (num_heads, kv_heads), (key_dim, value_dim) = sequences, heads, dims
    batch = equal_sequences(num_seqs, computed, new, BLOCK_SIZE)
    pages = PagedBatch(batch, BLOCK_SIZE, DEVICE)
    stored = 0 if in_keys else value_dim
    cache = KVCache(batch.block_tables.size, BLOCK_SIZE, kv_heads, key_dim, stored, DTYPE, DEVICE)
    query = random(num_seqs * new, num_heads, key_dim)
    params = AttentionParams(value_dim, key_dim**-0.5)
    num_pairs = num_seqs * (computed * new + new * (new + 1) // 2)
    moved = num_seqs * (computed + new) * cache.position_bytes
    moved += query.nbytes + query.nbytes * value_dim // key_dim
    flops = 2 * num_pairs * num_heads * (key_dim + value_dim)
    return Case(name, lambda: attend(query, cache, pages, params), moved, flops)


def linear(n: int, k: int, kind: Kind) -> Linear:
    """Of random weights; float8 has a scale for 128 inputs."""
    if kind == "plain":
        return Linear(random(n, k))
    if kind == "mxfp4":
        codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
        exponents = torch.full((n, k // 32), 121, dtype=torch.uint8, device=DEVICE)
        return CudaNarrowLinear(Mxfp4Weight(codes, exponents, DTYPE), None)
    scales = torch.full((n, -(-k // 128)), 1 / 64, device=DEVICE)
    values = random(n, k, dtype=torch.float8_e4m3fn)
    narrow = NarrowWeight(values, scales, 128, 0, DTYPE, rows=128)
    return CudaNarrowLinear(narrow, None, takes_float8=kind == "float8 inputs")


def experts(
    name: str,
    num_tokens: int,
    top_k: int,
    sizes: tuple[int, int, int],
    *,
    is_gated: bool = True,
    kind: Kind = "plain",
) -> Iterator[Case]:
    """By our product; of plain weights by torch's, order and sum too.

    `sizes`: experts, hidden, inner.
    """
    num, hidden, inner = sizes
    held = [
        Expert(
            gate=linear(inner, hidden, kind) if is_gated else None,
            up=linear(inner, hidden, kind),
            down=linear(hidden, inner, kind),
        )
        for _ in range(num)
    ]
    scores = torch.rand(num_tokens, num, device=DEVICE)
    ids, x = scores.topk(top_k, dim=1).indices.int(), random(num_tokens, hidden)
    pairs, num_pairs = OPS.group_pairs(ids, 0, 1, num, ids.numel()), ids.numel()
    used = int((pairs.counts > 0).sum())
    num_weights = sum(each.num_weights for each in held[0].linears)
    weight_bytes = sum(tensor.nbytes for tensor in held[0].tensors())
    results, activation = random(num_pairs, hidden), Activation("silu" if is_gated else "gelu")
    inner_bytes = (4 if is_gated else 2) * num_pairs * inner * x.itemsize
    moved = used * weight_bytes + 2 * results.nbytes + inner_bytes
    flops = 2 * num_pairs * num_weights
    ours = CudaExperts(held, activation, None)
    peaks = 2 if kind == "float8 inputs" else 1
    yield Case(f"{name}, ours", lambda: ours(x, pairs), moved, flops, peaks)
    if kind != "plain":
        return
    if grouped_mm is not None and DEVICE.type == "cuda":
        theirs = CudaExperts(held, activation, grouped_mm)
        yield Case(f"{name}, torch's", lambda: theirs(x, pairs), moved, flops)
    order_bytes = (2 * 4 + 24) * num_pairs
    yield Case(f"{name}, order", lambda: OPS.group_pairs(ids, 0, 1, num, num_pairs), order_bytes)
    factors, from_results = torch.rand(num_tokens, top_k, device=DEVICE), results.nbytes
    yield Case(
        f"{name}, sum",
        lambda: OPS.gather_sum(results, pairs.numbers, factors),
        from_results + x.nbytes,
    )


def rows(
    num_tokens: int, hidden: int, inner: int, heads: tuple[int, int], dim: int
) -> Iterator[Case]:
    """Norm with a sum, activation, rotation with the write to the cache."""
    x, weight = random(num_tokens, hidden), random(hidden, dtype=torch.float32)
    other = random(num_tokens, hidden)
    yield Case(
        f"norm, {num_tokens} rows", lambda: add_rms_norm(x, other, weight, 1e-5), 4 * x.nbytes
    )
    both = random(num_tokens, 2 * inner)
    yield Case(
        f"activation, {num_tokens} rows",
        lambda: activate(both, Activation("silu"), is_gated=True),
        both.nbytes * 3 // 2,
    )
    projected = random(num_tokens, heads[0] + 2 * heads[1], dim)
    cache = KVCache(-(-num_tokens // BLOCK_SIZE), BLOCK_SIZE, heads[1], dim, dim, DTYPE, DEVICE)
    cos, sin = (random(num_tokens, 1, dim, dtype=torch.float32) for _ in range(2))
    slots = torch.arange(num_tokens, device=DEVICE)
    query_key, value = projected.split([sum(heads), heads[1]], dim=1)

    def rotate_and_write() -> None:
        turned = norm_and_rotate(query_key, slots, cos, sin, None, 1e-5, interleave=False)
        write(cache, slots, turned[:, heads[0] :], value)

    moved = 2 * projected.nbytes + cos.nbytes + sin.nbytes
    yield Case(f"rotation, {num_tokens} rows", rotate_and_write, moved)


def cases(*, tiny: bool) -> Iterator[Case]:
    """At the paper's, Qwen3's and DeepSeek-V3's sizes; or tiny ones."""
    if tiny:
        yield attention("decode", (2, 20, 1), (4, 2), (32, 32))
        yield attention("decode in the latent", (2, 20, 1), (4, 1), (48, 32), in_keys=True)
        yield from experts("experts", 3, 2, (4, 32, 16))
        yield from experts("float8 experts", 3, 2, (4, 32, 16), kind="float8")
        yield from experts("experts with float8 inputs", 3, 2, (4, 32, 16), kind="float8 inputs")
        yield from experts("mxfp4 experts", 3, 2, (4, 32, 32), kind="mxfp4")
        yield from rows(3, 64, 32, (4, 2), 16)
        return
    yield attention("decode, paper, 64 × 8k", (64, 8191, 1), (16, 16), (512, 512))
    yield attention("decode, Qwen3, 64 × 8k", (64, 8191, 1), (32, 4), (128, 128))
    yield attention("decode, Qwen3, 1 × 8k", (1, 8191, 1), (32, 4), (128, 128))
    yield attention("decode, DeepSeek, 64 × 8k", (64, 8191, 1), (128, 1), (576, 512), in_keys=True)
    yield attention("prompt, paper, 4 × 2k", (4, 0, 2048), (16, 16), (512, 512))
    yield attention("prompt, Qwen3, 4 × 4k", (4, 0, 4096), (32, 4), (128, 128))
    yield attention("prompt, DeepSeek, 2 × 4k", (2, 0, 4096), (128, 128), (192, 128))
    yield from experts("experts decode, paper, EP 16", 128, 1, (1, 8192, 32768), is_gated=False)
    yield from experts("experts decode, DeepSeek, 32 of 256", 128, 8, (32, 7168, 2048))
    yield from experts("experts prompt, paper, EP 16", 8192, 1, (1, 8192, 32768), is_gated=False)
    yield from experts("experts prompt, DeepSeek", 4096, 8, (32, 7168, 2048))
    narrow: dict[Kind, tuple[int, int, int]] = {
        "float8": (32, 7168, 2048),  # DeepSeek-V3's
        "float8 inputs": (32, 7168, 2048),
        "mxfp4": (32, 2880, 2880),  # GPT-OSS'
    }
    for kind, sizes in narrow.items():
        for phase, num_tokens in (("decode", 128), ("prompt", 4096)):
            yield from experts(f"{kind} experts {phase}", num_tokens, 8, sizes, kind=kind)
    for num_tokens in (64, 8192):
        yield from rows(num_tokens, 7168, 2048, (32, 4), 128)


def seconds(call: Callable[[], object]) -> float:
    """The median of a call, by the device's clock."""
    evicting = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    found = []
    for repeat in range(REPEATS + 3):  # the first ones compile
        evicting.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= 3:
            found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


def limits() -> tuple[float, float]:
    """Bytes and FLOPs a second of this card: of a copy of 1 GiB, and of a product of 8192³."""
    source, to = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    bandwidth = 2 * source.numel() / seconds(lambda: to.copy_(source))
    a, b = random(8192, 8192), random(8192, 8192)
    return bandwidth, 2 * 8192**3 / seconds(lambda: a @ b)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tiny", action="store_true", help="on any machine, without times")
    options.add_argument("--json", type=Path, metavar="FILE")
    given = options.parse_args()
    if given.tiny:
        for case in cases(tiny=True):
            case.call()
            print(f"{case.name}: {case.num_bytes} bytes, {case.flops} FLOPs")
        return 0
    if DEVICE.type == "cpu":
        print("bench_cuda: torch sees no GPU here; nothing was run", file=sys.stderr)
        return 2
    bandwidth, peak = limits()
    print(f"{torch.cuda.get_device_name(0)}: copy {bandwidth / 1e12:.2f} TB/s, ", end="")
    print(f"product {peak / 1e12:.0f} TFLOP/s, torch {torch.__version__}")
    found = []
    for case in cases(tiny=False):
        limit_s = max(case.num_bytes / bandwidth, case.flops / (case.peaks * peak))
        measured_s = seconds(case.call)
        share = limit_s / measured_s
        found.append(Measured(case.name, case.num_bytes, case.flops, measured_s, limit_s, share))
        print(
            f"{case.name:36} {measured_s * 1e6:9.1f} µs, limit {limit_s * 1e6:9.1f} µs: "
            f"{share:4.0%} of it",
            flush=True,
        )
    if given.json:
        head = {
            "card": torch.cuda.get_device_name(0),
            "bytes_per_s": bandwidth,
            "flops_per_s": peak,
        }
        given.json.write_text(json.dumps(head | {"cases": [asdict(each) for each in found]}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
