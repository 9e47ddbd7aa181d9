"""An MLP that every token takes as steps: a dense layer's, or the shared expert."""

import numpy as np

from expertlane.cost.step.batch_sizes import TokenSizes
from expertlane.cost.step.operation import Ints
from expertlane.cost.step.step_list import StepWriter
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage


def mlp_steps(
    out: StepWriter,
    model: ModelConfig,
    inner: int,
    part: TokenSizes,
    *,
    is_scaled: bool = False,
    is_summed: bool = True,
) -> None:
    """An MLP cut over tp in its inner width: gather tokens, sum outputs, add to the residual.

    Args:
        inner: the whole inner width.
        is_scaled: the sum is multiplied by a gate of its own.
        is_summed: summed over ranks here; else by what comes after.
    """
    item, hidden = out.types.activation_bytes, model.hidden_size
    own = tp_shares(inner, out)
    out.gather_tokens(part.owned, hidden * item)
    num_inner = 2 if model.gated_mlp else 1
    num_products = 1 if out.kernels.merges_products else num_inner
    for _ in range(num_products):
        out.gemm(Stage.EXPERTS, part.tokens, own * (num_inner // num_products), hidden)
    moved = part.tokens * own * ((num_inner + 1) * item)
    out.memory(Stage.EXPERTS, moved, out.kernels.activation)
    out.gemm(Stage.EXPERTS, part.tokens, hidden, own)
    num_passes = 3 if is_scaled else 0
    num_kernels = out.kernels.gate if is_scaled else 0
    if is_summed:
        out.sum_tokens(Stage.COLLECTIVES, "tp", part.owned, hidden * item)
        num_passes, num_kernels = num_passes + 3, num_kernels + 1
    if num_passes:
        out.by_token(Stage.EXPERTS, part, hidden * item, num_passes, num_kernels)


def tp_shares(total: int, out: StepWriter) -> Ints:
    """[A]; each rank's part of what is cut near-equally over tp."""
    return shares(total, out.mesh.layout.tp, out.tp_rank)


def shares(total: int, num_parts: int, part: Ints) -> Ints:
    """[R]; the sizes of some parts of a near-equal cut."""
    size, num_longer = divmod(total, num_parts)
    sizes: Ints = size + (part < num_longer).astype(np.int64)
    return sizes
