"""Time slowed down: each rank gets a share q of a core, so that many ranks have "a core each".

A rank's threads are in a cgroup of its own, whose CPU time the kernel limits to a quota a period
(CFS bandwidth control, cgroup v1). The quota is the least that the kernel takes, 1 ms, and the
period 1 ms / q: what a rank computes takes 1/q as long. A rank that has waited finds a whole quota
unused, so of what follows a wait, up to 1 ms runs undilated; hence pieces of work between two waits
should be much longer than that.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import network
from network import NAME, JudgeError, end_with_parent

CONTROLLER = Path("/sys/fs/cgroup/cpu")
ROOT = CONTROLLER / NAME
QUOTA_US = 1000  # the kernel's least
RANK_SHARES, MOST_SHARES = 1024, 262_144  # of the cores that ranks and other processes want
CHECKED_S, CHECKED_WAIT_S, CHECKED_TIMES = (0.01, 0.02, 0.04), 0.1, 10


class Dilation:
    """A group for all that is started, and one inside it for each rank."""

    def __init__(self, num_ranks: int) -> None:
        self._groups = [ROOT / f"rank{rank}" for rank in range(num_ranks)]

    def make(self) -> None:
        """Make the groups; ranks run at full speed at first."""
        if not (CONTROLLER / "cpu.shares").exists():
            raise JudgeError(f"no cgroup v1 controller at {CONTROLLER}; this needs its quotas")
        for group in (ROOT, *self._groups):
            group.mkdir(exist_ok=True)
        self.end()

    def place(self, pids: Sequence[int]) -> None:
        """Put each of these processes, with all its threads, into a rank's group."""
        for group, pid in zip(self._groups, pids, strict=True):
            (group / "cgroup.procs").write_text(str(pid))

    def place_ranks(self) -> None:
        """The same for the ranks: whoever of us has a socket on a data link, whoever started it.

        Raises:
            JudgeError: there are more or fewer of them than ranks.
        """
        pids = (ROOT / "cgroup.procs").read_text().split()
        found = [int(pid) for pid in pids if network.uses_data_link(int(pid))]
        if len(found) != len(self._groups):
            raise JudgeError(f"{len(self._groups)} ranks, but {len(found)} processes use data0")
        self.place(found)

    def begin(self, share: float) -> None:
        """From now on each rank has `share` of a core; 1 for no limit. Others come after them."""
        (ROOT / "cpu.shares").write_text(str(MOST_SHARES))
        for group in self._groups:
            if share < 1:
                (group / "cpu.cfs_period_us").write_text(str(round(QUOTA_US / share)))
                (group / "cpu.cfs_quota_us").write_text(str(QUOTA_US))

    def end(self) -> None:
        """Ranks run as fast as they can, beside others."""
        for group in self._groups:
            (group / "cpu.cfs_quota_us").write_text("-1")
        (ROOT / "cpu.shares").write_text(str(RANK_SHARES * len(self._groups)))


def join() -> None:
    """For `preexec_fn`: all that the process starts can be found in the group, and ends with us."""
    (ROOT / "cgroup.procs").write_text(str(os.getpid()))
    end_with_parent()


def remove_all() -> None:
    """Kill what is left in the groups and remove them."""
    groups = [*ROOT.glob("rank*"), ROOT] if ROOT.is_dir() else []
    until = time.monotonic() + 10
    for group in groups:
        while (pids := (group / "cgroup.procs").read_text().split()) and time.monotonic() < until:
            for pid in map(int, pids):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        group.rmdir()


def check(share: float) -> list[dict[str, float]]:
    """How long a purely computing process takes under a share, against 1/share of its CPU time.

    `ratio` is 1 where dilation is exact; of work without a break, and of work after a wait.
    """
    dilation = Dilation(1)
    dilation.make()
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=join,
        start_new_session=True,
    )
    dilation.place([process.pid])
    dilation.begin(share)
    out, _ = process.communicate(timeout=120)
    dilation.end()
    rows = []
    for line in out.splitlines():
        work_s, wait_s, *walls = map(float, line.split())
        ratios = [wall * share / work_s for wall in walls]
        mean, spread = statistics.mean(ratios), statistics.stdev(ratios)
        rows.append({"share": share, "work_s": work_s, "wait_s": wait_s})
        rows[-1] |= {"ratio": mean, "spread": spread}
    return rows


def _wall_s(work_s: float) -> float:
    began, until = time.perf_counter(), time.thread_time() + work_s
    while time.thread_time() < until:
        pass
    return time.perf_counter() - began


def _measure(cases: Sequence[tuple[float, float]]) -> None:
    time.sleep(0.3)  # until it is placed
    for work_s, wait_s in cases:
        walls = []
        for _ in range(CHECKED_TIMES):
            walls.append(_wall_s(work_s))
            time.sleep(wait_s)
        print(work_s, wait_s, *walls)


if __name__ == "__main__":
    _measure([(work_s, wait_s) for wait_s in (0, CHECKED_WAIT_S) for work_s in CHECKED_S])
