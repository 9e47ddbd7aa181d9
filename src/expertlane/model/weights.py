"""Seeded weights: the same logical tensors whatever the layout.

A tensor is drawn in blocks along the dimension that parallel layouts cut, each block from a
counter-based stream of its own (Philox, Salmon et al. 2011) keyed by (seed, name, block). So a rank
draws little more than its own slice. Matrices have std 1/√fan_in; norm weights are 1 + 0.1·N, so
that a test notices a norm that is left out.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

from expertlane.spec.model import ModelConfig

EMBEDDING = "embedding"
FINAL_NORM = "final_norm"
HEAD = "head"
_CUT_BY_INPUT = ("output", "down")
_BLOCK = 64  # indices of the cut dimension in one stream


def layer_name(layer: int, part: str) -> str:
    """The name of a layer's tensor.

    Parts: attention_norm, query, key, value, output, moe_norm, router.
    """
    return f"layers.{layer}.{part}"


def expert_name(layer: int, expert: int, part: str) -> str:
    """The name of an expert's tensor; parts: up, down."""
    return f"layers.{layer}.experts.{expert}.{part}"


def tensor_shape(model: ModelConfig, name: str) -> tuple[int, ...]:
    """The logical shape of a tensor; matrices are [out_features, in_features].

    Raises:
        KeyError: the model has no tensor of that name.
    """
    hidden, attention = model.hidden_size, model.attention_size
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (model.vocab_size, hidden),
        "head": (model.vocab_size, hidden),
        "final_norm": (hidden,),
        "attention_norm": (hidden,),
        "moe_norm": (hidden,),
        "query": (attention, hidden),
        "key": (attention, hidden),
        "value": (attention, hidden),
        "output": (hidden, attention),
        "router": (model.num_experts, hidden),
        "up": (model.moe_intermediate_size, hidden),
        "down": (hidden, model.moe_intermediate_size),
    }
    return shapes[name.rsplit(".", 1)[-1]]


def draw(
    model: ModelConfig, seed: int, name: str, part: range | None = None
) -> npt.NDArray[np.float32]:
    """The logical tensor `name`, float32, of the shape `tensor_shape` gives, or a part of it.

    Args:
        part: indices of the dimension that layouts cut: input features of `output` and `down`,
            output features of all others; None for all.
    """
    shape = tensor_shape(model, name)
    cut_dim = 1 if name.rsplit(".", 1)[-1] in _CUT_BY_INPUT else 0
    part = range(shape[cut_dim]) if part is None else part
    rest = math.prod(shape) // shape[cut_dim]
    first_block = part.start // _BLOCK
    blocks = [
        _draw_block(seed, name, block, min(_BLOCK, shape[cut_dim] - block * _BLOCK), rest)
        for block in range(first_block, -(-part.stop // _BLOCK))
    ]
    drawn = np.concatenate(blocks) if blocks else np.empty((0, rest), dtype=np.float32)
    drawn = drawn[part.start - first_block * _BLOCK :][: len(part)]
    if len(shape) == 1:
        return np.float32(1.0) + np.float32(0.1) * drawn[:, 0]
    fan_in = 1 if name == EMBEDDING else shape[1]
    drawn *= np.float32(1.0 / math.sqrt(fan_in))
    return drawn.T if cut_dim else drawn


def _draw_block(seed: int, name: str, block: int, size: int, rest: int) -> npt.NDArray[np.float32]:
    """[size, rest]; standard normal."""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return generator.standard_normal((size, rest), dtype=np.float32)
