"""Quantised weights back to numbers: DeepSeek's block-scaled FP8 and GPT-OSS's MXFP4.

Both go block of rows by block of rows, so that little more than the result is ever held.
"""

import torch
from torch import Tensor

from expertlane.model.checkpoint_names import MXFP4_BLOCK

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127
_VALUES_AT_A_TIME = 4_194_304


def dequantize_fp8(
    weight: Tensor,
    scales: Tensor,
    block_size: tuple[int, int],
    first: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """weight · the scale of its block, multiplied in float32 (DeepSeek-AI 2024, V3).

    Args:
        weight: [num_rows, num_columns] float8_e4m3fn; a slice of a matrix.
        scales: the scales of the blocks that the slice touches, one a block.
        block_size: rows and columns of a block.
        first: row and column of the matrix at which the slice begins.

    Returns:
        [num_rows, num_columns] in `dtype`.
    """
    num_rows, num_columns = weight.shape
    block_rows, block_columns = block_size
    out = torch.empty(num_rows, num_columns, dtype=dtype)
    column_block = (torch.arange(num_columns) + first[1] % block_columns) // block_columns
    stop = 0
    for scale in scales.float()[:, column_block]:  # [num_columns], one a block of rows
        start, stop = stop, min(num_rows, stop + block_rows - (first[0] + stop) % block_rows)
        out[start:stop] = weight[start:stop].float() * scale
    return out


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of 4 bits (e2m1) times powers of two (OCP Microscaling Formats, version 1.0).

    Args:
        blocks: [num_rows, num_blocks, 16] uint8; two values a byte, the lower half first.
        scales: [num_rows, num_blocks] uint8; exponents with a bias of 127.

    Returns:
        [num_rows, 32 · num_blocks] in `dtype`.
    """
    num_rows, num_blocks = scales.shape
    out = torch.empty(num_rows, num_blocks * MXFP4_BLOCK, dtype=dtype)
    of_code = torch.tensor(_E2M1)
    step = max(1, _VALUES_AT_A_TIME // max(1, out.shape[1]))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        codes = torch.stack([blocks[rows] & 0x0F, blocks[rows] >> 4], dim=-1).flatten(-2)
        exponents = scales[rows].int()[:, :, None] - _E8M0_BIAS
        out[rows] = torch.ldexp(of_code[codes.int()], exponents).flatten(1)
    return out
