"""The experts one rank holds: whole ones, or its slice of each under expert tensor parallelism."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.moe.dispatch import ExpertInput
from expertlane.ops.cpu import Pointers
from expertlane.ops.linear import Linear


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
    def _linears(self) -> list[Linear]:
        return [linear for linear in (self.gate, self.up, self.down) if linear is not None]

    def tensors(self) -> list[Tensor]:
        """All that another rank needs to compute the same; `with_tensors` takes it."""
        return [tensor for linear in self._linears for tensor in linear.tensors()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Expert":
        """An expert of the same shape with other weights, as `tensors` gave them."""
        rest = list(tensors)

        def take(linear: Linear) -> Linear:
            num = len(linear.tensors())
            given, rest[:] = rest[:num], rest[num:]
            return linear.with_tensors(given)

        gate = None if self.gate is None else take(self.gate)
        return Expert(gate=gate, up=take(self.up), down=take(self.down))


class Experts:
    """MLPs side by side.

    Attributes:
        held: [num_local_experts].
    """

    def __init__(self, held: Sequence[Expert], activation: Activation) -> None:
        self.held = list(held)
        self.activation = activation
        first = self.held[0]
        self._inner, hidden_size = first.up.out_features, first.up.in_features
        self._num_weights = self._inner * hidden_size * (2 if first.gate is None else 3)
        self._itemsize = first.up.itemsize
        self._kernel = self._own_kernel()

    def _own_kernel(self) -> Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor] | None:
        """All experts in one call, where our kernels know the model's kind of MLP."""
        gates = [expert.gate for expert in self.held if expert.gate is not None]
        ups, downs = [expert.up for expert in self.held], [expert.down for expert in self.held]
        kernels = ups[0].kernels
        if (
            kernels is None
            or self._inner % 32
            or any(each.kernels is None or each.bias is not None for each in gates + ups + downs)
            or not self.activation.is_plain(is_gated=bool(gates))
        ):
            return None
        gate, up, down = (
            Pointers([linear.packed for linear in of_part]) if of_part else None
            for of_part in (gates, ups, downs)
        )
        assert up is not None, "there are experts"
        assert down is not None, "there are experts"
        return partial(kernels.experts, gate=gate, up=up, down=down, inner=self._inner)

    def forward(self, arrived: ExpertInput) -> Tensor:
        """Apply each expert to the rows of its pairs; a partial sum where experts are cut.

        Returns:
            [P, hidden_size], in the order of `arrived.result_of_pair`.
        """
        ends = list(accumulate(arrived.num_tokens_per_expert))
        if self._kernel is not None:
            return self._kernel(arrived.rows, arrived.row_of_pair, arrived.result_of_pair, ends)
        begins, rows = [0, *ends], arrived.by_expert()
        results = torch.empty_like(rows)
        for expert, begin, end in zip(self.held, begins, ends, strict=False):
            if end > begin:
                places = arrived.result_of_pair[begin:end]
                results.index_copy_(0, places, self._apply(expert, rows[begin:end]))
        return results

    def _apply(self, expert: Expert, rows: Tensor) -> Tensor:
        gate = None if expert.gate is None else expert.gate(rows)
        return expert.down(self.activation(gate, expert.up(rows)))

    def compute_cost(self, num_tokens_per_expert: Sequence[int]) -> tuple[int, int]:
        """FLOPs and weight bytes read of one `forward`."""
        num_used = sum(1 for num_tokens in num_tokens_per_expert if num_tokens)
        flops = 2 * sum(num_tokens_per_expert) * self._num_weights
        return flops, num_used * self._num_weights * self._itemsize
