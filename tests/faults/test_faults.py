"""No request is lost and no token changes when a rank is; 312 cases: `python -m faults.runs`."""

import os

import pytest

from faults.draws import KINDS, LAYOUTS, MOMENTS, NUM_CASES, TRANSPORTS, draw, places
from faults.numbered import asked_for, lines_of, numbered

NUM_RUNS, NUM_QUICK = 30, 2


@pytest.fixture(scope="module")
def lines(request, tmp_path_factory):
    """Gives a case's line when it has ended."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no unnamed shared memory")
    file = tmp_path_factory.mktemp("faults") / "runs.jsonl"
    command = ["faults.runs", str(file), "--to", str(asked_for(request))]
    with lines_of(command, file, patience_s=280) as line:
        yield line


@pytest.mark.parametrize("number", numbered(NUM_RUNS, NUM_QUICK))
def test_every_request_ends_as_if_nothing_had_happened(lines, number):
    line = lines(number)
    assert line["wrong"] == [], line
    assert line.get("left_out", 0) <= 0.02 * line["num_tokens"]


def test_all_cases_hold_every_pair():
    chosen = places()
    assert len(chosen) == len(set(chosen)) == NUM_CASES
    pairs = {(kind, moment) for kind, moment, _, _ in chosen}
    assert len(pairs) == len(KINDS) * len(MOMENTS)
    assert {(kind, layout) for kind, _, layout, _ in chosen} == {
        (kind, layout) for kind in range(len(KINDS)) for layout in range(len(LAYOUTS))
    }


def test_the_runs_hold_all_kinds():
    cases = [draw(number) for number in range(NUM_RUNS)]
    assert {case.faults[-1].kind for case in cases} == set(KINDS)
    assert {case.transport for case in cases} == set(TRANSPORTS)
    assert len({case.layout for case in cases}) > 8
    assert len({case.moment for case in cases}) > 15
