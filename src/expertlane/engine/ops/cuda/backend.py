"""The backend of GPUs: our Triton kernels, and torch for what they do not cover.

Only `engine/ops/backend.py` chooses it, where `why_not` finds nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
from torch import Tensor

from expertlane.engine.ops.bookkeeping import RowParts
from expertlane.engine.ops.cuda import compiled
from expertlane.engine.ops.cuda.flash import attend
from expertlane.engine.ops.cuda.parts import CudaAttention, CudaExperts, CudaMlp, CudaNarrowLinear
from expertlane.engine.ops.device import CudaGraphs
from expertlane.engine.ops.float8 import rounded_inputs
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.narrow import Float8Inputs, Mxfp4Weight, NarrowWeight, Weight
from expertlane.engine.ops.products import (
    Activation,
    Expert,
    Experts,
    GroupedExperts,
    Linear,
    grouped_mm,
)
from expertlane.engine.ops.step import AttentionWeights, MlpWeights
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.errors import UserError
from expertlane.schedule.plan import Batch


class CudaBackend(TorchBackend):
    """Attention, experts and narrow weights by Triton kernels; operations on rows compiled."""

    instructions = f"triton {triton.__version__}"
    adds_with_norm = True

    def __init__(
        self,
        *,
        keeps_narrow: bool = True,
        reads_float8: bool = True,
        multiplies_float8: bool = True,
    ) -> None:
        """Keep weights of one byte and of four bits narrow, or have them widened."""
        self.keeps_narrow = self.keeps_mxfp4 = keeps_narrow
        self.reads_float8, self.multiplies_float8 = reads_float8, multiplies_float8

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        if isinstance(weight, Float8Inputs):
            narrow = weight.weight
            if isinstance(narrow, Tensor) or not CudaNarrowLinear.suits(narrow):
                raise UserError(
                    "activations in float8 need matrices with a scale for all inputs or for a "
                    "multiple of 32; valid here: activations='model' (--activations model)"
                )
            return CudaNarrowLinear(narrow, bias, takes_float8=True)
        if isinstance(weight, Tensor) or not CudaNarrowLinear.suits(weight):
            return super().linear(weight, bias)
        return CudaNarrowLinear(weight, bias)

    def experts(self, held: Sequence[Expert], activation: Activation) -> Experts:
        if not CudaExperts.suits(held):
            return super().experts(held, activation)
        groups = grouped_mm if GroupedExperts.suits(held) else None
        return CudaExperts(held, activation, groups)

    def gather_sum(
        self,
        values: Tensor | RowParts,
        places: Tensor,
        weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        values = values.tensor() if isinstance(values, RowParts) else values
        return compiled.gather_sum(values, places, weights, out)

    def graphs(self) -> CudaGraphs:
        return CudaGraphs()

    def attention_part(self, weights: AttentionWeights, dtype: torch.dtype) -> CudaAttention:
        return CudaAttention(weights)

    def mlp_part(self, weights: MlpWeights, dtype: torch.dtype) -> CudaMlp | None:
        return CudaMlp(weights) if CudaMlp.suits(weights.mlp) else None

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> Tensor:
        compiled.write(cache, batch.slots, key, value)
        return attend(query, cache, batch, params)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return compiled.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, added: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return compiled.add_rms_norm(x, added, weight, eps)

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
        return compiled.rotate(x, cos, sin, interleave=interleave)


def why_not(device: torch.device) -> str:
    """The reason why our kernels cannot be used on a device, in a line; empty where they can.

    A norm and a step of attention are compiled, run, and compared with torch's.
    """
    try:
        is_right = _is_right(device)
    except Exception as error:  # of a compiler, a driver or the device
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton {triton.__version__} cannot run our kernels here: {lines[0][:200]}"
    return "" if is_right else "our kernels give other results than torch here"


def reads_float8(device: torch.device) -> bool:
    """Whether attention over a float8 cache runs here and agrees with torch's.

    Triton converts from float8 (e4m3) from compute capability 8.9 on.
    """
    try:
        return _is_right(device, is_float8=True)
    except Exception:  # of a compiler, a driver or the device
        return False


def multiplies_narrow(device: torch.device) -> bool:
    """Whether products with weights of one byte and of four bits run here and agree with torch's.

    A card before compute capability 8.9 has no float8.
    """
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(8, 32)
    scales = torch.linspace(0.5, 1, 8, device=device)[:, None]
    x = torch.linspace(-1, 1, 3 * 32, device=device).half().view(3, 32)
    float8 = codes.where(codes & 0x7F < 0x7F, 0).view(torch.float8_e4m3fn)  # without NaN
    tried: list[NarrowWeight | Mxfp4Weight] = [
        NarrowWeight(values, scales, 32, 0, torch.float16)
        for values in (float8, codes.view(torch.int8))
    ]
    exponents = torch.full((8, 2), 126, dtype=torch.uint8, device=device)
    tried.append(Mxfp4Weight(codes, exponents, torch.float16))
    try:
        return all(
            torch.allclose(
                CudaNarrowLinear(each, None)(x.repeat(1, each.shape[1] // 32)).float(),
                x.float().repeat(1, each.shape[1] // 32) @ each.widened(torch.float32).t(),
                rtol=2e-3,
                atol=2e-1,
            )
            for each in tried
        )
    except Exception:  # of a compiler, a driver or the device
        return False


def multiplies_float8(device: torch.device) -> bool:
    """Whether products of float8 with float8 run here and agree with torch's.

    Cards have them from compute capability 8.9 on.
    """
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(2, 128)
    values = codes.where(codes & 0x7F < 0x7F, 0).view(torch.float8_e4m3fn)
    scales = torch.linspace(0.5, 1, 2, device=device)[:, None]
    narrow = NarrowWeight(values, scales, 128, 0, torch.float16)
    x = torch.linspace(-1, 1, 3 * 128, device=device).half().view(3, 128)
    try:
        found = CudaNarrowLinear(narrow, None, takes_float8=True)(x).float()
        expected = rounded_inputs(x.float()) @ narrow.widened(torch.float32).t()
        return torch.allclose(found, expected, rtol=2e-3, atol=2e-1)
    except Exception:  # of a compiler, a driver or the device
        return False


def _is_right(device: torch.device, *, is_float8: bool = False) -> bool:
    found, expected = (_tried(ops, device, is_float8) for ops in (CudaBackend(), TorchBackend()))
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def _tried(ops: TorchBackend, device: torch.device, is_float8: bool) -> Tensor:
    """Attention of two sequences in decode, of 16 and 17 positions, with normed queries."""
    batch = Batch(
        seq_ids=np.arange(2),
        num_scheduled_tokens=np.ones(2, dtype=np.int64),
        num_computed_tokens=np.array([15, 16]),
        token_ids=np.zeros(2, dtype=np.int64),
        block_tables=np.array([[3, -1], [0, 2]], dtype=np.int32),
        yields_token=np.ones(2, dtype=np.bool_),
    )
    cache = KVCache(4, 16, 1, 64, 64, torch.float16, device, is_float8=is_float8)
    cached = torch.linspace(-1, 1, 64 * 64, device=device).sin().half().view(64, 1, 64)
    cache.write(torch.arange(64, device=device), cached, cached)
    x = torch.linspace(-2, 2, 2 * 4 * 64, device=device).view(8, 64)
    query = ops.rms_norm(x, torch.ones(64, device=device), 1e-5).half().view(2, 4, 64)
    key, value = query[:, :1].clone(), query[:, 1:2].clone()
    pages, params = PagedBatch(batch, 16, device), AttentionParams(64, 0.125)
    return ops.paged_attention(query, key, value, cache, pages, params).float()
