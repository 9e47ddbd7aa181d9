"""Parts of a layer in one call against the same operations one by one, on each instruction set."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops.test_attention import batch_of
from expertlane.engine.model.head import NO_TOKEN, likeliest
from expertlane.engine.ops.cpu import VectorBackend
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache
from expertlane.engine.ops.narrow import NarrowWeight
from expertlane.engine.ops.packed import FEW_ROWS
from expertlane.engine.ops.products import Activation, Expert
from expertlane.engine.ops.router import Router, RouterParams, route
from expertlane.engine.ops.step import AttentionWeights, CompiledRouter, MlpWeights
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.spec.model import Routing

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16]
ERRORS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}  # of the largest value


@pytest.fixture(scope="module")
def ours(kernels) -> VectorBackend:
    return kernels


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype is expected.dtype
    assert found.shape == expected.shape
    if expected.numel():
        error = (found.double() - expected.double()).abs().max()
        assert error <= ERRORS[found.dtype] * expected.double().abs().max()


def router_params(
    num_experts: int,
    top_k: int,
    routing: Routing,
    *,
    hidden: int = 16,
    seed: int = 0,
) -> RouterParams:
    return RouterParams(
        norm=1 + random(hidden, seed=seed) / 8,
        eps=1e-5,
        weight=random(num_experts, hidden, seed=seed + 1),
        bias=random(num_experts, seed=seed + 2) if routing.router_bias else None,
        correction_bias=random(num_experts, seed=seed + 3) if routing.correction_bias else None,
        top_k=top_k,
        routing=routing,
    )


ROUTINGS = st.builds(
    Routing,
    scoring_func=st.sampled_from(["softmax", "sigmoid"]),
    norm_topk_prob=st.booleans(),
    routed_scaling_factor=st.sampled_from([1.0, 2.5]),
    router_bias=st.booleans(),
    correction_bias=st.booleans(),
    n_group=st.sampled_from([1, 4]),
    topk_group=st.integers(1, 4),
    group_score=st.sampled_from(["max", "top2_sum"]),
).map(lambda routing: routing if routing.n_group > 1 else Routing(**vars(routing) | ONE_GROUP))
ONE_GROUP = {"topk_group": 1}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(routing=ROUTINGS, num_tokens=st.sampled_from([0, 1, 3, 17]), top_k=st.integers(1, 2))
def test_router(ours, routing: Routing, num_tokens: int, top_k: int):
    params = router_params(8, top_k, routing)
    router = ours.router(params)
    assert isinstance(router, CompiledRouter)
    for dtype in TYPES:
        x = random(num_tokens, 16, seed=9, dtype=dtype)
        hidden, topk_ids, topk_weights = router(x)
        own, expected_ids, expected_weights = Router(params, ours.rms_norm)(x)
        assert torch.equal(hidden, own)
        assert torch.equal(topk_ids, expected_ids)
        assert_near(topk_weights, expected_weights)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    num_experts=st.sampled_from([3, 8, 64, 160, 256]),
    top_k=st.integers(1, 3),
    levels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_equal_scores_are_chosen_in_torch_s_order(ours, num_experts, top_k, levels, seed):
    """A few levels of logits, so that most are equal; they are exact, being the biases."""
    levels_of = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, num_experts))
    for routing in (Routing(router_bias=True), Routing(scoring_func="sigmoid", router_bias=True)):
        params = RouterParams(
            norm=torch.ones(16),
            eps=1e-5,
            weight=torch.zeros(num_experts, 16),
            bias=levels_of.float(),
            correction_bias=None,
            top_k=top_k,
            routing=routing,
        )
        _, topk_ids, _ = ours.router(params)(random(2, 16))
        expected, _ = route(levels_of.float().expand(2, -1), top_k, routing)
        assert torch.equal(topk_ids, expected)


def held_experts(
    ops: TorchBackend, num: int, hidden: int, inner: int, dtype, *, is_gated: bool, is_narrow=False
):
    def linear(n: int, k: int, seed: int):
        weight = random(n, k, seed=seed) / k**0.5
        return ops.linear(NarrowWeight.rounded(weight, dtype) if is_narrow else weight.to(dtype))

    return [
        Expert(
            up=linear(inner, hidden, 3 * number),
            down=linear(hidden, inner, 3 * number + 1),
            gate=linear(inner, hidden, 3 * number + 2) if is_gated else None,
        )
        for number in range(num)
    ]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("is_narrow", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 16])
def test_experts_that_are_all_here(ours, dtype, is_gated: bool, is_narrow: bool, num_tokens: int):
    """Against router, grouping, experts and sums one by one."""
    hidden, inner, num_experts = 48, 64, 5
    params = router_params(num_experts, 2, Routing(norm_topk_prob=False), hidden=hidden)
    router = ours.router(params)
    held = held_experts(
        ours, num_experts, hidden, inner, dtype, is_gated=is_gated, is_narrow=is_narrow
    )
    experts = ours.experts(held, Activation("silu" if is_gated else "gelu"))
    here = ours.local_experts(router, experts, dtype)
    x = random(num_tokens, hidden, seed=7, dtype=dtype)
    assert here is not None
    assert here.takes(x)
    normed, topk_ids, topk_weights = router(x)
    pairs = ours.group_pairs(topk_ids.int(), 0, 1, num_experts)
    results = experts(normed, pairs)
    expected = ours.gather_sum(results, pairs.numbers, topk_weights)

    work = here.route(x)
    assert torch.equal(here.topk_ids(work, num_tokens), topk_ids)
    assert torch.equal(here.normed(work, x), normed)
    here.group(work, num_tokens)
    assert here.num_tokens_per_expert(work, num_tokens).tolist() == pairs.counts.tolist()
    here.compute(work, num_tokens)
    assert_near(here.combine(work, x, adds_input=False), expected)
    assert_near(here.combine(work, x, adds_input=True), x + expected)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    num_tokens=st.sampled_from([1, 2, 9, 32]),
    sizes=st.sampled_from([(48, 64), (16, 32), (208, 96)]),
    flags=st.tuples(*[st.booleans()] * 4),
)
def test_an_mlp_of_all_tokens(ours, num_tokens: int, sizes, flags):
    """Against norm, projections, activation and scale one by one."""
    is_gated, is_narrow, has_norm, has_scale = flags
    hidden, inner = sizes
    for dtype in TYPES:
        (mlp,) = held_experts(ours, 1, hidden, inner, dtype, is_gated=is_gated, is_narrow=is_narrow)
        activation = Activation("silu" if is_gated else "gelu")
        norm = 1 + random(hidden, seed=11) / 8 if has_norm else None
        scale = (random(1, hidden, seed=12) / hidden**0.5).to(dtype) if has_scale else None
        part = ours.mlp_part(MlpWeights(mlp, activation, norm, 1e-5, scale), dtype)
        x = random(num_tokens, hidden, seed=13, dtype=dtype)
        assert part is not None
        assert part.takes(x)
        rows = x if norm is None else ours.rms_norm(x, norm, 1e-5)
        gate = None if mlp.gate is None else mlp.gate(rows)
        expected = mlp.down(activation(gate, mlp.up(rows)))
        if scale is not None:
            expected = expected * torch.sigmoid(rows @ scale.T)
        found, expected = part(x), expected.double()  # which is rounded in three more places
        assert (found.double() - expected).abs().max() <= 2 * ERRORS[dtype] * expected.abs().max()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, FEW_ROWS), (torch.bfloat16, 512)])
def test_which_mlps_and_blocks_ours_compute(ours, dtype, most):
    """No rows, too many, rows apart; other activations, and widths of bfloat16."""
    router = ours.router(router_params(4, 2, Routing(), hidden=32))

    def parts(ops: TorchBackend, activation: Activation, hidden: int = 32, inner: int = 32):
        held = held_experts(ops, 4, hidden, inner, dtype, is_gated=True)
        here = ops.local_experts(router, ops.experts(held, activation), dtype)
        return ops.mlp_part(MlpWeights(held[0], activation), dtype), here

    for part in parts(ours, Activation("silu")):
        assert part is not None
        taken = {num: part.takes(torch.empty(num, 32, dtype=dtype)) for num in (0, 1, most)}
        assert taken == {0: False, 1: True, most: True}
        assert not part.takes(torch.empty(most + 1, 32, dtype=dtype))
        assert not part.takes(torch.empty(2, 64, dtype=dtype)[:, :32])
    for other in (Activation("gelu"), Activation("silu", swiglu_limit=7.0)):
        assert parts(ours, other) == (None, None)
    assert parts(ours, Activation("silu"), hidden=24)[0] is None
    if dtype is torch.bfloat16:
        assert parts(ours, Activation("silu"), inner=24) == (None, None)
    assert parts(TorchBackend(), Activation("silu")) == (None, None)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    new=st.sampled_from([1, 1, 3]),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    rotary_dim=st.sampled_from([32, 8]),
    interleave=st.booleans(),
    window=st.sampled_from([None, 5]),
    flags=st.tuples(*[st.booleans()] * 7),
)
def test_attention(ours, lengths, new, heads, rotary_dim, interleave, window, flags):
    """Norm, projections, head norms, rotation, cache and attention one by one."""
    has_norm, has_bias, has_head_norms, has_sinks, adds_input, is_narrow, is_float8 = flags
    (num_heads, num_kv_heads), dim, hidden = heads, 32, 48
    for dtype in TYPES:
        scheduled = [min(new, length) for length in lengths]
        angles = random(40, 1, rotary_dim // 2, seed=8)
        cos, sin = (torch.cat(each, dim=2) for each in ([angles.cos()] * 2, [-angles.sin()] * 2))
        sin[..., rotary_dim // 2 :] *= -1
        batch = batch_of(
            [(length - new, new) for length, new in zip(lengths, scheduled, strict=True)], 4
        )
        num_tokens, num_all = sum(scheduled), num_heads + 2 * num_kv_heads
        bias = random(num_all * dim, seed=1) if has_bias else None
        projection = random(num_all * dim, hidden, seed=2) / hidden**0.5
        weight = NarrowWeight.rounded(projection, dtype) if is_narrow else projection.to(dtype)
        qkv = ours.linear(weight, bias)
        output = ours.linear((random(hidden, num_heads * dim, seed=3) / 12).to(dtype))
        head_norms = None
        if has_head_norms:
            head_norms = 1 + random(num_heads + num_kv_heads, dim, seed=4) / 8
        sinks = random(num_heads, seed=5) if has_sinks else None
        norm = 1 + random(hidden, seed=6) / 8 if has_norm else None
        params = AttentionParams(dim, dim**-0.5, window, sinks)
        part = ours.attention_part(
            AttentionWeights(
                norm=norm,
                eps=1e-5,
                query_key_value=qkv,
                head_norms=head_norms,
                output=output,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=dim,
                cos=cos,
                sin=sin,
                interleave=interleave,
                params=params,
            ),
            dtype,
        )
        assert part is not None
        x = random(num_tokens, hidden, seed=9, dtype=dtype)
        num_blocks = int(batch.sequences.block_tables.max()) + 1
        sizes = num_blocks, 4, num_kv_heads, dim, dim, dtype, CPU
        caches = [KVCache(*sizes, is_float8=is_float8) for _ in range(2)]
        held = (random(4 * num_blocks, num_kv_heads, dim, seed=seed) for seed in (10, 11))
        keys, values = (each.to(dtype) for each in held)
        for each in caches:
            each.write(torch.arange(4 * num_blocks), keys, values)

        assert part.takes(x)
        found = part(x, caches[0], batch, adds_input=adds_input)

        hidden_rows = x if norm is None else ours.rms_norm(x, norm, 1e-5)
        projected = qkv(hidden_rows).view(num_tokens, num_all, dim)
        query_key, value = projected[:, :-num_kv_heads], projected[:, -num_kv_heads:]
        if head_norms is not None:
            query_key = ours.rms_norm_heads_(query_key, head_norms, 1e-5)
        query_key = ours.rotate_(
            query_key, cos[batch.positions], sin[batch.positions], interleave=interleave
        )
        query, key = query_key[:, :num_heads], query_key[:, num_heads:]
        attended = ours.paged_attention(query, key, value, caches[1], batch, params)
        expected = output(attended.flatten(1))
        assert_near(found, x + expected if adds_input else expected)
        tables = torch.arange(num_blocks)[None]
        for mine, other in zip(
            *(each.read(tables, 4 * num_blocks) for each in caches), strict=True
        ):
            assert torch.equal(mine, other)


def test_attention_that_ours_do_not_cover(ours):
    """Heads of another width, and no token."""

    def part(dim: int, dtype: torch.dtype):
        weights = AttentionWeights(
            norm=None,
            eps=1e-5,
            query_key_value=ours.linear(random(3 * dim, 16, dtype=dtype)),
            head_norms=None,
            output=ours.linear(random(16, dim, dtype=dtype)),
            num_heads=1,
            num_kv_heads=1,
            head_dim=dim,
            cos=torch.ones(9, 1, dim),
            sin=torch.zeros(9, 1, dim),
            interleave=False,
            params=AttentionParams(dim, 1.0),
        )
        return ours.attention_part(weights, dtype)

    assert part(24, torch.float32) is None
    assert part(8, torch.bfloat16) is None
    taken = part(16, torch.float32)
    assert taken is not None
    assert taken.takes(torch.empty(2, 16))
    assert not taken.takes(torch.empty(0, 16))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("vocab_size", [1, 7, 40])
@pytest.mark.parametrize("has_norm", [True, False])
def test_head(ours, dtype, vocab_size: int, has_norm: bool):
    """Of some rows, with logits that are equal, infinite or no numbers."""
    hidden = 32
    head = ours.linear(random(vocab_size, hidden, dtype=dtype))
    norm = 1 + random(hidden, seed=1) / 8 if has_norm else None
    x, rows = random(6, hidden, seed=2, dtype=dtype), torch.tensor([0, 2, 5])
    part = ours.head_part(head, norm, 1e-5, dtype)
    assert part is not None
    token_ids, best = torch.empty(6, dtype=torch.int64), torch.empty(6, 2, dtype=torch.float64)
    logits = part(x, None, token_ids, best)
    expected = head(x if norm is None else ours.rms_norm(x, norm, 1e-5)).float()
    assert_near(logits, expected)
    assert torch.equal(token_ids, likeliest(logits))
    assert torch.equal(best[:, 0], logits.amax(1).double())
    assert torch.equal(best[:, 1].long(), token_ids)
    if has_norm:
        some = torch.empty(3, dtype=torch.int64)
        assert torch.equal(part(x, rows, some), logits[rows])
        assert torch.equal(some, token_ids[rows])


def test_head_s_choice_of_odd_logits(ours):
    """The weights are chosen so that column i of x is logit i."""
    size = 48
    part = ours.head_part(ours.linear(torch.eye(size)), None, 1e-5, torch.float32)
    assert part is not None
    x = torch.zeros(5, size)
    x[1, [9, 33, 47]] = 2.0
    x[2] = -3.0
    x[2, [40, 44]] = -1.0
    x[3, 20] = torch.finfo(torch.float32).max
    token_ids, best = torch.empty(5, dtype=torch.int64), torch.empty(5, 2, dtype=torch.float64)
    part(x, None, token_ids, best)
    assert token_ids.tolist() == [0, 9, 40, 20, 0]
    x[0, 13], x[1, 1] = torch.nan, torch.inf  # no number times 0 is none in any column
    part(x, None, token_ids, best)
    assert token_ids.tolist() == [NO_TOKEN, NO_TOKEN, 40, 20, 0]
    assert best[:2, 0].isnan().all()
