"""`expertlane judge`: its answer, its files, and what takes the corrections."""

import json
import re
from dataclasses import replace

import pytest

import expertlane
from comparison.planted import Case, results_of
from expertlane.cost.laws.corrections import read_corrections
from expertlane.cost.laws.profile import Execution
from expertlane.results.file import write
from expertlane.results.record import DeploymentRecord
from expertlane.results.results import Results

CASE = Case("host", "paper-small", "h100x16", Execution.EAGER, ("tp=8",), 16, 128, True, 5)


@pytest.fixture(scope="module")
def results() -> Results:
    return results_of(CASE)


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    write(results, folder)
    return folder


@pytest.fixture(scope="module")
def corrections(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("fitted") / "corrections.toml"
    return expertlane.judge(folder).write_corrections(path)


def test_the_answer_comes_first_and_fits_a_screen(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("judge", str(folder), "--out", ".")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert "host overhead at" in " ".join(lines[:6])
    assert {each.name for each in tmp_path.iterdir()} == {
        "corrections.toml",
        "judge.json",
        "report.html",
        "report.md",
    }
    found = read_corrections(tmp_path / "corrections.toml")
    assert found.factors["host"].factor == pytest.approx(3, rel=0.2)
    assert "corrections.toml" in err
    page = (tmp_path / "report.html").read_text()
    assert "host overhead" in page


def test_other_programs_get_all_numbers(run, folder, tmp_path):
    code, out, _ = run("judge", str(folder), "--json", "--out", str(tmp_path), "--export", "csv")
    assert code == 0
    found = json.loads(out)
    assert found["likeliest"] == ["host"]
    assert found["corrections"]["fitted_on"]["deployments"] == list(CASE.layouts)
    assert json.loads((tmp_path / "judge.json").read_text()) == found
    rows = (tmp_path / "judge.csv").read_text().splitlines()
    assert len(rows) == 1 + len(found["numbers"])


def test_a_hostile_name_stays_text(results, run, tmp_path):
    def renamed(record: DeploymentRecord) -> DeploymentRecord:
        return replace(record, name="<script>alert(1)</script>\x1b[2J")

    write(results.changed(renamed), tmp_path)
    code, out, _ = run("judge", str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 0
    assert "\x1b[2J" not in out
    assert "<script>alert" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_corrections_are_used_and_said(run, corrections, tmp_path, command):
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
    said = [each for each in after["assumptions"] if each["name"] == "corrections"]
    assert len(said) == 1
    assert "host overhead ×" in said[0]["value"]
    assert said[0]["change"] == "--corrections"
    assert not [each for each in before["assumptions"] if each["name"] == "corrections"]


def test_a_comparison_projects_by_corrections(run, corrections, tmp_path):
    (tmp_path / "mine.toml").write_text(
        """
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
    )
    found = expertlane.compare(
        str(tmp_path / "mine.toml"), project=True, corrections=corrections, only="1"
    )
    said = [each.value for each in found.assumptions if each.name == "corrections"]
    assert len(said) == 1
    asked = found.question["projection"]
    assert asked["corrections"] == str(corrections)


def test_python_gets_the_same(folder):
    found = expertlane.judge(folder)
    assert found.likeliest == ("host",)
    assert re.search(r"host overhead at [23]\.\d+× the time", found.headline)
    assert "Judgement of paper-small on h100x16" in repr(found)
    assert len(found.answer.splitlines()) <= 40


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "RESULTS"),
        (["missing"], "missing"),
        (["FOLDER", "--cluster", "h100"], "PROFILExCOUNT"),
        (["FOLDER", "--corrections", "x"], "no option --corrections"),
    ],
)
def test_mistakes_are_one_line(run, folder, tmp_path, args, said):
    args = [str(folder) if each == "FOLDER" else each for each in args]
    code, out, err = run("judge", *args, "--out", str(tmp_path / "none"))
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", ["", "factors = 3", "\x00", "a = ["])
def test_damaged_corrections_are_one_line(run, tmp_path, text):
    (path := tmp_path / "corrections.toml").write_text(text)
    code, out, err = run(
        "simulate",
        "paper-tiny",
        "--layout",
        "tp=1",
        "--cluster",
        "h100x1",
        "--corrections",
        str(path),
    )
    assert (code, out) == (2, "")
    assert "--corrections" in err
    assert len(err.splitlines()) == 1
