"""Outputs that README shows are what the commands print."""

import gzip
import shlex
from pathlib import Path

from documented.commands import ROOT
from documented.printed import printed, shape
from documented.smokes import run_expertlane


def test_the_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    shown = printed("README.md", "plan")
    done = run_expertlane(tmp_path, *shlex.split(shown.command)[1:])
    first = done.stdout.splitlines()[: shown.text.count("\n")]
    assert [line.rstrip() for line in first] == shown.text.splitlines()


def test_the_comparison(tmp_path, monkeypatch):
    """Setting, columns, names and causes: of results of the same command, less its timelines.

    What is measured differs from run to run; `make test-full` compares a whole run.
    """
    monkeypatch.setenv("COLUMNS", "80")
    results = gzip.decompress(Path(__file__).with_name("paper-small.json.gz").read_bytes())
    (tmp_path / "results.json").write_bytes(results)
    done = run_expertlane(tmp_path, "report", "results.json", "--out", "pages")
    assert shape(done.stdout) == shape(printed("README.md", "compare").text)
