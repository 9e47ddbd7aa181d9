"""The payload of dispatch: hidden states in the model's dtype, or rounded to a narrower one.

Only dispatch is narrowed; results come back in the model's dtype, as in DeepSeek-V3
(arXiv:2412.19437, section 3.3.2), which also scales float8 by blocks of 128 values.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.cost.number_types import SCALED_VALUES, PayloadBytes
from expertlane.engine.comm.recorder import Recorder
from expertlane.spec.deployment import PayloadType

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max


class Payload:
    """Rounds hidden states [num_tokens, hidden_size] for dispatch, and counts the rounding error.

    Args:
        kind: the type to round to; no effect if the model's dtype is as narrow already.
    """

    def __init__(self, kind: PayloadType, recorder: Recorder) -> None:
        self._kind = kind
        self._recorder = recorder

    def encode(self, x: Tensor) -> list[Tensor]:
        """The parts that are sent, [num_tokens, columns] each; the last one holds the values.

        float8 values are bytes; before them stands a scale for each block: [num_tokens, blocks]
        float32.
        """
        if not PayloadBytes.of(self._kind, x.itemsize, x.shape[1]).is_narrowed:
            return [x]
        parts = _to_float8(x) if self._kind == "float8" else [x.bfloat16()]
        if self._recorder.is_recording:
            with self._recorder.uncounted():
                exact = x.double()
                error = self.decode(parts, torch.float32) - exact
                squares = (float(each.square().sum()) for each in (error, exact))
                self._recorder.count_payload_error(*squares)
        return parts

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Hidden states [num_rows, hidden_size] from the parts that `encode` gave.

        Args:
            parts: rows need not be adjacent in memory.
            dtype: the model's.
        """
        if len(parts) == 1:
            return parts[0].to(dtype)
        scales, values = parts
        blocks = _in_blocks(values.view(_FLOAT8).float())
        return (blocks * scales[:, :, None]).flatten(1)[:, : values.shape[1]].to(dtype)


def _in_blocks(x: Tensor) -> Tensor:
    """x [num_rows, columns] as [num_rows, blocks, 128], padded with zeros."""
    padded = F.pad(x, (0, -x.shape[1] % SCALED_VALUES))
    return padded.view(len(x), padded.shape[1] // SCALED_VALUES, SCALED_VALUES)


def _to_float8(x: Tensor) -> list[Tensor]:
    blocks = _in_blocks(x.float())
    scales = blocks.abs().amax(dim=2) / _LARGEST
    scales = scales.where(scales > 0, 1.0)
    values = (blocks / scales[:, :, None]).flatten(1)[:, : x.shape[1]]
    values = values.clamp(-_LARGEST, _LARGEST)  # a subnormal scale rounds down
    return [scales, values.to(_FLOAT8).view(torch.uint8)]


Columns = list[tuple[torch.dtype, int]]


def columns_of(parts: Sequence[Tensor]) -> Columns:
    """The dtype and number of columns of parts [num_rows, columns], for `unpack`."""
    return [(part.dtype, part.shape[1]) for part in parts]


def bytes_of(columns: Columns) -> int:
    """Bytes of a row with these columns."""
    return sum(num * dtype.itemsize for dtype, num in columns)


def unpack(packed: Tensor, columns: Columns) -> list[Tensor]:
    """Views of the parts in packed rows.

    Args:
        packed: [num_rows, bytes of a row] uint8.
        columns: dtype and number of columns of each part.
    """
    parts, begin = [], 0
    for dtype, num in columns:
        end = begin + num * dtype.itemsize
        parts.append(packed[:, begin:end].view(dtype))
        begin = end
    return parts
