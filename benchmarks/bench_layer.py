"""Decode steps and prompts of one layer, as a rank alone runs it: on the GPU, or on the CPU.

One decoder layer with embedding and head, random weights, no launcher and no transfers. A time is
the median of repeated steps, by the host's clock with the device's work done; `read` are the bytes
of weights and of keys and values that the step has to read, by the recorder's own count. Then the
layer's experts alone, as the engine applies them and one after the other.

    python benchmarks/bench_layer.py [--device cpu] [--quick] [--json FILE]
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from one_rank import OneRank, seconds
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.engine.ops.backend import DTYPES, backend_for
from expertlane.engine.ops.products import LoopedExperts
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig

SMALL = ModelConfig(
    name="small",
    num_hidden_layers=1,
    hidden_size=1024,
    num_attention_heads=16,
    head_dim=64,
    num_key_value_heads=4,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=1024,
    gated_mlp=True,
    hidden_act="silu",
    vocab_size=1024,
    max_position_embeddings=8192,
)
MIXTRAL_LIKE = SMALL.with_overrides(
    name="mixtral-like",
    hidden_size=4096,
    num_attention_heads=32,
    head_dim=128,
    num_key_value_heads=8,
    num_experts=8,
    moe_intermediate_size=14336,
)
CONTEXT = 1024
DECODES = [1, 8, 32, 128]  # sequences with CONTEXT positions each
PROMPTS = [(1, 512), (1, 4096), (8, 512)]  # sequences, and their lengths

Row = dict[str, float | int | str]


class Bench:
    """One layer on one rank."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self._one = OneRank(model, Layout(), 0, dtype, device)

    def rows(self, *, quick: bool) -> Iterator[Row]:
        """Every step, then the experts alone."""
        for num_seqs in DECODES[:2] if quick else DECODES:
            yield self._step(f"decode, {num_seqs} × {CONTEXT}", num_seqs, CONTEXT - 1, 1)
        for num_seqs, length in PROMPTS[:1] if quick else PROMPTS:
            yield self._step(f"prompts, {num_seqs} × {length}", num_seqs, 0, length)
        for num_tokens in (1, 32) if quick else (1, 32, 256, 4096):
            yield from self._experts(num_tokens)

    def _step(self, what: str, num_seqs: int, num_computed: int, num_new: int) -> Row:
        step = self._one.step(num_seqs, num_computed, num_new)
        record = self._one.record(step)
        num_bytes = int(record.weight_bytes.sum()) + record.kv_bytes
        taken_s = seconds(step, self.device)
        return self._row(what, "", taken_s, num_bytes, int(record.flops.sum()))

    def _experts(self, num_tokens: int) -> Iterator[Row]:
        (block,) = self._one.stage.moe_blocks.values()
        model, experts = self.model, block.experts
        ids = torch.rand(num_tokens, model.num_experts, device=self.device)
        ids = ids.topk(model.num_experts_per_tok).indices.int()
        x = torch.randn(num_tokens, model.hidden_size, dtype=self.dtype, device=self.device)
        pairs = backend_for(self.device).group_pairs(ids, 0, 1, model.num_experts)
        flops, num_bytes = experts.compute_cost(pairs.counts.tolist())
        chosen = backend_for(self.device).experts(experts.held, experts.activation)
        looped = LoopedExperts(experts.held, experts.activation)
        variants = {type(each).__name__: each for each in (chosen, looped)}
        for name, apply in variants.items():
            taken_s = seconds(partial(apply, x, pairs), self.device)
            yield self._row(f"experts, {num_tokens} tokens", name, taken_s, num_bytes, flops)

    def _row(self, what: str, variant: str, taken_s: float, num_bytes: int, flops: int) -> Row:
        return {
            "model": self.model.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "what": what,
            "variant": variant,
            "s": taken_s,
            "read_bytes": num_bytes,
            "bytes_per_s": num_bytes / taken_s,
            "flops": flops,
            "flops_per_s": flops / taken_s,
        }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    options.add_argument("--quick", action="store_true", help="the small model, a few sizes")
    options.add_argument("--json", type=Path, help="write the rows here too")
    given = options.parse_args()
    device, found = torch.device(given.device), []
    with torch.inference_mode():
        for model in [SMALL] if given.quick else [SMALL, MIXTRAL_LIKE]:
            found += Bench(model, DTYPES[given.dtype], device).rows(quick=given.quick)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    line = {
        "benchmark": "layer",
        "version": __version__,
        "torch": torch.__version__,
        "device": name,
        "rows": found,
    }
    if given.json is not None:
        given.json.write_text(json.dumps(line, indent=1))
    table = Table("model", "what", "variant", "ms", "read MB", "GB/s", "TFLOP/s", title=name)
    for row in found:
        table.add_row(
            *(str(row["model"]), str(row["what"]), str(row["variant"])),
            f"{1e3 * float(row['s']):.3f}",
            f"{float(row['read_bytes']) / 1e6:,.0f}",
            f"{float(row['bytes_per_s']) / 1e9:,.0f}",
            f"{float(row['flops_per_s']) / 1e12:,.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
