"""Tiny checkpoints with one planted error each, and the numbers that tell how much it changes.

A changed copy is a whole checkpoint again, in the files that transformers writes, so any server can
load it: what it then computes is what it would by a mistake of its own on the original.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.model.families import make_model
from expertlane.endpoint.reference import CheckpointReference
from expertlane.progress import Progress

_GROUPED = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "dots1"),
    *("minimax_m2", "ernie4_5_moe", "granitemoe"),
)
_LATENT = ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "glm4_moe_lite")
_ALL = _GROUPED + _LATENT
_SHARED = ("qwen2_moe", "glm4_moe", "dots1", "ernie4_5_moe", *_LATENT)
_BIASED = (
    *("gpt_oss", "glm4_moe", "glm4_moe_lite", "dots1", "minimax_m2", "ernie4_5_moe"),
    "deepseek_v3",
)
_RANKS = 4  # of which one's experts are zeroed
_EPSILONS = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Planted:
    """An error, and where it is.

    Attributes:
        kind: of `KINDS`.
        layers: of the decoder that it is in; empty: all.
        experts: of these layers that it is in; empty: all, or none in particular.
    """

    kind: str
    family: str
    layers: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pair:
    """An original and its changed copy."""

    original: Path
    changed: Path
    planted: Planted


Place = tuple[tuple[int, ...], tuple[int, ...]]  # layers and experts
Change = Callable[[Any, np.random.Generator], Place]


def plant(kind: str, family: str, folder: Path, seed: int = 0, **overrides: Any) -> Pair:
    """Write a checkpoint and its changed copy under a folder.

    Args:
        overrides: fields of the family's configuration.
    """
    families, change = KINDS[kind]
    assert family in families, f"{family} cannot have {kind}"
    model = make_model(family, seed, **overrides)
    original, changed = folder / "original", folder / "changed"
    model.save_pretrained(original)
    with torch.no_grad():
        layers, experts = change(model, np.random.default_rng(seed))
    model.save_pretrained(changed)
    return Pair(original, changed, Planted(kind, family, layers, experts))


@dataclass(frozen=True)
class Effect:
    """How much an error moves log-probabilities, and a number type does: root mean squares."""

    change: float
    noise: float


def effect(original: Path, changed: Path, prompts: list[list[int]], dtype: str) -> Effect:
    """What the reference makes of the original, of the copy, and of the original in a type."""

    def logprobs(folder: Path, name: str) -> Any:
        (found,) = CheckpointReference(folder).score_in(prompts, (name,), Progress()).values()
        return np.concatenate([each.logprobs for each in found])

    plain = logprobs(original, "float32")
    apart = [logprobs(changed, "float32") - plain, logprobs(original, dtype) - plain]
    return Effect(*(float(np.sqrt(np.square(each).mean())) for each in apart))


def _experts(model: Any) -> dict[int, Any]:
    """The modules of experts, by layer."""
    found = {}
    for index, layer in enumerate(model.get_decoder().layers):
        for name, module in layer.named_modules():
            if name.endswith("experts") and hasattr(module, "down_proj"):
                down = module.down_proj
                if isinstance(down, torch.Tensor) and down.dim() == 3:
                    found[index] = module
    return found


def _drawn_layer(model: Any, draw: np.random.Generator) -> tuple[int, Any]:
    found = _experts(model)
    layer = int(draw.choice(list(found)))
    return layer, found[layer]


def _of_experts(module: Any) -> list[torch.Tensor]:
    """All its parameters that have a row for each expert."""
    return list(module.parameters())


def _swap(model: Any, draw: np.random.Generator) -> Place:
    layer, module = _drawn_layer(model, draw)
    one, other = map(int, draw.choice(len(module.down_proj), size=2, replace=False))
    for tensor in _of_experts(module):
        tensor[[one, other]] = tensor[[other, one]]
    return (layer,), (one, other)


def _scale(model: Any, draw: np.random.Generator) -> Place:
    layer, module = _drawn_layer(model, draw)
    expert = int(draw.integers(len(module.down_proj)))
    for name, tensor in module.named_parameters():
        if name.startswith("down_proj"):
            tensor[expert] *= 1.1
    return (layer,), (expert,)


def _zero_rank(model: Any, draw: np.random.Generator) -> Place:
    found = _experts(model)
    num_experts = len(next(iter(found.values())).down_proj)
    rank, size = int(draw.integers(_RANKS)), num_experts // _RANKS
    own = range(rank * size, (rank + 1) * size)
    for module in found.values():
        for name, tensor in module.named_parameters():
            if name.startswith("down_proj"):
                tensor[own.start : own.stop] = 0
    return tuple(found), tuple(own)


def _drop_bias(model: Any, _: np.random.Generator) -> Place:
    dropped = 0
    for name, tensor in model.state_dict().items():
        if name.endswith(("e_score_correction_bias", "router.bias")):
            tensor.zero_()
            dropped += 1
    assert dropped
    return tuple(_experts(model)), ()


def _rope_base(model: Any, draw: np.random.Generator) -> Place:
    parameters = model.config.rope_parameters
    parameters["rope_theta"] *= float(draw.choice([0.1, 10.0, 100.0]))
    return (), ()


def _repeat_heads(model: Any, _: np.random.Generator) -> Place:
    """Query head h gets key/value head h mod n, in place of h // (heads / n).

    The same as query heads in another order: those of one remainder side by side.
    """
    config = model.config
    num_heads, num_kv = config.num_attention_heads, config.num_key_value_heads
    order = torch.tensor(sorted(range(num_heads), key=lambda head: (head % num_kv, head)))
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        dim = attention.q_proj.weight.shape[0] // num_heads
        rows = (order[:, None] * dim + torch.arange(dim)).flatten()
        for each in (attention.q_proj.weight, attention.q_proj.bias):
            if each is not None:
                each.copy_(each[rows].clone())
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows].clone())
        if hasattr(attention, "sinks"):
            attention.sinks.copy_(attention.sinks[order].clone())
        norm = getattr(attention, "q_norm", None)
        if norm is not None and len(norm.weight) == len(rows):
            norm.weight.copy_(norm.weight[rows].clone())
    return (), ()


def _epsilon(model: Any, draw: np.random.Generator) -> Place:
    model.config.rms_norm_eps = float(draw.choice(_EPSILONS))
    return (), ()


def _normalise_otherwise(model: Any, _: np.random.Generator) -> Place:
    model.config.norm_topk_prob = not model.config.norm_topk_prob
    return tuple(_experts(model)), ()


def _leave_shared_out(model: Any, _: np.random.Generator) -> Place:
    left_out = 0
    for name, module in model.named_modules():
        if name.endswith(("shared_expert", "shared_experts")):
            module.down_proj.weight.zero_()
            left_out += 1
    assert left_out
    return tuple(_experts(model)), ()


# The families that can have an error, and what makes it.
KINDS: dict[str, tuple[tuple[str, ...], Change]] = {
    "experts swapped": (_ALL, _swap),
    "expert scaled by 1.1": (_ALL, _scale),
    "experts of a rank zeroed": (_ALL, _zero_rank),
    "routing bias dropped": (_BIASED, _drop_bias),
    "RoPE base wrong": (_ALL, _rope_base),
    "KV heads repeated wrongly": (_GROUPED, _repeat_heads),
    "norm's epsilon wrong": (_ALL, _epsilon),
    "top-k weights normalised otherwise": (
        ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "dots1", "glm4_moe_lite"),
        _normalise_otherwise,
    ),
    "shared expert left out": (_SHARED, _leave_shared_out),
}
