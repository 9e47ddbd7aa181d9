import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cli.screen import one_line, tells
from cli.stub_llm import StubLLM
from example_serving import POINT, RECORD, RESULTS
from expertlane.balance.holding import ModelPlacement, write_placement
from expertlane.balance.placement import Placement
from expertlane.report import terminal
from expertlane.report.sections import report_of
from expertlane.results.file import to_json

SHORT = ["--prompt-len", "2:8", "--output-len", "1:3"]


@pytest.fixture
def stub(monkeypatch):
    """Put stubs in place of what would be loaded; gives the layouts they were loaded on."""
    layouts = []

    def load(found, layout, options):
        layouts.append(str(layout))
        llm = StubLLM(found.config)
        llm.limits = replace(llm.limits, num_blocks=options.num_blocks or 1000)
        return llm

    monkeypatch.setattr("expertlane.cli.bench.load_model", load)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return layouts


def test_layouts_side_by_side_on_real_ranks(run, tmp_path):
    arguments = ["--batch", "1,3", "--layout", "tp=1", "--layout", "dp=2,ep=2", "--seed", "5"]
    arguments += ["--dispatch", "hierarchical", "--ranks-per-node", "1"]
    arguments += ["--placement", "round_robin"]
    out_folder = str(tmp_path / "new" / "out")
    code, out, err = run("bench", "paper-tiny", *SHORT, *arguments, "--json", "--out", out_folder)

    assert code == 0
    assert Path(out_folder, "results.json").read_text(encoding="utf-8") == out
    found = json.loads(out)
    asked = found["question"]
    assert (found["schema_version"], found["kind"], asked["model"]) == (9, "bench", "paper-tiny")
    assert found["command"].startswith("expertlane bench paper-tiny --prompt-len 2:8 ")
    assert asked["workload"] == {
        "prompt_len": "2:8",
        "output_len": "1:3",
        "seed": 5,
        "requests": None,
    }
    assert found["machine"]["device"]
    assert found["machine"]["num_cores"] >= 1
    assert re.match(r"\d+\.\d+", found["versions"]["torch"])
    assert 0 <= found["foreign_cpu_share"] <= 1
    assert [each["layout"]["ep"] for each in found["deployments"]] == [1, 2]
    points = [point for each in found["deployments"] for point in each["serving"]]
    assert [each["batch"] for each in points] == [1, 3, 1, 3]
    for point, same in zip(points[:2], points[2:], strict=True):  # the same requests
        assert point["num_prompt_tokens"] == same["num_prompt_tokens"]
        assert point["num_output_tokens"] == same["num_output_tokens"]
    for point in points:
        assert point["num_requests"] == 2 * point["batch"]
        assert point["num_requests"] <= point["num_output_tokens"] <= 3 * point["num_requests"]
        assert point["rate"] is None
        tps = point["num_output_tokens"] / point["wall_s"]["value"]
        assert point["output_tps"]["value"] == pytest.approx(tps)
        assert point["prefill_tps"] is None  # not all requests were there at once
        ttft_s, e2e_s = point["ttft_s"], point["e2e_s"]
        assert ttft_s["median"]["value"] <= e2e_s["median"]["value"] <= e2e_s["p99"]["value"]
    lines = [re.split(":| with ", line)[0] for line in err.splitlines()]
    assert lines == [
        "loading paper-tiny on 1 rank (tp=1)",
        "computing",
        "tp=1, batch 1",
        "tp=1, batch 3",
        "loading paper-tiny on 2 ranks (dp=2,ep=2)",
        "computing",
        "dp=2,ep=2, batch 1",
        "dp=2,ep=2, batch 3",
        "written",
    ]


def test_a_rate_and_its_table(run, stub):
    code, out, _ = run(
        "bench", "paper-tiny", "--rate", "2000,1e4", "--num-requests", "12", *SHORT, "--full"
    )
    assert code == 0
    assert "2000 req/s" in out
    assert "10000 req/s" in out
    assert max(map(len, out.splitlines())) <= 80
    assert [
        word
        for word in out.partition("Latency")[2].split()
        if word in ("TTFT", "TPOT", "ITL", "E2E")
    ] == ["TTFT", "TPOT", "ITL", "E2E"] * 2
    assert stub == ["tp=1"]


def test_the_default_is_a_sweep(run, stub):
    code, out, _ = run("bench", "paper-tiny", "--json")
    assert code == 0
    points = json.loads(out)["deployments"][0]["serving"]
    assert [(each["batch"], each["num_requests"]) for each in points] == [(1, 2), (8, 16), (32, 64)]
    assert all(each["num_output_tokens"] == 32 * each["num_requests"] for each in points)


def test_fewer_requests_than_the_usual_batches(run, stub):
    code, out, _ = run("bench", "paper-tiny", "--num-requests", "20", "--json")
    assert code == 0
    points = json.loads(out)["deployments"][0]["serving"]
    assert [each["batch"] for each in points] == [1, 8, 20]
    assert [each["num_requests"] for each in points] == [20, 20, 20]


def test_objectives_and_cost(run, stub):
    asked = ["bench", "paper-tiny", "--batch", "4", "--slo", "ttft.p95=1e6s,itl.p90=1e6s"]
    asked += ["--slo", "e2e.p50=0.000001ms", "--price", "36"]
    code, out, _ = run(*asked, "--json")
    assert code == 0
    (point,) = json.loads(out)["deployments"][0]["serving"]
    assert [each["value"]["value"] for each in point["slos"][::2]] == [
        point["ttft_s"]["p95"]["value"],
        point["e2e_s"]["median"]["value"],
    ]
    assert point["goodput"]["value"] == 0
    cost = 36 / 3600 / point["output_tps"]["value"] * 1e6  # of the machine, not of a core
    assert point["usd_per_million_output"]["value"] == pytest.approx(cost)
    code, out, _ = run(*asked[:6], "--json")
    (point,) = json.loads(out)["deployments"][0]["serving"]
    assert point["good_share"]["value"] == 1
    assert point["goodput"] == point["requests_per_s"]


def recorded(folder):
    """Two requests that begin alike, on a model of 64 positions."""
    path = folder / "trace.jsonl"
    lines = [
        {"timestamp": 0, "input_length": 48, "output_length": 2, "hash_ids": [5]},
        {"timestamp": 1, "input_length": 40, "output_length": 3, "hash_ids": [5]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_recorded_requests_share_what_their_hashes_say(run, stub, tmp_path):
    asked = ["bench", "paper-tiny", "--requests", recorded(tmp_path), "--batch", "1"]
    code, out, _ = run(*asked, "--json")
    assert code == 0
    (point,) = json.loads(out)["deployments"][0]["serving"]
    assert (point["num_prompt_tokens"], point["num_output_tokens"]) == (88, 5)
    assert point["num_cached_tokens"] == 32  # the full blocks of 16 before the last token
    code, out, _ = run(*asked)
    assert tells(out, "36% prompt tokens cache")
    code, out, _ = run(*asked[:4], "--json")
    (point,) = json.loads(out)["deployments"][0]["serving"]
    assert (point["batch"], point["rate"]) == (None, None)


def placement_file(folder, layers=4, ep=2):
    """Of a model of 16 experts a layer."""
    path = folder / "placement.json"
    linear = Placement.linear(16, ep)
    write_placement(ModelPlacement("any", 16, dict.fromkeys(range(layers), linear)), path)
    return str(path)


def test_options_are_written_down(run, stub, tmp_path):
    options = ["--layout", "dp=2,ep=2", "--placement", placement_file(tmp_path)]
    options += ["--dispatch", "hierarchical", "--ranks-per-node", "1"]
    code, out, _ = run("bench", "paper-tiny", "--batch", "1", *SHORT, *options, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["question"]["ranks_per_node"] == found["machine"]["ranks_per_node"] == 1
    (record,) = found["deployments"]
    assert record["options"]["dispatch"] == "hierarchical"
    assert record["options"]["placement_file"] == str(tmp_path / "placement.json")


def test_a_cache_that_is_too_small(run, stub):
    code, out, err = run("bench", "paper-tiny", "--num-blocks", "3", "--prompt-len", "48")
    assert (code, out) == (2, "")
    assert one_line(err, "48 32 tokens 79 positions 64")
    code, out, err = run("bench", "paper-tiny", "--num-blocks", "3", "--output-len", "20")
    assert (code, out) == (2, "")
    assert "take 51 positions; valid: 48 at most\n" in err


def test_one_layout_a_run_on_several_nodes(run, stub, monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (place | {"MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    code, _, err = run("bench", "paper-tiny", "--layout", "tp=1", "--layout", "tp=2")
    assert (code, stub) == (2, [])
    assert one_line(err, "nodes --layout ranks")


def shown(results, width):
    stream = io.StringIO()
    terminal.show(report_of(results), Console(file=stream, width=width))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_the_widest_table_keeps_all_its_numbers(width):
    text = shown(RESULTS, width)
    assert max(map(len, text.splitlines())) <= width
    for number in ("10,000", "1,234,568", "12,345,679", "1,234", "12,345,600", "0.125 req/s"):
        assert number in text
    assert "…" not in text


def test_notes():
    machine = replace(RESULTS.machine, num_cores=1)
    point = replace(POINT, num_preemptions=1, tpot_s=None, itl_s=None, prefill_tps=2.0)
    record = replace(RECORD, serving=(point,))
    results = replace(RESULTS, machine=machine, deployments=(record,), foreign_cpu_share=0.5)
    text = " ".join(shown(results, 100).split())
    assert tells(text, "512 ranks 1")
    assert tells(text, "1 preemption KV cache")
    assert tells(text, "50% idle")
    assert "TPOT — — — —" in text
    assert json.loads(to_json(results))["deployments"][0]["serving"][0]["itl_s"] is None
    on_gpu = replace(RESULTS, machine=replace(machine, device="a GPU"))
    assert "ranks share" not in shown(on_gpu, 100)
    assert "Other processes" not in shown(on_gpu, 100)
    assert "preemption" not in shown(on_gpu, 100)
