"""Attention over pages of each instruction set that this machine has, against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.engine.ops.float8 import from_float8, to_float8
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.schedule.plan import Batch

CPU = torch.device("cpu")
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}  # of the largest value
HEADS = [(4, 4), (4, 2), (6, 1), (9, 3), (16, 1), (40, 1)]  # few rows a kv head, and many
DIMS = [(32, 32), (64, 48), (80, 80), (5, 7), (16, 16), (96, None)]  # None: values are in the keys
# Positions computed before and new tokens: decodes, prompts, chunks, none; of keys 96 make a block,
# and more than 256 are cut.
SEQUENCE = st.one_of(
    st.tuples(st.sampled_from([0, 1, 31, 94, 95, 96, 255, 256, 600]), st.just(1)),
    st.tuples(st.integers(0, 70), st.integers(0, 40)),
    st.tuples(st.integers(200, 700), st.integers(1, 8)),
    st.tuples(st.just(0), st.integers(90, 150)),
)


def batch_of(
    sequences: list[tuple[int, int]], block_size: int, device: torch.device = CPU
) -> PagedBatch:
    """Sequences are (positions computed before, new tokens); blocks in random order."""
    computed, new = np.array(sequences, dtype=np.int64).reshape(-1, 2).T
    width = max(1, -(-int((computed + new).max(initial=1)) // block_size))
    blocks = np.random.default_rng(0).permutation(len(sequences) * width)
    batch = Batch(
        seq_ids=np.arange(len(sequences)),
        num_scheduled_tokens=np.ascontiguousarray(new),
        num_computed_tokens=np.ascontiguousarray(computed),
        token_ids=np.zeros(new.sum(), dtype=np.int64),
        block_tables=blocks.reshape(len(sequences), width).astype(np.int32),
        yields_token=np.ones(len(sequences), dtype=np.bool_),
    )
    return PagedBatch(batch, block_size, device)


def by_slot(pages: torch.Tensor) -> torch.Tensor:
    """[num_slots, heads, dim] of keys or values of a cache."""
    return pages.transpose(1, 2).flatten(0, 1).clone()


def held(cache: KVCache) -> list[torch.Tensor]:
    """Keys and values by slot, widened where they are float8."""
    keys, values = (by_slot(x) for x in (cache.keys, cache.values))
    if cache.key_scales is None:
        return [keys, values]
    scales = by_slot(cache.key_scales), by_slot(cache.value_scales)
    return [from_float8(x, y, cache.dtype) for x, y in zip((keys, values), scales, strict=True)]


class Drawn:
    """A cache; new tokens' queries, keys and values, side by side as a projection gives them."""

    def __init__(self, batch, heads, dims, dtype, *, is_float8=False):
        (num_heads, kv_heads), (key_dim, value_dim) = heads, dims
        generator = torch.Generator().manual_seed(1)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.value_dim = value_dim or key_dim // 2
        stored = value_dim or 0
        sizes = batch.sequences.block_tables.numel(), batch.block_size, kv_heads
        self.cache = KVCache(*sizes, key_dim, stored, dtype, CPU, is_float8=is_float8)
        num_slots = sizes[0] * batch.block_size
        before = (random(num_slots, kv_heads, dim) for dim in (key_dim, stored))
        self.cache.write(torch.arange(num_slots), *before)
        wide = random(len(batch.slots), num_heads + kv_heads, key_dim)
        self.query, self.key = wide[:, :num_heads], wide[:, num_heads:]
        self.value = random(len(batch.slots), kv_heads + 1, stored)[:, 1:]

    def rounded(self, rows):
        """As the cache stores them."""
        is_whole = self.cache.key_scales is None or not rows.shape[-1]
        return rows if is_whole else from_float8(*to_float8(rows), rows.dtype)

    def expected(self, batch, params):
        """In float64, token by token; and the cache afterwards."""
        keys, values = held(self.cache)
        keys[batch.slots], values[batch.slots] = self.rounded(self.key), self.rounded(self.value)
        after = keys, values
        values = values.double() if values.shape[-1] else keys[..., : self.value_dim].double()
        keys, group = keys.double(), self.query.shape[1] // self.key.shape[1]
        out = torch.empty(*self.query.shape[:2], self.value_dim, dtype=torch.float64)
        paged, size = batch.sequences, batch.block_size
        for table, first, new, end in zip(*(each.numpy() for each in paged), strict=True):
            seen = np.arange(end)
            slots = table[seen // size] * size + seen % size
            k, v = (x[slots].repeat_interleave(group, dim=1) for x in (keys, values))
            tokens, own = slice(first, first + new), np.arange(end - new, end)[:, None]
            logits = torch.einsum("phd,nhd->hnp", k, self.query[tokens].double()) * params.scale
            is_seen = (seen <= own) & (seen > own - (params.window or end))
            logits = logits.masked_fill(~torch.from_numpy(is_seen), -torch.inf)
            if params.sinks is not None:
                sinks = params.sinks.double()[:, None, None].expand(-1, int(new), 1)
                logits = torch.cat([logits, sinks], dim=2)
            out[tokens] = torch.einsum("hnp,phd->nhd", logits.softmax(2)[..., :end], v)
        return out, after


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    sequences=st.lists(SEQUENCE, max_size=4),
    block_size=st.sampled_from([1, 3, 16]),
    heads=st.sampled_from(HEADS),
    dims=st.sampled_from(DIMS),
    window=st.sampled_from([None, None, 1, 7, 64, 300]),
    has_sinks=st.booleans(),
    is_float8=st.booleans(),
)
def test_attention(kernels, **drawn):
    check_attention(kernels, **drawn)


def check_attention(kernels, sequences, block_size, heads, dims, window, has_sinks, is_float8):
    batch = batch_of(sequences, block_size)
    sinks = torch.linspace(-1, 2, heads[0]) if has_sinks else None
    for dtype, bound in BOUND.items():
        drawn = Drawn(batch, heads, dims, dtype, is_float8=is_float8)
        params = AttentionParams(drawn.value_dim, dims[0] ** -0.5, window, sinks)
        expected, (keys, values) = drawn.expected(batch, params)
        found = kernels.paged_attention(
            drawn.query, drawn.key, drawn.value, drawn.cache, batch, params
        )
        assert found.dtype is dtype
        assert found.shape == expected.shape
        assert torch.equal(held(drawn.cache)[0], keys)
        assert torch.equal(held(drawn.cache)[1], values)
        if len(found):
            assert (found.double() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("dims", [(576, None), (512, 512)])
@pytest.mark.parametrize("sequences", [[(700, 1)], [(40, 20), (3, 1)]])
@pytest.mark.parametrize("is_float8", [False, True])
def test_the_largest_heads(kernels, dims, sequences, is_float8):
    sizes = sequences, 16, (16, 1), dims, None
    check_attention(kernels, *sizes, has_sinks=False, is_float8=is_float8)


@pytest.mark.parametrize("dtype", BOUND)
def test_a_result_does_not_depend_on_threads_or_company(kernels, dtype):
    """Long contexts are cut by their lengths alone."""
    sequences = [(900, 1), (5, 1), (700, 4), (0, 60)]
    params = AttentionParams(64, 0.1)
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        batch = batch_of(sequences, 16)
        drawn = Drawn(batch, (4, 2), (64, 64), dtype)
        tensors = drawn.query, drawn.key, drawn.value
        found.append(kernels.paged_attention(*tensors, drawn.cache, batch, params))
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    first = batch.sequences.block_tables[:1].numpy().astype(np.int32)
    alone = PagedBatch(
        Batch(
            np.arange(1),
            np.array([1]),
            np.array([900]),
            np.zeros(1, np.int64),
            first,
            np.ones(1, dtype=np.bool_),
        ),
        16,
        CPU,
    )
    tensors = (x[:1] for x in (drawn.query, drawn.key, drawn.value))
    assert torch.equal(kernels.paged_attention(*tensors, drawn.cache, alone, params), found[0][:1])


@pytest.mark.parametrize("dtype", BOUND)
def test_what_is_not_seen_may_be_anything(kernels, dtype):
    """NaN after the last position and before the window, in blocks that others have."""
    batch = batch_of([(200, 1), (30, 12)], 16)
    params = AttentionParams(32, 0.2, 40)
    found = []
    for unseen in (0.0, torch.nan):
        drawn = Drawn(batch, (8, 2), (32, 32), dtype)
        for pages in (drawn.cache.keys, drawn.cache.values):
            kept = pages.clone()
            pages.fill_(unseen)
            for table, first, end in zip(
                batch.sequences.block_tables, (161, 0), (200, 30), strict=True
            ):
                seen = torch.arange(first, end)
                at = table[seen // 16], slice(None), seen % 16
                pages[at] = kept[at]
        tensors = drawn.query, drawn.key, drawn.value
        found.append(kernels.paged_attention(*tensors, drawn.cache, batch, params))
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    num_tokens=st.integers(0, 30),
    heads=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 70), st.sampled_from([1, 2, 6, 32, 130])),
    is_shared=st.booleans(),
)
def test_a_product_for_each_head(kernels, num_tokens, heads, sizes, is_shared):
    """Between rows that lie apart, or that all heads take; odd widths are torch's."""
    out_features, in_features = sizes
    generator = torch.Generator().manual_seed(0)
    for dtype, bound in BOUND.items():
        wide = torch.randn(num_tokens, heads, in_features + 3, generator=generator).to(dtype)
        weight = torch.randn(heads, out_features, in_features, generator=generator).to(dtype)
        x = wide[:, :1, 3:].expand(-1, heads, -1) if is_shared else wide[..., 3:]
        out = torch.zeros(num_tokens, heads, out_features + 5, dtype=dtype)
        product = kernels.heads_linear(weight)
        assert product.num_weights == weight.numel()
        product(x, out=out[..., :-5])
        expected = torch.einsum("thk,hnk->thn", x.double(), weight.double())
        assert not out[..., -5:].any()
        if num_tokens:
            error = (out[..., :-5].double() - expected).abs().max()
            assert error <= bound * expected.abs().max()


def test_other_types_are_torch_s(kernels):
    batch = batch_of([(4, 1), (0, 3)], 4)
    drawn = Drawn(batch, (4, 2), (8, 8), torch.float64)
    params = AttentionParams(8, 0.3)
    tensors = drawn.query, drawn.key, drawn.value
    expected = TorchBackend().paged_attention(*tensors, drawn.cache, batch, params)
    assert torch.equal(kernels.paged_attention(*tensors, drawn.cache, batch, params), expected)


@pytest.mark.parametrize("dtype", BOUND)
def test_float8_has_torch_s_bits(kernels, dtype):
    """Rows of every magnitude, of ties, of zeros, and of what is no number."""
    batch = batch_of([(0, 40)], 16)
    drawn = Drawn(batch, (2, 2), (32, 32), dtype, is_float8=True)
    exponents = torch.arange(40).view(-1, 1, 1) * 3 - 60
    key = torch.randn(40, 2, 32, generator=torch.Generator().manual_seed(2)) * 2.0**exponents
    key[5], key[6, 1] = 0.0, torch.tensor([448.0, 17.0, 19.0, 2.0**-9 * 1.5] * 8)
    key[7, 0, 3], key[8, 1, 9], key[9] = torch.nan, -torch.inf, torch.finfo(torch.float32).tiny / 8
    key = key.to(dtype)
    params = AttentionParams(32, 0.1)
    found = kernels.paged_attention(drawn.query, key, drawn.value, drawn.cache, batch, params)
    values, scales = to_float8(key)
    is_number = scales != 255
    assert is_number.sum() == 80 - 2
    assert torch.equal(by_slot(drawn.cache.key_scales)[batch.slots], scales)
    stored = by_slot(drawn.cache.keys)[batch.slots]
    assert torch.equal(stored * is_number, values * is_number)
    assert found[:7].isfinite().all()


def test_float8_tells_of_what_is_no_number(kernels):
    """A value that is none is none for all that see it."""
    batch = batch_of([(0, 40), (0, 3)], 16)
    for dtype in BOUND:
        drawn = Drawn(batch, (4, 2), (32, 32), dtype, is_float8=True)
        drawn.value = drawn.value.clone()
        drawn.value[7, 0, 5] = torch.nan
        tensors = drawn.query, drawn.key, drawn.value, drawn.cache, batch
        found = kernels.paged_attention(*tensors, AttentionParams(32, 0.1))
        assert found[40:].isfinite().all()
        assert not found[7:40, :2].isfinite().any(dim=2).any()
        assert found[:, 2:].isfinite().all()
