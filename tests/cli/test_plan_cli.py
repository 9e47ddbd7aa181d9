import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cli.screen import tells
from cli.small_checkpoint import checkpoint
from expertlane.balance.trace import RoutingTrace, write_trace
from expertlane.cli.model import find_model
from expertlane.cost.laws import shipped_profiles
from expertlane.cost.laws.profile import parse_cluster
from expertlane.results.record import BEST, TWO_POOLS
from expertlane.results.results import Results
from expertlane.spec.experiment import read_experiment

TINY = ("plan", "paper-tiny", "--cluster", "h100x2")
QWEN3_235B = Path(__file__).parents[2] / "docs/qwen3-235b/config.json"
WORKLOAD = ("--batch", "8", "--prompt-len", "16", "--output-len", "16")


def flat(text):
    return " ".join(text.split())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_is_printed_and_written(run, here):
    code, out, err = run(*TINY, *WORKLOAD, "--full")
    assert code == 0, err
    assert all(len(line) <= 80 for line in out.splitlines())
    for heading in ("Verdict", "Best deployments", "Pareto front", "Run it", "Assumptions"):
        assert heading in out
    folder = here / "results" / "plan-paper-tiny-h100x2"
    assert {each.name for each in folder.iterdir()} == {
        "results.json",
        "report.html",
        "report.md",
        "experiment.toml",
    }
    experiment = read_experiment(folder / "experiment.toml")
    assert experiment.model.name == "paper-tiny"
    assert experiment.name != folder.name, "compare would overwrite the plan's results"
    assert experiment.workload.num_sequences == 8
    data = json.loads((folder / "results.json").read_text())
    best = data["deployments"][0]
    assert best["roles"] == ["best"]
    planned = experiment.deployments[-1]
    assert [each.name.split(";")[0] for each in experiment.deployments] == [
        str(each.layout) for each in experiment.deployments
    ]
    assert planned.layout.dp == best["layout"]["dp"]
    assert planned.options.dispatch == best["options"]["dispatch"]


@pytest.mark.full
def test_json_is_the_file_and_reads_back(run, here):
    from pydantic import TypeAdapter

    code, out, err = run(*TINY, *WORKLOAD, "--json", "--out", "mine")
    assert code == 0, err
    assert (here / "mine" / "results.json").read_text() == out
    results = TypeAdapter(Results).validate_json(out)
    assert results.plans[0].num_candidates > 5
    best = results.select("projected", BEST)[0]
    for pools in results.select("projected", TWO_POOLS):
        tps = pools.serving[0].output_tps.value
        assert pools.over_best.value == pytest.approx(tps / best.serving[0].output_tps.value)
    assert best.why == ""
    tps = best.serving[0].output_tps
    assert tps.low <= tps.value <= tps.high


@pytest.mark.full
def test_a_checkpoint_needs_only_its_configuration(run, here):
    checkpoint(here / "mine")
    code, _, err = run("plan", "./mine", "--cluster", "h100x2", *WORKLOAD, "--out", "there")
    assert code == 0, err
    (plan,) = json.loads((here / "there" / "results.json").read_text())["plans"]
    assert [each["engine"] for each in plan["engines"]] == [
        "vllm",
        "sglang",
        "trtllm",
        "expertlane",
    ]
    commands = [each for engine in plan["engines"] for each in engine["commands"]]
    servers = [line for each in commands if each["role"] != "router" for line in each["lines"]]
    assert servers
    assert all(str(here / "mine") in line for line in servers)
    written = tomllib.loads((here / "there" / "experiment.toml").read_text())
    assert written["model"] == {"checkpoint": str(here / "mine")}


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(shipped_profiles()))
def test_a_node_of_every_profile(run, here, name):
    checkpoint(here / "mine", quantization_config={"quant_method": "mxfp4"})
    code, _, err = run("plan", "./mine", "--cluster", f"{name}x8", *WORKLOAD, "--out", "there")
    assert code == 0, err
    found = json.loads((here / "there" / "results.json").read_text())
    assert {each["conditions"]["dtype"] for each in found["deployments"]} == {"mxfp4"}


@pytest.mark.full
def test_a_trace_says_which_experts_tokens_choose(run, here):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((4, 256, 16)), axis=2)[..., :2].astype(np.int16)
    trace = RoutingTrace("paper-tiny", 16, (0, 1, 2, 3), ids, np.arange(256))
    write_trace(trace, here / "trace.npz")
    asked = (*TINY, *WORKLOAD, "--routing-trace", "trace.npz", "--full")
    code, out, err = run(*asked)
    assert code == 0, err
    assert "256 recorded tokens" in " ".join(out.split())
    assert tells(run(*asked, "--skew", "1")[2], "--routing-trace --skew")


def test_a_limit_that_nothing_keeps_names_the_nearest(run, here):
    code, out, err = run(*TINY, *WORKLOAD, "--slo", "tpot.mean=0.0001ms")
    assert (code, out) == (2, "")
    assert tells(err, "h100x2 nearest")
    assert tells(err, "2 TPOT 0.0001")
    assert not (here / "results").exists()


@pytest.mark.full
def test_an_engine_is_the_only_one(run, here):
    code, out, err = run(*TINY, *WORKLOAD, "--engine", "trtllm", "--full")
    assert code == 0, err
    assert "| TensorRT-LLM 1.2 |" in flat(out)
    assert "trtllm-serve MODEL" in flat(out)
    assert "vllm" not in out
    (plan,) = json.loads((here / "results/plan-paper-tiny-h100x2/results.json").read_text())[
        "plans"
    ]
    assert plan["engine"] == "trtllm"
    (engine,) = plan["engines"]
    assert engine["why"] == ""


def test_a_preset_is_in_a_type_that_the_devices_have():
    found, cluster = find_model("paper-small", weights=False), parse_cluster("h100x2")
    assert found.number_types(None, "model", cluster).weights == "float16"
    device = replace(cluster.profile.device, flops_per_s={"float32": 1e12})
    own = replace(cluster, profile=replace(cluster.profile, device=device))
    assert found.number_types(None, "model", own).weights == "float32"


@pytest.mark.parametrize(
    ("quantization", "weights", "caution"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "float8", ""),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "float8", ""),
        ({"quant_method": "mxfp4"}, "mxfp4", ""),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            "bfloat16",
            "nvfp4 H100 not compute bfloat16 --dtype float8 nearer",
        ),
        ({"quant_method": "awq", "bits": 4}, "int4", ""),
        ({"quant_method": "awq"}, "bfloat16", "awq priced bfloat16"),
    ],
)
def test_quantised_checkpoints_are_priced_in_their_type_or_with_a_caution(
    here, quantization, weights, caution
):
    checkpoint(here / "mine", quantization_config=quantization)
    found = find_model("./mine", weights=False)
    cluster = parse_cluster("h100x2")
    types = found.number_types(None, "model", cluster)
    assert types.weights == weights
    cautions = found.cautions(types, cluster)
    assert len(cautions) == bool(caution)
    assert tells(" ".join(cautions), caution)


def test_matrices_beside_narrow_experts_have_a_type_of_their_own(here):
    checkpoint(here / "mine", quantization_config={"quant_method": "fp8", "expert_dtype": "fp4"})
    found, cluster = find_model("./mine", weights=False), parse_cluster("h100x2")
    types = found.number_types(None, "model", cluster)
    assert [types.of_part(part) for part in ("attention", "mlp", "experts")] == [
        *("float8", "float8", "mxfp4")
    ]
    assert (types.kept, types.index_type) == ("bfloat16", "float8")
    assert str(types) == "mxfp4, beside experts float8"
    assert found.cautions(types, cluster) == ()
    (caution,) = found.cautions(found.number_types("float8", "model", cluster), cluster)
    assert tells(caution, "mxfp4 priced float8 --dtype mxfp4")
    assert found.number_types("float8", "model", cluster).others is None


def test_what_does_not_fit_is_told_a_type_that_does(run, here):
    nvfp4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    config = json.loads(QWEN3_235B.read_text())
    (here / "large").mkdir()
    config = json.dumps(config | {"quantization_config": nvfp4})
    (here / "large/config.json").write_text(config)
    code, _, err = run("plan", "./large", "--cluster", "h100x4")
    assert code == 2
    assert tells(err, "fits no deployment --dtype float8 fits nvfp4 H100 not compute")
    code, _, err = run("simulate", "./large", "--layout", "tp=4", "--cluster", "h100x4")
    assert code == 2
    assert tells(err, "needs nvfp4 H100 not compute --dtype float8 nearer")
