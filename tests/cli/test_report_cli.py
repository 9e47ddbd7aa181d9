"""`expertlane report`: kept results of every kind, and files that are none."""

import json
from pathlib import Path

import pytest

import example_pages
from cli.screen import fits_a_screen, one_line, tells
from expertlane.results.file import to_json, write


@pytest.mark.smoke(1)
@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_reports_are_made_again(run, tmp_path, make, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(make(), Path("kept"))
    code, out, err = run("report", str(path))
    made = [path.with_name("report.md"), path.with_name("report.html")]
    assert (code, err) == (0, f"written: {made[0]}, {made[1]}\n")
    assert fits_a_screen(out)
    assert out.splitlines()[-1] == f"More: --full, or {made[1]}"
    assert made[0].read_text(encoding="utf-8").startswith("# expertlane")
    assert made[1].read_text(encoding="utf-8").startswith("<!doctype html>")


def test_traffic_that_was_asked_for_is_shown_again(run, tmp_path):
    path = write(example_pages.KINDS["measured"]().with_traffic(), tmp_path)
    assert run("report", str(path))[0] == 0
    assert "\n## Traffic of #3 EP 16, decode\n" in path.with_name("report.md").read_text("utf-8")


def test_a_folder_another_place_and_json(run, tmp_path):
    write(example_pages.serving(), tmp_path / "kept")
    there = tmp_path / "new" / "place"
    code, out, err = run("report", str(tmp_path / "kept"), "--out", str(there), "--json")
    assert (code, err) == (0, f"written: {there / 'report.md'}, {there / 'report.html'}\n")
    assert json.loads(out) == json.loads((tmp_path / "kept" / "results.json").read_text())
    assert sorted(each.name for each in there.iterdir()) == ["report.html", "report.md"]
    assert [each.name for each in (tmp_path / "kept").iterdir()] == ["results.json"]


OLD = {"schema_version": 4, "command": "expertlane compare", "deployments": []}
MISTAKES = {
    "missing": (None, "FILE No such file"),
    "cut off": ("whole"[:3], "FILE JSON 1"),
    "of an older version": (
        json.dumps(OLD),
        "FILE schema_version 4 reads 9",
    ),
    "another file": ('{"name": "x"}', "FILE schema_version"),
    "unknown kind": (
        '{"schema_version": 1, "kind": "x"}',
        "FILE unknown x",
    ),
    "nested": ("[" * 100_000, "FILE nested 100"),
    "changed": (
        to_json(example_pages.serving()).replace('"batch": 8', '"batch": "eight"'),
        "FILE deployments.0.serving.1.batch eight",
    ),
}


WHOLE = to_json(example_pages.KINDS["measured"]())
DAMAGED = {
    "no number": (
        ('"num_steps": ', '"num_steps": NaN, "n": '),
        "NaN JSON",
    ),
    "a column too short": (
        ('"track": [0, 1, 0, 1]', '"track": [0]'),
        "columns lengths",
    ),
    "no such stage": (
        ('"stage": [2, 4, 5, 8]', '"stage": [2, 4, 5, 99]'),
        "row stage",
    ),
    "no moment": (('"created": "20', '"created": "yesterday 20'), "created yesterday ISO 8601"),
}


@pytest.mark.parametrize(("change", "words"), DAMAGED.values(), ids=DAMAGED)
def test_content_that_makes_no_sense_is_one_line_too(run, tmp_path, change, words):
    assert change[0] in WHOLE
    path = tmp_path / "results.json"
    path.write_text(WHOLE.replace(*change), encoding="utf-8")
    code, out, err = run("report", str(path))
    assert (code, out) == (2, "")
    assert tells(err, words)
    assert err.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(("text", "line"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(run, tmp_path, text, line):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    before = sorted(Path(tmp_path).iterdir())
    code, out, err = run("report", str(path))
    assert (code, out) == (2, "")
    assert one_line(err, f"{line.replace('FILE', str(path))}")
    assert sorted(Path(tmp_path).iterdir()) == before


def test_a_folder_that_cannot_be_written_to(run, tmp_path):
    path = write(example_pages.serving(), tmp_path)
    code, _, err = run("report", str(path), "--out", str(path / "below"))
    assert code == 2
    assert tells(err, f"{path} folder")
