"""The kills of `server/journal_kills.py`: two of them, and 50 in the long tests."""

import pytest

from server.journal_kills import PART, run_part, table


def check(folder, parts):
    """Nothing lost, nothing twice: `run_part` says so; and there was something to lose."""
    done = [run_part(folder, 1, number, num_kills) for number, num_kills in enumerate(parts)]
    print("\n".join(table(done)))
    assert sum(kill.resumed for part in done for kill in part.kills) >= 2 * sum(parts)
    assert all(part.counts["reconnects"] for part in done)


@pytest.mark.full
def test_two_kills(chatty):
    check(chatty, [2])


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_50_kills(chatty):
    check(chatty, [PART] * 5)
