"""Attention over pages on each instruction set of this CPU, beside torch's, and its roof.

Decodes: one new token of each sequence; checks: four. Prompts: 8 of 512 tokens, and the last 512
of 8,192. Torch's is `scaled_dot_product_attention` with keys and values side by side (without pages
to gather; a latent is read as its values too). Variants take turns over copies of the cache that do
not fit in the CPU's; a time is the tenth percentile, or with --cpu-time the least CPU time of one
thread, which other programs disturb less. The roof is the larger of the bytes of keys and values
over the bandwidth of a sum, and of FLOPs over the peak of a product of matrices on that set. Run:

    python benchmarks/bench_attention.py [--json] [--cpu-time] [--float32] [--only NAME]
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.engine.ops.build import BASELINE, ONLY_IF_ASKED_FOR, SETS, build
from expertlane.engine.ops.host import num_cores
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.vector import VectorBackend
from expertlane.schedule.plan import Batch

COPIES_BYTES = 200_000_000
MEASURE_S = 0.4
BLOCK_SIZE = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Heads:
    """Heads of a model; a value_dim of None: values are the first 512 of the keys."""

    name: str
    num: int
    kv: int
    key_dim: int
    value_dim: int | None
    window: int | None = None


HEADS = [
    Heads("32/8 × 128", 32, 8, 128, 128),
    Heads("8/8 × 512", 8, 8, 512, 512),
    Heads("latent, 16", 16, 1, 576, None),
    Heads("window 1,024", 32, 8, 128, 128, 1024),
]
# Sequences, positions computed before, new tokens.
DECODES = [(num, length - 1, 1) for length in (1024, 8192, 32768) for num in (1, 8)]
CHECKS = [(1, 8188, 4)]
PROMPTS = [(8, 0, 512), (1, 7680, 512)]


class Case:
    """Sequences of equal lengths and as many caches as do not fit in the CPU's."""

    def __init__(self, heads: Heads, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
        num_seqs, computed, new = sizes
        self.heads, length = heads, computed + new
        width = -(-length // BLOCK_SIZE)
        tables = np.arange(num_seqs * width, dtype=np.int32).reshape(num_seqs, width)
        batch = Batch(
            seq_ids=np.arange(num_seqs),
            num_scheduled_tokens=np.full(num_seqs, new),
            num_computed_tokens=np.full(num_seqs, computed),
            token_ids=np.zeros(num_seqs * new, dtype=np.int64),
            block_tables=tables,
            yields_token=np.ones(num_seqs, dtype=np.bool_),
        )
        self.batch = PagedBatch(batch, BLOCK_SIZE, CPU)
        value_dim = heads.value_dim or 512
        stored = heads.value_dim or 0
        self.params = AttentionParams(value_dim, heads.key_dim**-0.5, heads.window)
        tokens = num_seqs * new
        self.query, self.key, self.value = (
            torch.randn(tokens, num, dim).to(dtype)
            for num, dim in (
                (heads.num, heads.key_dim),
                (heads.kv, heads.key_dim),
                (heads.kv, stored),
            )
        )
        block = torch.randn(heads.kv, BLOCK_SIZE, heads.key_dim).to(dtype)

        def cache() -> KVCache:
            sizes = num_seqs * width, BLOCK_SIZE, heads.kv, heads.key_dim, stored
            made = KVCache(*sizes, dtype, CPU)
            made.keys.copy_(block)
            made.values.copy_(block[..., :stored])
            return made

        caches = [cache()]
        caches += [cache() for _ in range(COPIES_BYTES // caches[0].num_bytes)]
        self.caches, self._turn = caches, 0
        seen = np.arange(computed + 1, length + 1)
        if heads.window:
            seen = np.minimum(seen, heads.window)
        widths = heads.key_dim + value_dim
        self.flops = 2 * num_seqs * int(seen.sum()) * heads.num * widths
        read = min(length, new + heads.window - 1) if heads.window else length
        self.num_bytes = num_seqs * read * caches[0].position_bytes
        self.sizes, self.length = sizes, length

    def _next(self) -> KVCache:
        self._turn = (self._turn + 1) % len(self.caches)
        return self.caches[self._turn]

    def ours(self, ops: VectorBackend) -> None:
        """A call of our kernels."""
        ops.paged_attention(self.query, self.key, self.value, self._next(), self.batch, self.params)

    def torch(self) -> None:
        """A call of torch's."""
        num_seqs, _, new = self.sizes
        cache = self._next()
        by_seq = num_seqs, self.heads.kv, cache.keys.shape[0] * BLOCK_SIZE // num_seqs
        keys, values = (
            x.view(*by_seq, x.shape[-1])[:, :, : self.length]  # whatever stands there
            for x in (cache.keys, cache.values)
        )
        if self.heads.value_dim is None:
            values = keys[..., : self.params.value_dim]
        query = self.query.view(num_seqs, new, self.heads.num, -1).transpose(1, 2)
        mask = None
        if new > 1 or self.heads.window:
            own = torch.arange(self.length - new, self.length)[:, None]
            seen = torch.arange(self.length)
            mask = (seen <= own) & (seen > own - (self.heads.window or self.length))
        F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=self.params.scale, enable_gqa=True
        )


def seconds(variants: dict[str, Callable[[], object]], *, in_cpu_time: bool) -> dict[str, float]:
    clock = time.thread_time if in_cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in variants}
    until = time.perf_counter() + MEASURE_S * len(variants)
    while time.perf_counter() < until or len(next(iter(times.values()))) < 3:
        for name, variant in variants.items():
            began = clock()
            variant()
            times[name].append(clock() - began)
    return {
        name: min(of) if in_cpu_time else sorted(of)[len(of) // 10] for name, of in times.items()
    }


def bandwidth(*, in_cpu_time: bool) -> float:
    values = torch.from_numpy(np.ones(1 << 27, dtype=np.float32))
    return values.nbytes / seconds({"": values.sum}, in_cpu_time=in_cpu_time)[""]


def peak(ops: VectorBackend, dtype: torch.dtype, *, in_cpu_time: bool) -> float:
    """FLOP/s of a product of our own; in float32 of torch's."""
    x, weight = torch.randn(480, 1024).to(dtype), torch.randn(2048, 1024).to(dtype)
    product = partial(ops.linear(weight), x)
    taken = seconds({"": product}, in_cpu_time=in_cpu_time)[""]
    return 2 * x.numel() * len(weight) / taken


def backends() -> Iterator[VectorBackend]:
    baseline = build(BASELINE)
    for instructions in SETS:
        if instructions in ONLY_IF_ASKED_FOR:
            continue
        if baseline.has_instructions(instructions.name.encode()):
            yield VectorBackend(baseline, build(instructions), instructions.name)


def measure(options: argparse.Namespace) -> Iterator[dict[str, float | str]]:
    in_cpu_time = options.cpu_time
    dtype = torch.float32 if options.float32 else torch.bfloat16
    read = bandwidth(in_cpu_time=in_cpu_time)
    ours = list(backends())
    peaks = {ops.instructions: peak(ops, dtype, in_cpu_time=in_cpu_time) for ops in ours}
    kinds = {"decode": DECODES, "check": CHECKS, "prompt": PROMPTS}
    for kind, all_sizes in kinds.items():
        for heads in HEADS:
            if options.only and options.only not in f"{kind} {heads.name}":
                continue
            for sizes in all_sizes:
                case = Case(heads, sizes, dtype)
                variants = {ops.instructions: partial(case.ours, ops) for ops in ours}
                found = seconds(variants | {"torch": case.torch}, in_cpu_time=in_cpu_time)
                of_torch = found.pop("torch")
                for name, taken in found.items():
                    yield {
                        "kind": kind,
                        "heads": heads.name,
                        "sizes": f"{sizes[0]} × {sizes[2]} of {case.length:,}",
                        "set": name,
                        "s": taken,
                        "torch_s": of_torch,
                        "bytes_per_s": case.num_bytes / taken,
                        "flops_per_s": case.flops / taken,
                        "roof_s": max(case.num_bytes / read, case.flops / peaks[name]),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention on the CPU")
    for name in ("json", "cpu-time", "float32"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--only", help="a part of a kind and of heads, such as 'decode 32/8'")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1 if options.cpu_time else num_cores())
    with torch.inference_mode():
        rows = list(measure(options))
    if options.json:
        line = {"benchmark": "attention", "version": __version__, "num_cores": num_cores()}
        print(json.dumps(line | {"rows": rows}))
        return
    headings = "kind", "heads", "new tokens", "set", "ms", "GB/s", "GFLOP/s", "roof", "torch"
    table = Table(*headings, box=None, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("kind", "heads", "sizes", "set")),
            f"{1e3 * float(row['s']):.3g}",
            *(f"{float(row[name]) / 1e9:.3g}" for name in ("bytes_per_s", "flops_per_s")),
            f"{float(row['roof_s']) / float(row['s']):.0%}",
            f"× {float(row['torch_s']) / float(row['s']):.1f}",
        )
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
