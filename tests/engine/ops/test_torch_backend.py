"""Torch's attention against float64 arithmetic, and bookkeeping, on a CPU, and on a GPU if any."""

import pytest
import torch

from engine.ops.test_attention import batch_of
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache
from expertlane.engine.ops.torch_backend import TorchBackend

OPS = TorchBackend()
STEPS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
WHERE = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
if torch.cuda.is_available():
    WHERE += [("cuda", dtype) for dtype in STEPS]


@pytest.fixture(params=WHERE, ids=lambda where: f"{where[0]}-{str(where[1])[6:]}")
def where(request):
    return torch.device(request.param[0]), request.param[1]


@pytest.fixture
def device(where):
    return where[0]


@pytest.fixture
def dtype(where):
    return where[1]


@pytest.fixture
def random(device, dtype):
    """Values of the device and type, the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return draw


def assert_near(found: torch.Tensor, expected: torch.Tensor, steps: float = 4.0) -> None:
    """Within some roundings of the largest value."""
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max()
    assert error <= steps * STEPS[found.dtype] * expected.abs().max()


@pytest.mark.parametrize(
    "sequences", [[(0, 5), (0, 5)], [(6, 1), (11, 1)], [(0, 3), (9, 1), (4, 4)]]
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_paged_attention(random, device, dtype, sequences, kv_heads, window, has_sinks):
    heads, dim, block_size = 4, 16, 4
    batch = batch_of(sequences, block_size, device)
    num_tokens, num_blocks = len(batch.positions), batch.sequences.block_tables.numel()
    query, key, value = random(num_tokens, heads, dim), *random(2, num_tokens, kv_heads, dim)
    cache = KVCache(num_blocks, block_size, kv_heads, dim, dim, dtype, device)
    cache.keys[:], cache.values[:] = random(2, *cache.keys.shape)
    before = [x.transpose(1, 2).flatten(0, 1).double() for x in (cache.keys, cache.values)]
    sinks = torch.linspace(-1, 2, heads, device=device) if has_sinks else None
    params = AttentionParams(dim, dim**-0.5, window, sinks)
    found = OPS.paged_attention(query, key, value, cache, batch, params)
    for new, old in zip((key, value), before, strict=True):
        old[batch.slots] = new.double()
    token = 0
    for seq, (computed, new) in enumerate(sequences):
        table = batch.sequences.block_tables[seq].to(device)
        for own in range(computed, computed + new):
            seen = torch.arange(max(0, own + 1 - (window or own + 1)), own + 1, device=device)
            slots = table[seen // block_size] * block_size + seen % block_size
            for head in range(heads):
                keys, values = (old[slots, head * kv_heads // heads] for old in before)
                logits = keys @ query[token, head].double() * dim**-0.5
                if sinks is not None:
                    logits = torch.cat([logits, sinks[head : head + 1].double()])
                expected = logits.softmax(0)[: len(seen)] @ values
                assert_near(found[token, head], expected, steps=8)
            token += 1


def test_bookkeeping_is_the_same_on_every_device(device):
    """What `test_bookkeeping.py` shows for a CPU."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 12, (40, 3), generator=generator).int()
    table = torch.randint(0, 99, (12, 3), generator=generator)
    num_copies, topk_ids = torch.arange(12) % 3 + 1, ids.clamp(min=0).long()

    def found(on: torch.device) -> list[torch.Tensor]:
        rows = OPS.rows_by_peer(ids.to(on), 3, 4)
        pairs = OPS.group_pairs(ids.to(on), 2, 2, 4)
        copies = OPS.choose_copies(topk_ids.to(on), table.to(on), num_copies.to(on), 1)
        return [*vars(rows).values(), *vars(pairs).values(), copies]

    for one, other in zip(found(device), found(torch.device("cpu")), strict=True):
        assert torch.equal(one.cpu(), other)
