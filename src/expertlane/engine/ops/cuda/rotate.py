"""Rotary embedding, with the norms of heads before it and the write to the paged cache after it.

Limit: memory. A token's queries, keys and values are read once and written once: 2 · (heads + 2 ·
kv heads) · head_dim · b bytes over the card's bandwidth, and its cosines and sines.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertlane.engine.ops.cuda.float8 import largest_of, rounded, scale_of
from expertlane.engine.ops.cuda.launch import adjacent, launch
from expertlane.engine.ops.kv_cache import KVCache

_PROGRAM_VALUES = 2048  # of a token's heads


@triton.jit
def _rotate_kernel(
    x, positions, cos, sin, norms, slots, out, keys, values, key_scales, value_scales,
    x_token, x_head, key_block, key_head, value_block, value_head, block_size,
    num_heads, num_kv_heads, eps,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVE: tl.constexpr,
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
    first, second = _columns_of_pairs(half, is_value[:, None] == 0, KEPT, HALF, INTERLEAVE)
    row = x + token * x_token + head[:, None] * x_head
    a = tl.load(row + first, mask=in_half, other=0.0).to(tl.float32)
    b = tl.load(row + second, mask=in_half, other=0.0).to(tl.float32)
    c = tl.load(row + kept, mask=in_kept, other=0.0).to(tl.float32)
    if norms is not None:
        squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1) + tl.sum(c * c, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        norm, has_norm = norms + head[:, None] * HEAD_DIM, is_value[:, None] == 0
        dtype = x.dtype.element_ty
        a = _normalised(a, scale, norm + first, in_half, has_norm, dtype)
        b = _normalised(b, scale, norm + second, in_half, has_norm, dtype)
        c = _normalised(c, scale, norm + kept, in_kept, has_norm, dtype)
    position = tl.load(positions + token).to(tl.int64) if positions is not None else token
    angle = position * ROTARY_DIM + half
    cos_a = tl.load(cos + angle, mask=half < HALF, other=0.0)
    sin_b = tl.load(sin + angle + HALF, mask=half < HALF, other=0.0)  # the first half is negative
    turned_a, turned_b = a * cos_a - b * sin_b, b * cos_a + a * sin_b
    dtype = out.dtype.element_ty
    a = tl.where(is_value[:, None], a, turned_a).to(dtype)
    b = tl.where(is_value[:, None], b, turned_b).to(dtype)
    c = c.to(dtype)
    to = out + (token * num_heads + head[:, None]) * HEAD_DIM
    if slots is not None:
        slot = tl.load(slots + token)
        block, offset = slot // block_size, slot % block_size
        of_cache = tl.where(is_value, head - num_heads - num_kv_heads, head - num_heads)
        key = keys + block * key_block + of_cache[:, None] * key_head + offset * HEAD_DIM
        value = values + block * value_block + of_cache[:, None] * value_head + offset * HEAD_DIM
        stored = tl.where(is_value[:, None], value, key)
        if key_scales is not None:
            in_cache = (is_head & (is_query == 0))[:, None]
            place = (block * num_kv_heads + of_cache) * block_size + offset
            scales = tl.where(is_value, value_scales + place, key_scales + place)[:, None]
            _store_in_float8(
                stored, scales, a, b, c, half, kept, in_cache, in_half & in_cache,
                in_kept & in_cache, KEPT, HALF,
            )  # fmt: skip
            in_half, in_kept = in_half & is_query[:, None], in_kept & is_query[:, None]
        else:
            to = tl.where(is_query[:, None], to, stored)
    _store_head(to, a, b, c, half, kept, in_half, in_kept, KEPT, HALF)


@triton.jit
def _columns_of_pairs(
    half, is_turned, KEPT: tl.constexpr, HALF: tl.constexpr, INTERLEAVE: tl.constexpr
):  # fmt: skip
    """The two columns of each rotary pair: adjacent if INTERLEAVE, in heads that are rotated."""
    first = KEPT + half
    second = first + HALF
    if INTERLEAVE:
        first = tl.where(is_turned, first + half, first)
        second = tl.where(is_turned, first + 1, second)
    return first, second


@triton.jit
def _normalised(x, scale, norm, is_there, has_norm, dtype):
    """x · scale · norm where there is a norm, rounded as a norm of its own operation would be."""
    x = tl.where(has_norm, x * scale * tl.load(norm, is_there & has_norm, 0.0), x)
    return x.to(dtype).to(tl.float32)


@triton.jit
def _store_in_float8(
    to, scales, a, b, c, half, kept, in_cache, in_half, in_kept,
    KEPT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Round heads to float8, and store them and their scales in the cache."""
    largest = tl.maximum(largest_of(a), tl.maximum(largest_of(b), largest_of(c)))
    scale = scale_of(largest)[:, None]
    tl.store(scales, scale.to(tl.uint8), mask=in_cache)
    a, b, c = rounded(a, scale), rounded(b, scale), rounded(c, scale)
    _store_head(to, a, b, c, half, kept, in_half, in_kept, KEPT, HALF)


@triton.jit
def _store_head(
    to, a, b, c, half, kept, in_half, in_kept, KEPT: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    tl.store(to + KEPT + half, a, mask=in_half)
    tl.store(to + KEPT + HALF + half, b, mask=in_half)
    tl.store(to + kept, c, mask=in_kept)


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
    x = adjacent(x)
    kept, half = (triton.next_power_of_2(max(1, n)) for n in (dim - rotary_dim, rotary_dim // 2))
    heads = max(1, _PROGRAM_VALUES // triton.next_power_of_2(dim))
    heads = min(triton.next_power_of_2(max(1, total)), heads)
    keys, values, *scales = (out, out, None, None) if cache is None else cache.parts
    launch(
        _rotate_kernel,
        (num_tokens, triton.cdiv(total, heads)),
        *(x, positions, cos, sin, norms, slots, out, keys, values, *scales),
        *(x.stride(0), x.stride(1), keys.stride(0), keys.stride(1)),
        *(values.stride(0), values.stride(1), 1 if cache is None else cache.block_size),
        *(num_heads, num_kv_heads, eps),
        HEAD_DIM=dim,
        ROTARY_DIM=rotary_dim,
        INTERLEAVE=interleave,
        HEADS=heads,
        KEPT_BLOCK=kept,
        HALF_BLOCK=half,
        num_warps=4,
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
    """Rotate each head, as `TorchBackend.rotate_` defines it; never in place."""
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
        angles: positions [num_tokens]; cosines and sines of all positions, those of
            `AttentionWeights`.
        norms: [num_heads + num_kv_heads, head_dim] float32; None where heads have no norm.
        slots: [num_tokens]; each token's slot in the cache.

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
    key, value, slots, keys, values, key_scales, value_scales,
    key_token, key_from_head, value_token, value_from_head,
    key_block, key_head, value_block, value_head, block_size,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    block, offset = slot // block_size, slot % block_size
    place = (block * tl.num_programs(1) + head) * block_size + offset  # of the row's scale
    row = key + token * key_token + head * key_from_head
    to = keys + block * key_block + head * key_head + offset * KEY_DIM
    _write_row(row, to, key_scales, place, KEY_DIM, KEY_BLOCK)
    if VALUE_DIM > 0:
        row = value + token * value_token + head * value_from_head
        to = values + block * value_block + head * value_head + offset * VALUE_DIM
        _write_row(row, to, value_scales, place, VALUE_DIM, VALUE_BLOCK)


@triton.jit
def _write_row(row, to, scales, place, DIM: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    is_there = columns < DIM
    values = tl.load(row + columns, is_there, 0.0)
    if scales is not None:
        scale = scale_of(largest_of(values))
        tl.store(scales + place, scale.to(tl.uint8))
        tl.store(to + columns, rounded(values, scale), is_there)
    else:
        tl.store(to + columns, values, is_there)


def write(cache: KVCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Store new tokens' keys and values in the cache; see `KVCache.write`."""
    num_tokens, heads, key_dim = key.shape
    value_dim, (keys, values, *scales) = value.shape[2], cache.parts
    key, value = adjacent(key), adjacent(value)
    launch(
        _write_kernel,
        (num_tokens, heads),
        *(key, value, slots, keys, values, *scales, *key.stride()[:2], *value.stride()[:2]),
        *(*keys.stride()[:2], *values.stride()[:2], cache.block_size),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_BLOCK=triton.next_power_of_2(key_dim),
        VALUE_BLOCK=triton.next_power_of_2(max(1, value_dim)),
        num_warps=1 if key_dim <= 256 else 2,
    )
