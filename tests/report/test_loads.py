"""The answers of simulate and bench: what they say, on 40 lines of 80 columns whatever comes."""

from dataclasses import replace

import pytest

from cli.screen import in_order, tells
from example_serving import POINT, RECORD, RESULTS
from example_simulation import RECORD as SIMULATED
from example_simulation import SIMULATION
from expertlane.report.loads import headline, lengths_of
from expertlane.report.sections import report_of
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.results import with_costs
from expertlane.results.serving_record import SampleRecord, SLOResult
from expertlane.spec.layout import Layout
from expertlane.spec.workload import parse_slos
from report.shown import answer_lines

LAYOUTS = [Layout(replicas=1000 + place, pp=4, dp=16, tp=8, ep=128) for place in range(12)]
SLOS = parse_slos(["ttft.p95=500ms,ttft.p99=1s,tpot.mean=20ms,itl.p99=0.1s,e2e.median=100s"])


def lines(results):
    return answer_lines(report_of(results))


def words(results):
    return " ".join(" ".join(lines(results)).split())


def loads(like, num, **sizes):
    """So many, each with twice the batch and more output."""
    results = tuple(SLOResult(slo, Estimate(123.456)) for slo in SLOS)
    return tuple(
        replace(
            like,
            batch=2**place,
            rate=None,
            output_tps=like.output_tps * (1 + place),
            slos=results,
            goodput=Estimate(1234.5 + place),
            good_share=Estimate(0.987),
            **sizes,
        )
        for place in range(num)
    )


WIDE = Summary(*[Estimate(12.3456, 1.23456, 123.456)] * 4)
SWEPT = replace(
    SIMULATION,
    cluster=replace(SIMULATION.cluster, num_devices=5632),
    question=SIMULATION.question
    | {"model": {"name": "a-checkpoint-of-a-long-name/" * 3}}
    | {"workload": SIMULATION.question["workload"] | {"requests": "traces/" * 20 + "a.jsonl"}},
    deployments=(
        replace(
            SIMULATED,
            layout=LAYOUTS[0],
            prefill_layout=LAYOUTS[1],
            steps=tuple(
                replace(
                    SIMULATED.steps[0],
                    phase=phase,
                    breakdown_s={
                        "waiting for slower ranks": 3.0,
                        "exposed dispatch and combine": 2.0,
                        "compute slowed by transfers": 1.5,
                    },
                    extrapolated_share=0.9,
                )
                for phase in ("prefill", "decode")
            ),
            serving=loads(SIMULATED.serving[0], 10, tpot_s=WIDE, ttft_s=WIDE),
        ),
    ),
)
BENCHED = replace(
    RESULTS,
    question=RESULTS.question | {"model": "/home/somebody/models/" * 5},
    deployments=tuple(
        replace(RECORD, name=str(layout), layout=layout, serving=loads(POINT, 10))
        for layout in LAYOUTS
    ),
)
FOUR = replace(BENCHED, deployments=BENCHED.deployments[:4])


@pytest.mark.parametrize(
    "results",
    [
        with_costs(SWEPT, 12.34),
        with_costs(FOUR, 12.34),
        with_costs(replace(BENCHED, deployments=BENCHED.deployments[:1]), 1e6),
        BENCHED,
        SIMULATION,
        RESULTS,
    ],
    ids=["ten loads", "four layouts", "one layout", "twelve layouts", "simulation", "bench"],
)
def test_an_answer_fits_one_screen(results):
    found = lines(results)
    assert max(map(len, found)) <= 80
    assert len(found) <= 40
    assert not any("…" in line for line in found[4:])  # no number is cut
    assert found[-1].startswith("More: ")


def test_the_best_load_is_named_with_its_latency():
    assert "highest throughput" not in words(SWEPT)  # it misses objectives
    assert in_order(words(SWEPT), "No SLOs 512 goodput 20.0 10.0–40.0")
    record = SWEPT.deployments[0]
    none = [
        replace(each, goodput=Estimate(0.0), good_share=Estimate(0.0)) for each in record.serving
    ]
    near = [replace(each, value=each.value * 0.5) for each in none[2].slos if each.value]
    none[2] = replace(none[2], slos=tuple(near))
    found = words(replace(SWEPT, deployments=(replace(record, serving=tuple(none)),)))
    assert in_order(found, "No SLOs 4 nearest TPOT")
    met = tuple(replace(each, value=Estimate(1e-3)) for each in record.serving[5].slos)
    serving = (*record.serving[:5], replace(record.serving[5], slos=met), *record.serving[6:])
    found = words(replace(SWEPT, deployments=(replace(record, serving=serving),)))
    assert in_order(found, "32 throughput SLOs 12.0 6.00–24.0 tokens/s")
    assert "TTFT p95 1.00 ms ≤ 500 ms, met; TTFT p99 1.00 ms ≤ 1 s, met" in found
    assert tells(found, "goodput 1,240 requests/s 99%")


def test_what_is_left_out_is_said():
    assert "Omitted" not in words(SIMULATION)
    assert "Omitted 2 rows; --full shows all" in words(SWEPT)  # its setting takes four lines
    found = words(FOUR)
    assert "Omitted 32 rows; --full shows all" in found
    for record in FOUR.deployments:  # each is there, with its best load
        assert f"replicas={record.layout.replicas}," in found


def test_a_value_and_its_bounds_have_one_unit():
    tps = Estimate(43_925.0, 28_012.0, 54_321.0)
    record = replace(SIMULATED, serving=(replace(SIMULATED.serving[0], output_tps=tps),))
    said = headline(replace(SIMULATION, deployments=(record,)))
    assert "43,925 (28,012–54,321)" in said


@pytest.mark.parametrize(
    ("output_len", "num_positions", "said"),
    [
        ("256", 4096, "1,024 in / 256 ±20% out"),
        ("205:307", 4096, "1,024 in / 256 ±20% out"),  # as simulate keeps it
        ("256", 1024 + 270, "1,024 in / 241–271 out"),  # no more fits
        ("256", 1024 + 256, "1,024 in / 255–257 out"),
        ("256", 0, "1,024 in / 256 out"),
        ("256:256", 4096, "1,024 in / 256 out"),
        ("205:308", 4096, "1,024 in / 205–308 out"),
        ("100:300", 4096, "1,024 in / 100–300 out"),
        ("1", 4096, "1,024 in / 1 out"),
    ],
)
def test_outputs_are_told_as_they_are_drawn(output_len, num_positions, said):
    means = {"prompt_len": 1024, "output_len": 256}
    assert lengths_of({"output_len": output_len}, means, num_positions) == said


def test_a_steady_state_is_no_burst():
    """Though as many requests began in it as are served at once."""
    (load,) = SIMULATED.serving
    assert load.num_requests == load.batch
    assert tells(words(SIMULATION), "burst")
    steady = replace(load, sample=SampleRecord(num_decoding=7, num_waiting=1))
    found = words(replace(SIMULATION, deployments=(replace(SIMULATED, serving=(steady,)),)))
    assert "burst" not in found
    assert tells(found, "steady")
