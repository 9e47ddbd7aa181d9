"""A rank that dies or stops at a drawn moment of an exchange; a thousand: `engine/harm.py`."""

import os
import signal

import pytest

from engine.ranks.harm import Draw, asked_for, lines_of, numbered, read, remaining
from engine.ranks.harmed_ranks import ALL_KINDS

NUM_RUNS, NUM_QUICK, NUM_AT_ONCE = 30, 6, 3


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Gives a run's line when the run has ended."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no unnamed shared memory")
    file = tmp_path_factory.mktemp("harm") / "runs.jsonl"
    command = [
        "engine.ranks.harm",
        str(file),
        "--to",
        str(asked_for(request)),
        "--at-once",
        str(NUM_AT_ONCE),
    ]
    with lines_of(command, file, patience_s=280) as line:
        yield line


@pytest.mark.parametrize("number", numbered(NUM_RUNS, NUM_QUICK))
def test_a_rank_that_is_killed_or_stopped_is_named_and_nothing_is_left(runs, number):
    line = runs(number)
    if "skipped" in line:
        pytest.skip(line["skipped"])
    assert line["wrong"] == [], line


def test_what_is_drawn_covers_all():
    draws = [Draw.of(number) for number in range(NUM_RUNS)]
    assert {draw.harm.kind for draw in draws} == set(ALL_KINDS)
    assert {draw.harm.number for draw in draws} == {signal.SIGKILL, signal.SIGSTOP}
    assert len({draw.deployment for draw in draws}) > 10


def test_runs_go_on_where_the_file_ends(tmp_path):
    file = tmp_path / "runs.jsonl"
    assert remaining(file, 0, 3) == [0, 1, 2]
    file.write_text('{"number": 1}\n{"number": 0}\n{"numb')
    assert remaining(file, 0, 4) == [2, 3]
    with file.open("a") as lines:
        lines.write('{"number": 2}\n')
    assert [line["number"] for line in read(file)] == [0, 1, 2]
