"""An MLP that every token takes: a dense layer's, or an MoE layer's shared expert.

It is cut over the tensor-parallel group, so its tokens are gathered and its partial sums scattered.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.comm.interleave import Steps
from expertlane.comm.mesh import ParallelMesh
from expertlane.comm.recorder import Recorder
from expertlane.model.weights import WeightSource
from expertlane.moe.experts import Activation
from expertlane.ops.linear import Linear
from expertlane.spec.layout import partition
from expertlane.spec.names import Stage
from expertlane.spec.tensors import layer_name


class MLP:
    """Gate, up and down projections named `layers.N.PREFIX.…`.

    Args:
        inner: its whole inner width.
        is_scaled: its output is multiplied by the sigmoid of a projection, `shared_gate`.
    """

    def __init__(
        self,
        source: WeightSource,
        layer: int,
        prefix: str,
        inner: int,
        activation: Activation,
        mesh: ParallelMesh,
        recorder: Recorder,
        *,
        is_gated: bool,
        is_scaled: bool = False,
    ) -> None:
        part = partition(inner, mesh.layout.tp)[mesh.at.tp_rank]

        def take(matrix: str) -> Linear:
            return Linear(source.take(layer_name(layer, f"{prefix}.{matrix}"), part))

        self._gate = take("gate") if is_gated else None
        self._up, self._down = take("up"), take("down")
        self._scale = source.take(layer_name(layer, "shared_gate")) if is_scaled else None
        self._activation = activation
        self._tp = mesh.tp
        self._recorder = recorder
        self._layer = layer

    def forward(self, x: Tensor, num_tokens_of: Sequence[int]) -> Steps[Tensor]:
        """Apply to the tokens this rank owns.

        Args:
            x: [num_owned, hidden_size].
            num_tokens_of: [tp]; tokens owned by each tensor-parallel rank.

        Returns:
            [num_owned, hidden_size].
        """
        enter, layer, rows = self._recorder.enter, self._layer, x
        if self._tp.size > 1:
            enter(Stage.COLLECTIVES, layer)
            rows = yield self._tp.all_gather(x, num_tokens_of)
        enter(Stage.EXPERTS, layer)
        gate = None if self._gate is None else self._gate(rows)
        out = self._down(self._activation(gate, self._up(rows)))
        num_weights = (2 if self._gate is None else 3) * self._up.num_weights
        self._recorder.count_compute(
            2 * len(rows) * num_weights, num_weights * self._up.itemsize if len(rows) else 0
        )
        if self._tp.size > 1:
            enter(Stage.COLLECTIVES, layer)
            out = yield self._tp.reduce_scatter(out, num_tokens_of)
        if self._scale is not None:
            out = out * torch.sigmoid(F.linear(x, self._scale))
        return out
