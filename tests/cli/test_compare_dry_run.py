"""`expertlane compare --dry-run`: the commands of engines, and scripts for several nodes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from cli.screen import one_line, tells

MODEL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_local_experts": 16, "num_experts_per_tok": 2,
    "vocab_size": 128, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "dtype": "bfloat16",
}  # fmt: skip
EXPERIMENT = """
name = "own"
[model]
checkpoint = "model"
[workload]
num_sequences = 32
prompt_len = 16
output_len = 16
[[deployments]]
name = "one node"
layout = "tp=2"
[[deployments]]
name = "EP 16"
layout = "dp=16,ep=16"
dispatch = "all_gather"
[[deployments]]
name = "odd"
layout = "tp=4,ep=2"
"""
DRY = ["compare", "own.toml", "--engine", "vllm", "--dry-run"]


@pytest.fixture(autouse=True)
def experiment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("own.toml").write_text(EXPERIMENT)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(MODEL))


def test_scripts_of_each_deployment(run):
    code, out, err = run(*DRY, "--scripts", "start", "--cluster", "h100x16", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [each["deployment"] for each in found["commands"]] == ["one node", "EP 16", "odd"]
    names = {each.name for each in Path("start").iterdir()}
    assert {Path(each).name for each in found["scripts"]} == names
    assert names == {
        f"{name}.vllm.{kind}"
        for name in ("one-node", "EP-16")
        for kind in ("slurm.sh", "kubernetes.yaml")
    }
    assert tells(err, "script odd vLLM")
    script = Path("start/EP-16.vllm.slurm.sh").read_text()
    assert "#SBATCH --nodes=2\n" in script
    assert "--headless" in script
    assert "#SBATCH --nodes=1\n" in Path("start/one-node.vllm.slurm.sh").read_text()
    assert "LeaderWorkerSet" in Path("start/EP-16.vllm.kubernetes.yaml").read_text()
    if bash := shutil.which("bash"):
        subprocess.run([bash, "-n", "start/EP-16.vllm.slurm.sh"], check=True)


def test_replicas_are_several_servers_and_a_router(run):
    Path("own.toml").write_text(EXPERIMENT.replace("dp=16,ep=16", "replicas=2,tp=2"))
    asked = [*DRY, "--only", "2", "--scripts", "start", "--cluster", "h100x16"]
    code, out, err = run(*asked)
    assert code == 0, err
    assert tells(out, "# not run replicas router --dry-run --scripts --url")
    script = Path("start/EP-16.vllm.slurm.sh").read_text()
    assert "vllm serve" in script
    assert "router" in script.partition("vllm serve")[2]


def test_a_plan_says_the_cluster(run):
    Path("own.toml").write_text(EXPERIMENT + '[projection]\ncluster = "h100x16"\n')
    code, out, err = run(*DRY, "--scripts", "start")
    assert code == 0, err
    assert tells(err, "start/EP-16.vllm.slurm.sh --url")
    assert tells(out, "one node vllm")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--dry-run", "--scripts", "start"], "--scripts --cluster"),
        (["--dry-run", "--scripts", "start", "--cluster", "h900x1"], "h900 h100"),
        (["--dry-run", "--cluster", "h100x16"], "--cluster --project"),
        (["--scripts", "start"], "--scripts --dry-run"),
        (["--dry-run", "--scripts", "own.toml", "--cluster", "h100x16"], "own.toml folder"),
    ],
)
def test_a_mistake_is_one_line(run, options, line):
    code, out, err = run("compare", "own.toml", "--engine", "vllm", *options)
    assert (code, out) == (2, "")
    assert one_line(err, line)
    assert not Path("start").exists()
