"""What int8 weights cost in quality: perplexity of a small model on text it has not seen.

Trains a byte-level Mixtral of 4 layers × 8 experts on the documentation but every eighth file, for
some minutes on one core, then measures the perplexity of those files: with the weights as
trained, in bfloat16, and rounded to int8 as `--weights int8` does, computed in float32 by
transformers. That the engine computes the rounded model is `tests/parity/test_narrow.py`. A model
so small and so briefly trained has no outliers as those of billions of weights do: this bounds the
rounding, it does not foretell a large model's loss.

    python benchmarks/narrow_quality.py [MINUTES [BYTES]]

BYTES: of the files left out, to measure on; all if not given.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from expertlane.engine.ops.narrow import NarrowWeight

DOCS = Path(__file__).parents[1] / "docs"
LENGTH, BATCH = 128, 8
MINUTES = 5.0


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and others."""
    files = sorted(DOCS.rglob("*.md"))
    held_out = files[::8]
    parts = ([file for file in files if file not in held_out], held_out)
    train, test = (b"\n".join(file.read_bytes() for file in each) for each in parts)
    return torch.tensor(list(train)), torch.tensor(list(test))


def made() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=LENGTH,
            output_router_logits=True,
        )
    )


def train(model: MixtralForCausalLM, text: Tensor, minutes: float) -> int:
    """Gives the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    generator, until, step = torch.Generator().manual_seed(1), time.monotonic() + 60 * minutes, 0
    while time.monotonic() < until:
        left = (until - time.monotonic()) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (0.05 + 0.95 * left)
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    return step


@torch.no_grad()
def logits_of(model: MixtralForCausalLM, text: Tensor) -> tuple[float, Tensor]:
    """Perplexity a byte, and logits."""
    windows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    logits = torch.cat([model(part).logits.float() for part in windows.split(16)])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return math.exp(loss), logits


def changed(model: MixtralForCausalLM, change: Callable[[Tensor], Tensor]) -> MixtralForCausalLM:
    """A copy with other matrices, but for router, norms and embedding."""
    other = made().eval()
    other.load_state_dict(model.state_dict())
    for name, weight in other.named_parameters():
        if weight.dim() > 1 and "embed" not in name and not name.endswith("gate.weight"):
            weight.data = change(weight.data.flatten(0, -2)).view(weight.shape)
    return other


def rounded(weight: Tensor) -> Tensor:
    return NarrowWeight.rounded(weight, torch.float32).widened()


def by_row(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def main() -> None:
    torch.set_num_threads(1)  # small products
    seen, unseen = texts()
    model = made()
    steps = train(model, seen, float(sys.argv[1]) if len(sys.argv) > 1 else MINUTES)
    unseen = unseen[: int(sys.argv[2])] if len(sys.argv) > 2 else unseen
    model.eval()
    found, logits = logits_of(model, unseen)
    print(f"{steps} steps of {BATCH} × {LENGTH} bytes; {len(unseen)} bytes unseen")
    print(f"{'float32':24} perplexity {found:.4f}")
    kinds = {
        "bfloat16": lambda weight: weight.bfloat16().float(),
        "int8, groups of 128": rounded,
        "int8, whole rows": by_row,
    }
    for name, change in kinds.items():
        other, moved = logits_of(changed(model, change), unseen)
        error = (moved - logits).abs().max() / logits.abs().max()
        mean = (moved - logits).abs().mean() / logits.abs().mean()
        same = (moved.argmax(-1) == logits.argmax(-1)).float().mean()
        print(
            f"{name:24} perplexity {other:.4f} ({100 * (other / found - 1):+.3f} %), logits off by "
            f"{error:.4f} of the largest, {mean:.4f} in the mean; same byte {100 * same:.2f} %"
        )


if __name__ == "__main__":
    main()
