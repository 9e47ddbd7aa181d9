"""What requests of a load felt, by hand: percentiles, objectives, goodput, cost."""

from dataclasses import replace

import numpy as np
import pytest

import example_plan
import example_serving
import example_simulation
from expertlane.results.estimate import Estimate
from expertlane.results.metrics import ServedRequest, serving_record
from expertlane.results.results import with_costs
from expertlane.results.serving_record import best_load
from expertlane.spec.workload import SLO, parse_slos

# TTFT 1, 2 and 4 s; TPOT 1 and 3 s; gaps 1, 1 and 2, 4 s; E2E 3, 8 and 4 s.
REQUESTS = [
    ServedRequest(10, 3, 0.0, [1.0, 2.0, 3.0]),
    ServedRequest(10, 3, 0.0, [2.0, 4.0, 8.0]),
    ServedRequest(10, 1, 6.0, [10.0]),
]


def served(slos):
    return serving_record(REQUESTS, parse_slos([slos]))


@pytest.mark.parametrize(
    ("slo", "value"),
    [
        ("ttft.mean=1s", 7 / 3),
        ("ttft.median=1s", 2),
        ("ttft.p90=1s", 3.6),
        ("ttft.p95=1s", 3.8),
        ("ttft.p99=1s", 3.96),
        ("tpot.mean=1s", 2),
        ("itl.median=1s", 1.5),
        ("e2e.mean=1s", 5),
    ],
)
def test_the_statistic_of_an_objective(slo, value):
    (result,) = served(slo).slos
    assert result.value.value == pytest.approx(value)
    assert not result.is_met


@pytest.mark.parametrize(
    ("slos", "num_good"),
    [
        ("ttft.p95=2s", 2),
        ("ttft.mean=4s", 3),
        ("tpot.mean=2s", 2),  # one token has no TPOT, and meets it
        ("itl.p99=3s", 2),  # of the second, 3.98 s by itself
        ("itl.median=3s", 3),
        ("itl.mean=2.9s", 2),
        ("ttft.p95=2s,e2e.mean=4s", 1),
        ("ttft.p95=1s,tpot.mean=1s,e2e.p99=3s", 1),
        ("e2e.mean=1s", 0),
    ],
)
def test_goodput_is_of_requests_within_all_limits(slos, num_good):
    record = served(slos)
    assert record.goodput == Estimate(num_good / 10)  # requests over 10 s
    assert record.good_share.value == pytest.approx(num_good / 3)


def test_a_limit_that_is_just_met():
    record = served("ttft.median=2s,e2e.p99=7.92s")
    assert record.keeps_slos
    assert record.good_share.value == pytest.approx(1 / 3)  # 8 s is over the limit by itself


def test_an_objective_that_no_request_has():
    record = serving_record(REQUESTS[2:], [SLO("tpot", "mean", 1e-9)])
    assert record.slos[0].value is None
    assert record.keeps_slos
    assert record.good_share.value == 1


def test_without_objectives_there_is_no_goodput():
    record = serving_record(REQUESTS)
    assert (record.slos, record.goodput, record.good_share) == ((), None, None)
    assert record.itl_s.median.value == 1.5


def test_goodput_of_a_projection_has_bounds():
    times = np.array([0.5, 1.0, 3.0])
    requests = [
        ServedRequest(4, 2, np.zeros(3), [times, 2 * times]),
        ServedRequest(4, 2, np.zeros(3), [3 * times, 4 * times]),
    ]
    record = serving_record(requests, [SLO("ttft", "p95", 2.0)])
    assert record.goodput == Estimate(1 / 4, 0.0, 2 / 2)
    assert record.good_share == Estimate(0.5, 0.0, 1.0)
    assert not record.keeps_slos


def test_the_best_load():
    good, fast, slow = (
        replace(served("ttft.mean=4s"), output_tps=Estimate(tps)) for tps in (10, 20, 5)
    )
    missed = replace(served("ttft.mean=2s"), output_tps=Estimate(100), goodput=Estimate(9))
    assert best_load([good, missed, fast, slow]) is fast
    worse = replace(missed, output_tps=Estimate(200), goodput=Estimate(8))
    assert best_load([worse, missed]) is missed


def test_cost_is_of_a_deployment_s_devices():
    found = with_costs(example_simulation.SIMULATION, 1.8)
    (load,) = found.deployments[0].serving
    # 16 devices at 1.8 dollars an hour, 2 tokens a second: 8 dollars an hour for 7,200 tokens.
    assert load.usd_per_million_output.value == pytest.approx(16 * 1.8 / 7200 * 1e6)
    assert load.usd_per_million_output.low == pytest.approx(16 * 1.8 / (4 * 3600) * 1e6)
    assert load.usd_per_million_total == load.usd_per_million_output
    assert found.question["price"] == 1.8


def test_cost_on_cpus_is_of_the_machine_and_on_gpus_of_each():
    on_cpus = with_costs(example_serving.RESULTS, 3600.0).deployments[0].serving[0]
    assert on_cpus.usd_per_million_output.value == pytest.approx(1e6 / 1_234_567.8)
    machine = replace(example_serving.RESULTS.machine, device="a GPU")
    on_gpus = with_costs(replace(example_serving.RESULTS, machine=machine), 3600.0)
    (load,) = on_gpus.deployments[0].serving
    assert load.usd_per_million_output == on_cpus.usd_per_million_output * 512


def test_cost_of_a_plan_counts_its_prompts():
    load = with_costs(example_plan.PLAN, 2.0).deployments[0].serving[0]
    output = 16 * 2 / 3600 / 20_000 * 1e6
    assert load.usd_per_million_output.value == pytest.approx(output)
    assert load.usd_per_million_total.value == pytest.approx(output / 2)  # 1,000 in, 1,000 out
