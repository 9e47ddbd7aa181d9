"""Residual streams around a block (`spec.compressed`) as steps; nothing of a plain residual.

They stay where tokens are owned: what is gathered, dispatched and summed is as wide as one.
"""

from expertlane.cost.step.batch_sizes import TokenSizes
from expertlane.cost.step.operation import Amounts
from expertlane.cost.step.step_list import StepWriter
from expertlane.spec.compressed import Streamed, num_mixing
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage

_MIXING_TYPE = "float32"


def join_streams(
    out: StepWriter, model: ModelConfig, stage: Stage, block: Streamed, rows: Amounts
) -> None:
    """A block's input from all streams, normed, and the weights that mix them after it.

    What makes these weights from their logits is in the same kernel, and not counted.

    Args:
        rows: tokens whose streams a rank has.
    """
    num, hidden = model.num_streams, model.hidden_size
    if num == 1:
        return
    out.gemm(stage, rows, num_mixing(block, num), num * hidden, dtype=_MIXING_TYPE)
    out.memory(stage, rows * ((num + 1) * hidden * out.types.activation_bytes))


def spread_over_streams(
    out: StepWriter, model: ModelConfig, stage: Stage, part: TokenSizes
) -> None:
    """Streams mixed with each other, and a block's output added to each."""
    if model.num_streams > 1:
        num_passes = 2 * model.num_streams + 1
        row_bytes = model.hidden_size * out.types.activation_bytes
        out.memory(stage, out.held(part) * (num_passes * row_bytes))
