"""Points, and the most tokens per second that a machine could reach at each.

A step takes at least max(bytes / read bandwidth, FLOPs / GEMM peak):

- bytes: the weights of attention, router and output head, those of the experts that at least one
  token reaches, 2 bytes each, and the keys and values of the context. With B tokens that choose
  k of E experts independently and evenly, E·(1 − (1 − k/E)^B) experts are reached.
- FLOPs: 2 for each weight and token (k experts a token), 4 for each head's value, query and key.

Embedding rows, norms, activations and the writing of keys and values are left out: all small.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

DECODE_TOKENS = 32  # tokens decoded per prompt, after the first


@dataclass(frozen=True)
class Point:
    """`batch_size` prompts of `prompt_len` tokens; `decode` or else prefill is what counts.

    A decode point counts tokens after the first, over the time that they add to a batch's
    first tokens; a prefill point counts prompt tokens until all have their first token.
    """

    decode: bool
    batch_size: int
    prompt_len: int

    @property
    def name(self) -> str:
        """Short and unique: `decode-8`, `prefill-512x8`."""
        if self.decode:
            return f"decode-{self.batch_size}"
        return f"prefill-{self.prompt_len}x{self.batch_size}"

    @property
    def num_repeats(self) -> int:
        """Runs in one sample: small batches are over too soon for one to be a steady measure."""
        return 3 if self.decode and self.batch_size <= 8 else 1


DECODE = tuple(Point(True, batch, 32) for batch in (1, 8, 32, 128))
POINTS = (*DECODE, Point(False, 8, 512), Point(False, 32, 32))


@dataclass(frozen=True)
class ModelShape:
    """What a roof needs of a checkpoint's config; sizes in weights."""

    num_layers: int
    attention: int  # all four projections of a layer
    query_size: int  # heads × head_dim
    key_size: int  # key/value heads × head_dim
    router: int
    expert: int
    head: int
    num_experts: int
    num_experts_per_tok: int

    @classmethod
    def of(cls, checkpoint: Path) -> Self:
        """Read `config.json` of a checkpoint made by `make_checkpoint.py`."""
        config = json.loads((checkpoint / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config["head_dim"] or hidden // heads
        query_size = heads * head_dim
        key_size = config["num_key_value_heads"] * head_dim
        inner = config.get("moe_intermediate_size") or config["intermediate_size"]
        return cls(
            num_layers=config["num_hidden_layers"],
            attention=2 * hidden * (query_size + key_size),
            query_size=query_size,
            key_size=key_size,
            router=hidden * config["num_local_experts"],
            expert=3 * hidden * inner,
            head=hidden * config["vocab_size"],
            num_experts=config["num_local_experts"],
            num_experts_per_tok=config["num_experts_per_tok"],
        )


def step_cost(shape: ModelShape, point: Point) -> tuple[float, float]:
    """Bytes and FLOPs of a decode step in mid-run, or of the prefill of the whole batch."""
    num_seqs = point.batch_size
    num_tokens = num_seqs if point.decode else num_seqs * point.prompt_len
    # The mean number of keys that a query sees; a prompt's queries see those before them.
    context = point.prompt_len + (DECODE_TOKENS + 1) / 2 if point.decode else point.prompt_len / 2
    missed = (1 - shape.num_experts_per_tok / shape.num_experts) ** num_tokens
    common = shape.attention + shape.router
    weights = shape.num_layers * (common + shape.num_experts * (1 - missed) * shape.expert)
    cached = num_seqs * context * 2 * shape.num_layers * shape.key_size if point.decode else 0
    used = shape.num_layers * (common + shape.num_experts_per_tok * shape.expert)
    attended = 4 * num_tokens * context * shape.query_size * shape.num_layers
    num_bytes = 2 * (weights + shape.head + cached)
    flops = 2 * (num_tokens * used + num_seqs * shape.head) + attended
    return num_bytes, flops


def roof(
    shape: ModelShape, point: Point, read_bytes_per_s: float, gemm_flops_per_s: float
) -> float:
    """The most tokens per second at a point."""
    num_bytes, flops = step_cost(shape, point)
    seconds = max(num_bytes / read_bytes_per_s, flops / gemm_flops_per_s)
    return point.batch_size * (1 if point.decode else point.prompt_len) / seconds


def goal(best_peer: float, roof_tps: float) -> float:
    """The lower of 75 % of the roof and 1.5 × the best peer."""
    return min(1.5 * best_peer, 0.75 * roof_tps)
