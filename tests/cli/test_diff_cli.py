"""`expertlane diff` and `--export`: what is printed and written, exit codes, refusals."""

import json
import re
import sys
from dataclasses import replace

import pytest

import example_pages
from cli.screen import one_line, tells
from example_simulation import SIMULATION
from expertlane.results.file import write
from expertlane.results.results import Results


def slower(results: Results, factor: float) -> Results:
    """The same with less throughput in every load and step."""
    deployments = [
        replace(
            record,
            steps=tuple(replace(each, tps=each.tps * factor) for each in record.steps),
            serving=tuple(
                replace(each, output_tps=each.output_tps * factor) for each in record.serving
            ),
        )
        for record in results.deployments
    ]
    return replace(results, deployments=tuple(deployments))


@pytest.fixture
def pair(tmp_path):
    """Write two results; their folders."""

    def write_both(first: Results, second: Results) -> tuple[str, str]:
        for name, results in (("a", first), ("b", second)):
            write(results, tmp_path / name)
        return str(tmp_path / "a"), str(tmp_path / "b")

    return write_both


@pytest.mark.smoke(4)
@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_the_answer_fits_one_screen_and_the_exit_code_tells(run, pair, make, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    results = make()
    paths = pair(results, slower(results, 0.5))
    is_projected = {each.source for each in results.deployments} == {"projected"}
    code, out, err = run("diff", *paths)
    assert (code, err) == (int(is_projected), "")
    fits_a_screen(out)
    assert "beyond 5%" in out
    assert ("Slower in B" if is_projected else "Noise unknown") in out
    assert run("diff", *paths, "--threshold", "60")[0] == 0
    assert run("diff", *reversed(paths))[0] == 0  # faster
    code, out, _ = run("diff", paths[0], paths[0])
    assert code == 0
    assert re.search(r"No regression.*\d.*identical", out)
    assert "Noise unknown" not in out


def fits_a_screen(out: str) -> None:
    lines = out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith(" ") for line in lines)


def test_many_long_names_fit_too(run, pair):
    first = example_pages.projected()
    record = first.deployments[0]
    many = [
        replace(record, name=f"replicas=2,dp=2,ep=2; 4 micro-batches rotating, all-gather {n}")
        for n in range(40)
    ]
    first = replace(first, deployments=tuple(many))
    second = replace(slower(first, 0.5), deployments=slower(first, 0.5).deployments[3:])
    mixed = replace(second, deployments=slower(first, 2).deployments[3:9] + second.deployments[6:])
    code, out, _ = run("diff", *pair(first, mixed))
    assert code == 1
    fits_a_screen(out)
    assert "Only in A: " in out


def test_other_forms(run, pair):
    first = SIMULATION
    paths = pair(first, slower(first, 0.5))
    code, out, _ = run("diff", *paths, "--quiet")
    assert (code, len(out.splitlines())) == (1, 1)
    code, out, _ = run("diff", *paths, "--json")
    found = json.loads(out)
    assert (code, found["names"]) == (1, list(paths))
    assert found["num_regressions"] == 1
    assert {change["verdict"] for change in found["changes"]} == {"slower", "identical"}
    code, out, _ = run("diff", *paths, "--full")
    assert code == 1
    assert "verdict" in out


def test_numbers_that_make_no_sense_are_refused(run, pair):
    paths = pair(slower(example_pages.serving(), 1e-300), slower(example_pages.serving(), 1e300))
    code, out, err = run("diff", *paths)
    assert (code, out) == (2, "")
    assert one_line(err, "numbers")


def test_a_name_is_escaped(run, pair):
    results = example_pages.serving()
    record = replace(results.deployments[0], name="\x1b[31m=red\n")
    results = replace(results, deployments=(record,))
    code, out, _ = run("diff", *pair(results, slower(results, 0.5)))
    assert code == 0
    assert "red" in out
    assert "\x1b" not in out


def test_report_exports_a_table(run, tmp_path):
    write(example_pages.serving(), tmp_path)
    code, _, err = run("report", str(tmp_path), "--export", "csv")
    assert code == 0
    assert str(tmp_path / "results.csv") in err
    assert len((tmp_path / "results.csv").read_text("utf-8").splitlines()) == 4


@pytest.mark.parametrize("command", ["report", "simulate", "plan", "bench", "compare"])
def test_a_missing_library_is_said_before_anything_runs(run, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(example_pages.serving(), tmp_path / "kept")
    before = {
        "report": ["kept"],
        "simulate": ["paper", "--layout", "dp=16,ep=16", "--cluster", "h100x16"],
        "plan": ["paper"],
        "bench": ["paper-tiny"],
        "compare": [],
    }
    code, out, err = run(command, *before[command], "--export", "parquet")
    assert (code, out) == (2, "")
    assert one_line(err, "parquet pyarrow expertlane[parquet] csv")
    assert [each.name for each in tmp_path.iterdir()] == ["kept"]


def test_little_in_common_is_no_verdict(run, pair):
    """Of three loads each, one is the same: the exit code is not that of an unchanged result."""
    first = example_pages.serving()
    (record,) = first.deployments
    assert [each.batch for each in record.serving] == [1, 8, 32]
    batches = [1, 108, 132]
    loads = [replace(e, batch=batch) for e, batch in zip(record.serving, batches, strict=True)]
    second = replace(first, deployments=(replace(record, serving=tuple(loads)),))
    paths = pair(first, second)
    code, out, err = run("diff", *paths, "--quiet")
    assert code == 2
    assert tells(out, "12 15 3 identical 6")
    assert out.count("\n") == 1
    assert one_line(err, "12 15 partner deployments loads")
    code, out, _ = run("diff", *pair(first, slower(second, 0.5)), "--json")
    assert (code, json.loads(out)["num_unpaired"]) == (2, 12)
    fewer = replace(record, serving=record.serving[:2])
    code, out, _ = run("diff", *pair(first, replace(first, deployments=(fewer,))), "--quiet")
    assert code == 0
    assert tells(out, "6 identical 3")
