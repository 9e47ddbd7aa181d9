"""Decode steps of several ranks as graphs give what steps without graphs give.

Without a GPU a double records operations and collectives, and does them again
(`engine.rank_threads`).
"""

from contextlib import closing

import pytest

pytest.importorskip("triton")

from engine.rank_threads import Meeting, RankThreads
from engine.test_decode_graphs import difference, drive, limits_of, requests_of
from expertlane.spec.deployment import DispatchMode, DispatchRow, DispatchTable, Options
from expertlane.spec.layout import Layout
from ops.cuda.near import needs_kernels
from ops.cuda.tiny_models import MODELS

pytestmark = needs_kernels

MODEL = MODELS["normed heads, shared expert"].with_overrides(num_hidden_layers=1)


def play(layout, options, monkeypatch, *, has_graphs, model=MODEL, num=4, max_tokens=6, before=()):
    """Tokens, logits of each step, and the ranks."""
    layout, limits = Layout.parse(layout), limits_of(model, num_blocks=12)
    ranks = RankThreads(layout, model, limits, options, monkeypatch, has_graphs=has_graphs)
    ranks.before = dict(before)
    requests = requests_of(model, num, max_tokens)
    with closing(ranks):
        logits = drive(ranks, layout, options, limits, requests, rate=0.4)
    return [request.output_token_ids for request in requests], logits, ranks


def assert_equal(layout, options, monkeypatch, **how):
    """Gives the ranks with graphs."""
    with monkeypatch.context() as patch:
        expected, logits, without = play(layout, options, patch, has_graphs=False, **how)
    found, others, ranks = play(layout, options, monkeypatch, has_graphs=True, **how)
    assert found == expected
    assert difference(logits, others) <= 1e-5
    assert ranks.sizes == without.sizes
    for stage, other in zip(ranks.stages, without.stages, strict=True):
        ours, theirs = stage.totals(), other.totals()
        assert ours.num_tokens.tolist() == theirs.num_tokens.tolist()
        assert (ours.sent_bytes >= theirs.sent_bytes).all()
    return ranks, without


full = pytest.mark.full


@pytest.mark.parametrize(
    ("layout", "form", "name"),
    [
        ("dp=2,ep=2", "static", None),
        pytest.param("dp=2,ep=2", "all_gather", None, marks=full),
        pytest.param("dp=4,ep=4", "static", None, marks=full),
        pytest.param("dp=4,ep=4", "all_gather", None, marks=full),
        pytest.param("tp=2", "static", None, marks=full),
        pytest.param("dp=2,tp=2,ep=2", "static", None, marks=full),
        pytest.param("tp=2,ep=2", "all_gather", "norm of all heads", marks=full),
        pytest.param("pp=2", "static", "sinks, window, biases", marks=full),
        pytest.param("dp=2,ep=2,pp=2", "static", "sinks, window, biases", marks=full),
        pytest.param("dp=2,ep=2", "static", "latent, dense layer", marks=full),
    ],
)
def test_whole_steps_of_ranks(layout, form, name, monkeypatch):
    """Data-parallel ranks have different numbers of sequences, and none."""
    model, dp = MODELS[name] if name else MODEL, Layout.parse(layout).dp
    ranks, _ = assert_equal(layout, Options(dispatch=form), monkeypatch, model=model)
    assert [each.num_replayed for each in ranks.graphs] == [len(ranks.sizes)] * len(ranks.graphs)
    assert len({each.num_recorded for each in ranks.graphs}) == 1
    print(layout, ranks.sizes)
    assert len({max(sizes) for sizes in ranks.sizes}) > 1
    if dp > 1:
        assert any(0 in sizes and any(sizes) for sizes in ranks.sizes)
        assert any(len({*sizes}) > 1 and min(sizes) for sizes in ranks.sizes) or dp > 3
