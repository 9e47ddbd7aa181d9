"""Timelines: each moment of a rank as one thing, and what is idle, waiting or without a core."""

import pytest

from cli.screen import tells
from example_timelines import COMPUTE, NETWORK, events
from expertlane.report.charts.timeline import timelines_chart
from expertlane.report.document import Chart, Lanes
from expertlane.results.timeline import timeline_of
from expertlane.spec.names import Cause, Gap, Stage, Track

DESCHEDULED = list(Track).index(Track.DESCHEDULED)
MARKUP = '</script><b title="x">&'


def drawn(ranks: list[list[tuple[int, Stage, int, float, float]]], **how: bool) -> Chart:
    """One deployment; rows in milliseconds."""
    in_s = [
        [(track, stage, layer, begin / 1e3, end / 1e3) for track, stage, layer, begin, end in rows]
        for rows in ranks
    ]
    step = timeline_of(
        [(rank, 0, events(rows)) for rank, rows in enumerate(in_s)], num_tokens=4, num_seqs=4
    )
    group = timelines_chart("title", {"a": (step, "note")}, **how)
    ((_, chart),) = group.charts
    return chart


def segments(chart: Chart, lane: int = 0) -> set[tuple[str, int, float, float]]:
    """What, row, from when and to when in ms."""
    assert isinstance(chart.spec, Lanes)
    found = set()
    for kind, of_kind in chart.spec.segments.items():
        for each in (each for each in of_kind if each.lane == lane):
            end_us = each.begin_us + each.duration_us
            found.add((kind, each.row, round(each.begin_us / 1e3, 6), round(end_us / 1e3, 6)))
    return found


def test_in_a_pipeline_the_time_without_work_is_its_bubble():
    chart = drawn(
        [
            [(COMPUTE, Stage.ATTENTION, 0, 0, 2), (NETWORK, Stage.DISPATCH, 0, 2, 4),
             (COMPUTE, Stage.EXPERTS, 0, 6, 8)],
            [(COMPUTE, Stage.ATTENTION, 0, 1, 3), (COMPUTE, Stage.HAND_OVER, -1, 7, 10)],
        ]
    )  # fmt: skip
    assert segments(chart) == {
        (Cause.ATTENTION, 0, 0, 2),
        (Cause.DISPATCH_COMBINE, 0, 2, 4),
        (Cause.WAITING, 0, 4, 6),
        (Cause.EXPERTS, 0, 6, 8),
        (Cause.PIPELINE_BUBBLE, 0, 8, 10),  # the other stage has the work
        (Cause.PIPELINE_BUBBLE, 1, 0, 1),
        (Cause.ATTENTION, 1, 1, 3),
        (Cause.PIPELINE_BUBBLE, 1, 3, 7),  # until the stage before sends
        (Cause.HAND_OVER, 1, 7, 10),
    }
    assert chart.spec.num_lanes == 1
    assert chart.title == "a: 10.0 ms, computing 30%, pipeline bubble 35%"
    assert chart.note == "4 tokens of 4 sequences. note"


def test_without_a_pipeline_gaps_are_waits_before_and_after_idle():
    chart = drawn(
        [
            [(COMPUTE, Stage.ATTENTION, 0, 0, 2), (COMPUTE, Stage.EXPERTS, 0, 6, 8)],
            [(COMPUTE, Stage.ATTENTION, 0, 1, 10)],
        ]
    )
    assert segments(chart) == {
        (Cause.ATTENTION, 0, 0, 2),
        (Cause.WAITING, 0, 2, 6),
        (Cause.EXPERTS, 0, 6, 8),
        (Gap.IDLE, 0, 8, 10),
        (Gap.IDLE, 1, 0, 1),
        (Cause.ATTENTION, 1, 1, 10),
    }


def test_what_computing_hides_is_in_a_lane_of_its_own():
    chart = drawn([[(COMPUTE, Stage.EXPERTS, 0, 0, 8), (NETWORK, Stage.COMBINE, 0, 6, 10)]])
    assert segments(chart) == {(Cause.EXPERTS, 0, 0, 8), (Cause.DISPATCH_COMBINE, 0, 8, 10)}
    assert segments(chart, lane=1) == {(Cause.DISPATCH_COMBINE, 0, 6, 8)}
    assert chart.spec.num_lanes == 2
    assert tells(chart.note, "transfers hides")
    table = dict(zip([c.heading for c in chart.table.columns], chart.table.rows[0], strict=True))
    assert table == {"rank": "0", Cause.EXPERTS: "8.00", Cause.DISPATCH_COMBINE: "2.00"}


def test_in_wall_time_a_rank_without_a_core_is_not_idle():
    rows = [
        [(NETWORK, Stage.HAND_OVER, -1, 0, 4), (COMPUTE, Stage.ATTENTION, 0, 4, 5),
         (DESCHEDULED, Stage.ATTENTION, 0, 5, 7), (NETWORK, Stage.DISPATCH, 0, 7, 8)],
        [(COMPUTE, Stage.HEAD, -1, 3, 10)],
    ]  # fmt: skip
    both = {
        (Cause.PIPELINE_BUBBLE, 0, 0, 4),
        (Cause.ATTENTION, 0, 4, 5),
        (Gap.DESCHEDULED, 0, 5, 7),
        (Cause.WAITING, 0, 7, 8),
        (Cause.PIPELINE_BUBBLE, 0, 8, 10),
        (Cause.HEAD, 1, 3, 10),
    }
    shared = drawn(rows, is_measured=True, shares_cores=True)
    assert segments(shared) == both | {(Gap.DESCHEDULED, 1, 0, 3)}
    own = drawn(rows, is_measured=True)
    assert segments(own) == both | {(Cause.PIPELINE_BUBBLE, 1, 0, 3)}
    assert own.spec.num_lanes == 1


def test_short_stretches_are_one_with_what_is_around_them():
    """A thousand times 9 µs of experts and 1 µs of router: the experts' time is drawn, all told."""
    rows = [
        row
        for at in range(1000)
        for row in (
            (COMPUTE, Stage.EXPERTS, 0, at / 100, (at + 0.9) / 100),
            (COMPUTE, Stage.ROUTER, 0, (at + 0.9) / 100, (at + 1) / 100),
        )
    ]
    chart = drawn([rows])
    assert segments(chart) == {(Cause.EXPERTS, 0, 0, 10)}
    table = dict(zip([c.heading for c in chart.table.columns], chart.table.rows[0], strict=True))
    assert (table[Cause.EXPERTS], table[Cause.ROUTER]) == ("9.00", "1.00")


@pytest.mark.parametrize("rank_begins", [0, 5])
def test_all_of_a_group_share_one_axis(rank_begins):
    long, short = (
        timeline_of([(0, 0, events([(COMPUTE, Stage.HEAD, -1, 0.0, end)], start_s=rank_begins))],
                    num_tokens=1, num_seqs=1)
        for end in (2.0, 1.0)
    )  # fmt: skip
    group = timelines_chart("title", {"long": (long, ""), "short": (short, "")})
    assert [chart.spec.until_us for _, chart in group.charts] == [2e6, 2e6]
    ((segment,),) = (each for each in group.charts[1][1].spec.segments.values() if each)
    assert (segment.begin_us, segment.duration_us) == (0.0, pytest.approx(1e6))
