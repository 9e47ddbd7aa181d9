"""The choice of experts in one kernel against its definition in torch.

Without a GPU it runs in Triton's interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from engine.ops.cuda.near import DEVICE, assert_near, drawn, needs_kernels, random
from expertlane.engine.ops import router as definition
from expertlane.engine.ops.cuda.route import CudaRouter, route
from expertlane.engine.ops.router import Router, RouterParams
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.spec.model import Routing

pytestmark = needs_kernels

# Experts, groups, best groups, chosen.
SIZES = st.sampled_from(
    [(1, 1, 1, 1), (5, 1, 1, 3), (40, 1, 1, 40), (128, 1, 1, 8), (12, 3, 2, 5), (256, 8, 4, 8)]
)


@pytest.mark.full
@settings(drawn, max_examples=40)
@given(
    num_rows=st.sampled_from([0, 1, 4]),
    sizes=SIZES,
    scoring_func=st.sampled_from(["softmax", "sigmoid"]),
    group_score=st.sampled_from(["max", "top2_sum"]),
    norms=st.booleans(),
    has_bias=st.booleans(),
    spread=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 9),
)
def test_any_routing(num_rows, sizes, scoring_func, group_score, norms, has_bias, spread, seed):
    num_experts, n_group, topk_group, top_k = sizes
    routing = Routing(
        scoring_func=scoring_func,
        norm_topk_prob=norms,
        routed_scaling_factor=2.5,
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
    )
    logits = spread * random(torch.float32, num_rows, num_experts + 1, seed=seed)[:, 1:]
    bias = random(torch.float32, num_experts, seed=seed + 1) if has_bias else None
    expected_ids, expected = definition.route(logits, top_k, routing, bias)
    found_ids, found = route(logits, top_k, routing, bias)
    # Scores that vanish, or round to 1, are equal: which of them is taken is open.
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    is_plain = scoring_func == "softmax" and norms and n_group == 1 and bias is None
    by = logits if is_plain else choice
    assert found_ids.dtype is torch.int64
    if spread == 1.0:
        assert torch.equal(found_ids, expected_ids)
        assert_near(found, expected, steps=16)
    assert torch.equal(by.gather(1, found_ids), by.gather(1, expected_ids)) or n_group > 1
    assert all(len({*row}) == top_k for row in found_ids.tolist())


def test_by_hand():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]], device=DEVICE)
    ids, weights = route(logits, 2, Routing(scoring_func="sigmoid", norm_topk_prob=False))
    assert ids.tolist() == [[1, 3]]
    assert weights[0].tolist() == pytest.approx([0.952574, 0.880797], abs=1e-6)
    bias = torch.tensor([0.0, -1.0, 1.0, 0.0], device=DEVICE)
    assert route(logits, 2, Routing(scoring_func="sigmoid"), bias)[0].tolist() == [[2, 3]]


def test_equal_scores_go_to_the_first_and_no_expert_twice():
    logits = torch.zeros(1, 6, device=DEVICE)
    logits[0, 4] = -torch.inf
    ids, weights = route(logits, 6, Routing())
    assert ids.tolist() == [[0, 1, 2, 3, 5, 4]]
    assert weights[0, 5] == 0


@pytest.mark.parametrize("has_groups", [False, True])
def test_what_is_no_number_stays_so(has_groups):
    """With experts that exist, so that nothing else is read; another token is as it was."""
    logits = random(torch.float32, 2, 8)
    logits[0, 5] = torch.nan
    groups = {"n_group": 4, "topk_group": 2} if has_groups else {}
    ids, weights = route(logits, 3, Routing(scoring_func="sigmoid", **groups))
    assert weights[0].isnan().all()
    assert ((ids >= 0) & (ids < 8)).all()
    assert weights[1].isfinite().all()


def test_router():
    """The norm, the product, and the choice."""
    routing = Routing(scoring_func="sigmoid", correction_bias=True, n_group=4, topk_group=2)
    params = RouterParams(
        norm=torch.linspace(0.5, 2, 32, device=DEVICE),
        eps=1e-5,
        weight=random(torch.float32, 16, 32),
        bias=random(torch.float32, 16),
        correction_bias=random(torch.float32, 16, seed=1),
        top_k=3,
        routing=routing,
    )
    x, norm = random(torch.float32, 5, 32), TorchBackend().rms_norm
    for found, expected in zip(CudaRouter(params, norm)(x), Router(params, norm)(x), strict=True):
        assert_near(found.float(), expected.float(), steps=16)
