"""Weights of one byte beside bfloat16 ones: products, experts, and decoding with the engine.

Products x · Wᵀ and one layer's experts (16 of 1024 × 1024, top-2), rows in bfloat16, take turns
over so many copies of the weights that none is found in a cache; a time is the tenth percentile.
Or an engine of each type of weights decodes in turns: the least mean time of a step. Run it for
each instruction set, with nothing else on the machine:

    python benchmarks/bench_narrow.py [ROWS …] [--engine CHECKPOINT]
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from expertlane import LLM, SamplingParams
from expertlane.engine.ops.backend import backend_of_cpu
from expertlane.engine.ops.narrow import NarrowWeight
from expertlane.engine.ops.products import Activation, Expert, PairGroups
from expertlane.engine.ops.vector import VectorBackend
from expertlane.spec.deployment import Options

COPIES_BYTES = 200_000_000  # of bfloat16
ROUNDS = 15
SHAPES = [(3072, 1024), (1024, 1024), (4096, 4096)]
NUM_ROWS = [1, 2, 4, 8, 32, 128, 512]  # also the tokens of experts
NUM_EXPERTS, SIZE = 16, 1024
DECODED, TURNS = 24, 5


def tenth_percentiles(variants: dict[str, Callable[..., object]], copies: int) -> list[float]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            for copy in range(copies):
                began = time.perf_counter()
                variant(copy=copy)
                times[name].append(time.perf_counter() - began)
    return [sorted(of)[len(of) // 10] for of in times.values()]


def on_copy(made: list[Any], kind: int, *given: object, copy: int) -> object:
    return made[copy][kind](*given)


def show(what: str, num_bytes: int, times: list[float]) -> None:
    """Times beside that of bfloat16, and GB/s of weights."""
    wide_s, *others = times
    text = f"{what:28} bf16 {1e6 * wide_s:8.0f} µs ({2 * num_bytes / wide_s / 1e9:5.1f} GB/s)"
    for name, each_s in zip(("int8", "float8"), others, strict=True):
        text += f"   {name} {1e6 * each_s:8.0f} µs ({num_bytes / each_s / 1e9:5.1f} GB/s)"
        text += f" ×{wide_s / each_s:.2f}"
    print(text)


def weights_of(n: int, k: int) -> list[torch.Tensor | NarrowWeight]:
    """The same in bfloat16, int8 by groups and float8 by blocks."""
    weight = torch.randn(n, k) / k**0.5
    values = (weight * 1000).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.full((n, -(-k // 128)), 1e-3)
    narrow = NarrowWeight(values, scales, 128, 0, torch.bfloat16)
    return [weight.bfloat16(), NarrowWeight.rounded(weight, torch.bfloat16), narrow]


def products(ops: VectorBackend, num_rows: list[int]) -> None:
    for n, k in SHAPES:
        copies = max(2, COPIES_BYTES // (2 * n * k))
        made = [[ops.linear(each) for each in weights_of(n, k)] for _ in range(copies)]
        for m in num_rows:
            x = torch.randn(m, k).bfloat16()
            variants = {str(i): partial(on_copy, made, i, x) for i in range(3)}
            show(f"{n} × {k}, {m} rows", n * k, tenth_percentiles(variants, copies))


def experts(ops: VectorBackend, num_tokens: list[int]) -> None:
    copies = max(2, COPIES_BYTES // (2 * 3 * SIZE * SIZE * NUM_EXPERTS))
    made = []
    for _ in range(copies):
        linears = [
            [[ops.linear(each) for each in weights_of(SIZE, SIZE)] for _ in range(3)]
            for _ in range(NUM_EXPERTS)
        ]
        held = [
            [Expert(up=up[i], down=down[i], gate=gate[i]) for gate, up, down in linears]
            for i in range(3)
        ]
        made.append([ops.experts(each, Activation("silu")) for each in held])
    for m in num_tokens:
        generator = torch.Generator().manual_seed(m)
        ids = torch.rand(m, NUM_EXPERTS, generator=generator).topk(2).indices
        experts_of_pair, order = ids.flatten().sort(stable=True)
        counts = torch.bincount(experts_of_pair, minlength=NUM_EXPERTS)
        pairs = PairGroups(counts, order // 2, order, ids)
        x = torch.randn(m, SIZE).bfloat16()
        variants = {str(i): partial(on_copy, made, i, x, pairs) for i in range(3)}
        num_bytes = int((counts > 0).sum()) * 3 * SIZE * SIZE
        show(f"experts, {m} tokens", num_bytes, tenth_percentiles(variants, copies))


def engine(checkpoint: str) -> None:
    """Milliseconds of a decode step, at batches of 1, 8 and 32."""
    types = ("model", "int8")
    running = {
        weights: LLM(
            checkpoint,
            dtype="bfloat16",
            options=Options(weights=weights),
            max_model_len=256,
            max_num_seqs=32,
        )
        for weights in types
    }
    print(running["model"].machine[0].kernels, flush=True)
    try:
        for batch in (1, 8, 32):
            best = dict.fromkeys(types, float("inf"))
            for _ in range(TURNS):
                for weights in types:
                    step_s = mean_step_s(running[weights], batch)
                    best[weights] = min(best[weights], step_s)
            wide_s, narrow_s = best.values()
            print(
                f"decode at batch {batch:3}: bf16 {1e3 * wide_s:.2f} ms, int8 "
                f"{1e3 * narrow_s:.2f} ms, ×{wide_s / narrow_s:.2f}",
                flush=True,
            )
    finally:
        for each in running.values():
            each.close()


def mean_step_s(llm: LLM, batch: int) -> float:
    """The mean time of a step after the first token."""
    params = SamplingParams(max_tokens=DECODED, temperature=0.0, ignore_eos=True)
    prompts = [[1 + number, 2, 3, 4] for number in range(batch)]
    began = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    prefill_s = time.perf_counter() - began
    began = time.perf_counter()
    llm.generate(prompts, params)
    return (time.perf_counter() - began - prefill_s) / (DECODED - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", metavar="CHECKPOINT", help="measure decoding, nothing else")
    parser.add_argument("rows", nargs="*", type=int, default=NUM_ROWS, metavar="ROWS")
    asked = parser.parse_args()
    ops, why_not = backend_of_cpu()
    if not isinstance(ops, VectorBackend):
        sys.exit(why_not)
    if asked.engine is not None:
        engine(asked.engine)
    else:
        print(f"{ops.instructions}, {torch.get_num_threads()} threads")
        products(ops, asked.rows)
        experts(ops, asked.rows)


if __name__ == "__main__":
    main()
