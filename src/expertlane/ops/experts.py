"""MLPs side by side in torch: one after the other, or by products that torch groups.

Shapes: R rows, P token-expert pairs grouped by expert, E experts, H = hidden_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.ops.linear import Linear

# rows [R, H], row_of_pair [P], result_of_pair [P], num_tokens_per_expert [E] → results [P, H]
ApplyExperts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """The inner function of an MLP; its attributes are those of `ModelConfig`."""

    hidden_act: Literal["gelu", "silu"]
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702

    def is_plain(self, *, is_gated: bool) -> bool:
        """Whether it is SiLU times up where there is a gate, GELU where there is none."""
        plain = "silu" if is_gated else "gelu"
        return self.swiglu_limit is None and self.hidden_act == plain

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """[num_rows, inner] of gate (None where MLPs are not gated) and up projections."""
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
        """All that another rank needs to compute the same; `with_tensors` takes it."""
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


class LoopedExperts:
    """An `ApplyExperts` that takes one expert after the other."""

    def __init__(self, held: Sequence[Expert], activation: Activation) -> None:
        self._held, self._activation = held, activation

    def __call__(
        self, rows: Tensor, row_of_pair: Tensor, result_of_pair: Tensor, num_tokens: Tensor
    ) -> Tensor:
        """[P, H]."""
        rows = rows.index_select(0, row_of_pair)
        results = torch.empty_like(rows)
        ends = num_tokens.cumsum(0).tolist()
        for expert, (begin, end) in zip(self._held, pairwise([0, *ends]), strict=True):
            if end > begin:
                of_expert = rows[begin:end]
                gate = None if expert.gate is None else expert.gate(of_expert)
                out = expert.down(self._activation(gate, expert.up(of_expert)))
                results.index_copy_(0, result_of_pair[begin:end], out)
        return results


class GroupedExperts:
    """An `ApplyExperts` by grouped products, without a word from the device to the host.

    The weights of all experts are put side by side, and each expert's become a part of that. On a
    CPU a loop is faster with few pairs, since torch goes through experts without tokens too; and
    with many, since what is between the products stays in the cache.
    """

    def __init__(self, held: Sequence[Expert], activation: Activation) -> None:
        self._activation = activation
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
        """Whether torch groups products of these weights."""
        linears = [linear for expert in held for linear in expert.linears]
        sizes = {size for each in linears for size in (each.in_features, each.out_features)}
        first = linears[0].weight
        return (
            all(type(linear) is Linear for linear in linears)
            and all(size and size * first.itemsize % _ALIGNMENT == 0 for size in sizes)
            and _groups_products(first.device, first.dtype)
        )

    def __call__(
        self, rows: Tensor, row_of_pair: Tensor, result_of_pair: Tensor, num_tokens: Tensor
    ) -> Tensor:
        """[P, H]."""
        if len(row_of_pair) not in self._pairs:
            return self._loop(rows, row_of_pair, result_of_pair, num_tokens)
        rows = rows.index_select(0, row_of_pair)
        ends = num_tokens.cumsum(0, dtype=torch.int32)
        gate = None if self._gate is None else self._gate(rows, num_tokens, ends)
        inner = self._activation(gate, self._up(rows, num_tokens, ends))
        out = self._down(inner, num_tokens, ends)
        return torch.empty_like(out).index_copy_(0, result_of_pair, out)


_ANY_NUMBER = 1 << 62
_CACHE_BYTES = 256 << 10  # of a core
_ALIGNMENT = 16  # bytes, of the rows that a grouped product takes
# Public since torch 2.10.
_grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class _Stack:
    """Products of one shape: weight [E, out_features, in_features], bias [E, out_features]."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._weight = torch.stack([linear.weight for linear in linears])
        for linear, weight in zip(linears, self._weight, strict=True):
            linear.weight = weight
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self._bias = torch.stack(biases) if biases else None

    def __call__(self, rows: Tensor, num_tokens: Tensor, ends: Tensor) -> Tensor:
        assert _grouped_mm is not None, "suits() was asked"
        out: Tensor = _grouped_mm(rows, self._weight.transpose(1, 2), offs=ends)
        if self._bias is not None:
            out += self._bias.repeat_interleave(num_tokens, dim=0, output_size=len(rows))
        return out


@cache
def _groups_products(device: torch.device, dtype: torch.dtype) -> bool:
    """By trying: which devices and types torch can do it for depends on its version."""
    if _grouped_mm is None:
        return False
    rows = torch.ones(3, 16, device=device, dtype=dtype)
    weight = torch.arange(3.0).repeat_interleave(256).view(3, 16, 16).to(device, dtype)
    ends = torch.tensor([1, 1, 3], dtype=torch.int32, device=device)
    try:
        out = _grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return bool(out[:, 0].tolist() == [0, 32, 32])
