"""`expertlane compare --project` from the command line to the files."""

import json
from pathlib import Path

import pytest

import example_results
from cli.screen import tells
from cli.small_checkpoint import checkpoint
from expertlane.comparison import run as machine
from expertlane.errors import CapacityError
from expertlane.results.file import read
from expertlane.results.record import EXPERIMENT, SCALING
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase

SHORT = """
name = "short"
[model]
preset = "paper"
num_experts_per_tok = 2
[workload]
num_sequences = 64
prompt_len = 128
output_len = 8
[[deployments]]
name = "TP 8 × PP 2"
layout = "tp=8,pp=2"
[[deployments]]
name = "EP 16"
layout = "dp=16,ep=16"
[[scaling]]
name = "EP 8"
layout = "dp=8,ep=8"
"""


def few_layouts(model, num_devices):
    """Some layouts of all devices, the experiment's own among them."""
    return [
        Layout(pp=2, tp=num_devices // 2),
        Layout(dp=num_devices, ep=num_devices),
        Layout(dp=num_devices // 4, tp=4, ep=num_devices),
    ]


@pytest.fixture
def too_small(tmp_path, monkeypatch):
    """A machine whose memory holds none of it, an empty folder, and a planner that tries little."""
    monkeypatch.setattr("expertlane.planner.search.valid_layouts", few_layouts)
    monkeypatch.setattr("expertlane.comparison.run._ACCELERATORS", ())
    monkeypatch.setattr("expertlane.engine.ops.host.memory_bytes", lambda: (10**9, 2 * 10**9))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("short.toml").write_text(SHORT, encoding="utf-8")


@pytest.mark.full
def test_what_is_too_large_to_measure_is_projected_alone(too_small, run):
    code, out, err = run("compare", "short.toml", "--project", "--full")

    assert code == 0
    assert any(
        line.startswith("expertlane: ") and " needs " in line and " free" in line
        for line in err.splitlines()
    )
    assert tells(out, "Projected h100x16")
    assert tells(" ".join(out.split()), "Nothing TP 8 × PP 2")
    assert "3.75×" not in out  # that is the paper's study
    assert max(map(len, out.splitlines())) <= 80

    results = read(Path("results/short/results.json"))
    assert results.select("measured") == ()
    assert results.machine is None
    assert {each.top_k for each in results.conditions} == {2}
    assert "starting" not in err  # no rank
    assert "Projected: verdict" in Path("results/short/report.md").read_text(encoding="utf-8")


@pytest.mark.full
def test_another_cluster_and_json(too_small, run):
    code, out, _ = run(
        "compare", "short.toml", "--project", "--json", "--cluster", "h200x16", "--skew", "0.5"
    )
    assert code == 0
    found = json.loads(out)
    assert (found["cluster"]["name"], found["question"]["skew"]) == ("h200x16", 0.5)


def test_what_fits_is_measured_with_the_projection_beside_it(
    too_small, comparison, run, monkeypatch
):
    small = SHORT.replace('"paper"', '"paper-small"').replace("tp=8", "tp=2").replace("16", "4")
    Path("short.toml").write_text(small.replace("=8,ep=8", "=2,ep=2"), encoding="utf-8")
    monkeypatch.setattr(machine, "why_not_here", lambda experiment, dtype: None)
    comparison.answer = example_results.usual()
    code, out, err = run("compare", "short.toml", "--project")
    assert code == 0
    assert len(comparison.calls) == 1
    assert "cluster=Cluster(name='h100x4'" in out
    assert "source='measured'" in out
    assert "source='projected'" in out
    assert err.index("projecting on h100x4") < err.index("starting 4 ranks")
    assert " needs " not in err


@pytest.mark.full
def test_a_checkpoints_projection_stands_beside_it_too(too_small, comparison, run, monkeypatch):
    """What is read of the weights makes the experiment another object, of the same results."""
    monkeypatch.setattr(machine, "why_not_here", lambda experiment, dtype: None)
    monkeypatch.setattr("expertlane.engine.launch.check_checkpoint", lambda model, *_, **__: model)
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 16, "num_local_experts": 16}
    checkpoint(Path("moe"), max_position_embeddings=256, **sizes)
    comparison.answer = example_results.usual()
    code, out, err = run("compare", "short.toml", "--model", "moe", "--project")
    assert code == 0, err
    assert "source='measured'" in out
    assert "source='projected'" in out


@pytest.mark.full
def test_memory_that_only_ranks_can_tell_of(too_small, comparison, run, monkeypatch):
    monkeypatch.setattr(machine, "why_not_here", lambda experiment, dtype: None)
    comparison.too_large = CapacityError("needs 2 GB but 1 GB is free")
    code, out, err = run("compare", "short.toml", "--project")
    assert code == 0
    assert "not_measured='needs 2 GB but 1 GB is free'" in " ".join(out.split())
    assert tells(err, "2 GB 1 free")
    assert comparison.calls == []


@pytest.mark.full
def test_the_papers_experiment_at_full_size(too_small, run):
    code, out, _ = run("compare", "paper", "--project", "--full")
    assert code == 0
    assert "TPOT at" in out
    results = read(Path("results/paper/results.json"))
    first = results.select("projected", EXPERIMENT)[0]
    contexts = {step.context for step in first.steps_of(Phase.DECODE)}
    assert contexts == {1, 128, 1024, 10_000}
    assert [each.layout.ep for each in results.select("projected", SCALING)][-1] == 64
