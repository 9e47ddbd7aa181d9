import math

import pytest
import torch

from parity.reference import moe_block, router_margin

GELU_1 = 0.8413447460685429  # Φ(1)
GELU_2 = 2 * 0.9772498680518208  # 2 Φ(2)

# Hidden size 2, inner size 1, three experts. Expert e reads one input and writes one output:
# 0: x0 -> y0, 1: x1 -> y1, 2: x0 + x1 -> -y0.
UP = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]])
DOWN = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[-1.0], [0.0]]])
# Logits: 0: x0, 1: x0 + x1 × ln 3, 2: -x0.
ROUTER = torch.tensor([[1.0, 0.0], [1.0, math.log(3)], [-1.0, 0.0]])


def test_two_experts_by_hand():
    # Logits 1, 1 + ln 3, -1: experts 1 and 0 with weights 3/4 and 1/4.
    out = moe_block(torch.tensor([[1.0, 1.0]]), ROUTER, UP, DOWN, top_k=2)
    torch.testing.assert_close(out, torch.tensor([[GELU_1 / 4, 3 * GELU_1 / 4]]))


def test_one_expert_by_hand():
    # Logits 1, 1 + ln 3, -1: expert 1 alone, with weight 1.
    out = moe_block(torch.tensor([[1.0, 1.0]]), ROUTER, UP, DOWN, top_k=1)
    torch.testing.assert_close(out, torch.tensor([[0.0, GELU_1]]))


def test_all_experts_by_hand():
    # Logits 0, ln 3, 0: weights 1/5, 3/5, 1/5.
    out = moe_block(torch.tensor([[0.0, 1.0]]), ROUTER, UP, DOWN, top_k=3)
    torch.testing.assert_close(out, torch.tensor([[-GELU_1 / 5, 3 * GELU_1 / 5]]))


def test_tokens_choose_for_themselves():
    x = torch.tensor([[1.0, 1.0], [-2.0, 0.0]])
    # The second token's logits are -2, -2, 2: expert 2, gelu(-2) = gelu(2) - 2, negated.
    out = moe_block(x, ROUTER, UP, DOWN, top_k=1)
    torch.testing.assert_close(out, torch.tensor([[0.0, GELU_1], [2 - GELU_2, 0.0]]))


def test_zero_tokens():
    x = torch.empty(0, 2)
    assert moe_block(x, ROUTER, UP, DOWN, top_k=2).shape == (0, 2)
    assert router_margin(x, ROUTER, top_k=2).shape == (0,)


def test_one_expert_in_all():
    out = moe_block(torch.tensor([[1.0, 5.0]]), ROUTER[:1], UP[:1], DOWN[:1], top_k=1)
    torch.testing.assert_close(out, torch.tensor([[GELU_1, 0.0]]))


def test_the_result_is_float32_whatever_comes_in():
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    out = moe_block(x, ROUTER.bfloat16(), UP.bfloat16(), DOWN.bfloat16(), top_k=1)
    torch.testing.assert_close(out, torch.tensor([[0.0, GELU_1]]))


@pytest.mark.parametrize(
    ("top_k", "margins"),
    [(1, [math.log(3), 4.0]), (2, [2.0, 0.0]), (3, [math.inf, math.inf])],
)
def test_router_margins_by_hand(top_k, margins):
    # Logits 1, 1 + ln 3, -1 and -2, -2, 2.
    x = torch.tensor([[1.0, 1.0], [-2.0, 0.0]])
    torch.testing.assert_close(router_margin(x, ROUTER, top_k), torch.tensor(margins))
