"""A rank is lost at a drawn moment: the others leave the epoch, and the next one is right.

Ranks are real processes, which check every row (`epoch_ranks.py`): one of an earlier epoch would be
another one.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.comm.epoch_ranks import KINDS, LAST_EPOCH, NUM_RANKS

_TIMEOUT_S = 120.0  # far below the bound on waits: ranks leave since the epoch has ended


@pytest.mark.smoke(1)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_leave_an_epoch_and_go_on_in_the_next(kind):
    """One is killed or stopped, twice with another one late, and once while the epoch begins."""
    seeds = ["1", "2", "3"]
    ran = subprocess.run(
        [sys.executable, "-m", "engine.comm.epoch_ranks", kind, *seeds],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    assert ran.returncode == 0, ran.stderr
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    if "skipped" in results[0]:
        pytest.skip(results[0]["skipped"])
    assert len(results) == len(seeds), ran.stderr
    for result in results:
        assert result["codes"] == [0] * NUM_RANKS, ran.stderr
        check(result, shares_memory=kind not in ("gloo", "native"))


def check(result, *, shares_memory):
    everyone = set(range(NUM_RANKS))
    for epoch in range(LAST_EPOCH):
        harm = result["harms"][epoch]
        left = [each for each in result["left"] if each["left"] == epoch]
        survivors = everyone - {harm["rank"]}
        ranks = {each["rank"] for each in left}
        assert ranks <= survivors if harm["step"] < 0 else ranks == survivors  # or never joined
        for each in left:  # a broken connection is noticed earlier
            assert each["error"] in ("EpochEndedError", "PeerLostError")
            assert (
                each["rank"] != harm["late"]
                or harm["step"] < 0
                or each["error"] == "EpochEndedError"
            )
    joined = {(each["rank"], each["joined"]): each for each in result["joined"]}
    assert {rank for rank, epoch in joined if epoch == LAST_EPOCH} == everyone
    for (rank, epoch), each in joined.items():
        assert each["num_mapped"] == int(shares_memory), (rank, epoch, "old memory stays")
