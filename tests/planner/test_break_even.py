"""Where two plans are level: by hand on curves, and evaluated again on a plan."""

from dataclasses import replace
from math import inf, log

import pytest

from expertlane.cost.throughput import Goals
from expertlane.planner.candidates import Candidate
from expertlane.planner.ranking import (
    Contender,
    Pair,
    Point,
    Ranking,
    Uncertain,
    break_even,
    contender,
    level_of,
    ranked,
    rival_of,
    screened_again,
)
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from planner.requests import WORKLOAD, planned, search_of


def points(ahead, *places) -> list[Point]:
    return [Point(each, ahead(each)) for each in places]


def by_skew(skew: float) -> float:
    """100 tokens a second, and 120 less 50 for each of the skew: level at 0.4."""
    return log((120 - 50 * skew) / 100)


def by_sequences(num: float) -> float:
    """100 n / (n + 50) and 60 n / (n + 10): level at 50."""
    return log((100 / (num + 50)) / (60 / (num + 10)))


def test_two_curves_over_skew_are_level_where_they_cross():
    found = level_of(points(by_skew, 0.0, 0.8, 1.2), 0.0, by_skew)
    assert found == pytest.approx(0.4, abs=0.02)


def test_two_curves_over_sequences_are_level_where_they_cross():
    tried = points(by_sequences, 4, 16, 64, 256, 1024)
    found = level_of(tried, 64, by_sequences, is_log=True)
    assert found == pytest.approx(50, abs=2)
    assert isinstance(found, int)


def test_one_that_is_ahead_everywhere_is_level_nowhere():
    assert level_of(points(by_skew, 0.0, 0.2, 0.3), 0.2, by_skew) is None


def test_the_nearest_of_several_places_counts():
    def ahead(num: float) -> float:
        return log(num / 30) * log(num / 3000)

    tried = points(ahead, 4, 16, 64, 256, 1024, 4096)
    assert level_of(tried, 64, ahead, is_log=True) == pytest.approx(30, rel=0.05)
    assert level_of(tried, 1024, ahead, is_log=True) == pytest.approx(3000, rel=0.05)


def test_a_jump_is_found_too():
    def ahead(num: float) -> float:
        return 0.5 if num < 300 else -inf

    found = level_of(points(ahead, 64, 256, 1024), 64, ahead, is_log=True)
    assert found is not None
    assert 256 <= found < 300


def test_what_is_unsure_is_shared_out_by_law():
    gemm, driver, links = ("gemm", (7,)), ("driver_s", ()), (("link", (4,)), ("link", (5,)))
    one = Uncertain(10.0, {gemm: (9.0, 11.0), driver: (8.0, 12.0), links[0]: (9.0, 10.0)})
    other = Uncertain(10.0, {driver: (8.0, 12.0), links[1]: (10.0, 12.0)})
    shares = one.shares(other)
    of_gemm = log(10 / 9) ** 2 + log(1.1) ** 2
    of_link = log(10 / 9) ** 2 + log(1.2) ** 2
    assert shares["driver_s"] == 0
    assert shares["gemm"] == pytest.approx(of_gemm / (of_gemm + of_link))
    assert sum(shares.values()) == pytest.approx(1)
    assert one.shares(one) == {}


class Finalist:
    """What a ranking reads of one."""

    def __init__(self, layout: str) -> None:
        self.candidate = Candidate(Layout.parse(layout), Options())


@pytest.mark.parametrize(
    ("layouts", "rival"),
    [
        (("dp=8,ep=8", "dp=4,tp=2,ep=8", "tp=8"), "tp=8"),
        (("tp=8", "pp=2,tp=4", "dp=8,ep=8"), "dp=8,ep=8"),
        (("tp=8", "replicas=2,tp=4", "pp=2,tp=4"), "pp=2,tp=4"),
        (("tp=8", "replicas=2,tp=4"), None),
    ],
)
def test_the_rival_is_of_the_other_kind(layouts, rival):
    contenders = [Contender(Finalist(each), Uncertain(1.0, {})) for each in layouts]
    found = rival_of(Ranking(contenders, 1, None))
    assert (found and str(found.finalist.candidate.layout)) == rival


@pytest.fixture(
    scope="module",
    params=[Goals(), pytest.param(Goals(max_tpot_s=0.012), marks=pytest.mark.full)],
    ids=["free", "limit"],
)
def made(request):
    """A search, and its ranking."""
    search = search_of(skew=0.8, goals=request.param)
    found = planned(search)
    contenders = [contender(each, WORKLOAD) for each in found.finalists]
    return search, ranked(contenders, search.request.goals)


def test_what_is_said_to_be_level_is_level(made):
    search, ranking = made
    found = break_even(ranking, search.request, search.known)
    assert found is not None
    rival = rival_of(ranking)
    assert found.rival == str(rival.finalist.candidate)
    assert [each.varied for each in found.levels] == ["skew", "sequences"]
    pair = Pair(ranking.chosen.finalist, rival.finalist, search.request, search.known)
    ratio = log(ranking.chosen.tps.value / rival.tps.value)
    for each, ahead in zip(found.levels, (pair.with_skew, pair.with_sequences), strict=True):
        assert ahead(each.asked) == pytest.approx(ratio)
        assert each.tried[0] <= each.asked <= each.tried[1]
        assert each.over_at_end == pytest.approx(2.718281828 ** -ahead(each.end))
        if each.at is not None:
            assert abs(ahead(each.at)) < 0.03
            assert (each.end > each.at) == (each.asked < each.at)
    assert 0 < found.unsure_share <= 1


def test_a_level_moves_with_what_one_of_two_is_found_to_have(made):
    """With the rival's simulation scaled to be as fast as the best, they are level as asked."""
    search, ranking = made
    best, rival = ranking.chosen.finalist, rival_of(ranking).finalist
    served = rival.served
    as_fast = replace(rival, served=replace(served, tps=served.tps * (best.tps / rival.tps)))
    pair = Pair(best, as_fast, search.request, search.known)
    assert pair.with_sequences(WORKLOAD.num_sequences) == pytest.approx(0)
    assert pair.with_skew(0.8) == pytest.approx(0)


def test_deployments_are_screened_again_as_they_were(made):
    search, ranking = made
    finalists = [each.finalist for each in ranking.contenders]
    again = screened_again([each.candidate for each in finalists], search.request, search.known)
    for finalist, option in zip(finalists, again, strict=True):
        at = option.at(finalist.option.num_seqs, WORKLOAD)
        assert at.tps == pytest.approx(finalist.option.tps)
        assert option.candidate.layout == finalist.candidate.layout
