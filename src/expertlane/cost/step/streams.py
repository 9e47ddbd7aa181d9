"""Steps that mix several residual streams around a block (`spec.compressed`); none for one stream.

Each rank keeps the streams of the tokens it owns: gathering, dispatch and sums move one stream's
width.
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
    """A block's normed input from all streams, and the weights that mix them after it.

    The same kernel makes these weights from their logits; that is not counted.

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
    """Mix the streams with each other, and add a block's output to each."""
    if model.num_streams > 1:
        num_passes = 2 * model.num_streams + 1
        row_bytes = model.hidden_size * out.types.activation_bytes
        out.memory(stage, out.held(part) * (num_passes * row_bytes))
