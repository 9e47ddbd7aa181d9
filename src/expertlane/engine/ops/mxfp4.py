"""Weights of four bits whose scales are powers of two (OCP Microscaling Formats, version 1.0)."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from expertlane.spec.hf_config import MXFP4_BLOCK

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127
_VALUES_AT_A_TIME = 4_194_304


@dataclass(frozen=True, eq=False)
class Mxfp4Weight:
    """A matrix of MXFP4 values, or a slice of whole blocks of one.

    Attributes:
        blocks: [out_features, in_features / 2] uint8; two e2m1 values a byte, lower half first.
        scales: [out_features, in_features / 32] uint8; exponents with a bias of 127.
        dtype: dtype of the widened weight.
    """

    blocks: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of outputs and inputs."""
        return self.scales.shape[0], self.scales.shape[1] * MXFP4_BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.blocks.nbytes + self.scales.nbytes

    def to(self, device: torch.device) -> Self:
        """The weight on a device, contiguous."""
        blocks, scales = self.blocks.to(device).contiguous(), self.scales.to(device).contiguous()
        return type(self)(blocks, scales, self.dtype)

    def widened(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [out_features, in_features]; of the weight's own dtype where dtype is None."""
        (num_rows, num_blocks), device = self.scales.shape, self.blocks.device
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        of_code = torch.tensor(_E2M1, device=device)
        step = max(1, _VALUES_AT_A_TIME // max(1, out.shape[1]))
        for start in range(0, num_rows, step):
            blocks = self.blocks[start : start + step]
            codes = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).view(
                len(blocks), num_blocks, MXFP4_BLOCK
            )
            exponents = self.scales[start : start + step].int()[:, :, None] - _E8M0_BIAS
            out[start : start + step] = torch.ldexp(of_code[codes.int()], exponents).flatten(1)
        return out
