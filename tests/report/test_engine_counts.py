"""What the page and the answer of `bench --url` say of the server's own counts."""

from dataclasses import replace

import pytest

from cli.screen import tells
from example_serving import POINT
from expertlane.report.engine_counts import counted_by_servers, engine_notes, over_time
from expertlane.report.loads import LoadPoint
from expertlane.report.numbers import NONE
from expertlane.results.engine_record import (
    EngineCounts,
    EngineRecord,
    GaugesRecord,
    RankGauges,
    RoundCounts,
)
from expertlane.results.record import DeploymentRecord

SAME = RoundCounts(EngineCounts(12, 0, 900, 90), EngineCounts(12, 0, 900, 90))
GAUGES = GaugesRecord(
    (1, 1),
    (0.0, 0.5),
    {
        "0": RankGauges((4.0, 6.0), (0.0, 1.0), (0.25, 0.5)),
        "1": RankGauges((1.0, 1.0), (0.0, 2.0), (0.125, 0.125)),
    },
)
ENGINE = EngineRecord("vllm", EngineCounts(12, 0, 900, 90, 0, 2), (SAME,), {}, GAUGES)


def served(engine, name="http://a (vllm 1)"):
    serving = replace(POINT, engine=engine)
    return LoadPoint(DeploymentRecord(name, None, None, "measured", serving=(serving,)), serving)


def notes(*engines, shares_prefixes=False):
    found = [served(each, f"s{i}") for i, each in enumerate(engines)]
    return dict(engine_notes(found, shares_prefixes=shares_prefixes))


def cells(engine):
    (table, *_) = counted_by_servers([served(engine)], []).parts
    return dict(zip((each.heading for each in table.columns), table.rows[0], strict=True))


def test_what_is_not_told_is_a_dash():
    found = cells(EngineRecord("trtllm", EngineCounts()))
    assert found["requests"] == found["running, mean"] == found["ranks, max/mean"] == NONE
    assert found["client's counts"] == NONE


@pytest.mark.parametrize(
    ("engine", "subject", "words"),
    [
        (
            replace(ENGINE, rounds=(SAME, replace(SAME, engine=EngineCounts(12, 0, 900, 89)))),
            "Counts",
            "89 output tokens 90",
        ),
        (
            replace(ENGINE, rounds=(replace(SAME, engine=EngineCounts(15, 0, 999, 99)),)),
            "Other traffic",
            "3 requests",
        ),
        (
            replace(ENGINE, counts=EngineCounts(12, 0, 900, 90, 774, 0)),
            "Prefix cache",
            "86% --seed --flush-caches",
        ),
        (ENGINE, "Ranks", "1.67×"),
        (ENGINE, "KV cache", "2 preemptions"),
        (
            replace(
                ENGINE,
                by_rank={"0": EngineCounts(12, 0, 900, 90), "1": EngineCounts(0, 0, 0, 0)},
            ),
            "Ranks",
            "2.00× 1 of 2",
        ),
    ],
)
def test_what_is_in_doubt_is_said(engine, subject, words):
    assert tells(notes(engine)[subject], words)
    assert tells(notes(ENGINE, engine)[subject], words)


def test_what_is_in_order_is_not():
    even = replace(ENGINE, gauges=None, counts=EngineCounts(12, 0, 900, 90, 0, 0))
    assert notes(even) == {}
    cached = replace(even, counts=EngineCounts(12, 0, 900, 90, 774, 0))
    assert notes(cached, shares_prefixes=True) == {}


def test_an_experiments_prompts_change_with_its_seed():
    cached = replace(ENGINE, counts=EngineCounts(12, 0, 900, 90, 774, 0))
    seed = "another seed in [workload]"
    said = dict(engine_notes([served(cached)], shares_prefixes=False, seed=seed))["Prefix cache"]
    assert seed in said
    assert "another --seed" not in said


def series(num_samples, ranks=("0", "1")):
    """Two rounds; in the last one there are `num_samples`."""
    rounds = (1, *[2] * num_samples)
    own = {
        rank: RankGauges(
            tuple(float(place + int(rank)) for place in range(len(rounds))),
            (0.0,) * len(rounds),
            (0.25,) * len(rounds),
        )
        for rank in ranks
    }
    times_s = (0.0, *(0.5 * place for place in range(num_samples)))
    return replace(ENGINE, gauges=GaugesRecord(rounds, times_s, own))


def points(chart):
    """Points by curve: time and value."""
    found = {}
    for each in chart.spec["data"]["values"]:
        found.setdefault(each["curve"], []).append((each["x"], each["y"]))
    return found


def test_gauges_of_the_last_round_over_time_by_rank():
    running, kv = over_time([served(series(3))]).parts  # none waited
    (of_0, of_1) = points(running).values()
    assert of_0 == [(0.0, 1.0), (0.5, 2.0), (1.0, 3.0)]
    assert of_1 == [(0.0, 2.0), (0.5, 3.0), (1.0, 4.0)]
    assert tells(running.title, "4 running requests rank 1")
    assert {y for curve in points(kv).values() for _, y in curve} == {25.0}


@pytest.mark.parametrize("num_samples", [0, 1, 2])
def test_few_samples_are_no_curve(num_samples):
    assert over_time([served(series(num_samples))]).parts == ()
    assert over_time([served(replace(ENGINE, gauges=None))]).parts == ()
    assert over_time([served(None)]).parts == ()


def test_many_ranks_are_one_curve_and_many_samples_are_thinned():
    running, kv = over_time([served(series(401, tuple(map(str, range(9)))))]).parts
    (curve,) = points(running).values()
    assert curve[0] == (0.0, 9 * 1 + sum(range(9)))
    assert 20 < len(curve) <= 40
    (curve,) = points(kv).values()
    assert {y for _, y in curve} == {25.0}
