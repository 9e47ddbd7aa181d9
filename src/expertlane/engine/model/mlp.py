"""MLPs that every token takes: a dense layer's, and the shared expert of an MoE layer."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.engine.comm.collectives import Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.weights import WeightSource, taker_of
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.mlp import MlpPart
from expertlane.engine.ops.products import Activation, Expert, Linear
from expertlane.spec.layout import partition
from expertlane.spec.model import ModelConfig, layer_name
from expertlane.spec.names import CheckPoint, Stage


def activation_of(model: ModelConfig) -> Activation:
    """The activation of all the model's MLPs."""
    return Activation(model.hidden_act, model.swiglu_limit, model.swiglu_alpha)


class MLP:
    """An MLP that every token takes: a dense layer's, or an MoE layer's shared expert.

    It is divided over the tensor-parallel group: tokens are gathered, and partial sums are
    reduce-scattered. Its projections are named `layers.N.PREFIX.…`.

    Attributes:
        tp_rank: the rank whose slice it is.

    Args:
        inner: its inner width, over all ranks.
        norm: [hidden_size] float32; None where tokens come normed.
        is_scaled: its output is multiplied by the sigmoid of a projection, `shared_gate`.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        source: WeightSource,
        mesh: ParallelMesh,
        prefix: str,
        inner: int,
        *,
        norm: Tensor | None = None,
        is_scaled: bool = False,
    ) -> None:
        ops = self._ops = backend_for(source.device)
        part = partition(inner, mesh.layout.tp)[mesh.at.tp_rank]

        def linear(matrix: str) -> Linear:
            name = layer_name(layer, f"{prefix}.{matrix}")
            return source.once(layer, (name, part), lambda: ops.linear(source.matrix(name, part)))

        self._gate = linear("gate") if model.gated_mlp else None
        self._up, self._down = linear("up"), linear("down")
        self._scale = taker_of(source, layer)("shared_gate") if is_scaled else None
        self._activation = activation_of(model)
        self._tp, self._recorder, self.tp_rank = mesh.tp, mesh.recorder, mesh.at.tp_rank
        self._layer, self._norm, self._eps = layer, norm, model.hidden_norm_eps
        around = (norm, self._eps, self._scale) if mesh.tp.size == 1 else (None, self._eps, None)
        linears = Expert(gate=self._gate, up=self._up, down=self._down)
        self.part = ops.mlp_part(linears, self._activation, source.dtype, *around)

    def tensors(self) -> list[Tensor]:
        """All weights, for checksums."""
        linears = Expert(gate=self._gate, up=self._up, down=self._down)
        return [*linears.tensors(), *(t for t in (self._scale, self._norm) if t is not None)]

    def forward(self, x: Tensor, batch: ForwardBatch) -> Steps[Tensor]:
        """Apply the MLP to the tokens that this rank owns, [num_owned, hidden_size]."""
        enter, layer, part = self._recorder.enter, self._layer, self.part
        if self._tp.size == 1 and part is not None and part.takes(x):
            enter(Stage.EXPERTS, layer)
            self._count(x)
            return part(x)
        if self._norm is not None:
            x = self._ops.rms_norm(x, self._norm, self._eps)
        rows = x
        if self._tp.size > 1:
            enter(Stage.COLLECTIVES, layer)
            rows = yield from self._tp.gathered(x, batch.tokens_of_tp_rank)
        enter(Stage.EXPERTS, layer)
        if self._tp.size > 1 and part is not None and part.takes(rows):
            out = part(rows)
        else:
            gate = None if self._gate is None else self._gate(rows)
            out = self._down(self._activation(gate, self._up(rows)))
        self._count(rows)
        if self._tp.size > 1:
            self._recorder.check_finite(out, CheckPoint.MLP, layer)
            enter(Stage.COLLECTIVES, layer)
            out = yield from self._tp.reduced(out, batch.tokens_of_tp_rank)
        if self._scale is not None:
            out = out * torch.sigmoid(F.linear(x, self._scale))
        return out

    def _count(self, rows: Tensor) -> None:
        num_weights = (2 if self._gate is None else 3) * self._up.num_weights
        num_bytes = (1 if self._gate is None else 2) * self._up.num_bytes + self._down.num_bytes
        self._recorder.count_compute(2 * len(rows) * num_weights, num_bytes if len(rows) else 0)


class DenseBlock:
    """A norm and an MLP, whose output is added to its input."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        source: WeightSource,
        mesh: ParallelMesh,
        norm: Tensor,
    ) -> None:
        self.mlp = MLP(model, layer, source, mesh, "dense", model.intermediate_size, norm=norm)

    @property
    def parts(self) -> tuple[None, MlpPart] | None:
        """The C++ call that computes the block; None without one."""
        return (None, self.mlp.part) if isinstance(self.mlp.part, MlpPart) else None

    def held(self) -> Iterator[tuple[str, list[Tensor]]]:
        """The block's weights, by names within the layer."""
        yield f"MLP of tp rank {self.mlp.tp_rank}", self.mlp.tensors()

    def forward(self, x: Tensor, batch: ForwardBatch, added: Tensor | None = None) -> Steps[Tensor]:
        """Apply the block to the tokens that this rank owns.

        Args:
            x: [num_owned, hidden_size].
            added: attention's output, still to be added to x; None if it is.

        Returns:
            [num_owned, hidden_size].
        """
        x = x if added is None else x + added
        return x + (yield from self.mlp.forward(x, batch))
