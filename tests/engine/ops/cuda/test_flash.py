"""What is given to torch's `varlen_attn`, by a stand-in that does what its documentation says.

FlashAttention 3 itself runs on a GPU alone (tests/gpu).
"""

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from engine.ops.cuda.near import DEVICE, assert_near, needs_kernels, random
from engine.ops.test_attention import batch_of
from expertlane.engine.ops.cuda import attention, flash
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache

pytestmark = needs_kernels


def documented(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
    *, scale, window_size, enable_gqa, seqused_k, block_table,
):  # fmt: skip
    """Row by row: keys of pages, of which the last `q` positions are the sequence's new tokens."""
    assert cu_seq_k is None
    assert {cu_seq_q.dtype, seqused_k.dtype, block_table.dtype} == {torch.int32}
    assert (block_table >= 0).all()
    group = query.shape[1] // key.shape[2]
    assert enable_gqa == (group != 1)
    out = torch.empty_like(query)
    for seq, (begin, end) in enumerate(pairwise(cu_seq_q)):
        length = int(seqused_k[seq])
        assert end - begin <= max_q
        assert length <= max_k
        keys, values = (
            x[block_table[seq].long()].flatten(0, 1)[:length].repeat_interleave(group, 1)
            for x in (key, value)
        )
        for place in range(int(begin), int(end)):
            last = length - int(end) + place
            first = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            seen = slice(first, last + 1 + window_size[1])
            logits = torch.einsum("hd,phd->hp", query[place].float(), keys[seen].float())
            weights = (logits * scale).softmax(-1)
            out[place] = torch.einsum("hp,phd->hd", weights, values[seen].float())
    return out


@pytest.fixture
def calls(monkeypatch):
    """Installs the stand-in; what it was called with."""
    found = []

    def stand_in(*given, **options):
        found.append(given[0].shape)
        return documented(*given, **options)

    monkeypatch.setattr(flash, "_varlen_attn", lambda device: stand_in)
    flash._is_right.cache_clear()
    yield found
    flash._is_right.cache_clear()


def given(sequences, dims=(16, 16), dtype=torch.float16, heads=(4, 2), block_size=4):
    """Query, a cache full of numbers, and the batch."""
    batch = batch_of(sequences, block_size, DEVICE)
    num_blocks = batch.sequences.block_tables.numel()
    cache = KVCache(num_blocks, block_size, heads[1], *dims, dtype, DEVICE)
    for seed, each in enumerate((cache.keys, cache.values)):
        each.copy_(random(dtype, *each.shape, seed=seed))
    return random(dtype, len(batch.slots), heads[0], dims[0], seed=2), cache, batch


@pytest.mark.smoke(1)
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_prompts_are_those_of_our_kernel(calls, window, heads):
    query, cache, batch = given([(0, 66), (5, 3), (9, 1)], heads=heads)
    params = AttentionParams(16, 0.25, window)
    found = flash.attend(query, cache, batch, params)
    assert calls[1:] == [query.shape]  # after it was tried
    assert_near(found, attention.attend(query, cache, batch, params), steps=4)


@pytest.mark.full
def test_what_it_does_not_suit(calls):
    """Decode steps, sinks, latents, float32, and odd heads are our kernel's."""
    sinks = torch.zeros(4, device=DEVICE)
    for case, params in (
        (given([(66, 1), (3, 1)]), AttentionParams(16, 0.25)),
        (given([(0, 66)]), AttentionParams(16, 0.25, None, sinks)),
        (given([(0, 66)], dims=(24, 0)), AttentionParams(16, 0.25)),
        (given([(0, 66)], dtype=torch.float32), AttentionParams(16, 0.25)),
        (given([(0, 66)], dims=(12, 12)), AttentionParams(12, 0.25)),
    ):
        found = flash.attend(*case, params)
        assert torch.equal(found, attention.attend(*case, params))
    assert calls == []


@pytest.mark.parametrize("fault", ["fails", "differs"])
def test_what_fails_or_differs_is_left(fault, monkeypatch):
    def wrong(query, *_, **__):
        if fault == "fails":
            raise RuntimeError("Paged KV cache block size must be divisible by 256")
        return query

    monkeypatch.setattr(flash, "_varlen_attn", lambda device: wrong)
    flash._is_right.cache_clear()
    case = given([(0, 66)])
    params = AttentionParams(16, 0.25)
    assert torch.equal(flash.attend(*case, params), attention.attend(*case, params))
    flash._is_right.cache_clear()


def test_it_is_not_sought_without_a_gpu():
    assert flash._varlen_attn(torch.device("cpu")) is None


def test_shapes_of_torchs_own_function(monkeypatch):
    """Its signature takes what it is given, on tensors without data."""
    module = pytest.importorskip("torch.nn.attention.varlen", reason="of torch 2.10 on")
    monkeypatch.setattr(flash, "_varlen_attn", lambda device: module.varlen_attn)
    query, cache, batch = given([(0, 66), (5, 3)])
    sequences = batch.sequences
    with FakeTensorMode() as mode:
        batch.__dict__["sequences"] = type(sequences)(*map(mode.from_tensor, sequences))
        faked = KVCache.of(mode.from_tensor(cache.keys), mode.from_tensor(cache.values))
        out = flash._by_flash(mode.from_tensor(query), faked, batch, AttentionParams(16, 0.25, 20))
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
