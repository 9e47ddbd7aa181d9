"""`expertlane simulate`: what it prints, writes and refuses."""

import json
import re
from pathlib import Path

import pytest

from cli.screen import tells
from expertlane.results.file import read
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Phase

LOAD = ["--batch", "8", "--prompt-len", "4:16", "--output-len", "2:6"]
EP16 = ["--layout", "dp=16,ep=16", "--cluster", "h100x16"]
TP2 = ["--layout", "tp=2", "--cluster", "h100x2"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def simulate(run, *arguments, model="paper-tiny"):
    code, out, err = run("simulate", model, *arguments)
    assert code == 0, err
    return out, err


def as_json(run, *arguments, **model):
    return json.loads(simulate(run, *arguments, "--json", **model)[0])


@pytest.mark.full
def test_a_report_says_what_limits_the_deployment(run, tmp_path):
    out, err = simulate(run, *EP16, *LOAD, "--full", "--out", str(tmp_path / "new"))
    assert all(len(line) <= 80 for line in out.splitlines())
    title, _, heading, first, *_ = out.splitlines()
    assert "paper-tiny as dp=16,ep=16 on h100x16" in title
    assert "limits" in heading
    assert "limited" in first
    for part in ("low–high", "TTFT", "floor", "weight reads", "fitted", "--routing", "inter-node"):
        assert part in out
    assert tells(err, "steady state")
    found = read(tmp_path / "new" / "results.json")
    (record,) = found.deployments
    assert record.num_ranks == found.cluster.num_devices == 16
    assert record.serving[0].num_output_tokens >= 8 * 2
    assert [step.phase for step in record.steps] == [Phase.PREFILL, Phase.DECODE]
    for phase in record.steps:
        assert sum(phase.shares.values()) == pytest.approx(1)
        assert sum(phase.basis_shares.values()) == pytest.approx(1)
        assert phase.step_s.mean.low <= phase.step_s.mean.value <= phase.step_s.mean.high
        assert phase.floor_s < phase.step_s.mean.low
    assert record.serving[0].output_tps.low < record.serving[0].output_tps.value


def test_one_length_is_a_mean_and_two_equal_ends_are_exact(run):
    out, _ = simulate(run, *TP2, "--batch", "4", "--prompt-len", "8", "--output-len", "10")
    assert "8 in / 10 ±20% out" in out
    out, _ = simulate(run, *TP2, "--batch", "4", "--prompt-len", "8", "--output-len", "10:10")
    assert "8 in / 10 out" in out


def test_what_has_no_range_is_shown_without_one(run):
    served = ["--rate", "2,4", "--prompt-len", "4", "--output-len", "4:4"]
    out, _ = simulate(run, *TP2, *served)
    assert not re.search(r"\b([\d.]+)–\1\b", out), "ranges of equal ends"


@pytest.mark.full
def test_loads_in_turn_are_one_record_and_the_best_is_told_in_detail(run, tmp_path):
    swept = ["--batch", "2,8,4", *LOAD[2:], "--num-requests", "24"]
    both, alone = (
        as_json(run, *TP2, *load)["deployments"][0]
        for load in (swept, [*swept[2:], "--batch", "8"])
    )
    assert [each["batch"] for each in both["serving"]] == [2, 8, 4]
    assert both["serving"][1] == alone["serving"][0]
    assert both["steps"] == alone["steps"]
    assert both["pools"] == alone["pools"]
    # Within the objective nothing but the smallest batch.
    limit = both["serving"][2]["tpot_s"]["mean"]["value"]
    kept = as_json(run, *TP2, *swept, "--slo", f"tpot.mean={0.999 * limit}s")["deployments"][0]
    assert [each["slos"][0]["value"] for each in kept["serving"]] == [
        each["tpot_s"]["mean"] for each in both["serving"]
    ]
    small = as_json(run, *TP2, *swept[2:], "--batch", "2")["deployments"][0]
    assert kept["steps"] == small["steps"]
    _, err = simulate(run, *TP2, *swept)
    assert [line.partition(":")[0] for line in err.splitlines()] == [
        "batch 2",
        "batch 8",
        "batch 4",
        "written",
    ]


@pytest.mark.full
def test_recorded_requests(run):
    path = Path(__file__).parents[1] / "spec" / "requests" / "azure.csv"
    asked = ["--layout", "dp=16,ep=16", "--cluster", "h100x16", "--requests", str(path)]
    (record,) = as_json(run, *asked, model="paper")["deployments"]
    (found,) = record["serving"]
    assert (found["batch"], found["rate"]) == (None, None)
    assert (found["num_prompt_tokens"], found["num_output_tokens"]) == (1649, 208)
    assert found["wall_s"]["value"] > 4.54  # the last one's arrival
    two = ["--batch", "1", "--num-requests", "2", "--cold-start"]
    (found,) = as_json(run, *asked, *two, model="paper")["deployments"][0]["serving"]
    assert (found["batch"], found["num_output_tokens"]) == (1, 153)
    out, _ = simulate(run, *asked, model="paper")
    assert tells(" ".join(out.split()), "recorded arrivals")
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.full
def test_prefixes_of_recorded_requests_are_not_computed_again(run, tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 0, "input_length": 600, "output_length": 4, "hash_ids": [0, 1]},
        {"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [0, 2]},
        {"timestamp": 0, "input_length": 600, "output_length": 4, "hash_ids": [0, 1]},
    ]
    asked = ["--layout", "tp=8", "--cluster", "h100x8", "--requests", str(path), "--batch", "1"]
    asked += ["--cold-start"]  # the same requests once each, known prefixes or not
    found = []
    for known in (True, False):
        of_file = [line if known else line | {"hash_ids": []} for line in lines]
        path.write_text("\n".join(map(json.dumps, of_file)))
        found.append(as_json(run, *asked, model="paper")["deployments"][0]["serving"][0])
    # Full blocks of 16, the last token left out: 512 of the second, 592 of the third.
    assert [each["num_cached_tokens"] for each in found] == [512 + 592, 0]
    assert found[0]["ttft_s"]["mean"]["value"] < 0.9 * found[1]["ttft_s"]["mean"]["value"]
    assert found[0]["tpot_s"]["mean"]["value"] == pytest.approx(found[1]["tpot_s"]["mean"]["value"])
    path.write_text("\n".join(map(json.dumps, lines)))
    out, _ = simulate(run, *asked, model="paper")
    assert tells(out, "58% prompt tokens cache")
    pools = ["--layout", "tp=8", "--prefill-layout", "tp=8", "--cluster", "h100x16", *asked[4:]]
    (apart,) = as_json(run, *pools, model="paper")["deployments"][0]["serving"]
    assert apart["num_cached_tokens"] == 512 + 592


@pytest.mark.full
def test_goodput_and_cost(run):
    asked = [*EP16, *LOAD, "--slo", "ttft.p90=1us,e2e.p99=1h"]
    assert run("simulate", "paper-tiny", *asked)[0] == 2
    asked[-1] = "ttft.p90=0.001ms,e2e.p99=1e5s"
    (found,) = as_json(run, *asked, "--price", "3")["deployments"][0]["serving"]
    assert [each["slo"]["metric"] for each in found["slos"]] == ["ttft", "e2e"]
    assert found["goodput"]["value"] == found["good_share"]["value"] == 0
    cost = 3 * 16 / 3600 / found["output_tps"]["value"] * 1e6
    assert found["usd_per_million_output"]["value"] == pytest.approx(cost)
    out, _ = simulate(run, *asked, "--price", "3")
    assert "Misses the SLOs" in out
    assert tells(" ".join(out.split()), "0% requests limits")


def test_fewer_requests_than_the_usual_batch(run):
    asked = [*EP16, *LOAD[2:], "--num-requests", "20"]
    (found,) = as_json(run, *asked, "--cold-start")["deployments"][0]["serving"]
    assert (found["batch"], found["num_requests"]) == (20, 20)


@pytest.mark.full
def test_routing_is_skewed_unless_a_user_says_otherwise(run):
    usual, uniform = (
        as_json(run, *EP16, *LOAD, *skew)["deployments"][0] for skew in ([], ["--skew", "0"])
    )
    assert usual["conditions"]["routing"] == f"--skew {PRESETS['paper-tiny'].usual_skew:g}"
    assert uniform["conditions"]["routing"] == "--skew 0"
    loads = [max(map(max, each["num_tokens_per_expert"])) for each in (usual, uniform)]
    assert loads[0] > loads[1]


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("dtype", "kv", "said"),
    [
        ([], [], ["float16 gets the same times"]),
        (["--dtype", "bfloat16"], [], []),
        (["--dtype", "bfloat16"], ["--kv-dtype", "float8"], ["float8 cache"]),
    ],
)
def test_measurements_that_stand_in_for_others_are_named(run, dtype, kv, said):
    out, _ = simulate(run, *TP2, *LOAD, *dtype, *kv)
    for words in ("float16 gets the same times", "float8 cache"):
        assert (words in " ".join(out.split())) == (words in said)


@pytest.mark.parametrize(
    ("asked", "tokens"), [([], 8192), (["--max-num-batched-tokens", "2048"], 2048)]
)
def test_what_is_given_goes_before_what_a_framework_has(run, asked, tokens):
    found = as_json(run, *TP2, *LOAD, "--framework", "trt", *asked)
    assert found["question"]["serving"]["max_num_batched_tokens"] == tokens


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("layout", "cluster", "asked", "dispatch"),
    [
        ("tp=2,ep=2", "h100x2", ["--framework", "trt"], "all_gather"),
        ("dp=16,ep=16", "h100x16", ["--framework", "trt"], "all_to_all"),
        ("tp=2,ep=2", "h100x2", ["--framework", "trt", "--dispatch", "all_to_all"], "all_to_all"),
        ("tp=2,ep=2", "h100x2", [], "all_to_all"),
    ],
)
def test_a_framework_dispatches_as_it_does(run, layout, cluster, asked, dispatch):
    found = as_json(run, "--layout", layout, "--cluster", cluster, *LOAD, *asked)
    assert found["deployments"][0]["options"]["dispatch"] == dispatch


@pytest.mark.full
def test_a_trace_has_one_prefill_and_one_decode(run, tmp_path):
    asked = ["--layout", "pp=2,tp=2", "--cluster", "h100x4", *LOAD]
    _, err = simulate(run, *asked, "--trace", "--out", str(tmp_path / "deep"))
    path = tmp_path / "deep" / "trace-pp-2-tp-2.json"
    assert err.splitlines()[-1].endswith(f", {path}")
    events = json.loads(path.read_text())["traceEvents"]
    timed = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["phase"] for event in timed} == {"prefill", "decode"}
    assert {event["pid"] for event in timed} == {0, 1, 2, 3}


def test_replicas_send_among_themselves(run, tmp_path):
    layout = ["--layout", "replicas=2,dp=2,ep=2", "--cluster", "h100x4"]
    found = as_json(run, *layout, *LOAD, "--out", str(tmp_path / "out"))
    (record,) = found["deployments"]
    for step in record["steps"]:
        sent_bytes = step["traffic"]["sent_bytes"]["payload"]
        assert [len(row) for row in sent_bytes] == [2, 2]
        assert [row[i] for i, row in enumerate(sent_bytes)] == [0, 0]
        assert sum(map(sum, sent_bytes)) > 0
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.full
def test_experts_are_placed_by_load_unless_a_user_says_otherwise(run):
    asked = [*EP16, "--batch", "512", "--prompt-len", "32", "--output-len", "4", "--skew", "1.2"]
    asked += ["--num-redundant-experts", "16", "--num-requests", "512"]
    by_load, in_order = (as_json(run, *asked, *more) for more in ([], ["--placement", "linear"]))
    assert by_load["deployments"][0]["options"]["placement"] == "load"
    assert in_order["deployments"][0]["options"]["placement"] == "linear"
    for found, is_by_load in ((by_load, True), (in_order, False)):
        names = [each["name"] for each in found["assumptions"]]
        assert ("placement of experts" in names) is is_by_load
    busiest = [
        max(step["traffic"]["busiest_over_mean"] for step in found["deployments"][0]["steps"])
        for found in (by_load, in_order)
    ]
    assert busiest[0] < 0.8 * busiest[1]


def test_without_expert_parallelism_nothing_is_placed(run):
    found = as_json(run, *TP2, *LOAD)
    assert found["deployments"][0]["options"]["placement"] == "linear"
    assert "placement of experts" not in [each["name"] for each in found["assumptions"]]


def test_a_mistake_of_the_prefill_pool_is_told_as_its_own(run):
    pools = ("--layout", "dp=8,ep=8", "--prefill-layout", "tp=8", "--cluster", "h100x16")
    code, _, err = run("simulate", "paper", *pools, "--num-redundant-experts", "3")
    assert code == 2
    assert tells(err, "--prefill-layout 19 experts 1 rank")


def test_a_model_that_does_not_fit(run):
    code, _, err = run("simulate", "paper", "--layout", "tp=1", "--cluster", "h100x1")
    assert code == 2
    (line,) = err.splitlines()
    assert "needs" in line
    assert tells(line, "72 GB memory free")


def test_too_little_memory_says_the_type_that_fits(run):
    model = str(Path(__file__).parents[2] / "docs" / "qwen3-235b")
    few = ("simulate", model, "--layout", "tp=4", "--cluster", "h100x4", "--batch", "8")
    code, _, err = run(*few)
    assert (code, err.count("\n")) == (2, 1)
    assert tells(err, "119 72 --dtype float8")
    code, _, err = run(*few[:3], "tp=8", *few[4:])
    assert code == 2
    assert "--dtype" not in err  # too few devices, whatever the type
