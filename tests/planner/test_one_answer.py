"""plan, simulate and compare --project say the same of one question."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

import expertlane
from cli.screen import tells
from expertlane.balance.trace import RoutingTrace, write_trace
from expertlane.comparison.projection import ExperimentProjector
from expertlane.cost.laws.profile import parse_cluster
from expertlane.cost.step.operation import NumberTypes
from expertlane.progress import Progress
from expertlane.report.shown import Results
from expertlane.results import file
from expertlane.results.record import BEST, EXPERIMENT, TWO_POOLS
from expertlane.results.serving_record import is_served
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Experiment, ProjectionSetup
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

_SKEWS = 0.0, 0.8
_SAME = 1e-3  # of a value
_WORSE = 0.01  # what chance may do to an answer


def draw(seed):
    """A question: the model, the cluster and the load, as `plan` takes them."""
    dice = random.Random(seed)
    return {
        "model": dice.choice(["paper-small", "paper"]),
        "cluster": f"{dice.choice(['h100', 'h200'])}x{dice.choice([2, 4, 8])}",
        "batch": dice.choice([1, 5, 24, 64]),
        "prompt_len": dice.choice([16, 100, 160]),
        "output_len": dice.choice([12, 40]),
        "skew": dice.choice(_SKEWS),
        "seed": dice.randrange(3),
    }


def plan(asked, **more):
    return expertlane.plan(**asked | more)


def best_of(results):
    return results.select("projected", BEST)[0]


def told(record):
    """Tokens a second, mean TPOT and mean TTFT."""
    serving = record.serving[0]
    means = (None if each is None else each.mean for each in (serving.tpot_s, serving.ttft_s))
    return [serving.output_tps.value, *(None if each is None else each.value for each in means)]


@pytest.mark.smoke(1)
@pytest.mark.parametrize("seed", range(8))
def test_simulate_says_of_a_row_what_plan_says(seed, tmp_path):
    asked = draw(seed)
    if seed % 2:
        asked["skew"] = None  # the usual one, with bounds
    are_rows_simulated_alike(plan(asked), tmp_path)


def is_best_simulated_alike(results, tmp_path):
    """The record of the plan's best, simulated again from its results."""
    file.write(results, tmp_path)
    found = expertlane.simulate(plan=tmp_path)
    assert told(found.deployments[0]) == pytest.approx(told(best_of(results)), rel=_SAME)
    return found


def said(results):
    """The answer in words."""
    return " ".join(Results.of(results).answer.split())


def are_rows_simulated_alike(results, tmp_path):
    file.write(results, tmp_path)
    rows = {str(place): row for place, row in enumerate(results.select("projected", BEST)[:2], 1)}
    rows |= dict(zip(["pools"], results.select("projected", TWO_POOLS), strict=False))
    rows |= {each.engine: each.best for each in results.plans[0].engines[:1] if each.best}
    for name, row in rows.items():
        found = expertlane.simulate(plan=f"{tmp_path}#{name}")
        assert told(found.deployments[0]) == pytest.approx(told(row), rel=_SAME)


def told_at_rate(record):
    """Requests a second, mean TPOT and, if the queue has an end, mean TTFT of an open load."""
    serving = record.serving[-1]
    ttft = [] if serving.ttft_s is None else [serving.ttft_s.mean.value]
    return [serving.requests_per_s.value, serving.tpot_s.mean.value, *ttft]


@pytest.fixture
def few_places(monkeypatch):
    """At most 16 sequences of a device, so that simulations are short."""
    monkeypatch.setattr("expertlane.planner.candidates._MOST_SEQS", 16)


@pytest.mark.full
@pytest.mark.usefixtures("few_places")
def test_an_open_load_is_served_at_its_rate(tmp_path):
    asked = draw(2) | {"batch": None, "cluster": "h100x2"}
    small, large = (plan(asked, rate=rate) for rate in (1, 1e6))
    for results in (small, large):  # the most requests/s do not depend on the rate
        assert told(best_of(results)) == told(best_of(small))
        file.write(results, tmp_path)
        rows = {"1": best_of(results)}
        rows |= dict(zip(["pools"], results.select("projected", TWO_POOLS), strict=False))
        for name, row in rows.items():
            found = expertlane.simulate(plan=f"{tmp_path}#{name}").deployments[0]
            assert told_at_rate(found) == pytest.approx(told_at_rate(row), rel=_SAME)
            assert found.serving[0].rate == results.question["load"]["rate"]
            assert is_served(row.serving[-1]) == (results is small)
    served = told_at_rate(best_of(small))
    assert served[0] == pytest.approx(1, rel=_SAME)
    assert served[1] < told(best_of(small))[1]  # fewer sequences in a step
    assert told_at_rate(best_of(large))[0] == pytest.approx(
        told(best_of(large))[0] / asked["output_len"], rel=0.05
    )
    assert tells(said(large), "1e+06 requests/s --cluster h100xauto")


@pytest.mark.full
def test_a_row_keeps_drafts_types_and_framework(tmp_path):
    asked = {"cluster": "h100x2", "batch": 8, "prompt_len": 64, "output_len": 16, "price": 3}
    own = {"mtp": 1, "mtp_acceptance": 0.7, "dtype": "float8", "framework": "trt", "seed": 2}
    results = expertlane.plan("paper-small", **asked, **own, execution="eager")
    row, found = best_of(results), is_best_simulated_alike(results, tmp_path)
    assert found.question["serving"]["mtp"] == row.num_drafts == 1
    assert found.cluster.framework == "trt"
    again = replace(found.deployments[0].conditions, routing=row.conditions.routing)
    assert again == row.conditions
    cost = found.deployments[0].serving[0].usd_per_million_output
    assert cost.value == pytest.approx(row.serving[0].usd_per_million_output.value, rel=_SAME)


@pytest.mark.full
def test_what_is_given_beside_a_row_takes_precedence(tmp_path):
    asked = draw(2)
    file.write(plan(asked), tmp_path)
    found = expertlane.simulate(plan=tmp_path, batch=[2, 3], skew=0.3, prompt_len=20)
    record = found.deployments[0]
    assert [each.batch for each in record.serving] == [2, 3]
    assert record.conditions.routing == "--skew 0.3"
    assert found.question["workload"]["prompt_len"] == "20"
    assert asked["output_len"] == 40
    assert found.question["workload"]["output_len"] == "32:48"
    open_loop = expertlane.simulate(plan=tmp_path, rate=1)
    assert open_loop.deployments[0].serving[0].rate == 1
    with pytest.raises(expertlane.UserError, match="--layout and --plan exclude each other"):
        expertlane.simulate(plan=tmp_path, layout="tp=2")


@pytest.mark.full
def test_those_without_a_place_wait_as_long_as_the_places_take(tmp_path):
    """Planned by Little's law; simulated, with all of them in the queue."""
    asked = draw(3) | {"batch": 64, "cluster": "h100x2", "output_len": 40, "price": 2}
    free = best_of(plan(asked))
    limit_s = 0.9 * free.serving[0].tpot_s.mean.value
    results = plan(asked, slo=f"tpot.mean={1e3 * limit_s:.6g}ms")
    file.write(results, tmp_path)
    row = best_of(results)
    serving = row.serving[0]
    num = serving.num_running
    assert num < 64
    wait_s = (64 - num) / (serving.output_tps.value / 40)
    assert serving.place_wait_s.value == pytest.approx(wait_s)
    queued = expertlane.simulate(plan=tmp_path, batch=64).deployments[0].serving[0]
    assert queued.num_running == num
    longer_s = queued.ttft_s.mean.value - serving.ttft_s.mean.value
    assert longer_s == pytest.approx(wait_s, rel=0.1)  # of a sample
    assert queued.place_wait_s.value == pytest.approx(wait_s, rel=0.05)


@pytest.mark.full
def test_a_price_is_of_whatever_is_shown():
    asked = draw(4) | {"batch": 24, "price": 2}
    results = plan(asked)
    (pools,) = results.select("projected", TWO_POOLS)
    shown = [pools, best_of(results), *(each.best for each in results.plans[0].engines)]
    for record in shown:
        tps = record.serving[0].output_tps.value
        usd = record.serving[0].usd_per_million_output.value
        assert usd == pytest.approx(1e6 * 2 / 3600 * record.num_ranks / tps)
    assert all(each.num_ranks == 2 for each in shown)


@pytest.mark.full
def test_a_row_of_a_comparison_is_what_compare_says(tmp_path):
    spread = Options(overlap="auto", num_redundant_experts=2)
    deployments = (
        Deployment("plain", Layout(tp=2)),
        Deployment("timed", Layout(dp=2, ep=2), spread),
    )
    experiment = Experiment("two", PRESETS["paper-small"], Workload(24, 100, 12), deployments)
    cluster, types = parse_cluster("h100x2"), NumberTypes.all_of("float16")
    asked = ProjectionSetup(cluster="h100x2", skew=0.8)
    results = ExperimentProjector(experiment, cluster, types, 0.8, asked).run(Progress(), "")
    file.write(results, tmp_path)
    rows = results.select("projected", EXPERIMENT, results.conditions[0])
    for place, row in enumerate(rows, 1):
        found = expertlane.simulate(plan=f"{tmp_path}#{place}")
        assert told(found.deployments[0]) == pytest.approx(told(row), rel=_SAME)


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("#9", "there is no row '9'; valid: #1"),
        ("#0", "there is no row '0'"),
        ("#", "there is no row ''"),
        ("#llamacpp", "#vllm, #sglang, #trtllm, #expertlane"),
    ],
)
def test_a_row_that_there_is_not_gets_one_line(row, says, tmp_path):
    file.write(plan(draw(0)), tmp_path)
    with pytest.raises(expertlane.UserError) as caught:
        expertlane.simulate(plan=f"{tmp_path}{row}")
    assert str(caught.value).startswith("--plan: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_results_have_no_row(tmp_path):
    load = {"batch": 2, "prompt_len": 8, "output_len": 8}
    found = expertlane.simulate("paper-tiny", layout="tp=2", cluster="h100x2", **load)
    file.write(found, tmp_path)
    with pytest.raises(
        expertlane.UserError, match="results of a simulation without projected rows"
    ):
        expertlane.simulate(plan=tmp_path)
    with pytest.raises(expertlane.UserError, match="No such file"):
        expertlane.simulate(plan=tmp_path / "nowhere.json")
    with pytest.raises(expertlane.UserError, match="--layout is missing: give a layout, or a row"):
        expertlane.simulate("paper-tiny", cluster="h100x2")


def test_recorded_requests_that_are_too_few_or_have_other_lengths_beside(tmp_path):
    asked = {"cluster": "h100x2", "batch": 4, "requests": recorded_requests(tmp_path, 6, 30)}
    with pytest.raises(expertlane.UserError, match="fewer than --batch 64"):
        expertlane.plan("paper-small", **asked | {"batch": 64})
    with pytest.raises(expertlane.UserError, match="exclude each other"):
        expertlane.plan("paper-small", **asked, prompt_len=20)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("seed", range(8))
def test_compare_says_of_two_rows_what_plan_says(seed):
    asked = draw(100 + seed)
    rows = plan(asked).select("projected", BEST)[:2]
    model = PRESETS[asked["model"]]
    workload = Workload(asked["batch"], asked["prompt_len"], asked["output_len"], asked["seed"])
    deployments = tuple(
        Deployment(f"row {place}", row.known_layout, row.known_options)
        for place, row in enumerate(rows)
    )
    experiment = Experiment("rows", model, workload, deployments)
    types = NumberTypes.all_of("float16")
    cluster = parse_cluster(asked["cluster"])
    projected = ExperimentProjector(experiment, cluster, types, asked["skew"]).run(Progress(), "")
    for place, row in enumerate(rows):
        mine = next(each for each in projected.deployments if each.name == f"row {place}")
        assert told(mine) == pytest.approx(told(row), rel=_SAME)
    if len(rows) > 1:
        assert set(projected.workload.compared) == {"row 0", "row 1"}


def recorded_requests(folder, num=30, longer=10):
    """Each of `longer` prompt tokens more than the one before."""
    path = folder / "requests.jsonl"
    rows = [
        {
            "timestamp": 100 * number,
            "input_length": 20 + longer * number,
            "output_length": 4 + number,
            "hash_ids": [1],
        }
        for number in range(num)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def recorded_routing(folder):
    path, generator = folder / "routing.npz", np.random.default_rng(0)
    ids = np.argsort(generator.random((4, 256, 16)), axis=2)[..., :2].astype(np.int16)
    write_trace(RoutingTrace("paper-tiny", 16, (0, 1, 2, 3), ids, np.arange(256)), path)
    return path


def limit_of(asked, metric, share):
    """A limit at a share of the mean without limits."""
    free = getattr(best_of(plan(asked)).serving[0], f"{metric.partition('.')[0]}_s").mean.value
    return f"{metric}={1e3 * share * free:.6g}ms"


@pytest.mark.full
@pytest.mark.parametrize(
    "case", ["limit", "lengths", "requests", "prefixes", "routing", "types", "percentile"]
)
def test_compare_takes_the_experiment_of_a_plan(case, tmp_path, monkeypatch):
    """Its table says all that was asked for: no option is needed, and no row differs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("expertlane.comparison.run.why_not_here", lambda *_: "for this test")
    asked = draw(700 + len(case)) | {"batch": 24, "seed": 2}
    match case:
        case "limit":
            asked |= {"model": "paper", "cluster": "h200x8", "batch": 64}
            asked["slo"] = limit_of(asked, "tpot.mean", 0.9)
        case "lengths":
            asked |= {"prompt_len": "16:160", "output_len": "12:60", "skew": None}
        case "requests":
            for name in ("prompt_len", "output_len"):
                del asked[name]
            asked["requests"] = recorded_requests(tmp_path).name
        case "prefixes":
            asked |= {"prompt_len": 160, "prefix_len": 96, "num_prefixes": 3}
        case "routing":
            asked |= {"model": "paper-tiny", "cluster": "h100x4", "skew": None}
            asked["routing_trace"] = recorded_routing(tmp_path).name
            asked |= {"prompt_len": 30, "output_len": 20}
        case "types":
            asked |= {"dtype": "float8", "kv_dtype": "float8", "framework": "trt"}
            asked["execution"] = "eager"
        case "percentile":
            asked["slo"] = limit_of(asked, "ttft.p95", 1.1)
    results = plan(asked, out="planned")
    best, *others = results.select("projected", BEST)
    plain = next((each for each in others if each.known_layout.ep == 1), None)
    monkeypatch.chdir("/")  # paths of the file do not turn on where it is read
    path = tmp_path / "planned" / "experiment.toml"
    projected = expertlane.compare(path, project=True)
    found = projected.select("projected", EXPERIMENT, projected.conditions[0])
    rows = [*([plain] if plain is not None else []), best]
    assert [told(each) for each in found] == [pytest.approx(told(each), rel=_SAME) for each in rows]
    assert [each.serving[0].num_running for each in found] == [
        each.serving[0].num_running for each in rows
    ]
    is_best_simulated_alike(results, tmp_path / "again")
    if case == "limit":
        assert all(slo.is_met for each in found for slo in each.serving[0].slos)
        assert found[-1].serving[0].num_running < asked["batch"]
        file.write(projected, tmp_path)
        again = expertlane.simulate(plan=f"{tmp_path}#{len(found)}")
        assert told(again.deployments[0]) == pytest.approx(told(best), rel=_SAME)


@pytest.mark.full
@pytest.mark.usefixtures("few_places")
def test_recorded_requests_at_a_rate_are_fewer_than_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr("expertlane.comparison.run.why_not_here", lambda *_: "for this test")
    asked = {"cluster": "h100x2", "requests": recorded_requests(tmp_path), "rate": 1, "skew": 0}
    results = expertlane.plan("paper-small", **asked, out=tmp_path / "planned")
    best = best_of(results)
    assert best.serving[0].num_running > 30  # requests of the file
    projected = expertlane.compare(tmp_path / "planned" / "experiment.toml", project=True)
    found = projected.select("projected", EXPERIMENT, projected.conditions[0])[-1]
    assert told(found) == pytest.approx(told(best), rel=_SAME)


@pytest.mark.full
def test_options_take_the_place_of_an_experiments_own(tmp_path, monkeypatch):
    monkeypatch.setattr("expertlane.comparison.run.why_not_here", lambda *_: "for this test")
    asked = draw(3) | {"batch": 24, "cluster": "h100x2", "output_len": 20, "skew": 0.5}
    plan(asked, slo=limit_of(asked, "tpot.mean", 0.9), out=tmp_path)
    path = tmp_path / "experiment.toml"
    given = {"cluster": "h200x2", "skew": 0.0, "slo": "tpot.mean=0.1ms", "dtype": "bfloat16"}
    found = expertlane.compare(path, project=True, **given)
    assert found.cluster.name == "h200x2"
    assert found.question["projection"]["skew"] == 0
    conditions = found.conditions[0]
    assert (conditions.routing, conditions.dtype) == ("balanced", "bfloat16")
    missed = found.select("projected", EXPERIMENT, conditions)
    assert not any(each.serving[0].keeps_slos for each in missed)
    assert tells(said(found), "misses TPOT 0.1 ms")
