"""Rotary positions (Su et al. 2021) with the stretchings that checkpoints name."""

import math

import torch
from torch import Tensor

from expertlane.ops.backend import backend_for
from expertlane.spec.model import ModelConfig, RopeScaling


def rotary_frequencies(model: ModelConfig) -> Tensor:
    """[rotary_dim / 2] float64; radians a position."""
    dims = torch.arange(0, model.rotary_dim, 2, dtype=torch.float64) / model.rotary_dim
    frequencies = model.rope_theta**-dims
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling)
    return _yarn(frequencies, scaling, model.rotary_dim, model.rope_theta)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided, 1: left as it is
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(frequencies: Tensor, scaling: RopeScaling, rotary_dim: int, theta: float) -> Tensor:
    def dim_of(num_turns: float) -> float:
        length = scaling.original_max_position_embeddings
        turns = math.log(length / (num_turns * 2 * math.pi))
        return rotary_dim * turns / (2 * math.log(theta))

    first, last = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    ramp = torch.arange(len(frequencies), dtype=torch.float64) - first
    divided = (ramp / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies * (1 - divided + divided / scaling.factor)


Rotation = tuple[Tensor, Tensor]


class RotaryEmbedding:
    """Turns the last `rotary_dim` values of queries and keys by their positions.

    The pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) where the model interleaves them.
    """

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        positions = torch.arange(model.max_position_embeddings, dtype=torch.float64)
        angles = positions[:, None] * rotary_frequencies(model)
        scaling = model.rope_scaling
        factor = scaling.attention_factor if scaling is not None else 1.0
        cos, sin = angles.cos() * factor, angles.sin() * factor
        # Both halves of a pair side by side: [positions, 1, rotary_dim].
        self._cos = torch.cat([cos, cos], dim=1).float().to(device)[:, None]
        self._sin = torch.cat([-sin, sin], dim=1).float().to(device)[:, None]
        self._interleave = model.rope_interleave
        self._ops = backend_for(device)

    def at(self, positions: Tensor) -> Rotation:
        """Cosines and sines of positions [num_tokens], for all layers alike."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def rotate_(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Turn queries or keys, maybe in place.

        Args:
            x: [num_tokens, num_heads, head_dim]; not to be used afterwards.
            rotation: what `at` gave for the tokens' positions.
        """
        return self._ops.rotate_(x, *rotation, interleave=self._interleave)
