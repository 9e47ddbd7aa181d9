"""Rotary embedding, with the norms of heads before and the write to the paged cache after.

Limit: memory. A token's queries, keys and values are read once and written once: 2 · (heads + 2 ·
kv heads) · head_dim · b bytes over the card's bandwidth, and its cosines and sines.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertlane.ops.cuda.launch import launch
from expertlane.ops.kv_cache import KVCache

_PROGRAM_VALUES = 2048  # of a token's heads


@triton.jit
def _rotate_kernel(
    x, positions, cos, sin, norms, slots, out, keys, values,
    x_token, x_head, key_block, key_head, value_block, value_head, block_size,
    num_heads, num_kv_heads, eps,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_NORMS: tl.constexpr, HAS_CACHE: tl.constexpr,
    HEADS: tl.constexpr, KEPT_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    # Heads are rows: queries, then keys, then values, which are neither normalised nor rotated.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_query, is_value = head < num_heads, head >= num_heads + num_kv_heads
    is_head = head < num_heads + 2 * num_kv_heads
    KEPT: tl.constexpr = HEAD_DIM - ROTARY_DIM
    HALF: tl.constexpr = ROTARY_DIM // 2
    kept, half = tl.arange(0, KEPT_BLOCK)[None, :], tl.arange(0, HALF_BLOCK)[None, :]
    in_kept, in_half = is_head[:, None] & (kept < KEPT), is_head[:, None] & (half < HALF)
    first = KEPT + half
    second = first + HALF
    if INTERLEAVE:
        is_pair = is_value[:, None] == 0
        first = tl.where(is_pair, first + half, first)
        second = tl.where(is_pair, first + 1, second)
    row = x + token * x_token + head[:, None] * x_head
    a = tl.load(row + first, mask=in_half, other=0.0).to(tl.float32)
    b = tl.load(row + second, mask=in_half, other=0.0).to(tl.float32)
    c = tl.load(row + kept, mask=in_kept, other=0.0).to(tl.float32)
    if HAS_NORMS:
        squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1) + tl.sum(c * c, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        has_norm = is_value[:, None] == 0
        norm = norms + head[:, None] * HEAD_DIM
        a = tl.where(has_norm, a * scale * tl.load(norm + first, in_half & has_norm, 0.0), a)
        b = tl.where(has_norm, b * scale * tl.load(norm + second, in_half & has_norm, 0.0), b)
        c = tl.where(has_norm, c * scale * tl.load(norm + kept, in_kept & has_norm, 0.0), c)
        dtype = x.dtype.element_ty  # rounded between norm and rotation, as separate operations are
        a, b, c = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32), c.to(dtype).to(tl.float32)
    position = token
    if HAS_POSITIONS:
        position = tl.load(positions + token).to(tl.int64)
    angle = position * ROTARY_DIM + half
    cos_a = tl.load(cos + angle, mask=half < HALF, other=0.0)
    sin_b = tl.load(sin + angle + HALF, mask=half < HALF, other=0.0)  # the first half is negative
    turned_a, turned_b = a * cos_a - b * sin_b, b * cos_a + a * sin_b
    a = tl.where(is_value[:, None], a, turned_a)
    b = tl.where(is_value[:, None], b, turned_b)
    to = out + (token * num_heads + head[:, None]) * HEAD_DIM
    if HAS_CACHE:
        slot = tl.load(slots + token)
        block, offset = slot // block_size, slot % block_size
        key = keys + block * key_block + (head - num_heads)[:, None] * key_head + offset * HEAD_DIM
        of_value = (head - num_heads - num_kv_heads)[:, None] * value_head
        value = values + block * value_block + of_value + offset * HEAD_DIM
        to = tl.where(is_query[:, None], to, tl.where(is_value[:, None], value, key))
    tl.store(to + KEPT + half, a.to(out.dtype.element_ty), mask=in_half)
    tl.store(to + KEPT + HALF + half, b.to(out.dtype.element_ty), mask=in_half)
    tl.store(to + kept, c.to(out.dtype.element_ty), mask=in_kept)


def _launch(
    x: Tensor,
    num_heads: int,
    num_kv_heads: int,
    angles: tuple[Tensor | None, Tensor, Tensor],
    norms: Tensor | None,
    eps: float,
    slots: Tensor | None,
    cache: KVCache | None,
    *,
    interleave: bool,
) -> Tensor:
    num_tokens, total, dim = x.shape
    positions, cos, sin = angles
    rotary_dim = cos.shape[-1]
    out = x.new_empty(num_tokens, num_heads, dim)
    x = x if x.stride(2) == 1 else x.contiguous()
    kept, half = (triton.next_power_of_2(max(1, n)) for n in (dim - rotary_dim, rotary_dim // 2))
    heads = max(1, _PROGRAM_VALUES // triton.next_power_of_2(dim))
    heads = min(triton.next_power_of_2(max(1, total)), heads)
    keys, values = (out, out) if cache is None else (cache.keys, cache.values)
    launch(
        _rotate_kernel,
        (num_tokens, triton.cdiv(total, heads)),
        *(x, positions, cos, sin, norms, slots, out, keys, values),
        *(x.stride(0), x.stride(1), keys.stride(0), keys.stride(1)),
        *(values.stride(0), values.stride(1), 1 if cache is None else cache.block_size),
        *(num_heads, num_kv_heads, eps),
        HEAD_DIM=dim,
        ROTARY_DIM=rotary_dim,
        INTERLEAVE=interleave,
        HAS_POSITIONS=positions is not None,
        HAS_NORMS=norms is not None,
        HAS_CACHE=cache is not None,
        HEADS=heads,
        KEPT_BLOCK=kept,
        HALF_BLOCK=half,
        num_warps=4,
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
    """As `TorchBackend.rotate_`; never in place."""
    return _launch(x, x.shape[1], 0, (None, cos, sin), None, 0.0, None, None, interleave=interleave)


def rotate_and_write(
    query_key_value: Tensor,
    num_heads: int,
    angles: tuple[Tensor, Tensor, Tensor],
    norms: Tensor | None,
    eps: float,
    slots: Tensor,
    cache: KVCache,
    *,
    interleave: bool,
) -> Tensor:
    """Normalise and rotate queries and keys; store keys and values; return the queries.

    Args:
        query_key_value: [num_tokens, num_heads + 2 · num_kv_heads, head_dim].
        angles: positions [num_tokens]; cosines and sines of all positions, as
            `AttentionWeights` has them.
        norms: [num_heads + num_kv_heads, head_dim] float32; None where heads have no norm.
        slots: [num_tokens]; where the cache keeps each token.

    Returns:
        [num_tokens, num_heads, head_dim].
    """
    num_kv_heads = (query_key_value.shape[1] - num_heads) // 2
    return _launch(
        query_key_value, num_heads, num_kv_heads, angles, norms, eps, slots, cache,
        interleave=interleave,
    )  # fmt: skip


@triton.jit
def _write_kernel(
    key, value, slots, keys, values,
    key_token, key_from_head, value_token, value_from_head,
    key_block, key_head, value_block, value_head, block_size,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    block, offset = slot // block_size, slot % block_size
    columns = tl.arange(0, KEY_BLOCK)
    row = tl.load(key + token * key_token + head * key_from_head + columns, columns < KEY_DIM)
    to = keys + block * key_block + head * key_head + offset * KEY_DIM
    tl.store(to + columns, row, columns < KEY_DIM)
    if VALUE_DIM > 0:
        columns = tl.arange(0, VALUE_BLOCK)
        is_there = columns < VALUE_DIM
        row = tl.load(value + token * value_token + head * value_from_head + columns, is_there)
        to = values + block * value_block + head * value_head + offset * VALUE_DIM
        tl.store(to + columns, row, is_there)


def write(cache: KVCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """As `KVCache.write`."""
    num_tokens, heads, key_dim = key.shape
    value_dim, keys, values = value.shape[2], cache.keys, cache.values
    key, value = (each if each.stride(2) == 1 else each.contiguous() for each in (key, value))
    launch(
        _write_kernel,
        (num_tokens, heads),
        *(key, value, slots, keys, values, *key.stride()[:2], *value.stride()[:2]),
        *(*keys.stride()[:2], *values.stride()[:2], cache.block_size),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_BLOCK=triton.next_power_of_2(key_dim),
        VALUE_BLOCK=triton.next_power_of_2(max(1, value_dim)),
        num_warps=1 if key_dim <= 256 else 2,
    )
