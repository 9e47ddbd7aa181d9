"""Seeded weights: the same logical matrices whatever the layout.

Every matrix is drawn whole from its own counter-based stream (Philox, Salmon et al. 2011), keyed by
(seed, name); a rank cuts out its slice and frees the rest. Matrices have std 1/√fan_in; norm
weights are 1 + 0.1·N, so that a test notices a norm that is left out.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

from expertlane.spec.model import ModelConfig

EMBEDDING = "embedding"
FINAL_NORM = "final_norm"
HEAD = "head"


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


def draw(model: ModelConfig, seed: int, name: str) -> npt.NDArray[np.float32]:
    """The whole logical tensor `name`, float32, of the shape `tensor_shape` gives."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    shape = tensor_shape(model, name)
    drawn = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.float32(1.0) + np.float32(0.1) * drawn
    fan_in = 1 if name == EMBEDDING else shape[1]
    drawn *= np.float32(1.0 / math.sqrt(fan_in))
    return drawn
