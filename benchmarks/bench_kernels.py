"""Our CPU kernels beside what torch has: products and experts in bfloat16, weights not in a cache.

Products x · Wᵀ of few to many rows: `F.linear`, oneDNN with packed weights, ours. Experts (16 of
1024 × 1024, top-2, one layer): a loop of oneDNN products against ours in one call. Variants take
turns over enough copies of the weights that none is found in a cache; a time is the tenth
percentile. Beside each stands a float32 sum over the same bytes, the roof of reading. Needs
AVX512_BF16 and a C++ compiler. Run it with nothing else on the machine:

    python benchmarks/bench_kernels.py
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.ops.backend import backend_of_cpu
from expertlane.ops.cpu import VectorBackend
from expertlane.ops.host import num_cores
from expertlane.ops.products import Activation, Expert, PairGroups

COPIES_BYTES = 160_000_000
MEASURE_S = 0.6
SHAPES = [(3072, 1024), (1024, 1024), (512, 512)]
NUM_ROWS = [1, 4, 8, 32, 128, 1024]
NUM_EXPERTS, SIZE, NUM_LAYERS = 16, 1024, 6
NUM_TOKENS = [1, 8, 32, 128, 2048]

Row = dict[str, float | int | str]


def onednn(x: torch.Tensor, packed: torch.Tensor, activation: str = "none") -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, activation, [], "")


def seconds(variants: dict[str, Callable[[int], object]], num_copies: int) -> dict[str, float]:
    """The tenth percentile of each variant's calls; `variant(copy)` is called copy by copy."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    until = time.perf_counter() + MEASURE_S * len(variants)
    while time.perf_counter() < until:
        for name, variant in variants.items():
            for copy in range(num_copies):
                began = time.perf_counter()
                variant(copy)
                times[name].append(time.perf_counter() - began)
    return {name: sorted(of)[len(of) // 10] for name, of in times.items()}


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) / shape[-1] ** 0.5).bfloat16()


def products(ops: VectorBackend) -> Iterator[Row]:
    for n, k in SHAPES:
        plain = [random(n, k) for _ in range(max(2, COPIES_BYTES // (2 * n * k)))]
        ours = [ops.linear(weight) for weight in plain]
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in plain]
        for m in NUM_ROWS:
            x = random(m, k)
            variants = {
                "F.linear": partial(on_copy, plain, partial(F.linear, x)),
                "oneDNN packed": partial(on_copy, packed, partial(onednn, x)),
                "ours": partial(on_copy, ours, lambda linear, x=x: linear(x)),
                "sum": partial(on_copy, plain, lambda w: w.view(torch.float32).sum()),
            }
            found = seconds(variants, len(plain))
            yield from rows(f"{n} × {k}, {m} rows", 2 * n * k, 2 * m * n * k, found)


def on_copy(copies: list[Any], use: Callable[[Any], object], i: int) -> object:
    return use(copies[i])


def experts(ops: VectorBackend) -> Iterator[Row]:
    layers = range(NUM_LAYERS)
    plain = [[[random(SIZE, SIZE) for _ in range(NUM_EXPERTS)] for _ in range(3)] for _ in layers]
    ours = [
        ops.experts(
            [
                Expert(gate=ops.linear(gate), up=ops.linear(up), down=ops.linear(down))
                for gate, up, down in zip(*layer, strict=True)
            ],
            Activation("silu"),
        )
        for layer in plain
    ]
    reorder = torch.ops.mkldnn._reorder_linear_weight
    packed = [[[reorder(w) for w in part] for part in layer] for layer in plain]
    for num_tokens in NUM_TOKENS:
        ids = torch.randint(0, NUM_EXPERTS, (2 * num_tokens,))
        counts = torch.bincount(ids, minlength=NUM_EXPERTS).tolist()
        x, at = random(2 * num_tokens, SIZE), torch.arange(2 * num_tokens)
        pairs = PairGroups(torch.tensor(counts), at, at, at[:, None])

        def loop(i: int, x: torch.Tensor = x, counts: list[int] = counts) -> torch.Tensor:
            results, start = [], 0
            for expert, count in enumerate(counts):
                if count:
                    gate, up, down = (part[expert] for part in packed[i])
                    own = x[start : start + count]
                    inner = onednn(own, gate, "swish") * onednn(own, up)
                    results.append(onednn(inner, down))
                    start += count
            return torch.cat(results)

        found = seconds(
            {
                "loop of oneDNN": loop,
                "ours": lambda i, x=x, pairs=pairs: ours[i](x, pairs),
            },
            NUM_LAYERS,
        )
        num_weights = 3 * SIZE * SIZE
        num_bytes = 2 * num_weights * sum(count > 0 for count in counts)
        yield from rows(
            f"experts, {num_tokens} tokens", num_bytes, 4 * num_tokens * num_weights, found
        )


def rows(what: str, num_bytes: int, flops: int, found: dict[str, float]) -> Iterator[Row]:
    for name, taken_s in found.items():
        yield {
            "what": what,
            "variant": name,
            "s": taken_s,
            "bytes_per_s": num_bytes / taken_s,
            "flops_per_s": 0 if name == "sum" else flops / taken_s,
        }


def main() -> None:
    ops, why_not = backend_of_cpu()
    if not isinstance(ops, VectorBackend):
        sys.exit(f"our kernels are not available here: {why_not}")
    torch.set_num_threads(num_cores())
    torch.manual_seed(0)
    with torch.inference_mode():
        found = [*products(ops), *experts(ops)]
    table = Table("what", "variant", "ms", "GB/s", "GFLOP/s", title="bfloat16 on the CPU")
    for row in found:
        table.add_row(
            str(row["what"]),
            str(row["variant"]),
            f"{1e3 * float(row['s']):.3f}",
            f"{float(row['bytes_per_s']) / 1e9:.1f}",
            f"{float(row['flops_per_s']) / 1e9:.0f}" if row["flops_per_s"] else "",
        )
    console = Console()
    console.print(table)
    line = {"benchmark": "kernels", "version": __version__, "num_cores": num_cores(), "rows": found}
    console.out(json.dumps(line), highlight=False)


if __name__ == "__main__":
    main()
