"""Which plans tie, on numbers made by hand, and on a plan."""

from dataclasses import dataclass, replace
from math import exp, hypot, inf, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertlane.cost.throughput import Goals, ThroughputCurve
from expertlane.planner.candidates import Candidate
from expertlane.planner.ranking import Contender, Uncertain, contender, pools_tps, ranked
from expertlane.planner.search import Search
from expertlane.planner.two_pools import TwoPools, TwoPoolSearch
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.serving_record import ServingRecord, SLOResult
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.workload import SLO
from planner.requests import WORKLOAD, planned, search_of

DRIVER, GEMM, LINK = ("driver", ()), ("gemm", (7,)), ("link", (20,))


def seconds(**parts: tuple[float, float, float]) -> Uncertain:
    """A sum of parts, each low, likely and high; the error of each is its own law's."""
    names = {"driver": DRIVER, "gemm": GEMM, "link": LINK}
    value = sum(likely for _, likely, _ in parts.values())
    return Uncertain(
        value,
        {
            names[name]: (value - likely + low, value - likely + high)
            for name, (low, likely, high) in parts.items()
        },
    )


def ties(one, other):
    """Whether 1 is within the bounds of the ratio."""
    low, _, high = one.over(other).bounds
    return low <= 1 <= high


def test_what_is_the_same_ties_and_has_no_error():
    a, b = (seconds(driver=(1, 2, 9), gemm=(3, 5, 8)) for _ in range(2))
    assert a.over(b).bounds == (1.0, 1.0, 1.0)
    assert ties(a, b)


def test_shared_errors_cancel_where_absolute_bounds_overlap():
    gemm, driver = (3.0, 5.0, 8.0), (1.0, 2.0, 9.0)
    a = seconds(driver=driver, gemm=gemm, link=(0.95, 1.0, 1.05))
    b = seconds(driver=driver, gemm=gemm, link=(1.9, 2.0, 2.1))
    assert 1 + 3 + 1.9 < 9 + 8 + 1.05  # b with all laws low, a with all of them high
    assert not ties(a, b)
    low, value, high = b.over(a).bounds
    assert value == pytest.approx(9 / 8)
    assert 1 < low < value < high


def test_a_large_error_of_what_differs_is_a_tie():
    a = seconds(gemm=(4, 5, 6), link=(0.5, 1.0, 3.0))
    b = seconds(gemm=(4, 5, 6), link=(1.0, 2.0, 6.0))
    assert not ties(a, b)  # twice the bytes are twice the time, whatever the link
    c = Uncertain(7.0, {GEMM: (6.0, 8.0), ("other link", ()): (6.0, 11.0)})
    assert ties(a, c)


def test_different_errors_are_independent():
    a = Uncertain(10.0, {GEMM: (8.0, 12.0), LINK: (9.0, 13.0)})
    b = Uncertain(10.0, {DRIVER: (9.5, 10.0)})
    low, _, high = a.over(b).bounds
    assert log(low) == pytest.approx(-hypot(log(10 / 8), log(10 / 9)))
    assert high == pytest.approx(exp(hypot(log(1.2), log(1.3), log(10 / 9.5))))


def test_what_has_no_end_ties_with_its_like_alone():
    a, b = (Uncertain(inf, {}) for _ in range(2))
    assert ties(a, b)
    assert not ties(a, Uncertain(1.0, {}))
    assert not ties(Uncertain(1.0, {}), a)
    queues = [Uncertain(value, {DRIVER: (0.5 * value, inf)}) for value in (1.0, 2.0)]
    assert queues[1].over(queues[0]).bounds == (2.0, 2.0, 2.0)
    assert queues[0].over(Uncertain(2.0, {})).bounds == (0.25, 0.5, inf)


@dataclass(frozen=True)
class Named:
    """What a ranking reads of a finalist."""

    candidate: Candidate
    served: ThroughputCurve


def plan(layout: str, tps: float, tpot_s: float, error: float = 0.0, ttft_s=0.1) -> Contender:
    """`error`: of tokens/s, as a share, a law's of its own."""
    one, times = np.ones((3, 1)), (tpot_s * np.ones((3, 1)), ttft_s * np.ones((3, 1)))
    served = ThroughputCurve(np.array([1]), tps * one, *times)
    named = Named(Candidate(Layout.parse(layout), Options()), served)
    own = {(layout, ()): (tps * (1 - error), tps * (1 + error))}
    return Contender(named, Uncertain(tps, own))  # type: ignore[arg-type]


def layouts(ranking):
    return [str(each.finalist.candidate.layout) for each in ranking.contenders]


def test_most_tokens_win_a_tie_and_what_is_surely_slower_does_not_tie():
    found = ranked(
        [
            plan("tp=8", 90, 0.05, 0.01),
            plan("dp=2,tp=4,ep=8", 98, 0.02, 0.05),
            plan("dp=8,ep=8", 100, 0.03, 0.05),
            plan("dp=4,tp=2,ep=8", 97, 0.01, 0.05),
        ],
        Goals(),
    )
    assert layouts(found) == ["dp=8,ep=8", "dp=2,tp=4,ep=8", "dp=4,tp=2,ep=8", "tp=8"]
    assert (found.num_tied, found.by) == (3, "most tokens")
    assert found.spread == pytest.approx(0.03)
    assert found.chosen is found.contenders[0]


@pytest.mark.parametrize(
    ("goals", "tps", "first"),
    [
        (Goals(max_tpot_s=0.05), 99.9, "tp=8,ep=8"),  # it leaves more room
        (Goals(max_tpot_s=0.05), 99.0, "dp=8,ep=8"),  # more tokens count for more
        (Goals(max_tpot_s=0.9), 99.9, "dp=8,ep=8"),  # kept 18 times over by both
        (Goals(max_ttft_s=0.11), 99.9, "dp=8,ep=8"),  # of TTFT they take the same
        (Goals(), 99.9, "dp=8,ep=8"),
    ],
)
def test_a_limit_that_is_near_decides_among_those_with_as_many_tokens(goals, tps, first):
    found = ranked([plan("dp=8,ep=8", 100, 0.049, 0.05), plan("tp=8,ep=8", tps, 0.03, 0.05)], goals)
    assert layouts(found)[0] == first
    assert found.by == ("farther from the limit" if first == "tp=8,ep=8" else "most tokens")


LAYOUTS = "tp=8", "dp=8", "dp=8,ep=8", "tp=8,ep=8", "dp=2,tp=4", "pp=2,tp=4", "dp=2,tp=4,ep=8"
LIMITED = [
    Goals(),
    Goals(max_tpot_s=0.05),
    Goals(max_ttft_s=0.2),
    Goals(max_tpot_s=0.05, max_ttft_s=0.2),
]


@st.composite
def contenders(draw) -> list[Contender]:
    """Some plans that keep all of `LIMITED`, near each other."""
    return [
        plan(
            layout,
            draw(st.one_of(st.sampled_from([99.7, 100.0]), st.floats(80, 100))),
            draw(st.one_of(st.just(0.02), st.floats(1e-3, 0.05))),
            draw(st.floats(0, 0.2)),
            draw(st.floats(1e-3, 0.2)),
        )
        for layout in draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, unique=True))
    ]


@given(contenders(), st.sampled_from(LIMITED))
def test_none_is_chosen_that_another_is_ahead_of_in_both(drawn, goals):
    chosen = ranked(drawn, goals).chosen
    for each in drawn:
        has_more = each.tps.value > chosen.tps.value
        assert not (has_more and each.taken(goals) < chosen.taken(goals))
        assert not (has_more and goals == Goals())
        assert chosen.tps.value >= 0.995 * each.tps.value


@given(contenders(), st.sampled_from(LIMITED[1:]), st.floats(2.001, 18))
def test_a_limit_that_is_kept_by_far_decides_nothing(drawn, goals, factor):
    far = Goals(*(limit and factor * limit for limit in (goals.max_tpot_s, goals.max_ttft_s)))
    assert layouts(ranked(drawn, far)) == layouts(ranked(drawn, Goals()))


@given(contenders(), st.sampled_from(LIMITED))
def test_those_tie_than_which_no_other_surely_has_more(drawn, goals):
    found = ranked(drawn, goals)
    for each in drawn:
        is_beaten = any(other.tps.over(each.tps).bounds[0] > 1 for other in drawn)
        assert (each in found.tied) == (not is_beaten)
    values = [each.tps.value for each in found.contenders[1:]]
    split = found.num_tied - 1
    for part in (values[:split], values[split:]):
        assert part == sorted(part, reverse=True)
    assert (found.by is None) == (found.num_tied == 1)


@pytest.fixture(scope="module")
def found():
    return planned(search_of())


def test_experts_are_drawn_again_where_they_are_apart(found):
    for each in found.finalists:
        is_drawn = any(
            name == "drawn experts" for name, _ in contender(each, WORKLOAD).tps.by_error
        )
        assert is_drawn == (each.candidate.layout.ep > 1)


def test_an_assumed_skew_is_one_error_of_all_that_spread_experts(found):
    """The first finalist with experts spread and the first without, of a routing with bounds."""
    search = search_of()
    setting = search.request.setting
    bounded = replace(setting, routing=replace(setting.routing, bounds=(0.0, 1.0)))
    assumed = Search(replace(search.request, setting=bounded))
    for is_spread in (True, False):
        one = next(each for each in found.finalists if (each.candidate.layout.ep > 1) == is_spread)
        other = assumed.finish(one.option)
        assert other.decode.round_s.value == one.decode.round_s.value
        skewed = [error for error in contender(other, WORKLOAD).tps.by_error if "skew" in error[0]]
        assert len(skewed) == is_spread
        assert (other.decode.wall_s.bounds != one.decode.wall_s.bounds) == is_spread
        assert other.decode.tps.low == pytest.approx(
            other.decode.num_tokens / other.decode.wall_s.high
        )
        assert (other.served.tps[0, 0] < one.formula.tps[0, 0]) == is_spread


def test_ratios_are_narrower_than_bounds(found):
    first, *others = (contender(each, WORKLOAD) for each in found.finalists)
    low, value, _ = first.finalist.served.tps[:, 0]
    alone = 1 - low / value
    for each in others:
        low, value, _ = each.tps.over(first.tps).bounds
        assert 1 - low / value < alone / 2


def test_those_that_do_not_serve_the_rate_come_last(found):
    made = [contender(each, WORKLOAD) for each in found.finalists]
    order = ranked(made, Goals()).contenders
    overloaded = ServingRecord(Estimate(1.0), rate=2.0)
    slow = SLOResult(SLO("tpot", "mean", 0.01), Estimate(0.02))
    late = replace(overloaded, ttft_s=Summary(mean=Estimate(0.1)), slos=(slow,))
    for failed in (overloaded, late):
        first = replace(order[0], at_rate=failed)
        others = [
            replace(each, at_rate=replace(failed, ttft_s=late.ttft_s, slos=()))
            for each in order[1:]
        ]
        ranking = ranked([first, *others], Goals())
        assert ranking.contenders[-1] is first
        assert ranking.chosen.finalist is ranked(order[1:], Goals()).chosen.finalist
        assert first not in ranking.tied
    none_serves = [replace(each, at_rate=overloaded) for each in order]
    again = ranked(none_serves, Goals()).contenders
    assert [each.finalist for each in again] == [each.finalist for each in order]


def test_two_pools_are_held_against_one(found):
    pools = TwoPoolSearch(search_of().request).run()
    assert isinstance(pools, TwoPools)
    tps = pools_tps(pools, WORKLOAD)
    assert tps.value == pytest.approx(float(pools.served.tps[1, 0]))
    low, value, high = tps.over(contender(found.finalists[0], WORKLOAD).tps).bounds
    assert low < value < high
