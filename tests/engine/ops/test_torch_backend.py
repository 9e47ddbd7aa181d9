"""Torch's operations against float64 arithmetic written out, on a CPU, and on a GPU if any."""

import numpy as np
import pytest
import torch

from engine.ops.test_attention import batch_of
from expertlane.engine.ops.bookkeeping import RowParts
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache
from expertlane.engine.ops.products import Activation, Expert, PairGroups
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


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_linear(random, num_rows):
    x, weight, bias = random(num_rows, 48), random(32, 48), random(32)
    linear = OPS.linear(weight.clone(), bias)
    expected = x.double() @ weight.double().t() + bias.double()
    for product in (linear, linear.with_tensors(linear.tensors())):
        if num_rows:
            assert_near(product(x), expected)
        else:
            assert product(x).shape == (0, 32)


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("counts", [[2, 0, 5], [0, 30, 3]])
def test_experts(random, device, counts, has_bias, is_gated):
    hidden, inner, num = 32, 16, sum(counts)

    def weights(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return random(n, k) / k**0.5, random(n) if has_bias else None

    def apply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = x @ weight.double().t()
        return out if bias is None else out + bias.double()

    drawn = [
        {
            "up": weights(inner, hidden),
            "down": weights(hidden, inner),
            "gate": weights(inner, hidden) if is_gated else None,
        }
        for _ in counts
    ]
    held = [
        Expert(**{name: OPS.linear(*given) for name, given in each.items() if given is not None})
        for each in drawn
    ]
    rows, taken = random(7, hidden), torch.arange(num, device=device) % 7
    given = torch.randperm(num, generator=torch.Generator().manual_seed(1)).to(device)
    activation = Activation("silu" if is_gated else "gelu")
    pairs = PairGroups(torch.tensor(counts, device=device), taken, given, torch.empty(0))
    found = OPS.experts(held, activation)(rows, pairs)
    expert_of_pair = np.repeat(np.arange(len(counts)), counts).tolist()
    for pair, expert in enumerate(expert_of_pair):
        x, parts = rows[taken[pair]].double()[None], drawn[expert]
        gate = apply(x, *parts["gate"]) if is_gated else None
        expected = apply(activation(gate, apply(x, *parts["up"])), *parts["down"])
        assert_near(found[given[pair]][None], expected, steps=8)


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


def test_norms(random, device):
    x, weight = random(5, 24), torch.linspace(0.5, 2, 24, device=device)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert_near(OPS.rms_norm(x, weight, 1e-5), exact * weight)
    of_heads = torch.stack([weight, weight.flip(0)])
    found = OPS.rms_norm_heads_(x[:, None].expand(5, 2, 24).clone(), of_heads, 1e-5)
    assert_near(found, exact[:, None] * of_heads)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dim", [8, 6])
def test_rotation(random, device, dim, interleave):
    x, angles = random(3, 2, 8), torch.linspace(-3, 3, 3 * dim // 2, device=device).view(3, -1)
    cos, sin = angles.cos().repeat(1, 2)[:, None], torch.cat([-angles.sin(), angles.sin()], 1)
    found = OPS.rotate_(x.clone(), cos, sin[:, None], interleave=interleave)
    turning = x[..., 8 - dim :].double()
    first, second = turning.chunk(2, -1)
    if interleave:
        first, second = turning[..., 0::2], turning[..., 1::2]
    c, s = angles.cos().double()[:, None], angles.sin().double()[:, None]
    turned = [first * c - second * s, second * c + first * s]
    assert_near(found, torch.cat([x[..., : 8 - dim].double(), *turned], dim=-1))


def test_sums(random, device):
    values, weights = random(6, 16), torch.rand(3, 2, device=device)
    places = torch.tensor([[0, 5], [-1, -1], [3, -1]], device=device)
    rows = values.double()
    expected = torch.stack(
        [rows[0] * weights[0, 0] + rows[5] * weights[0, 1], 0 * rows[0], rows[3] * weights[2, 0]]
    )
    assert_near(OPS.gather_sum(values, places, weights), expected)
    assert_near(OPS.sum_parts(RowParts.of(values), 3), rows.view(3, 2, 16).sum(0))


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
