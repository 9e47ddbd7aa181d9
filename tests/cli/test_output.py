import io
import sys

import pytest

from expertlane.cli.output import is_first_process, progress_on_stderr, stdout_console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({"RANK": "1"}, True),  # no torchrun
        ({"WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, False),
    ],
)
def test_only_the_first_rank_of_torchrun_speaks(monkeypatch, environment, speaks):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is speaks


@pytest.mark.parametrize(
    ("stream", "columns", "width"),
    [
        (io.StringIO(), "", 80),
        (io.StringIO(), 200, 200),
        (io.StringIO(), 3, 40),
        (io.StringIO(), "9" * 30, 1_000),
        (Terminal(), 200, 120),
        (Terminal(), 90, 90),
    ],
)
def test_width_of_tables(monkeypatch, stream, columns, width):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", stream)
    assert stdout_console().width == width


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with progress_on_stderr() as progress:
        progress.task("EP [16]", 3)
        progress.advance()
        progress.done()
    shown = terminal.getvalue()
    assert "EP [16]" in shown
    assert "3/3" in shown
