"""Health of a server: whether requests are computed or wait for ranks; `/health` and `/live`."""

import time
from typing import Any, Literal

from expertlane.engine.elastic.recovery import Recovery
from expertlane.engine.elastic.recovery_record import OVER, RecoveryKind
from expertlane.engine.engine import Engine
from expertlane.engine.rank_watch import RankWatch

PROBES = ("/health", "/ping")

Change = Literal["recovering", "scaling", "growing"]
CHANGES: dict[Change, str] = {
    "recovering": "Ranks were lost",
    "scaling": "The layout changes",
    "growing": "Lost ranks join again",
}
_CHANGE_OF: dict[RecoveryKind, Change] = {
    RecoveryKind.RECOVERY: "recovering",
    RecoveryKind.SCALING: "scaling",
    RecoveryKind.GROWTH: "growing",
}


def change_under_way(recovery: Recovery | None) -> Change | None:
    """The recovery or layout change that keeps requests waiting; None while they run."""
    if recovery is None or recovery.state in OVER:
        return None
    return _CHANGE_OF[recovery.records[-1].kind]


class Stall:
    """Detector of ranks that keep requests waiting for longer than a bound; used in one thread.

    Of ranks that should run it is the silence that `--timeout-s` bounds too; once they count as
    lost, or while the layout changes, the time that this takes. What begins with silence and goes
    on as a recovery is one stall.

    Args:
        watch: sees what ranks report; None where nothing is known of them.
        bound_s: a shorter wait is a pause, and no stall.
    """

    def __init__(self, engine: Engine[Any], watch: RankWatch | None, bound_s: float) -> None:
        self._recovery, self._watch, self._bound_s = engine.recovery, watch, bound_s
        self._was_seen = False

    def reason(self) -> str | None:
        """Why requests wait; None while they do not."""
        recovery = self._recovery
        change = change_under_way(recovery)
        if recovery is not None and change is not None:
            found = self._of_change(recovery, change)
        else:
            found = self._of_ranks()
        self._was_seen = found is not None
        return found

    def _of_ranks(self) -> str | None:
        silence = None if self._watch is None else self._watch.silence()
        return None if silence is None or silence.seconds <= self._bound_s else str(silence)

    def _of_change(self, recovery: Recovery, change: Change) -> str | None:
        record, seconds = recovery.records[-1], 0.0
        if record.moments and not record.is_over:  # else it begins right now
            seconds = time.monotonic() - record.moments[0].time_s
        if seconds <= self._bound_s and not self._was_seen:
            return None
        return f"{CHANGES[change]} ({recovery.state}): requests wait, for {seconds:.0f} s so far"
