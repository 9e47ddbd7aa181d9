import pytest

from cli.screen import one_line, tells
from expertlane import __version__
from expertlane.cli.output import progress_on_stderr
from expertlane.errors import CapacityError, RankError


def test_version(run):
    assert run("--version") == (0, f"expertlane {__version__}\n", "")


def test_no_command_shows_the_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "compare" in out
    assert run("--help")[1].split() == out.split()


def test_a_users_mistake_is_one_line_and_exit_code_2(comparison, run):
    comparison.error = CapacityError("16 ranks need\n3 GB, but 2 GB are free")
    code, out, err = run("compare")
    assert (code, out) == (2, "")
    assert err.splitlines()[1:] == ["expertlane: error: 16 ranks need 3 GB, but 2 GB are free"]


def test_a_rank_error_is_one_line_and_exit_code_1(comparison, run):
    comparison.error = RankError("rank 3 died in layer 2, experts")
    code, out, err = run("compare")
    assert (code, out) == (1, "")
    assert err.splitlines()[1:] == ["expertlane: error: rank 3 died in layer 2, experts"]


def test_the_traceback_of_a_bug_in_a_rank_is_shown_above_the_line(comparison, run):
    comparison.error = RankError("rank 3 failed")
    comparison.error.add_note("Traceback: it was me")
    assert run("compare")[2].splitlines()[1:] == [
        "Traceback: it was me",
        "expertlane: error: rank 3 failed",
    ]


def test_an_interrupt_is_one_line_and_exit_code_130(comparison, run):
    comparison.error = KeyboardInterrupt()
    code, out, err = run("compare")
    assert (code, out) == (130, "")
    assert err.splitlines()[1:] == ["expertlane: error: interrupted"]


def test_anything_else_keeps_its_traceback(comparison, run):
    comparison.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("compare")


def test_a_usage_error_is_one_line(run):
    code, out, err = run("compare", "--topk", "1")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert tells(line, "--topk")
    assert line.endswith(" compare --help)")


def test_an_unknown_command_is_one_line(run):
    code, out, err = run("compar")
    assert (code, out) == (2, "")
    assert one_line(err, "compar")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("rank", "num_lines"), [("0", 1), ("1", 0)])
def test_under_torchrun_only_rank_0_tells_of_a_mistake(
    comparison, run, monkeypatch, rank, num_lines
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    code, out, err = run("compare", "none.toml")
    assert (code, out, err.count("\n")) == (2, "", num_lines)
    assert ("none.toml" in err) == bool(num_lines)


def test_under_torchrun_every_rank_tells_of_a_dead_one(comparison, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    comparison.error = RankError("rank 0 died in layer 2, experts")
    assert run("compare") == (1, "", "expertlane: error: rank 0 died in layer 2, experts\n")


def test_an_error_moves_no_cursor(comparison, run):
    comparison.error = CapacityError("\x1b]0;title\x07\u202ename\x9b2J")
    err = run("compare")[2]
    assert err.splitlines()[1:] == ["expertlane: error: \\x1b]0;title\\x07\\u202ename\\x9b2J"]
    comparison.calls.clear()
    comparison.error = RankError("rank 3 failed")
    comparison.error.add_note("Traceback:\n\tit was \x1b[31mme")
    assert run("compare")[2].splitlines()[1:-1] == ["Traceback:", "\tit was \\x1b[31mme"]
    assert "\\x1b[31m" in run("compare", "\x1b[31m.toml")[2]


def test_progress_moves_no_cursor(capsys):
    with progress_on_stderr() as progress:
        progress.task("\x1b[31mEP", 1)
        progress.done()
    assert capsys.readouterr().err.startswith("\\x1b[31mEP: done in ")


def test_a_name_that_is_too_long(run):
    name = "x" * 5000
    code, out, err = run("generate", "paper-tiny", "--token-ids", "1", "--record-routing", name)
    assert (code, out) == (2, "")
    assert len(err) < 200
    assert one_line(err, "File name too long")
    assert "xxx" in err
