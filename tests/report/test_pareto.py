"""Throughput of a device against the speed of a user, with names, and loads against each other."""

from dataclasses import replace

import pytest

from cli.screen import tells
from example_plan import EXPERT, PLAN, planned
from example_serving import POINT, RECORD, RESULTS, SPREAD
from expertlane.report.charts.pareto import Dot, pareto_chart, placed
from expertlane.report.load_plots import by_load
from expertlane.report.plots import plan
from expertlane.results.estimate import Estimate
from expertlane.results.record import (
    BEST,
    PARETO,
    TWO_POOLS,
)
from expertlane.results.serving_record import SLOResult
from expertlane.spec.layout import Layout
from expertlane.spec.workload import SLO
from report.shown import charts, values

MARKUP = '</script><b title="x">&'


def dot(name, tpot_ms, tps, role="other", label=""):
    return Dot(name, Estimate(tpot_ms / 1e3), Estimate(tps), role, label=label)


def test_dots_are_rates_and_what_matters_is_drawn_last():
    dots = [
        dot("best", 10, 500.0, "chosen", "#1 best"),
        dot("slow", 20, 300.0, label=MARKUP),
        dot("near", 5, 200.0, "front"),
        dot("far", 4, 100.0, "front"),
    ]
    chart = pareto_chart("title", dots, max_tpot_s=0.02)
    drawn = [(each["name"], each["x"], each["y"]) for each in values(chart)]
    assert drawn == [
        ("slow", 50.0, 300.0),
        ("far", 250.0, 100.0),
        ("near", 200.0, 200.0),
        ("best", 100.0, 500.0),
    ]
    (limit,) = chart.spec["layer"][0]["data"]["values"]
    assert limit == {"x": 50.0, "said": "TPOT ≤ 20 ms"}
    assert [each["label"] for each in values(chart)] == [MARKUP, "", "", "#1 best"]
    assert [each.label for each in chart.legend] == ["best", "Pareto front", "others"]
    assert tells(chart.note, "TPOT 20 ms")
    assert chart.table.rows[1][:3] == ("slow", "others", "50.0")


def boxes(points, names, width, height):
    found = zip(placed(points, names, (width, height)), names, strict=True)
    return [
        (place.left, place.left + 6.2 * len(name), place.middle) for place, name in found if place
    ]


def test_names_are_within_the_plot_and_none_covers_another():
    """Ten points at one place: some names find room around them, the others are left out."""
    points, names = [(100.0, 100.0)] * 10, ["a name"] * 10
    found = boxes(points, names, 300.0, 200.0)
    assert 3 <= len(found) < 10
    for place, (left, right, middle) in enumerate(found):
        assert 0 <= left < right <= 300.0
        for other_left, other_right, other in found[:place]:
            assert right <= other_left or other_right <= left or abs(middle - other) >= 14


def test_a_name_is_right_above_its_point_or_left_where_there_is_no_room():
    (place,) = placed([(50.0, 50.0)], ["abc"], (200.0, 100.0))
    assert place.left > 50.0 > place.middle
    (place,) = placed([(190.0, 50.0)], ["abc"], (200.0, 100.0))
    assert place.left + 3 * 6.2 < 190.0
    assert placed([(50.0, 50.0)], ["a name wider than the plot"], (100.0, 100.0)) == [None]
    assert placed([(50.0, 50.0)], [""], (100.0, 100.0)) == [None]
    assert placed([], [], (100.0, 100.0)) == []


def test_a_name_does_not_cross_the_line_where_there_is_other_room():
    line = [(0.0, 0.0), (200.0, 0.0)], [(0.0, 39.0), (200.0, 39.0)]
    (above,) = placed([(50.0, 50.0)], ["abc"], (200.0, 100.0), line[:1])
    (below,) = placed([(50.0, 50.0)], ["abc"], (200.0, 100.0), line[1:])
    assert above.middle < 50.0 <= below.middle


def test_a_name_stands_away_from_its_point_rather_than_on_a_line():
    """A line on every side of the point: the name is beyond it, led to by a line of its own."""
    around = [(30.0, 30.0), (90.0, 30.0), (90.0, 70.0), (30.0, 70.0), (30.0, 30.0)]
    (place,) = placed([(60.0, 50.0)], ["a long name"], (300.0, 200.0), [around])
    right, (x, y) = place.left + 6.2 * len("a long name"), place.lead
    assert place.left > 90.0 or place.middle + 7 < 30.0 or place.middle - 7 > 70.0
    assert place.left <= x <= right
    assert abs(y - place.middle) <= 7
    everywhere = [[(0.0, y), (95.0, y)] for y in (0.0, 20.0, 40.0, 60.0)]
    assert placed([(60.0, 50.0)], ["a long name"], (95.0, 72.0), everywhere) == [None]


@pytest.mark.parametrize(("width", "size_px"), [("wide", 500), ("narrow", 275)])
def test_no_name_crosses_the_limit(width, size_px):
    """Points left and right of the limit's line, near to it, and on it."""
    limit_s, user_tps = 0.05, (14, 18, 19, 20, 20, 21, 23, 60)
    dots = [
        dot("a deployment", 1e3 / tps, 100.0 * place, "other", f"a deployment {place}")
        for place, tps in enumerate(user_tps, 1)
    ]
    chart = pareto_chart("title", dots, max_tpot_s=limit_s)
    far = 1.12 * max(user_tps)
    line = size_px / limit_s / far
    said = line + 4 + 6.2 * len("TPOT ≤ 50 ms")
    found = [(each[width], each["label"]) for each in values(chart) if width in each]
    assert len(found) >= 4
    for place, label in found:
        left = place["x"] / far * size_px
        right = left + 6.2 * len(label)
        assert right <= line or left >= line, label
        top = 300 * (1 - place["y"] / (1.12 * 800)) - 7
        assert top >= 14 or left >= said or right <= line, "the limit's own words are free"


def test_what_to_use_is_emphasised_also_where_that_is_disaggregated():
    """Two pools that are 1.5 times as fast as the best aggregated, give or take a fifth."""
    pools = replace(
        planned(EXPERT, 30_000, TWO_POOLS, in_full=False), over_best=Estimate(1.5, 1.2, 1.8)
    )
    results = replace(PLAN, deployments=(*PLAN.deployments, pools))
    (*_, chart) = charts(plan(results)[0])
    assert values(chart)[-1]["label"] == "disaggregated"
    assert values(chart)[-1]["kind"] == "best"
    (aggregated,) = (each for each in values(chart) if each["label"].startswith("#1 "))
    assert aggregated["kind"] == "others"
    assert tells(chart.title, "1,875 tokens/s GPU")


def test_plans_that_tie_stand_as_they_are_ranked():
    summary = replace(PLAN.plans[0], num_tied=3, tie_break="ttft")
    slower = [planned(Layout(dp=2, tp=tp), tps, BEST) for tp, tps in ((8, 900), (4, 950), (2, 800))]
    results = replace(PLAN, deployments=(*slower, *PLAN.select("projected", PARETO)))
    (ranked, _) = charts(plan(replace(results, plans=(summary,)))[0])
    assert [each["value"] for each in values(ranked)] == [900, 950, 800]
    assert [each["role"] for each in values(ranked)] == ["faster", "other", "other"]
    assert tells(ranked.title, "#1 #3 tie tokens/s")
    question = PLAN.question | {"load": {"rate": 0.01}}
    at_rate = replace(results, plans=(summary,), question=question)
    (ranked, _) = charts(plan(at_rate)[0])
    length = question["workload"]["output_len"]
    assert [length * each["value"] for each in values(ranked)] == pytest.approx([900, 950, 800])
    assert tells(ranked.title, "#1 #3 tie requests/s")


def loads(num, **changes):
    points = tuple(
        replace(
            POINT, batch=2**place, rate=None, output_tps=Estimate(100.0 * (place + 1)), **changes
        )
        for place in range(num)
    )
    return replace(RESULTS, deployments=(replace(RECORD, serving=points),))


def charts_of(results):
    return [chart for section in by_load(results) for chart in charts(section)]


@pytest.mark.parametrize("num", [1, 2])
def test_of_few_loads_the_spread_of_each_latency_is_drawn(num):
    objective = SLOResult(SLO("ttft", "p95", 0.5), Estimate(0.6))
    (chart,) = charts_of(loads(num, slos=(objective,)))
    drawn = {(each["row"], each["what"]): each["ms"] for each in values(chart)}
    names = ["TTFT"] if num == 1 else ["TTFT, batch 1", "TTFT, batch 2"]
    for name in names:
        assert drawn[name, "limit"] == 500.0
        for what in ("median", "p95", "p99"):
            assert drawn[name, what] == 1e3 * getattr(SPREAD, what).value
    assert len({row for row, _ in drawn}) == 4 * num
    assert [each["row"] for each in values(chart) if "said" in each][:num] == names
    assert tells(chart.title, "first token 123,456 ms medians")
    assert {each.label for each in chart.legend} == {"median", "p95", "p99", "limit"}


def test_a_limit_is_drawn_over_its_own_statistic_the_one_that_decides_first():
    objectives = (
        SLOResult(SLO("tpot", "median", 0.02), Estimate(0.01)),
        SLOResult(SLO("ttft", "p95", 0.5), Estimate(0.6)),
    )
    _, ttft, tpot, trade = charts_of(loads(3, slos=objectives))
    assert ttft.title == "TTFT p95 is over 500 ms"
    assert ttft.spec["layer"][-1]["data"]["values"] == [{"limit": 500.0}]
    assert tpot.title == "TPOT median stays within 20 ms"
    assert tpot.spec["layer"][-1]["data"]["values"] == [{"limit": 20.0}]
    assert trade.spec["layer"][0]["data"]["values"][0]["said"] == "TPOT ≤ 20 ms"


def test_a_limit_on_the_mean_is_not_drawn_over_medians():
    mean = SLOResult(SLO("tpot", "mean", 0.02), Estimate(0.01))
    _, tpot, ttft, trade = charts_of(loads(3, slos=(mean,)))
    assert tpot.title == "TPOT mean stays within 20 ms"
    assert "data" not in ttft.spec["layer"][-1]
    assert not any("strokeDash" in str(layer) for layer in trade.spec["layer"])


def test_a_limit_is_kept_up_to_a_load():
    points = tuple(
        replace(each, slos=(SLOResult(SLO("ttft", "p95", 0.5), Estimate(seconds)),))
        for each, seconds in zip(loads(3).deployments[0].serving, (0.1, 0.5, 0.7), strict=True)
    )
    _, ttft, *_ = charts_of(replace(RESULTS, deployments=(replace(RECORD, serving=points),)))
    assert ttft.title == "Up to concurrency 2, TTFT p95 is within 500 ms"


def test_recorded_arrivals_have_no_size_to_draw_by():
    recorded = tuple(replace(POINT, batch=None, rate=None) for _ in range(4))
    results = replace(RESULTS, deployments=(replace(RECORD, serving=recorded),))
    (chart,) = charts_of(results)
    assert tells(chart.words, "TTFT TPOT")
    assert "concurrency" not in chart.words
