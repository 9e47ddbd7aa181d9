"""The notebook of the documentation runs from its first cell to its last, as it is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.py"


def run(folder: Path, python: Path | str = sys.executable, **environment: str) -> str:
    """Run the notebook in an empty folder; its output."""
    done = subprocess.run(
        [python, NOTEBOOK],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())  # nothing is written but where it is asked for
    return done.stdout


def check(output: str) -> None:
    """What each cell is to show."""
    assert "Use " in output  # the plan
    assert "concurrency 64: " in output
    assert "regression beyond 5%" in output
    assert "['even.csv', 'report.html', 'report.md', 'results.json']" in output
    assert "[1, 2, 3] → [" in output
    assert "| 8 in / 8 out | measured" in output
    assert "compare-paper-tiny-h100x2" in output


@pytest.mark.full
def test_it_runs_where_it_is_installed(tmp_path):
    check(run(tmp_path))
