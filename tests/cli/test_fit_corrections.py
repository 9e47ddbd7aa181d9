"""`--fit-corrections` and `fit_corrections`: the file, and the commands that take it."""

import json

import pytest

import expertlane
from comparison.planted import Case, results_of
from expertlane.cost.laws.corrections import read_corrections
from expertlane.cost.laws.profile import Execution
from expertlane.results.file import write

CASE = Case("host", "h100x16", Execution.EAGER, ("tp=8",), 16, 128, True, 5)
EXPERIMENT = """
name = "mine"
[model]
preset = "paper-tiny"
[workload]
num_sequences = 2
prompt_len = 4
output_len = 3
[[deployments]]
name = "EP 2"
layout = "dp=2,ep=2"
[projection]
cluster = "h100x2"
skew = 0
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(EXPERIMENT)
    return str(path)


@pytest.fixture(scope="module")
def corrections(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    write(results_of(CASE), folder)
    found = expertlane.fit_corrections(folder)
    path = found.write(folder / "corrections.toml")
    assert read_corrections(path).factors.keys() == found.factors.keys()
    assert found.factors["host"].factor == pytest.approx(3, rel=0.2)
    return path


@pytest.mark.parametrize("command", [pytest.param("plan", marks=pytest.mark.full), "simulate"])
def test_corrections_are_used_and_named(run, corrections, tmp_path, command):
    args = ["paper-small", "--cluster", "h100x2", "--dtype", "bfloat16", "--execution", "eager"]
    args += ["--batch", "4", "--prompt-len", "32", "--output-len", "8", "--skew", "0", "--json"]
    if command == "simulate":
        args += ["--layout", "tp=2"]
    found = []
    for more in ([], ["--corrections", str(corrections)]):
        code, out, err = run(command, *args, *more, "--out", str(tmp_path / f"{len(more)}"))
        assert code == 0, err
        found.append(json.loads(out))
    before, after = found
    tps = [each["deployments"][0]["serving"][0]["output_tps"]["value"] for each in found]
    assert tps[1] < 0.9 * tps[0]
    (named,) = [each for each in after["assumptions"] if each["name"] == "corrections"]
    assert "host overhead ×" in named["value"]
    assert named["change"] == "--corrections"
    assert not [each for each in before["assumptions"] if each["name"] == "corrections"]


@pytest.mark.full
def test_a_comparison_projects_by_corrections(corrections, experiment):
    found = expertlane.compare(experiment, project=True, corrections=corrections, only="1")
    assert len([each for each in found.assumptions if each.name == "corrections"]) == 1
    assert found.question["projection"]["corrections"] == str(corrections)


def test_a_comparison_writes_corrections(run, experiment, tmp_path, monkeypatch):
    """Measured on a CPU and projected on a GPU: refused; with a profile of this machine: fitted."""
    (path := tmp_path / "fit.toml").unlink(missing_ok=True)
    args = ["compare", experiment, "--repeat", "2", "--out", str(tmp_path / "out"), "--project"]
    code, out, err = run(*args, "--fit-corrections", str(path))
    assert code == 2
    assert "tokens/s" in out or "TPS" in out  # what was measured is shown all the same
    assert "--fit-corrections: measured on a CPU, projected on" in err
    assert not path.exists()
    monkeypatch.setattr("expertlane.comparison.points._check_device", lambda *_: None)
    code, _, err = run(*args, "--fit-corrections", str(path))
    assert code == 0, err
    assert "fit.toml" in err
    assert read_corrections(path).fitted_on.deployments == ("EP 2",)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fit-corrections", "x"], "--fit-corrections needs a projection; add --project"),
        (
            ["--fit-corrections", "x", "--project", "--experts-per-token", "2,1"],
            "--fit-corrections takes one comparison",
        ),
        (
            ["--fit-corrections", "x", "--project", "--engine", "vllm", "--engine", "sglang"],
            "--fit-corrections is of one engine",
        ),
    ],
)
def test_mistakes_are_one_line(run, experiment, more, message):
    code, out, err = run("compare", experiment, *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize("text", ["", "factors = 3", "\x00", "a = ["])
def test_damaged_corrections_are_one_line(run, tmp_path, text):
    (path := tmp_path / "corrections.toml").write_text(text)
    args = ["paper-tiny", "--layout", "tp=1", "--cluster", "h100x1", "--corrections", str(path)]
    code, out, err = run("simulate", *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--corrections" in err
