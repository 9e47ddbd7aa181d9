"""Attention of prompts by FlashAttention 3, where that is installed, through torch's `varlen_attn`.

It reads the cache where it lies: pages of any size, by their strides. FlashAttention 2, which
`varlen_attn` calls otherwise, takes pages of 256 positions alone. It gets prompts alone: there it
gains by Hopper's asynchronous loads and products, which our kernel lacks. Each kind of head is
compared with ours once before it is used.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.engine.ops.cuda import attention
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.schedule.plan import Batch

_LEAST_NEW = 64  # tokens of the longest prompt: shorter ones are bound by memory
_MOST_DIM = 256


def attend(query: Tensor, cache: KVCache, batch: PagedBatch, params: AttentionParams) -> Tensor:
    """Causal attention as `attention.attend` computes it, by FlashAttention 3 where that suits."""
    if not _suits(query, cache, batch, params):
        return attention.attend(query, cache, batch, params)
    kind = query.dtype, query.shape[2], cache.block_size, params.window is not None
    if not _is_right(query.device, *kind):
        return attention.attend(query, cache, batch, params)
    return _by_flash(query, cache, batch, params)


def _suits(query: Tensor, cache: KVCache, batch: PagedBatch, params: AttentionParams) -> bool:
    """Whether FlashAttention 3 takes these heads, and the batch has a prompt long enough."""
    dim = query.shape[2]
    return (
        batch.bounds.most_new >= _LEAST_NEW
        and params.sinks is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and cache.keys.dtype is cache.values.dtype is query.dtype
        and cache.values.shape[3] == params.value_dim == dim
        and dim <= _MOST_DIM
        and dim % 8 == 0
        and _varlen_attn(query.device) is not None
    )


@cache
def _varlen_attn(device: torch.device) -> Any:
    """torch's `varlen_attn` with FlashAttention 3 behind it; None where that cannot be had."""
    if device.type != "cuda" or find_spec("flash_attn_interface") is None:
        return None
    try:
        from torch.nn.attention import activate_flash_attention_impl
        from torch.nn.attention.varlen import varlen_attn

        if torch.cuda.get_device_capability(device) != (9, 0):
            return None
        activate_flash_attention_impl("FA3")
    except Exception:  # of an older torch, or of a package that does not fit it
        return None
    return varlen_attn


def _by_flash(query: Tensor, cache: KVCache, batch: PagedBatch, params: AttentionParams) -> Tensor:
    seqs, bounds = batch.sequences, batch.bounds
    out: Tensor = _varlen_attn(query.device)(
        query,
        cache.keys.transpose(1, 2),
        cache.values.transpose(1, 2),
        F.pad(seqs.num_scheduled.cumsum(0), (1, 0)).int(),
        None,
        bounds.most_new,
        bounds.longest,
        scale=params.scale,
        window_size=(-1 if params.window is None else params.window - 1, 0),
        enable_gqa=query.shape[1] != cache.num_heads,
        seqused_k=seqs.lengths.int(),
        block_table=seqs.block_tables.clamp(min=0).int(),
    )
    return out


@cache
def _is_right(
    device: torch.device, dtype: torch.dtype, dim: int, block_size: int, has_window: bool
) -> bool:
    """Whether flash-attn runs here and agrees with ours, on a prompt and on a later chunk."""
    new, computed = np.array([70, 3]), np.array([0, 40])
    num_blocks = -(-(new + computed) // block_size)
    tables = np.full((2, num_blocks.max()), -1, dtype=np.int32)
    blocks = iter(reversed(range(num_blocks.sum())))
    for table, num in zip(tables, num_blocks, strict=True):
        table[:num] = [next(blocks) for _ in range(num)]
    batch = Batch(
        seq_ids=np.arange(2),
        num_scheduled_tokens=new,
        num_computed_tokens=computed,
        token_ids=np.zeros(new.sum(), dtype=np.int64),
        block_tables=tables,
        yields_token=np.ones(2, dtype=np.bool_),
    )
    cached = KVCache(int(num_blocks.sum()), block_size, 2, dim, dim, dtype, device)
    query = torch.empty(int(new.sum()), 4, dim, dtype=dtype, device=device)
    for each in (query, cached.keys, cached.values):
        waves = torch.arange(each.numel(), device=device).mul(0.7).sin()
        each.copy_(waves.view(each.shape))
    params = AttentionParams(dim, dim**-0.5, 20 if has_window else None)
    pages = PagedBatch(batch, block_size, device)
    try:
        found = _by_flash(query, cached, pages, params)
    except Exception:  # of the library, a driver or the device
        return False
    expected = attention.attend(query, cached, pages, params)
    return torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2)
