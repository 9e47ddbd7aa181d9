"""The paged attention kernel against torch's operations, over drawn batches.

Without a GPU it runs in Triton's interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from engine.ops.cuda.near import DEVICE, PRODUCT_DTYPES, assert_near, drawn, needs_kernels, random
from engine.ops.test_attention import batch_of
from expertlane.engine.ops.cuda import attention as module
from expertlane.engine.ops.cuda.attention import attend
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache
from expertlane.engine.ops.torch_backend import TorchBackend

pytestmark = needs_kernels

OPS = TorchBackend()
IN_KEYS = {96: 48, 72: 64, 448: 384, 576: 512}  # values that are the first so many values of keys
# Positions computed before, and new tokens.
SEQUENCE = st.one_of(
    st.tuples(st.integers(0, 70), st.just(1)),
    st.tuples(st.integers(0, 30), st.integers(1, 20)),
)
BATCH = st.one_of(
    st.lists(SEQUENCE, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 70), st.just(1)), min_size=1, max_size=4),
)


def compare(
    sequences, block_size, heads, dims, window, has_sinks, dtype, steps=4, slack=0, is_float8=False
):
    """Of a cache in which what no sequence has is NaN; bounds are `slack` above what there is."""
    (num_heads, kv_heads), (key_dim, value_dim) = heads, dims
    batch = batch_of(sequences, block_size, DEVICE)
    bounds = batch.bounds
    batch.bounds = bounds._replace(
        most_new=bounds.most_new + (0 if bounds.is_decode else slack),
        longest=bounds.longest + slack,
    )
    num_blocks = batch.sequences.block_tables.numel()
    shape = num_blocks, block_size, kv_heads, key_dim, value_dim or 0, dtype, DEVICE
    ours, theirs = (KVCache(*shape, is_float8=is_float8) for _ in range(2))
    num_tokens = len(batch.slots)
    query = random(dtype, num_tokens, num_heads + 1, key_dim)[:, 1:]
    key, value = (
        random(dtype, num_tokens, kv_heads, dim, seed=1) for dim in (key_dim, value_dim or 0)
    )
    params = AttentionParams(
        value_dim or IN_KEYS[key_dim],
        key_dim**-0.5,
        window,
        torch.linspace(-1, 2, num_heads, device=DEVICE) if has_sinks else None,
    )
    for each in (ours.keys, ours.values):
        each.fill_(0x7F if is_float8 else torch.nan)
    cached = (
        random(dtype, len(batch.cached_slots), kv_heads, dim, seed=seed)
        for dim, seed in ((key_dim, 2), (value_dim or 0, 3))
    )
    before = batch.cached_slots, *cached
    for cache in (ours, theirs):
        cache.write(*before)
        key, value = cache.write(batch.slots, key, value)  # rounding twice is rounding once
    found = attend(query, ours, batch, params)
    rounded = (x.float() for x in (query, key, value))  # so that the reference alone is exact
    held = theirs.read(torch.arange(num_blocks, device=DEVICE)[:, None], block_size)
    exact = KVCache.of(*(each.float() for each in held))
    expected = OPS.paged_attention(*rounded, exact, batch, params) if num_tokens else found
    assert_near(found, expected.to(dtype), steps)


@pytest.mark.full
@settings(drawn, max_examples=20)
@given(
    sequences=BATCH,
    block_size=st.sampled_from([1, 4, 16]),
    heads=st.sampled_from([(1, 1), (6, 2), (3, 1), (20, 1)]),
    dims=st.sampled_from([(16, 16), (48, 32), (80, 80), (5, 7), (96, None), (72, None)]),
    window=st.sampled_from([None, None, 3, 40]),
    has_sinks=st.booleans(),
    dtype=PRODUCT_DTYPES,
    num_splits=st.sampled_from([1, 3]),
    bounds=st.sampled_from([{"slack": 0}, {"slack": 500}]),
    stored=st.sampled_from([{"is_float8": False}, {"is_float8": True}]),
)
def test_any_batch(
    sequences, block_size, heads, dims, window, has_sinks, dtype, num_splits, bounds, stored
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_num_splits", lambda *_: num_splits)
        compare(sequences, block_size, heads, dims, window, has_sinks, dtype, **bounds, **stored)


def test_splits_follow_from_bounds():
    """One sequence of at most 8,192 positions has 32 splits, however few positions it has."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        launch = module.launch
        patch.setattr(
            module, "launch", lambda *args, **o: asked.append(args[1]) or launch(*args, **o)
        )
        compare([(40, 1)], 16, (2, 1), (16, 16), None, False, torch.float32, slack=8151)
    assert asked == [(1, 1, 32), (2,)]


@pytest.mark.smoke(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "dims"),
    [((2, 1), (512, 512)), ((16, 1), (576, None)), ((4, 1), (192, 128))],
    ids=["512", "absorbed latent", "expanded latent"],
)
@pytest.mark.parametrize("is_float8", [False, True])
def test_wide_heads(heads, dims, dtype, is_float8):
    compare([(20, 1), (3, 5)], 16, heads, dims, None, False, dtype, is_float8=is_float8)


@pytest.mark.full
@pytest.mark.parametrize("card", [90, 100])
@pytest.mark.parametrize(
    ("heads", "dims", "sequences", "num_splits", "is_float8"),
    [
        ((66, 1), (448, None), [(3, 1)], 1, False),
        ((2, 1), (512, 512), [(3, 36), (3, 1)], 1, True),
        ((70, 1), (576, None), [(20, 1), (3, 1)], 3, False),
        ((4, 2), (328, 320), [(3, 34)], 3, False),
    ],
    ids=["short latent", "512", "absorbed latent", "not all columns"],
)
def test_programs_that_share_the_values_of_wide_heads(
    heads, dims, sequences, num_splits, is_float8, card, monkeypatch
):
    if module.shared_bytes(DEVICE) < 227 << 10:
        pytest.skip("this card has less shared memory than such tiles need")
    launched, launch = [], module.launch
    monkeypatch.setattr(module, "architecture", lambda: card)
    monkeypatch.setattr(module, "_num_splits", lambda *_: num_splits)
    monkeypatch.setattr(
        module, "launch", lambda *args, **o: launched.append(o) or launch(*args, **o)
    )
    compare(sequences, 16, heads, dims, None, False, torch.float16, is_float8=is_float8)
    tile = launched[0]
    assert (tile["VALUE_PARTS"], tile["ROWS"]) == (2, 128 if card == 90 else 64)


def test_cards_with_little_shared_memory_have_small_tiles(monkeypatch):
    for kib, fits in ((227, True), (163, False)):
        monkeypatch.setattr(module, "shared_bytes", lambda device, kib=kib: kib << 10)
        assert (module.Tile.wide(128, 512, 512, 2, DEVICE) is not None) == fits


def test_no_tokens():
    compare([], 4, (2, 1), (16, 16), None, False, torch.float32)
