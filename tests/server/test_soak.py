"""The soak of `server/soak.py` and the kills of `server/journal_kills.py`, in small."""

import pytest

from server.journal_kills import PART, run_part, table
from server.soak import LAYOUTS, soak


def check(chatty, tmp_path, layout, dtype, number, part):
    counts = soak(
        chatty, layout, range(number), seed=7, dtype=dtype, part=part, log=tmp_path / "log"
    )
    assert sum(counts[kind] for kind in ("answered", "refused", "left", "late")) == number
    assert counts["left"] >= number / 8
    assert counts["refused"] >= number / 50
    for kind in ("regex", "choice", "json_schema"):
        assert counts[f"complete {kind}"] >= number / 200
    assert counts["rebalances"] > 0 or "--rebalance-steps" not in LAYOUTS[layout]
    if dtype == "float32":
        assert counts["compared"] >= number / 2
    return counts


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_500_requests(chatty, tmp_path, layout):
    assert check(chatty, tmp_path, layout, "float32", 500, 100)["preemptions"] > 0


@pytest.mark.full
def test_500_requests_in_bfloat16(chatty, tmp_path):
    check(chatty, tmp_path, "dp=2,ep=2", "bfloat16", 500, 100)


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
