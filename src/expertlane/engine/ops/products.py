"""Linear layers, with weights in the device's fastest layout, and experts made of them.

On a CPU, bfloat16 weights are packed once: for our kernels (`engine/ops/packed.py`), or for oneDNN
where those are missing. Products of few rows then read memory at most of its bandwidth, which
torch's own product, packing anew at every call, does not (`docs/log.md`). Elsewhere, and in
float32, weights stay as they are.

Shapes: R rows, P token-expert pairs grouped by expert, E experts, H = hidden_size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.engine.ops.device import waits_raise


class Linear:
    """x · Wᵀ + b.

    Args:
        weight: [out_features, in_features]; not kept where it is packed.
        bias: [out_features].

    Attributes:
        weight: in the layout that this product reads.
        is_packed: the layout is not [out_features, in_features]: torch's products cannot read it.
    """

    is_packed = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.itemsize = weight.itemsize
        self.weight, self.bias = self.pack(weight), bias

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """The weight [out_features, in_features] in the layout that this product reads."""
        return weight

    @property
    def num_weights(self) -> int:
        """Number of values in the matrix."""
        return self.out_features * self.in_features

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrix; scales are not counted."""
        return self.num_weights * self.itemsize

    def tensors(self) -> list[Tensor]:
        """Weight and bias in a form that can be sent and given to `with_tensors`."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """A copy of this linear with other weights of the same shape, which are not copied.

        Args:
            tensors: weight and bias, as `tensors` gives them.
        """
        other = copy(self)
        other.weight = tensors[0]
        other.bias = tensors[1] if len(tensors) > 1 else None
        return other

    def __call__(self, x: Tensor) -> Tensor:
        """x · Wᵀ + b [num_rows, out_features], of x [num_rows, in_features]."""
        return F.linear(x, self.weight, self.bias)


class HeadsLinear:
    """x · Wᵀ with a matrix of its own for each head.

    Args:
        weight: [num_heads, out_features, in_features]; not kept where it is packed.

    Attributes:
        num_weights, num_bytes: weights, and their bytes, in all matrices together.
    """

    def __init__(self, weight: Tensor) -> None:
        self.num_weights, self.num_bytes = weight.numel(), weight.nbytes
        self.num_heads, self.out_features, self.in_features = weight.shape
        self.weight = self.pack(weight)

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """The weight [num_heads, out_features, in_features] in the layout that is read."""
        return weight

    def tensors(self) -> list[Tensor]:
        """Its matrices, in the layout that is read."""
        return [self.weight]

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """Fill out [num_tokens, num_heads, out_features] from [num_tokens, num_heads, in_features].

        Tokens and heads of both may lie apart.
        """
        return out.copy_(torch.einsum("thk,hnk->thn", x, self.weight))


class ScaledLinear(Linear):
    """A linear whose weight has scales.

    Attributes:
        weight, scales: in the layout that the product reads.
        group, first, rows: see `NarrowWeight`.
        takes_float8: it rounds its inputs itself, as `engine/ops/float8.py` does.
    """

    scales: Tensor
    group: int
    first: int
    rows = 1
    takes_float8 = False

    def tensors(self) -> list[Tensor]:
        """Values, scales and bias."""
        weight, *bias = super().tensors()
        return [weight, self.scales, *bias]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """A copy of this linear with other values, scales and bias, which are not copied."""
        other = super().with_tensors([tensors[0], *tensors[2:]])
        other.scales = tensors[1]
        return other


class OnednnLinear(Linear):
    """A linear whose weight oneDNN has packed; it is sent unpacked, as only oneDNN reads it."""

    is_packed = True

    @staticmethod
    def suits(weight: Tensor) -> bool:
        """Whether oneDNN is faster with this weight: bfloat16, on a CPU that multiplies it."""
        return (
            weight.device.type == "cpu"
            and weight.dtype is torch.bfloat16
            and weight.numel() > 0
            and torch._C._has_mkldnn
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """The weight in oneDNN's own layout."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return packed

    def tensors(self) -> list[Tensor]:
        """Unpacked copies of weight and bias."""
        return [self.weight.to_dense(), *super().tensors()[1:]]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """A copy of this linear with other weights, which are packed anew."""
        return super().with_tensors([self.pack(tensors[0]), *tensors[1:]])

    def __call__(self, x: Tensor) -> Tensor:
        """x · Wᵀ + b [num_rows, out_features]; without oneDNN for 0 rows, which it refuses."""
        if not len(x):
            return x.new_empty(0, self.out_features)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "none", [], ""
        )
        return product


@dataclass(frozen=True)
class PairGroups:
    """Token-expert pairs sorted by group (stable); a group is an expert, or a peer rank.

    P may exceed the number of pairs, so that the host need not ask a GPU for it. The entries behind
    the pairs are padding: valid rows, and numbers that no pair has. Their results are not read.

    Attributes:
        counts: [num_groups]; pairs in each group.
        rows: [P]; the row of each sorted pair.
        order: [P]; the number of each sorted pair before sorting; no number twice.
        numbers: [R, K]; each pair's number, by row, then choice; -1 where there is no pair.
    """

    counts: Tensor
    rows: Tensor
    order: Tensor
    numbers: Tensor

    @cached_property
    def ends(self) -> Tensor:
        """[num_groups]; the end of each group among the sorted pairs."""
        return self.counts.cumsum(0)

    def given(self, results: Tensor) -> Tensor:
        """Results [P, …] without the padding; on a GPU the host waits for the number of pairs."""
        if int(self.counts.sum()) == results.shape[0]:
            return results
        return results[self.numbers[self.numbers >= 0]]

    def of_pairs(self, values: Tensor) -> Tensor:
        """[P, …]; for each sorted pair the value of its group, of values [num_groups, …].

        Padding gets any value.
        """
        places = torch.arange(self.rows.shape[0], device=values.device)
        group = torch.searchsorted(self.ends, places, right=True)
        return values.index_select(0, group.clamp_(max=values.shape[0] - 1))


@dataclass(frozen=True)
class Activation:
    """The activation of an MLP, with the attributes of `ModelConfig`."""

    hidden_act: Literal["gelu", "silu"]
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702

    def is_plain(self, *, is_gated: bool) -> bool:
        """Whether the activation is plain SiLU(gate) · up; without a gate, plain GELU(up)."""
        plain = "silu" if is_gated else "gelu"
        return self.swiglu_limit is None and self.hidden_act == plain

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Activations [num_rows, inner] of the gate and up projections; no gate: None."""
        if self.swiglu_limit is not None:
            assert gate is not None, "a clamped SwiGLU has a gate"
            gate = gate.clamp(max=self.swiglu_limit)
            up = up.clamp(-self.swiglu_limit, self.swiglu_limit)
            return (up + 1) * gate * torch.sigmoid(self.swiglu_alpha * gate)
        act = F.gelu if self.hidden_act == "gelu" else F.silu
        return act(up) if gate is None else act(gate) * up


@dataclass(frozen=True, eq=False)
class Expert:
    """One MLP; `inner` is the rank's slice of moe_intermediate_size.

    Attributes:
        up, gate: [inner, hidden_size]; no gate where MLPs are not gated.
        down: [hidden_size, inner]; its bias only on the first rank of those whose partial sums are
            added up.
    """

    up: Linear
    down: Linear
    gate: Linear | None = None

    @property
    def linears(self) -> list[Linear]:
        """Gate, if there is one, up and down."""
        return [linear for linear in (self.gate, self.up, self.down) if linear is not None]

    def tensors(self) -> list[Tensor]:
        """The weights and biases, in the form that another rank gives to `with_tensors`."""
        return [tensor for linear in self.linears for tensor in linear.tensors()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Expert":
        """An expert of the same shape with other weights, as `tensors` gave them."""
        rest = list(tensors)

        def take(linear: Linear) -> Linear:
            num = len(linear.tensors())
            given, rest[:] = rest[:num], rest[num:]
            return linear.with_tensors(given)

        gate = None if self.gate is None else take(self.gate)
        return Expert(gate=gate, up=take(self.up), down=take(self.down))


class Experts(ABC):
    """The MLPs that a rank holds: whole ones, or slices under expert tensor parallelism.

    Attributes:
        held: [E]; the physical experts of this rank, by slot.
    """

    def __init__(self, held: Sequence[Expert], activation: Activation) -> None:
        self.held, self.activation = list(held), activation

    @abstractmethod
    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        """Apply each expert to the rows of its pairs.

        Args:
            rows: [R, H]; rows need not be adjacent in memory.
            out: [P, H]; filled and returned, if given.

        Returns:
            [P, H] by pair number (row, then choice); partial sums where experts are sliced.
        """

    def compute_cost(self, num_tokens_per_expert: Sequence[int]) -> tuple[int, int]:
        """FLOPs of one call, and the bytes of weights that it reads."""
        linears = self.held[0].linears
        num_weights = sum(linear.num_weights for linear in linears)
        num_used = sum(1 for num_tokens in num_tokens_per_expert if num_tokens)
        flops = 2 * sum(num_tokens_per_expert) * num_weights
        return flops, num_used * sum(linear.num_bytes for linear in linears)


class LoopedExperts(Experts):
    """Experts applied one after the other; the host waits for the counts of their pairs."""

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        """Results [P, H]; see `Experts`."""
        rows = rows.index_select(0, pairs.rows)
        results = torch.empty_like(rows) if out is None else out
        ends = pairs.ends.tolist()
        for expert, (begin, end) in zip(self.held, pairwise([0, *ends]), strict=True):
            if end > begin:
                of_expert = rows[begin:end]
                gate = None if expert.gate is None else expert.gate(of_expert)
                of_expert = expert.down(self.activation(gate, expert.up(of_expert)))
                results.index_copy_(0, pairs.order[begin:end], of_expert)
        return results


class GroupedExperts(Experts):
    """Grouped products of all experts, without a transfer from the device to the host.

    The weights of all experts are stacked, and each expert's become views of the stack. On a CPU a
    loop is faster with few pairs, since torch goes through experts without tokens too; and with
    many, since intermediate results then stay in the cache.
    """

    def __init__(self, held: Sequence[Expert], activation: Activation) -> None:
        super().__init__(held, activation)
        self._loop = LoopedExperts(held, activation)
        up = held[0].up
        self._pairs = range(1, _ANY_NUMBER)  # that are faster grouped
        if up.weight.device.type == "cpu":
            self._pairs = range(len(held) // 2 + 1, _CACHE_BYTES // (up.out_features * up.itemsize))
        *gate, self._up, self._down = (
            _Stack(linears) for linears in zip(*(each.linears for each in held), strict=True)
        )
        self._gate = gate[0] if gate else None

    @staticmethod
    def suits(held: Sequence[Expert]) -> bool:
        """Whether torch has a grouped product for these weights: their sizes, device and dtype."""
        linears = [linear for expert in held for linear in expert.linears]
        sizes = {size for each in linears for size in (each.in_features, each.out_features)}
        first = linears[0].weight
        return (
            not any(linear.is_packed for linear in linears)
            and all(size and size * first.itemsize % _ALIGNMENT == 0 for size in sizes)
            and _groups_products(first.device, first.dtype)
        )

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        """Results [P, H]; see `Experts`."""
        if len(pairs.rows) not in self._pairs:
            return self._loop(rows, pairs, out)
        rows = rows.index_select(0, pairs.rows)
        ends = pairs.counts.cumsum(0, dtype=torch.int32)
        gate = None if self._gate is None else self._gate(rows, pairs, ends)
        inner = self.activation(gate, self._up(rows, pairs, ends))
        results = self._down(inner, pairs, ends)
        out = torch.empty_like(results) if out is None else out
        return out.index_copy_(0, pairs.order, results)


_ANY_NUMBER = 1 << 62
_CACHE_BYTES = 256 << 10  # of a core
_ALIGNMENT = 16  # bytes, of the rows that a grouped product takes
# Public since torch 2.10.
grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class _Stack:
    """Stacked linears: weight [E, out_features, in_features], bias [E, out_features]."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._weight = torch.stack([linear.weight for linear in linears])
        for linear, weight in zip(linears, self._weight, strict=True):
            linear.weight = weight
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self._bias = torch.stack(biases) if biases else None

    def __call__(self, rows: Tensor, pairs: PairGroups, ends: Tensor) -> Tensor:
        assert grouped_mm is not None, "suits() was asked"
        out: Tensor = grouped_mm(rows, self._weight.transpose(1, 2), offs=ends)
        if self._bias is not None:
            out += pairs.of_pairs(self._bias)
        return out


@cache
def _groups_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has grouped products there; tried, as that depends on its version.

    On some GPUs it has them in bfloat16 alone; otherwise it reads the ends on the host, and loops.
    """
    if grouped_mm is None:
        return False
    rows = torch.ones(3, 16, device=device, dtype=dtype)
    weight = torch.arange(3.0).repeat_interleave(256).view(3, 16, 16).to(device, dtype)
    ends = torch.tensor([1, 1, 3], dtype=torch.int32, device=device)
    try:
        with waits_raise(device):
            out = grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return bool(out[:, 0].tolist() == [0, 32, 32])
