import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.engine.model import draw as draw_module
from expertlane.engine.model.draw import (
    draw,
    keep_likeliest,
    probabilities,
    token_logprobs,
    uniform_numbers,
)

EXHAUSTIVE = settings(derandomize=True, deadline=None, max_examples=200)
INF = math.inf


def column(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)[:, None]


def uniform(seeds, indices):
    return uniform_numbers(np.array(seeds, dtype=np.uint64), np.array(indices, dtype=np.int64))


def softmax(scores, temperature):
    return probabilities(scores, scores.amax(1, keepdim=True), temperature)


def test_uniform_numbers_are_those_published_for_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = uniform([1234567] * 3, range(3))
    assert found.tolist() == [number / 2**64 // 2**-48 * 2**-48 for number in published]


def test_uniform_numbers_fill_the_unit_interval_evenly():
    for found in (uniform([7] * 20_000, range(20_000)), uniform(range(20_000), [3] * 20_000)):
        assert 0 <= found.min() < 1e-3
        assert 1 - 1e-3 < found.max() < 1
        counts = np.histogram(found, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees, p = 0.001


ROW = st.tuples(
    st.one_of(st.integers(1, 50), st.just(INF)),
    st.one_of(st.floats(1e-6, 0.999999), st.just(INF)),
    st.one_of(st.floats(0, 1), st.just(0.0)),
)


def kept_by_sorting(p, top_k, top_p, min_p):
    """Which tokens of one row are kept; the plain way."""
    order = sorted(range(len(p)), key=lambda token: -p[token])
    if top_k < len(p):
        order = [token for token in order if p[token] >= p[order[int(top_k) - 1]]]
    if top_p < 1:
        total, held, last = math.fsum(p[token] for token in order), 0.0, 0.0
        for token in order:
            last = p[token]
            held += last
            if held >= top_p * total:
                break
        order = [token for token in order if p[token] >= last]
    least = np.float32(min_p) * max(p)
    return {token for token in order if p[token] > 0 and p[token] >= least}


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999, 1 - 1e-7])
def test_top_p_of_a_large_vocabulary(scale, share):
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * scale
    p = softmax(scores, torch.ones(3, 1))
    kept = keep_likeliest(p, None, column(share, share, share), None)
    for row in range(3):
        found = set(kept[row].nonzero().flatten().tolist())
        of_row = p[row].tolist()
        assert kept_by_sorting(of_row, INF, share - 1e-9, 0) <= found
        assert found <= kept_by_sorting(of_row, INF, share + 1e-9, 0)


def test_extreme_temperatures():
    scores = torch.tensor([[1.0, 3.0, -INF, 3.0], [1.0, 2.0, -INF, 3.0]])
    cold = softmax(scores, torch.full((2, 1), torch.finfo(torch.float32).tiny))
    assert cold.tolist() == [[0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.0, 1.0]]
    hot = softmax(scores, torch.full((2, 1), torch.finfo(torch.float32).max))
    assert hot.flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3] * 2)


@EXHAUSTIVE
@given(st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.7]), min_size=1, max_size=9), st.data())
def test_no_impossible_token_is_drawn(weights, data):
    weights[data.draw(st.integers(0, len(weights) - 1))] = 0.3
    for number in (0.0, 0.5, 1 - 2.0**-48):
        token = draw(torch.tensor([weights]), torch.tensor([number], dtype=torch.float64))
        assert weights[int(token)] > 0


@pytest.mark.parametrize("vocab_size", [700, 768])
def test_draws_from_many_tokens_go_by_their_running_sum(vocab_size):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        p = torch.rand(vocab_size, generator=generator) ** 9
        p[torch.rand(vocab_size, generator=generator) < 0.8] = 0
        p[:200] = 0
        running = p.double().cumsum(0)
        # Where rounding matters: at the bounds between tokens, the first at 0.
        bounds = (running / running[-1]).clamp(max=1 - 2.0**-48)
        at_bounds = draw(p.expand(vocab_size, -1), bounds)
        assert (p[at_bounds] > 0).all()
        numbers = torch.rand(200, generator=generator, dtype=torch.float64)
        expected = torch.searchsorted(running, numbers * running[-1], right=True)
        assert torch.equal(draw(p.expand(200, -1), numbers), expected)


def test_log_probabilities_of_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, -INF, 2.0, 1.0]])
    chosen, ids, values = token_logprobs(logits, torch.tensor([0]), 5)
    assert ids.tolist() == [[1, 3, 4, 0, 2]]  # the lowest id of equals first
    expected = logits.log_softmax(1)
    assert values.tolist() == expected[:, ids[0]].tolist()
    assert chosen.tolist() == [expected[0, 0]]
    _, ids, values = token_logprobs(logits, torch.tensor([0]), 0)
    assert ids.shape == values.shape == (1, 0)


@pytest.mark.parametrize("seed", range(4))
def test_what_a_gpu_keeps_of_all_entries_is_what_a_cpu_keeps_of_some(seed, monkeypatch):
    """The same tokens, where all entries are kept and the others weigh nothing."""
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(6, 700, generator=generator) * 4).softmax(1)
    p[0] = 0
    p[0, 5] = 1
    top_k = torch.tensor([[1.0], [3], [50], [699], [math.inf], [2]], dtype=torch.float64)
    top_p = torch.tensor([[0.5], [0.9], [0.99], [0.1], [0.3], [math.inf]], dtype=torch.float64)
    for limits in ((top_k, None, None), (None, top_p, None), (top_k, top_p, None)):
        expected = draw_module.keep_likeliest(p, *limits)
        with monkeypatch.context() as patch:
            patch.setattr(draw_module, "_only", draw_module._all_weighted)
            assert torch.equal(draw_module.keep_likeliest(p, *limits), expected)
