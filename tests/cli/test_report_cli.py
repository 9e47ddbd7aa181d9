"""`expertlane report`: kept results of every kind, and files that are none."""

import json
from pathlib import Path

import pytest

import example_pages
from cli.screen import fits_a_screen, tells
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


def test_a_folder_another_place_and_json(run, tmp_path):
    write(example_pages.serving(), tmp_path / "kept")
    there = tmp_path / "new" / "place"
    code, out, err = run("report", str(tmp_path / "kept"), "--out", str(there), "--json")
    assert (code, err) == (0, f"written: {there / 'report.md'}, {there / 'report.html'}\n")
    assert json.loads(out) == json.loads((tmp_path / "kept" / "results.json").read_text())
    assert sorted(each.name for each in there.iterdir()) == ["report.html", "report.md"]
    assert [each.name for each in (tmp_path / "kept").iterdir()] == ["results.json"]


WHOLE = to_json(example_pages.KINDS["measured"]())
DAMAGED = {
    "no number": (('"num_steps": ', '"num_steps": NaN, "n": '), "NaN JSON"),
    "a column too short": (('"track": [0, 1, 0, 1]', '"track": [0]'), "columns lengths"),
    "no such stage": (('"stage": [2, 4, 5, 8]', '"stage": [2, 4, 5, 99]'), "row stage"),
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
