"""False alarms and power of the tests, on differences that were drawn."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from endpoint.synthetic import World, draw
from expertlane.endpoint.statistics import (
    FALSE_ALARMS,
    Differences,
    drawn_rounding,
    find_position,
    least_seen,
    name_experts,
    run_tests,
)

_ALARM = FALSE_ALARMS / 50  # of one test of a run of fifty
_SMALL = World(short=32, long=1, long_len=1_200)
_CLEAN = [
    _SMALL,
    replace(_SMALL, server=1.6),
    replace(_SMALL, server=0.3),
    replace(_SMALL, flips=(0.01, 0.025)),
    replace(_SMALL, moved=0.2),
    replace(_SMALL, sigma=0.4),
    replace(_SMALL, short=60, long=0),
    replace(_SMALL, num_experts=32, top_k=4),
]


def _alarms(compared: Differences) -> set[str]:
    return {each.name for each in run_tests(compared) if each.is_alarm(_ALARM)}


def _planted(compared: Differences, sigma: float, chosen: np.ndarray | bool = True) -> Differences:
    noise = np.random.default_rng(1).standard_normal(len(compared))
    return replace(compared, differences=compared.differences + chosen * sigma * noise)


@pytest.mark.parametrize("runs", [24, pytest.param(2_400, marks=pytest.mark.full)])
def test_clean_servers_give_no_more_alarms_than_promised(runs: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(runs):
        seen.update(_alarms(draw(seed, _CLEAN[seed % len(_CLEAN)])))
    # All tests of a run together may alarm in 1 % of the runs; one comparison is a part of a run.
    assert sum(seen.values()) <= FALSE_ALARMS * runs, seen


def test_an_error_of_every_token_is_seen_above_the_tolerated_scale() -> None:
    clean = draw(3, _SMALL)
    assert "size" in _alarms(_planted(clean, 0.05))
    assert not _alarms(_planted(clean, 0.005))


def test_a_shift_far_below_the_scale_is_seen() -> None:
    clean = draw(3, _SMALL)
    moved = [replace(clean, differences=clean.differences + by) for by in (0.008, -0.008)]
    assert _alarms(moved[0]) == {"higher"}
    assert _alarms(moved[1]) == {"lower"}


def test_a_server_is_compared_with_itself_by_fair_signs() -> None:
    """Large rounding makes given tokens less likely in the mean: that is no shift of its own."""
    clean = draw(3, _SMALL)
    biased = replace(clean, rounding=clean.rounding - 0.012)
    assert _alarms(replace(biased, differences=clean.rounding - 0.012)) == set()
    own = replace(biased, differences=np.zeros(len(clean)), is_own=True)
    assert _alarms(own) == set()
    assert _alarms(replace(own, is_own=False)) == {"higher"}
    assert _alarms(replace(own, differences=np.full(len(clean), 0.012))) == {"higher"}


def test_tokens_that_a_server_chose_may_be_likelier_to_it() -> None:
    """The largest of what is nearly tied is the one that rounding has made larger."""
    draws = np.random.default_rng(4)
    clean = draw(3, _SMALL)
    noise = draws.normal(0, 0.02, (len(clean), 2))
    greedy = replace(
        clean,
        differences=np.where(draws.random(len(clean)) < 0.8, noise.max(axis=1), noise[:, 0]),
        rounding=draws.normal(0, 0.02, len(clean)),
        scales=np.full(len(clean), 0.02),
    )
    assert _alarms(greedy) == {"higher"}
    assert _alarms(replace(greedy, is_greedy=True)) == set()
    lower = replace(greedy, differences=greedy.differences - 0.025, is_greedy=True)
    assert _alarms(lower) == {"lower"}


@pytest.mark.parametrize(("layer", "expert"), [(0, 1), (2, 5)])
def test_a_wrong_expert_is_seen_and_named(layer: int, expert: int) -> None:
    clean = draw(7, _SMALL)
    assert clean.topk_ids is not None
    wrong = _planted(clean, 0.06, (clean.topk_ids[layer] == expert).any(axis=1))
    assert "experts" in _alarms(wrong)
    named = name_experts(wrong)
    assert [each[:2] for each in named] == [(layer, expert)]
    assert named[0].inside > 1.5 * named[0].outside
    assert not name_experts(clean)


def test_two_wrong_experts_are_both_named() -> None:
    clean = draw(8, _SMALL)
    assert clean.topk_ids is not None
    chosen = [(clean.topk_ids[layer] == expert).any(axis=1) for layer, expert in ((1, 2), (1, 6))]
    named = name_experts(_planted(clean, 0.2, chosen[0] | chosen[1]))
    assert {each[:2] for each in named} >= {(1, 2), (1, 6)}
    assert len(named) <= 3


def test_what_is_wrong_in_long_contexts_alone_is_seen_with_its_position() -> None:
    clean = draw(9, replace(_SMALL, long=2, long_len=2_560))
    wrong = _planted(clean, 0.3, clean.positions >= 2_048)
    assert _alarms(wrong) & {"positions", "outliers"}
    assert find_position(wrong) == 2_048
    assert find_position(clean) is None


def test_a_wrong_expert_is_no_position_where_late_tokens_round_more() -> None:
    clean = draw(9, replace(_SMALL, long=2, long_len=2_560))
    assert clean.topk_ids is not None
    late = clean.positions >= 2_048
    grown = replace(clean, differences=clean.differences * np.where(late, 4.0, 1.0))
    wrong = _planted(grown, 2.0, (clean.topk_ids[1] == 3).any(axis=1))
    assert find_position(grown) is not None
    assert find_position(wrong) is None
    assert [each[:2] for each in name_experts(wrong)] == [(1, 3)]


def test_a_few_tokens_of_many_prompts_are_seen() -> None:
    clean = draw(10, replace(_SMALL, flips=(0.003, 0.003)))
    chosen = np.random.default_rng(2).random(len(clean)) < 0.05
    assert _alarms(_planted(clean, 2.0, chosen)) & {"far", "outliers"}


def test_one_prompt_that_is_wrong_altogether_is_seen() -> None:
    clean = draw(11, replace(_SMALL, flips=(0.003, 0.003), moved=0.0))
    assert "outliers" in _alarms(_planted(clean, 3.0, clean.prompts == 5))


def test_float32_has_no_alarm_at_its_own_rounding_and_one_a_thousand_times_above() -> None:
    clean = draw(12, replace(_SMALL, sigma=1e-6, flips=(0.0, 0.0), moved=0.0))
    floor = 5e-5
    usual = replace(
        clean,
        rounding=drawn_rounding(len(clean), floor),
        scales=np.full(len(clean), floor),
        is_measured=False,
    )
    assert not _alarms(usual)
    assert "size" in _alarms(_planted(usual, 1e-3))


def test_the_least_error_that_would_be_seen_is_seen() -> None:
    clean = draw(13, _SMALL)
    least = least_seen(clean, _ALARM)
    assert 0.01 < least < 0.04  # rounding is 0.02
    assert _alarms(_planted(clean, 2 * least))
    assert not _alarms(_planted(clean, least / 2))


@pytest.mark.parametrize("num", [0, 1, 31])
def test_too_few_tokens_are_not_judged(num: int) -> None:
    few = draw(1, _SMALL).of(np.arange(len(draw(1, _SMALL))) < num)
    assert run_tests(few) == []
    assert name_experts(few) == []
