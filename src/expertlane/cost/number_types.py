"""The number types a projected deployment computes, stores and sends in."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from expertlane.cost.step.operation import Amounts, Ints
from expertlane.errors import SpecError
from expertlane.spec.deployment import INPUTS_OF_SCALE, Options, PayloadType
from expertlane.spec.hf_config import NarrowType

# Of a value of hidden states, and of keys and values.
ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1}
SCALED_VALUES = 128  # values of a float8 payload that share one float32 scale
# Of a weight with its share of the scales: float8 has a float32 for every 128 × 128 weights, NVFP4
# a byte for every 16, MXFP4 (OCP Microscaling Formats 1.0) a byte for every 32, INT4 (as Kimi-K2.5
# has it) a bfloat16 for every 32.
WEIGHT_BYTES: dict[str, float] = {
    **ITEM_BYTES,
    "float8": 1 + 4 / 128**2,
    "nvfp4": 1 / 2 + 1 / 16,
    "mxfp4": 1 / 2 + 1 / 32,
    "int4": 1 / 2 + 2 / 32,
}
# What checkpoints so quantised have in the type: of DeepSeek-V3, of NVIDIA's DeepSeek-R1-FP4, of
# gpt-oss, of Kimi-K2.5.
_QUANTISED: dict[str, tuple[str, ...]] = {
    "float8": ("attention", "mlp", "experts"),
    "int8": ("attention", "mlp", "experts"),
    "nvfp4": ("mlp", "experts"),
    "mxfp4": ("experts",),
    "int4": ("experts",),
}


def weight_bytes(num_weights: Amounts | int, number_type: str) -> Ints:
    """Bytes of weights with their scales, whole; of the shape of `num_weights`."""
    return np.ceil(np.asarray(num_weights) * WEIGHT_BYTES[number_type]).astype(np.int64)


@dataclass(frozen=True)
class NumberTypes:
    """The types of weights, of hidden states, and of keys and values.

    Where weights are narrower than activations, what checkpoints so quantised keep stays in the
    type of activations: embedding, output head and the absorbed products of latent attention;
    beside NVFP4 all of attention; beside MXFP4 and INT4 all but the experts. Router weights are
    always float32.

    Attributes:
        narrow_head: the output head has one byte per weight: it was rounded while loading.
        inputs_of_scale: inputs that share a scale in weights of one byte, in the engine's memory;
            None where scales are the checkpoint's.
        rounds_inputs: the engine rounds inputs of float8 matrices to float8 first; times that were
            measured of libraries include that.

    Raises:
        SpecError: an unknown type, or activations or a cache in a type of weights alone.
    """

    weights: str = "bfloat16"
    activations: str = "bfloat16"
    kv: str = "bfloat16"
    narrow_head: bool = False
    inputs_of_scale: int | None = None
    rounds_inputs: bool = False

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "kv"):
            value, known = getattr(self, name), WEIGHT_BYTES if name == "weights" else ITEM_BYTES
            if value not in known:
                raise SpecError(f"type of {name} is {value!r}; valid: {', '.join(known)}")
        if ITEM_BYTES[self.activations] == 1:
            raise SpecError(
                f"activations in {self.activations} are no type of a whole model; use bfloat16"
            )

    @classmethod
    def asked(cls, weights: str, kv: str = "model") -> "NumberTypes":
        """Types by the names of `--dtype` and `--kv-dtype`; beside narrow weights bfloat16.

        Args:
            kv: `model` for that of hidden states.
        """
        activations = "bfloat16" if weights in _QUANTISED else weights
        return cls(weights, activations, activations if kv == "model" else kv)

    @classmethod
    def all_of(cls, number_type: str) -> "NumberTypes":
        """One type for everything, as the engine has it unless weights have one byte."""
        return cls(number_type, number_type, number_type)

    @classmethod
    def of_engine(cls, number_type: str, options: Options) -> "NumberTypes":
        """Types of the engine where it widens weights of one byte."""
        rounds_inputs = options.activations == "float8"
        return replace(cls.asked(number_type, options.kv_dtype), rounds_inputs=rounds_inputs)

    @classmethod
    def kept_as(
        cls, number_type: str, options: Options, stored: NarrowType | Literal["mxfp4"] | None
    ) -> "NumberTypes":
        """Types of the engine where it can keep weights of one byte.

        Args:
            stored: what most matrices of a checkpoint are in, if in one byte: they stay so. Experts
                in MXFP4 do too, unless all weights are to be rounded.
        """
        asked, types = options.weights, cls.of_engine(number_type, options)
        if stored == "mxfp4" and asked == "model":
            return replace(types, weights=stored)
        stored = None if stored == "mxfp4" else stored
        if asked == "model" and stored is None:
            return types
        return replace(
            types,
            weights=stored or asked,
            narrow_head=asked == "int8",
            inputs_of_scale=INPUTS_OF_SCALE,
        )

    @property
    def kept(self) -> str:
        """The type of weights that are not quantised."""
        return self.activations if self.weights in _QUANTISED else self.weights

    def of_part(self, part: Literal["attention", "mlp", "experts"]) -> str:
        """The type of the matrices of attention, of dense and shared MLPs, or of experts."""
        return self.weights if part in _QUANTISED.get(self.weights, (part,)) else self.kept

    @property
    def activation_bytes(self) -> int:
        """Bytes of one value of a hidden state."""
        return ITEM_BYTES[self.activations]

    def cached_bytes(self, num_values: int, num_rows: int) -> int:
        """Bytes of keys and values in the cache.

        Args:
            num_rows: keys and values of heads; one of float8 has a scale of one byte.
        """
        return num_values * ITEM_BYTES[self.kv] + (num_rows if self.kv == "float8" else 0)

    def __str__(self) -> str:
        kv = f", keys and values {self.kv}" if self.kv != self.activations else ""
        return self.weights + kv


@dataclass(frozen=True)
class PayloadBytes:
    """A hidden state as it is dispatched.

    Attributes:
        values: bytes of the values: payload.
        scales: bytes of their scales: metadata.
        is_narrowed: whether it is rounded before and widened after.
    """

    values: int
    scales: int
    is_narrowed: bool

    @classmethod
    def of(cls, payload: PayloadType, activation_bytes: int, hidden_size: int) -> "PayloadBytes":
        """Bytes in a payload type; hidden states as narrow already are sent as they are."""
        item = {"model": activation_bytes, "bfloat16": 2, "float8": 1, "int8": 1}[payload]
        if item >= activation_bytes:
            return cls(hidden_size * activation_bytes, 0, False)
        blocks = -(-hidden_size // SCALED_VALUES) if payload == "float8" else 0
        return cls(hidden_size * item, 4 * blocks, True)
