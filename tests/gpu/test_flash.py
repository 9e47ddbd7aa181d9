"""FlashAttention 3 behind torch's `varlen_attn`, against our kernel on the same GPU."""

from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)
if find_spec("flash_attn_interface") is None:
    pytest.skip("FlashAttention 3 is not installed", allow_module_level=True)

from expertlane.engine.ops.cuda import flash

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("has_window", [False, True])
def test_prompts_in_pages_of_16_positions(dtype: torch.dtype, dim: int, has_window: bool) -> None:
    """What a rank tries before it uses it; the card has to be one that has it."""
    assert flash._varlen_attn(DEVICE) is not None
    assert flash._is_right(DEVICE, dtype, dim, 16, has_window)
