"""Sources of routing: what they give, and that they give it again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling, tells
from expertlane.balance.copies import CopyChoice
from expertlane.balance.holding import placements_of
from expertlane.balance.placement import Placement, max_over_mean, rank_loads
from expertlane.balance.trace import RoutingTrace, write_trace
from expertlane.cost.routing import (
    ComputingExperts,
    GivenRouting,
    PowerLawRouting,
    TraceRouting,
    choose_routing,
    extremes_of,
    placed,
    varying_work,
)
from expertlane.cost.step.counts import StageMesh, count_dispatch
from expertlane.errors import UserError
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS, Routing
from expertlane.spec.ranges import DEFAULT_SKEW, LIKENESS, SKEW_BOUNDS

NOTHING = np.zeros(2, dtype=np.int64)


def some(source, num, first=0, layer=0):
    return source.topk_ids(layer, first, NOTHING, np.array([num, 0]))


def popularity(source):
    """[num_experts]; the weights that the experts of layer 0 are drawn by, 1 in all."""
    weights = 1 / source._rarity(0)
    return weights / weights.sum()


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.2])
def test_shares_follow_the_power_law(alpha):
    """With one expert a token, shares are the weights (1 + place)^-alpha over their sum."""
    source = PowerLawRouting(12, 1, alpha, seed=3)
    num = 16_384
    share = np.bincount(some(source, num).ravel(), minlength=12) / num
    weights = (1.0 + np.arange(12)) ** -alpha
    expected = weights / weights.sum()
    np.testing.assert_allclose(np.sort(popularity(source))[::-1], expected)
    np.testing.assert_allclose(share, popularity(source), atol=5 * np.sqrt(0.25 / num))


def test_the_default_skew_has_bounds_and_one_that_was_asked_for_has_none():
    model = PRESETS["paper"]
    assumed = choose_routing(model, None, None)
    assert f"exponent {DEFAULT_SKEW:g}" in assumed.words
    assert tells(assumed.words, f"exponent {SKEW_BOUNDS[0]:g} {SKEW_BOUNDS[1]:g}")
    even, uneven = extremes_of(assumed.source)
    assert (even.alpha, uneven.alpha) == SKEW_BOUNDS
    assert assumed.source.alpha == DEFAULT_SKEW
    assert SKEW_BOUNDS[0] < DEFAULT_SKEW < SKEW_BOUNDS[1]
    assert extremes_of(even) is None
    asked = choose_routing(model, None, DEFAULT_SKEW)
    assert extremes_of(asked.source) is None
    assert "bounds" not in asked.words
    assert (assumed.source.likeness, asked.source.likeness) == (LIKENESS, 0)
    assert {each.likeness for each in (even, uneven, *assumed.source.redrawn(2))} == {LIKENESS}
    assert tells(assumed.words, f"one prompt similar correlation {LIKENESS:g}")
    assert "alike" not in asked.words
    np.testing.assert_array_equal(some(asked.source, 100), some(assumed.source, 100))
    ids = np.array([[[0, 1], [2, 3]]], dtype=np.int16)
    trace = RoutingTrace("paper", 16, (0,), ids, np.zeros(2, dtype=np.int64))
    assert extremes_of(TraceRouting(trace)) is None


@pytest.mark.parametrize("score", ["max", "top2_sum"])
def test_tokens_stay_within_their_groups(score):
    groups = Routing(n_group=8, topk_group=3, group_score=score)
    ids = some(PowerLawRouting(64, 6, 0.5, groups=groups), 3000)
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    reached = [len(set(token)) for token in (ids // 8).tolist()]
    assert max(reached) == 3
    assert (
        max(len(set(token)) for token in (some(PowerLawRouting(64, 6, 0.5), 500) // 8).tolist()) > 3
    )


def test_same_seed_same_choices_whatever_was_asked_before():
    one, two, other = (PowerLawRouting(16, 4, 0.5, seed) for seed in (7, 7, 8))
    some(one, 10), some(one, 5000, first=3)
    for first in (0, 900, 5000, 20_000):
        np.testing.assert_array_equal(some(one, 700, first), some(two, 700, first))
    assert (some(two, 100) != some(other, 100)).any()


def test_layers_take_turns_with_samples():
    source = PowerLawRouting(16, 4, num_sampled_layers=3)
    assert source.sample_of(1) == source.sample_of(4) != source.sample_of(2)
    np.testing.assert_array_equal(some(source, 50, layer=1), some(source, 50, layer=4))
    assert (some(source, 50, layer=1) != some(source, 50, layer=2)).any()


def test_parts_of_a_step_go_on_where_others_end():
    source = PowerLawRouting(16, 4)
    whole = some(source, 30)
    second = source.topk_ids(0, 0, np.array([7, 5]), np.array([10, 8]))
    np.testing.assert_array_equal(second, whole[12:30])


def of_prompts(source, num_new, first=0, layer=0):
    """[sum of num_new, K]; tokens of sequences so long."""
    num_new = np.array(num_new, dtype=np.int64)
    return source.topk_ids(layer, first, NOTHING, np.array([num_new.sum(), 0]), num_new)


def alike(*sizes, likeness=0.3, **options):
    return PowerLawRouting(*sizes, likeness=likeness, **options)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.2])
@pytest.mark.parametrize("likeness", [0.1, 0.5])
def test_over_many_prompts_popularity_is_the_common_one(alpha, likeness):
    source = alike(12, 1, alpha, seed=3, likeness=likeness)
    num = 8192  # as many prompts as are drawn of two tokens
    share = np.bincount(of_prompts(source, [2] * num).ravel(), minlength=12) / (2 * num)
    np.testing.assert_allclose(share, popularity(source), atol=5 * np.sqrt(0.25 / num))


@pytest.mark.parametrize("groups", [Routing(), Routing(n_group=8, topk_group=3)])
def test_a_token_of_a_prompt_chooses_as_any_other(groups):
    """How often each expert is chosen, and each two together."""
    num, source = 8192, alike(32, 4, 0.6, groups=groups)
    chosen = np.zeros((2, num, 32))
    np.put_along_axis(chosen[0], some(source, num), 1, axis=1)
    np.put_along_axis(chosen[1], of_prompts(source, [2] * num)[::2], 1, axis=1)
    one, other = (rows.T @ rows / num for rows in chosen)
    mean = (one + other) / 2
    deviation = np.sqrt(2 * mean * (1 - mean) / num) + 1 / num
    assert (np.abs(one - other) < 4.5 * deviation).all()


def test_tokens_of_a_prompt_choose_alike_experts():
    ids = of_prompts(alike(64, 4, 0.4), [100] * 64).reshape(64, 400)
    counts = np.array([np.bincount(each, minlength=64) for each in ids])
    halves = [np.array([np.bincount(e, minlength=64) for e in h]) for h in np.split(ids, 2, axis=1)]
    of_one = [np.corrcoef(*each)[0, 1] for each in zip(*halves, strict=True)]
    of_two = np.corrcoef(counts)[np.triu_indices(64, 1)]
    assert np.mean(of_one) > 0.9
    assert np.mean(of_two) < 0.4


@settings(deadline=None, max_examples=40)
@given(
    num_new=st.lists(st.sampled_from([0, 1, 2, 3, 50, 700]), max_size=12),
    first=st.integers(0, 50_000),
    likeness=st.sampled_from([0.05, 0.19, 0.6]),
)
def test_sequences_of_any_lengths(num_new, first, likeness):
    """Those of one token are as without likeness, and whatever was asked before."""
    source, again = (alike(16, 4, 0.5, likeness=likeness) for _ in range(2))
    of_prompts(again, [3, 1, 200], 77)
    ids = of_prompts(source, num_new, first)
    assert ids.shape == (sum(num_new), 4)
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    np.testing.assert_array_equal(ids, of_prompts(again, num_new, first))
    alone = np.repeat(np.array(num_new) < 2, num_new)
    np.testing.assert_array_equal(ids[alone], some(source, int(alone.sum()), first))


def test_a_trace_s_tokens_come_in_turn():
    topk_ids = np.arange(12, dtype=np.int16).reshape(2, 3, 2)
    source = TraceRouting(RoutingTrace("m", 12, (1, 3), topk_ids, np.zeros(3, dtype=np.int64)))
    assert some(source, 4, first=2, layer=1).tolist() == [[4, 5], [0, 1], [2, 3], [4, 5]]
    assert some(source, 1, layer=3).tolist() == [[6, 7]]
    assert some(source, 1, layer=2).tolist() == [[0, 1]]  # the trace has no layer 2
    assert source.sample_of(2) == source.sample_of(1)


def test_a_trace_without_tokens_is_refused():
    empty = np.zeros((1, 0, 2), dtype=np.int16)
    with pytest.raises(ValueError, match="without tokens"):
        TraceRouting(RoutingTrace("m", 4, (0,), empty, np.zeros(0, dtype=np.int64)))


def loads(source, layers, num=16_384):
    return np.stack(
        [
            np.bincount(some(source, num, layer=layer).ravel(), minlength=source.num_experts)
            for layer in layers
        ]
    )


def test_experts_are_placed_by_other_tokens_than_they_are_judged_by():
    source = PowerLawRouting(256, 8, 0.8, num_sampled_layers=2)
    earlier = np.stack([source.earlier_load(layer) for layer in (0, 1)])
    later = loads(source, (0, 1), int(earlier.sum()) // 16)
    assert (earlier.sum(axis=1) == later.sum(axis=1)).all()
    assert (earlier != later).any(axis=1).all()
    # What has drifted is still popular.
    for before, after in zip(np.log1p(earlier), np.log1p(later), strict=True):
        assert 0.8 < np.corrcoef(before, after)[0, 1] < 0.97


def test_a_trace_is_placed_by_its_first_tokens_alone():
    topk_ids = np.array([[[0, 1], [0, 2], [4, 5], [4, 6]]], dtype=np.int16)
    trace = RoutingTrace("m", 8, (0,), topk_ids, np.zeros(4, dtype=np.int64))
    source = TraceRouting(trace, num_earlier=2)
    assert source.earlier_load(0).tolist() == [2, 1, 1, 0, 0, 0, 0, 0]
    assert some(source, 3).tolist() == [[4, 5], [4, 6], [4, 5]]
    assert TraceRouting(trace).earlier_load(0).tolist() == [0] * 8
    with pytest.raises(ValueError, match="without tokens"):
        TraceRouting(trace, num_earlier=4)


def test_half_of_a_trace_is_for_placing(tmp_path):
    model = PRESETS["paper-tiny"]
    ids = np.arange(6, dtype=np.int16).reshape(1, 3, 2) % model.num_experts
    trace = RoutingTrace("m", model.num_experts, (0,), ids, np.arange(3))
    write_trace(trace, tmp_path / "trace.npz")
    chosen = choose_routing(model, tmp_path / "trace.npz", None)
    assert np.flatnonzero(chosen.source.earlier_load(0)).tolist() == [0, 1]
    assert some(chosen.source, 3).tolist() == [[2, 3], [4, 5], [2, 3]]
    assert tells(chosen.words, "3 recorded last 2 first half")


@pytest.mark.parametrize(("layout", "ratio"), [("dp=72,ep=72", 0.35), ("dp=8,tp=4,ep=8", 0.9)])
def test_experts_by_load_are_more_even(layout, ratio):
    source = PowerLawRouting(256, 8, 0.8, num_sampled_layers=2)
    chosen = Layout.parse(layout)
    model = PRESETS["paper"].with_overrides(num_experts=256, num_experts_per_tok=8)
    worst = {}
    for placement in ("linear", "load"):
        options = Options(placement=placement, num_redundant_experts=32)
        of_layers = placed(model, chosen, options, source, 8)[:2]
        worst[placement] = max_over_mean(rank_loads(of_layers, loads(source, (0, 1)), 8)).mean()
    assert worst["load"] < ratio * worst["linear"]


def test_a_placement_is_made_once():
    model = PRESETS["paper"].with_overrides(dense_layers=(0,), intermediate_size=64)
    source = PowerLawRouting.of(model, 0.8, num_sampled_layers=2)
    layout, options = Layout(dp=16, ep=16), Options(placement="load", num_redundant_experts=16)
    found = placed(model, layout, options, source, 8)
    assert found[0] is None
    assert found[1] is found[3] is not found[2]  # layers of one sample
    # Micro-batches, replicas and stages are no matter; nodes and slots are.
    again = Options(placement="load", num_redundant_experts=16, overlap=True)
    more = placed(model, Layout(replicas=2, dp=16, ep=16), again, source, 8)
    assert all(one is other for one, other in zip(found, more, strict=True))
    assert placed(model, layout, options, source, 4)[1] is not found[1]
    assert source.placements([1], layout, 0, 8)[0].num_slots == 16


def test_only_what_is_by_load_turns_on_the_routing():
    model, layout = PRESETS["paper"], Layout(dp=4, ep=4)
    source = PowerLawRouting.of(model, 1.0)
    for options in (Options(num_redundant_experts=4), Options(placement="round_robin")):
        assert placed(model, layout, options, source, 8) == placements_of(model, layout, options)
    moving = Options(rebalance_steps=64)
    assert placed(model, layout, moving, source, 8) == placed(
        model, layout, Options(placement="load"), source, 8
    )


def test_given_choices_by_rank():
    """Ranks 2 and 3 hold layer 1; each part takes up where the rank's part before ended."""
    ids = np.arange(8, dtype=np.int32).reshape(4, 2)
    source = GivenRouting([{0: ids}, {0: ids}, {1: ids}, {1: ids + 10}])
    taken = source.topk_ids(1, 99, np.array([1, 0]), np.array([2, 1]))
    assert taken.tolist() == [[2, 3], [4, 5], [10, 11]]


def test_a_trace_says_what_it_is_of(tmp_path):
    model, path = PRESETS["paper-tiny"], tmp_path / "trace.npz"

    def note(name, num_tokens, layers=(0, 1, 2, 3)):
        ids = np.tile(np.arange(2, dtype=np.int16), (len(layers), num_tokens, 1))
        trace = RoutingTrace(name, model.num_experts, layers, ids, np.arange(num_tokens))
        write_trace(trace, path)
        return choose_routing(model, path, None).note

    assert note("a/folder/paper-tiny", 480) == "trace of a/folder/paper-tiny, 480 tokens"
    assert tells(note("other", 480), "other 480 caution paper-tiny")
    assert tells(note("paper-tiny", 479), "caution 480 or more")
    assert tells(note("paper-tiny", 480, (1, 2)), "caution 2 of 4 layers")
    with pytest.raises(UserError, match=telling("layer 4 paper-tiny 0 3")):
        note("paper-tiny", 480, (0, 4))


def test_experts_that_compute_nothing_are_drawn_as_others_are_and_counted_by_none():
    model = PRESETS["paper-tiny"].with_overrides(
        num_experts=8, num_experts_per_tok=6, num_zero_experts=4
    )
    routing = PowerLawRouting.of(model, 0.0, num_sampled_layers=1)
    num, nothing = 2048, np.zeros(4, dtype=np.int64)
    ids = routing.topk_ids(0, 0, nothing, np.full(4, num // 4))
    assert ids.shape == (num, 6)
    assert set(np.unique(ids)) == {-1, *range(8)}
    computing = (ids >= 0).sum(axis=1)
    expected = ComputingExperts.of(model)
    assert expected == ComputingExperts(mean=4.0, least=3, most=5)
    assert computing.mean() == pytest.approx(4.0, rel=0.02)
    assert set(computing) == {2, 3, 4, 5, 6}
    layout = Layout(dp=4, ep=4)
    mesh = StageMesh.of(layout, 0, 0, 8)
    choice = CopyChoice(Placement.linear(8, 4), mesh.ep_rank, mesh.nodes_of_ep_group)
    counts = count_dispatch(ids, np.full(4, num // 4), choice, mesh)
    assert counts.num_tokens_per_expert.sum(axis=0).tolist() == [
        int((ids == expert).sum()) for expert in range(8)
    ]
    assert counts.pairs_computed.sum() == computing.sum()
    assert counts.rows_sent.sum() == sum(
        len({expert // 2 for expert in token if expert >= 0}) for token in ids.tolist()
    )
    assert routing.earlier_load(0).shape == (8,)


def test_of_experts_that_all_compute_all_do():
    assert list(varying_work(PRESETS["paper-tiny"])) == []
    model = PRESETS["paper-tiny"].with_overrides(num_zero_experts=1, num_experts_per_tok=1)
    (sentence,) = varying_work(model)
    assert tells(sentence, "1 of 17 experts compute nothing 0.94 on average 1 to 1")


def test_layers_that_route_by_token_are_told():
    (sentence,) = varying_work(PRESETS["paper-tiny"].with_overrides(hash_layers=(0, 1)))
    assert tells(sentence, "2 of 4 layers number vocabulary not known")
