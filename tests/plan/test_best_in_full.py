"""What is projected in full, where full times are a given factor of those screened."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from expertlane.plan.candidates import Goals
from expertlane.plan.screen import fitting
from expertlane.plan.search import NUM_FINALISTS, Finalist, best_in_full
from plan.requests import search_of


@pytest.fixture(scope="module")
def screened():
    return fitting(search_of(num_devices=8).screen())


def options_within(screened, goals):
    return [replace(each, place=each.served.best(goals)) for each in screened]


def slower(factor):
    """A projection in full that takes so many times what was screened."""

    def finish(option):
        at = slice(option.place, option.place + 1)
        served = replace(
            option.served,
            num_seqs=option.served.num_seqs[at],
            tps=option.served.tps[:, at] / factor,
            tpot_s=option.served.tpot_s[:, at] * factor,
            ttft_s=option.served.ttft_s[:, at] * factor,
        )
        in_full = vars(option) | {"served": served, "place": 0}
        return Finalist(
            **in_full, formula=served, option=option, decode=None, prefill=None, by_error={}
        )

    return finish


def test_all_keep_the_limits_and_few_are_of_one_layout(screened):
    free = max(option.tps for option in options_within(screened, Goals()))
    goals = Goals(max_tpot_s=0.01)
    options = options_within(screened, goals)
    for factor in (0.9, 1.0, 1.1, 1.6):
        finals = best_in_full(options, goals, slower(factor), lambda _: None)
        assert 0 < len(finals.kept) <= NUM_FINALISTS
        assert all(each.keeps(goals) for each in finals.kept)
        assert not any(each.keeps(goals) for each in finals.broke)
        assert max(each.tps for each in finals.kept) <= free / factor
        counts = Counter(each.option.candidate.layout for each in finals.kept)
        assert max(counts.values()) <= 2


def test_what_broke_a_limit_is_no_option_with_so_many_sequences(screened):
    options = options_within(screened, Goals())
    best = max(options, key=lambda option: option.tps)
    goals = Goals(max_tpot_s=1.01 * float(best.served.tpot_s[1, best.place]))
    options = options_within(screened, goals)
    finals = best_in_full(options, goals, slower(1.05), lambda _: None)
    assert finals.broke
    broken = {(each.option.candidate, each.num_seqs) for each in finals.broke}
    assert not broken & {(each.candidate, each.num_seqs) for each in finals.options}
    assert {each.option for each in finals.kept} <= set(finals.options)


def test_what_is_faster_in_full_than_screened_is_found(screened):
    options = options_within(screened, Goals())
    fastest = min(float(option.served.tpot_s[1].min()) for option in options)
    goals = Goals(max_tpot_s=0.97 * fastest)
    options = options_within(screened, goals)
    assert all(option.place is None for option in options)
    finals = best_in_full(options, goals, slower(0.95), lambda _: None)
    found = min(float(each.served.tpot_s[1, 0]) for each in finals.kept)
    assert found == pytest.approx(0.95 * fastest)
    assert finals.kept[0].option in finals.options


def test_nothing_keeps_an_impossible_limit(screened):
    goals = Goals(max_tpot_s=1e-6)
    finals = best_in_full(options_within(screened, goals), goals, slower(1.0), lambda _: None)
    assert not finals.kept
    assert np.isfinite(min(each.breach(goals) for each in finals.broke))
