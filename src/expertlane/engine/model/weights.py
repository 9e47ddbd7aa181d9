"""Sources of a rank's weights, seeded or a checkpoint: the same logical tensors in every layout.

A seeded tensor is drawn in blocks along the dimension that parallel layouts divide, each block from
a counter-based stream of its own (Philox, Salmon et al. 2011) keyed by (seed, name, block). So a
rank draws little more than its own slice. Matrices have std 1/√fan_in; norm weights are 1 + 0.1·N,
so that a test notices a norm that is left out, and biases and sinks 0.1·N.
"""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.float8 import FLOAT8
from expertlane.engine.ops.narrow import Float8Inputs, Mxfp4Weight, NarrowWeight, Weight
from expertlane.engine.ops.products import Linear
from expertlane.spec.deployment import INPUTS_OF_SCALE, ActivationsType, WeightsType
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Origin
from expertlane.spec.tensors import EMBEDDING, HEAD, cut_dim, layer_name, tensor_shape

MadeT = TypeVar("MadeT")
EXPERT = "expert"  # the key of an expert begins with it, and its number


class HeldWeights:
    """Linears and tensors made of weights, kept so that a later stage need not read them again.

    Parts stay only as long as this object: a stage has to keep references of its own.
    """

    def __init__(self) -> None:
        # By layer (None: outside layers) and key: the part that was made, and its bytes.
        self._made: dict[int | None, dict[Hashable, tuple[Any, int]]] = {}

    def put(self, layer: int | None, key: Hashable, made: Any, num_bytes: int) -> None:
        """Keep a part of a layer (None: outside layers) by its key."""
        self._made.setdefault(layer, {})[key] = made, num_bytes

    def find(self, layer: int | None, key: Hashable) -> tuple[Any, int] | None:
        """A part that was put there, and its bytes; None if there is none."""
        return self._made.get(layer, {}).get(key)

    def of_layer(self, layer: int | None) -> dict[Hashable, Any]:
        """A layer's parts by key, in the order in which they were added."""
        return {key: made for key, (made, _) in self._made.get(layer, {}).items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(size for made in self._made.values() for _, size in made.values())

    def copy(self) -> "HeldWeights":
        """An independent copy with the same parts."""
        other = HeldWeights()
        other._made = {layer: dict(made) for layer, made in self._made.items()}
        return other

    def drop(self, layer: int | None) -> None:
        """Drop all parts of a layer."""
        self._made.pop(layer, None)

    def keep_layers(self, layers: range) -> None:
        """Drop the parts of all other layers."""
        for layer in [each for each in self._made if each is not None and each not in layers]:
            self.drop(layer)


def _nothing() -> None:
    pass


@dataclass(eq=False)
class WeightSource(ABC):
    """Gives slices of weights on the rank's device, and counts them.

    Attributes:
        model: the model whose tensors they are.
        dtype: dtype of the slices, unless another is asked for.
        touch: called after every tensor, to show that work goes on.
        weights: whether matrices are rounded to a narrower type.
        activations: whether matrices stored in float8 get inputs in float8.
        num_bytes: bytes given so far.
        bytes_from: those bytes, by origin.
        read_s: seconds in which weights were read or drawn.
        held: parts that `once` has given.
        given: parts made earlier of the same weights, which `once` uses; the first origin that has
            a part is taken.
        is_ahead: nothing is computed with the weights yet; `held` gets all parts.
        before_make: called before a part is made; it may raise.
        fill: replaces a part by one with weights, by layer and key, or gives None if it has none.
            Then nothing is read: parts are made empty. None where they are made with weights.
    """

    model: ModelConfig
    dtype: torch.dtype
    device: torch.device
    touch: Callable[[], None]
    weights: WeightsType = "model"
    activations: ActivationsType = "model"
    num_bytes: int = field(default=0, init=False)
    bytes_from: Counter[Origin] = field(default_factory=Counter, init=False)
    read_s: float = field(default=0.0, init=False)
    held: HeldWeights = field(default_factory=HeldWeights, init=False)
    given: dict[Origin, HeldWeights] = field(default_factory=dict, init=False)
    is_ahead: bool = field(default=False, init=False)
    before_make: Callable[[], None] = field(default_factory=lambda: _nothing, init=False)
    fill: Callable[[int | None, Hashable, Any], Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._ops = backend_for(self.device)
        self._keeps_narrow = self._ops.keeps_narrow
        # With weights="int8" those of four bits are widened and rounded, as others are.
        self._keeps_mxfp4 = self._ops.keeps_mxfp4 and self.weights == "model"

    def once(
        self, layer: int | None, key: Hashable, make: Callable[[], MadeT], *, holds: bool = True
    ) -> MadeT:
        """Return a part that is given, or the result of `make`.

        Args:
            layer: the part's layer; None outside layers.
            key: names the weights that it is made of, and their slices.
            holds: keep the part in `held`.
        """
        for origin, given in self.given.items():
            if (found := given.find(layer, key)) is not None:
                self.num_bytes += found[1]
                self.bytes_from[origin] += found[1]
                if self.is_ahead:
                    return cast("MadeT", found[0])
                break
        else:
            self.before_make()
            num_before = self.num_bytes
            made = make()
            if self.fill is not None:
                filled = self.fill(layer, key, made)
                if filled is None:
                    return made
                made = filled
            found = made, self.num_bytes - num_before
        if holds or self.is_ahead:
            self.held.put(layer, key, *found)
        return cast("MadeT", found[0])

    def keep_layers(self, layers: range) -> None:
        """Drop the given parts of all other layers."""
        for given in self.given.values():
            given.keep_layers(layers)

    def drop(self, layer: int) -> None:
        """Drop the given parts that a layer did not use."""
        for given in self.given.values():
            given.drop(layer)

    def take(
        self, name: str, part: range | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Tensor `name`, or a slice of it in the dimension that layouts divide; contiguous."""
        began_s = time.perf_counter()
        read = self._read if self.fill is None else self._empty
        tensor = read(name, part, dtype or self.dtype).to(self.device)
        self._was_read(tensor.nbytes, began_s)
        return tensor

    def matrix(self, name: str, part: range | None = None) -> Weight:
        """Matrix `name`, or a slice of it, for a linear.

        It is narrow if it is stored narrow, or rounded. A backend that cannot keep it narrow gets
        it widened, with the same numbers.
        """
        began_s = time.perf_counter()
        if self._keeps_mxfp4 and (blocks := self._stored_mxfp4(name, part)) is not None:
            self._was_read(blocks.nbytes, began_s)
            return blocks.to(self.device)
        narrow = self._stored_narrow(name, part)
        if narrow is None and self.weights == "int8":
            narrow = self._rounded(name, part)
        if narrow is None:
            return self.take(name, part)
        narrow = narrow.to(self.device)
        weight = narrow if self._keeps_narrow else narrow.widened()
        self._was_read(weight.nbytes, began_s)
        takes_float8 = self.activations == "float8" and narrow.values.dtype is FLOAT8
        return Float8Inputs(weight) if takes_float8 else weight

    def linear(
        self,
        layer: int | None,
        name: str,
        part: range | None = None,
        bias: Callable[[], Tensor | None] = lambda: None,
    ) -> Linear:
        """The linear of matrix `name`, or of a slice of it; made once."""

        def make() -> Linear:
            return self._ops.linear(self.matrix(name, part), bias())

        return self.once(layer, (name, part), make)

    def _was_read(self, num_bytes: int, began_s: float) -> None:
        self.num_bytes += num_bytes
        self.bytes_from[Origin.READ] += num_bytes
        self.read_s += time.perf_counter() - began_s
        self.touch()

    def _rounded(self, name: str, part: range | None) -> NarrowWeight:
        """A matrix rounded to int8, whole groups at a time, so that no layout changes a scale."""
        if self.fill is not None:
            return self._empty_rounded(name, part)
        if part is None or cut_dim(name) == 0:
            return NarrowWeight.rounded(self._read(name, part, torch.float32), self.dtype)
        size = INPUTS_OF_SCALE
        begin, end = part.start // size * size, -(-part.stop // size) * size
        end = min(end, tensor_shape(self.model, name)[1])
        whole = self._read(name, range(begin, end), torch.float32)
        inside = range(part.start - begin, part.stop - begin)
        return NarrowWeight.rounded(whole, self.dtype).columns(inside)

    def _empty(self, name: str, part: range | None, dtype: torch.dtype) -> Tensor:
        """A tensor, or a slice, of uninitialized values, in the shape that `_read` gives."""
        shape = list(tensor_shape(self.model, name))
        if part is not None:
            shape[cut_dim(name)] = len(part)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _empty_rounded(self, name: str, part: range | None) -> NarrowWeight:
        """A matrix, or a slice, of uninitialized values, in the shapes that `_rounded` gives."""
        values = self._empty(name, part, torch.int8)
        first = part.start % INPUTS_OF_SCALE if part is not None and cut_dim(name) else 0
        num_groups = -(-(first + values.shape[1]) // INPUTS_OF_SCALE)
        scales = torch.empty(len(values), num_groups, device=self.device)
        return NarrowWeight(values, scales, INPUTS_OF_SCALE, first, self.dtype)

    def _stored_narrow(self, name: str, part: range | None) -> NarrowWeight | None:
        """A matrix, or a slice, as stored, if its values have one byte; else None."""
        return None

    def _stored_mxfp4(self, name: str, part: range | None) -> Mxfp4Weight | None:
        """A matrix as stored, if that is in MXFP4 and all of it is asked for; else None."""
        return None

    @abstractmethod
    def _read(self, name: str, part: range | None, dtype: torch.dtype) -> Tensor:
        """Read the result of `take`, on whichever device is convenient; contiguous."""


def taker_of(source: WeightSource, layer: int) -> Callable[..., Tensor]:
    """`WeightSource.take` for names within a layer."""

    def take(part: str, rows: range | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return source.take(layer_name(layer, part), rows, dtype)

    return take


_BLOCK = 64  # indices of the divided dimension in one stream


def draw(
    model: ModelConfig, seed: int, name: str, part: range | None = None
) -> npt.NDArray[np.float32]:
    """Draw the logical tensor `name` in float32, of the shape `tensor_shape` gives, or a slice.

    Args:
        part: indices of the dimension that layouts divide: input features of `output` and `down`,
            output features of all others; None for all.
    """
    shape = tensor_shape(model, name)
    if name.endswith(".router_bias") and model.routing.router_skew:
        order = np.argsort(_draw_block(seed, name, 0, model.num_experts, 1)[:, 0])
        return (-model.routing.router_skew * np.log1p(order)).astype(np.float32)
    cut = cut_dim(name)
    part = range(shape[cut]) if part is None else part
    rest = math.prod(shape) // shape[cut]
    first_block = part.start // _BLOCK
    blocks = [
        _draw_block(seed, name, block, min(_BLOCK, shape[cut] - block * _BLOCK), rest)
        for block in range(first_block, -(-part.stop // _BLOCK))
    ]
    drawn = np.concatenate(blocks) if blocks else np.empty((0, rest), dtype=np.float32)
    drawn = drawn[part.start - first_block * _BLOCK :][: len(part)]
    if len(shape) == 1:
        offset = 1.0 if name.endswith("norm") else 0.0
        return np.float32(offset) + np.float32(0.1) * drawn[:, 0]
    fan_in = 1 if name == EMBEDDING else shape[1]
    drawn *= np.float32(1.0 / math.sqrt(fan_in))
    return drawn.T if cut else drawn


def _draw_block(seed: int, name: str, block: int, size: int, rest: int) -> npt.NDArray[np.float32]:
    """Standard normal values [size, rest] of one block."""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return generator.standard_normal((size, rest), dtype=np.float32)


@dataclass(eq=False)
class SeededWeights(WeightSource):
    """A rank's slices of the seeded tensors."""

    seed: int = 0

    def _read(self, name: str, part: range | None, dtype: torch.dtype) -> Tensor:
        if name == HEAD and self.model.tie_word_embeddings:
            name = EMBEDDING
        drawn = draw(self.model, self.seed, name, part)
        return torch.from_numpy(drawn).to(self.device, dtype).contiguous()


@dataclass(eq=False, kw_only=True)
class CheckpointWeights(WeightSource):
    """A rank's slices of a checkpoint."""

    checkpoint: Checkpoint

    def _read(self, name: str, part: range | None, dtype: torch.dtype) -> Tensor:
        return self.checkpoint.tensor(name, *_sides(name, part), dtype)

    def _stored_narrow(self, name: str, part: range | None) -> NarrowWeight | None:
        return self.checkpoint.narrow(name, *_sides(name, part), self.dtype)

    def _stored_mxfp4(self, name: str, part: range | None) -> Mxfp4Weight | None:
        is_whole = part is None or len(part) == tensor_shape(self.model, name)[cut_dim(name)]
        return self.checkpoint.mxfp4(name, self.dtype) if is_whole else None


def _sides(name: str, part: range | None) -> tuple[range | None, range | None]:
    """Rows and columns of a slice in the dimension that layouts divide; None for all."""
    return (None, part) if cut_dim(name) == 1 else (part, None)
