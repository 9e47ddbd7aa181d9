"""The soak of `server/soak.py` and the kills of `server/journal_kills.py`, in small."""

import pytest

from server.journal_kills import PART, run_part, table
from server.soak import LAYOUTS, soak


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_500_requests(chatty, tmp_path, layout):
    number = 500
    counts = soak(chatty, layout, range(number), seed=7, part=100, log=tmp_path / "log")
    assert sum(counts[kind] for kind in ("answered", "refused", "left", "late")) == number
    assert counts["left"] >= number / 8
    assert counts["refused"] >= number / 50
    assert counts["compared"] >= number / 2
    for kind in ("regex", "choice", "json_schema"):
        assert counts[f"complete {kind}"] >= number / 200
    assert counts["rebalances"] > 0 or "--rebalance-steps" not in LAYOUTS[layout]
    assert counts["preemptions"] > 0


def check_kills(folder, parts):
    """Nothing lost, nothing twice: `run_part` says so; and there was something to lose."""
    done = [run_part(folder, 1, number, num_kills) for number, num_kills in enumerate(parts)]
    print("\n".join(table(done)))
    assert sum(kill.resumed for part in done for kill in part.kills) >= 2 * sum(parts)
    assert all(part.counts["reconnects"] for part in done)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_50_kills(chatty):
    check_kills(chatty, [PART] * 5)
