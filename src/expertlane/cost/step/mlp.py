"""An MLP that every token takes as steps: a dense layer's, or the shared expert."""

import numpy as np

from expertlane.cost.step.batch_sizes import TokenSizes
from expertlane.cost.step.operation import Ints
from expertlane.cost.step.step_list import StepWriter
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage


def mlp_steps(
    out: StepWriter, model: ModelConfig, inner: int, part: TokenSizes, *, is_scaled: bool = False
) -> None:
    """Gathered over tp, cut in its inner width, scattered; then added to the residual.

    Args:
        inner: the whole inner width.
        is_scaled: the sum is multiplied by a gate of its own.
    """
    item, hidden = out.types.activation_bytes, model.hidden_size
    own = tp_shares(inner, out)
    out.all_gather(Stage.COLLECTIVES, "tp", part.owned, hidden * item)
    num_inner = 2 if model.gated_mlp else 1
    for _ in range(num_inner):
        out.gemm(Stage.EXPERTS, part.tokens, own, hidden)
    moved = part.tokens * own * ((num_inner + 1) * item)
    out.memory(Stage.EXPERTS, moved, out.kernels.activation)
    out.gemm(Stage.EXPERTS, part.tokens, hidden, own)
    out.reduce_scatter(Stage.COLLECTIVES, "tp", part.owned, hidden * item)
    num_rows = 6 if is_scaled else 3
    num_kernels = 1 + (out.kernels.gate if is_scaled else 0)
    out.memory(Stage.EXPERTS, part.owned * (num_rows * hidden * item), num_kernels)


def tp_shares(total: int, out: StepWriter) -> Ints:
    """[A]; each rank's part of what is cut near-equally over tp."""
    return shares(total, out.mesh.layout.tp, out.tp_rank)


def shares(total: int, num_parts: int, part: Ints) -> Ints:
    """[R]; the sizes of some parts of a near-equal cut."""
    size, num_longer = divmod(total, num_parts)
    sizes: Ints = size + (part < num_longer).astype(np.int64)
    return sizes
