"""Tokens drawn in one pass against `model.draw`, which draws for all rows together."""

import math

import numpy as np
import pytest
import torch

from expertlane.engine.model.draw import draw, keep_likeliest, probabilities, uniform_numbers
from expertlane.engine.ops.cpu import VectorBackend


@pytest.fixture(scope="module")
def ours(kernels) -> VectorBackend:
    return kernels


def column(values, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def drawn(ours, scores, temperature=1.0, top_k=None, top_p=None, min_p=None, first=0):
    """Tokens by ours; seeds are the rows' numbers."""
    num = len(scores)
    limits = (
        None if top_k is None else column([top_k] * num),
        None if top_p is None else column([top_p] * num),
        None if min_p is None else column([min_p] * num, torch.float32),
    )
    seeds = np.arange(num, dtype=np.uint64)
    num_drawn = torch.full((num,), first)
    temperatures = column([temperature] * num, torch.float32)
    found = ours.draw_tokens(scores, temperatures, limits, seeds, num_drawn)
    assert num_drawn.tolist() == [first + 1] * num
    p = probabilities(scores, scores.amax(1, keepdim=True), temperatures)
    p = keep_likeliest(p, *limits)
    uniform = torch.from_numpy(uniform_numbers(seeds, np.full(num, first)))
    return found, draw(p, uniform), p


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 128, 1000])
@pytest.mark.parametrize("top_k", [None, 3, math.inf])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.95])
@pytest.mark.parametrize("min_p", [None, 0.1])
def test_the_same_tokens_as_for_all_rows_together(ours, vocab_size, top_k, top_p, min_p):
    """But where rounding decides, at a border between tokens: at most one of a hundred."""
    generator = torch.Generator().manual_seed(vocab_size)
    scores = 3 * torch.randn(300, vocab_size, generator=generator)
    scores[::7] = scores[::7].round()  # many equal
    scores[::5, vocab_size // 2 + 1 :] = -math.inf
    found, expected, p = drawn(ours, scores, 0.7, top_k, top_p, min_p, first=5)
    assert (p.gather(1, found[:, None]) > 0).float().mean() > 0.99
    assert (found == expected).float().mean() > 0.99


def test_limits_keep_what_they_should(ours):
    """Of 0.4, 0.3, 0.2, 0.1, in another order, drawn a hundred times."""
    scores = torch.tensor([0.2, 0.4, 0.1, 0.3]).log().expand(100, 4).contiguous()
    for limits, kept in (
        ({}, {0, 1, 2, 3}),
        ({"top_k": 1.0}, {1}),
        ({"top_k": 3.0}, {0, 1, 3}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.65}, {1, 3}),
        ({"top_p": 0.85}, {0, 1, 3}),
        ({"top_k": 2.0, "top_p": 0.5}, {1}),  # 0.4 of 0.7
        ({"min_p": 0.6}, {1, 3}),
        ({"top_k": math.inf, "top_p": math.inf, "min_p": 0.0}, {0, 1, 2, 3}),
    ):
        assert set(drawn(ours, scores, **limits)[0].tolist()) == kept, limits


def test_rows_that_are_not_finite_get_no_token(ours):
    scores = torch.zeros(5, 40)
    scores[1, 3], scores[2, 39], scores[3] = math.nan, math.inf, -math.inf
    scores[4, 1:] = -math.inf
    temperature, num_drawn = column([1.0] * 5, torch.float32), torch.zeros(5, dtype=torch.int64)
    limits, seeds = (None, column([0.9] * 5), None), np.zeros(5, dtype=np.uint64)
    found = ours.draw_tokens(scores, temperature, limits, seeds, num_drawn)
    assert found[1:].tolist() == [-1, -1, -1, 0]
    assert 0 <= found[0] < 40
    assert num_drawn.tolist() == [1] * 5


def test_no_rows(ours):
    none = torch.empty(0, dtype=torch.int64)
    empty, seeds = torch.empty(0, 1), np.empty(0, dtype=np.uint64)
    found = ours.draw_tokens(torch.empty(0, 9), empty, (None, None, None), seeds, none)
    assert found.shape == (0,)
