"""Models that the planner takes and the engine does not run."""

import json
from pathlib import Path

import pytest

from cli.screen import fits_a_screen, refused, tells

PUBLISHED = Path(__file__).parent.parent / "spec" / "published_mixers.json"
CONFIGS = json.loads(PUBLISHED.read_text())


@pytest.fixture
def folder(tmp_path):
    """Writes a model's config.json, perhaps changed; gives its folder."""

    def write(name, **changes):
        config = CONFIGS[name]
        text = config.get("text_config")
        config = config | (changes if text is None else {"text_config": text | changes})
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("name", CONFIGS)
def test_running_and_serving_are_refused_by_name(run, folder, name):
    (architecture,) = CONFIGS[name]["architectures"]
    words, model = f"models of {architecture} not run our engine plan simulate", folder(name)
    for command in ("generate", "serve", "bench"):
        assert refused(run(command, model), words)


@pytest.mark.full
def test_a_plan_says_what_was_not_measured_and_who_runs_it(run, folder):
    small = folder("qwen3-next-80b-a3b", num_hidden_layers=4)
    code, out, _ = run("plan", small, "--cluster", "h200x2", "--batch", "8")
    assert code == 0
    assert fits_a_screen(out)
    assert "nothing was measured" not in out
    assert tells(out, "expertlane none that fits")
    assert "expertlane compare" in out
    assert "--engine vllm" in out
    nemotron = folder("nemotron-3-nano-30b-a3b")
    code, out, _ = run("plan", nemotron, "--cluster", "h200x2", "--batch", "8")
    assert code == 0
    assert fits_a_screen(out)
    assert tells(out, "Mamba-2 nothing measured roofline")
    drafts = "--mtp", "1", "--mtp-acceptance", "0.8"
    line = "--mtp last layer mixer MLP alone"
    assert refused(run("plan", nemotron, "--cluster", "h200x2", *drafts), line)


def test_other_engines_are_compared_on_them(run, folder, tmp_path):
    small = folder("qwen3-next-80b-a3b", num_hidden_layers=4)
    experiment = tmp_path / "mine.toml"
    lines = ['name = "mine"', "[model]", f'checkpoint = "{small}"', "[workload]"]
    lines += ["num_sequences = 4", "prompt_len = 16", "output_len = 8"]
    lines += ["[[deployments]]", 'name = "two"', 'layout = "tp=2"']
    experiment.write_text("\n".join(lines))
    asked = "compare", str(experiment), "--dry-run", "--engine"
    code, out, _ = run(*asked, "vllm")
    assert code == 0
    assert "--tensor-parallel-size 2" in out
    code, out, _ = run(*asked, "expertlane")
    assert code == 0
    assert tells(out, "not run expertlane layers")
    assert refused(run("compare", str(experiment)), "Qwen3NextForCausalLM not run our engine")
