"""Dilated time: each rank gets a share q of a core, so that many ranks run as if each had a core.

A rank's threads are in a cgroup of its own, whose CPU time the kernel limits to a quota per period
(CFS bandwidth control, cgroup v1). The quota is the smallest that the kernel takes, 1 ms, and the
period 1 ms / q: what a rank computes takes 1/q times as long. A rank that has waited has its whole
quota left, so up to 1 ms of work after a wait runs undilated; pieces of work between two waits
should be much longer than that.

A core that is mostly idle may also do less work in a second of CPU time, for example because its
caches are cold or the host of a virtual machine takes it away. Then the same work takes more CPU
time than without a limit, and more than 1/q times as long. `check` measures how much.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import network
import numpy as np
from network import NAME, JudgeError, end_with_parent

CONTROLLER = Path("/sys/fs/cgroup/cpu")
ROOT = CONTROLLER / NAME
QUOTA_US = 1000  # the kernel's least
RANK_SHARES, MOST_SHARES = 1024, 262_144  # cpu.shares: per rank, and at most
CHECKED_S, CHECKED_WAIT_S, CHECKED_TIMES = (0.01, 0.02, 0.04), 0.1, 10
CHECK_S, END_S = 120.0, 10.0  # at most, for a check, and until killed processes have ended


class Dilation:
    """A cgroup for all processes that are started, with one inside it for each rank."""

    def __init__(self, num_ranks: int) -> None:
        self._groups = [ROOT / f"rank{rank}" for rank in range(num_ranks)]

    def make(self) -> None:
        """Make the groups; ranks run at full speed at first."""
        if not (CONTROLLER / "cpu.shares").exists():
            raise JudgeError(
                f"no CPU controller of cgroup v1 at {CONTROLLER}; this needs its quotas"
            )
        for group in (ROOT, *self._groups):
            try:
                group.mkdir(exist_ok=True)
            except OSError as error:
                raise JudgeError(f"{group}: {error.strerror}") from None
        self.end()

    def place(self, pids: Sequence[int]) -> None:
        """Put each of these processes, with all its threads, into a rank's group."""
        for group, pid in zip(self._groups, pids, strict=True):
            (group / "cgroup.procs").write_text(str(pid))

    def place_ranks(self) -> None:
        """Put each rank, which is found by the name of its process, into its group.

        Raises:
            JudgeError: one of them is missing.
        """
        found = {}
        for pid in (ROOT / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                found[Path(f"/proc/{pid}/comm").read_text().strip()] = int(pid)
        names = [f"expertlane r{rank}" for rank in range(len(self._groups))]
        if missing := [name for name in names if name not in found]:
            raise JudgeError(f"no process is called {missing[0]}")
        self.place([found[name] for name in names])

    def check_links(self, num_ranks: int) -> None:
        """Check that the first ranks are connected to other nodes over the data links.

        Raises:
            JudgeError: one has no connection there, so what was measured is not the link.
        """
        for rank, group in enumerate(self._groups[:num_ranks]):
            pids = (group / "cgroup.procs").read_text().split()
            if not any(network.is_linked(int(pid)) for pid in pids):
                raise JudgeError(f"rank {rank} has no connection to another node over data0")

    def begin(self, share: float) -> None:
        """Give each rank `share` of a core (1: no limit), before all other processes."""
        (ROOT / "cpu.shares").write_text(str(MOST_SHARES))
        for group in self._groups:
            if share < 1:
                (group / "cpu.cfs_period_us").write_text(str(round(QUOTA_US / share)))
                (group / "cpu.cfs_quota_us").write_text(str(QUOTA_US))

    def end(self) -> None:
        """Lift the limits; ranks compete with other processes."""
        for group in self._groups:
            (group / "cpu.cfs_quota_us").write_text("-1")
        (ROOT / "cpu.shares").write_text(str(RANK_SHARES * len(self._groups)))


def join() -> None:
    """For `preexec_fn`: put the process and its children in the group; it ends with its parent."""
    (ROOT / "cgroup.procs").write_text(str(os.getpid()))
    end_with_parent()


def remove_all() -> None:
    """Kill what is left in the groups and remove them.

    Raises:
        JudgeError: a process does not end.
    """
    groups = [*ROOT.glob("rank*"), ROOT] if ROOT.is_dir() else []
    until = time.monotonic() + END_S
    for group in groups:
        while (pids := (group / "cgroup.procs").read_text().split()) and time.monotonic() < until:
            for pid in map(int, pids):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        try:
            group.rmdir()
        except OSError as error:
            raise JudgeError(f"{group}: {error.strerror}; its processes do not end") from None


def check(share: float) -> list[dict[str, float]]:
    """Checks of dilation with a process that only computes: a row per length of work and of wait.

    `ratio` is the wall time × share / CPU time: 1 where dilation is exact. `spread` is its standard
    deviation. `speed` is the work per second of CPU time, over that of a process without a limit.
    """
    rates = [rate for *_, rate in _checked(1.0)]
    alone = statistics.median(rates)
    rows = []
    for work_s, wait_s, walls, rate in _checked(share):
        ratios = [wall * share / work_s for wall in walls]
        mean, spread = statistics.mean(ratios), statistics.stdev(ratios)
        rows.append({"share": share, "work_s": work_s, "wait_s": wait_s})
        rows[-1] |= {"ratio": mean, "spread": spread, "speed": rate / alone}
    return rows


def _checked(share: float) -> list[tuple[float, float, list[float], float]]:
    """For each piece of work: CPU seconds, the wait after it, wall seconds, products per second."""
    dilation = Dilation(1)
    dilation.make()
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=join,
        start_new_session=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    dilation.place([process.pid])
    dilation.begin(share)
    try:
        out, _ = process.communicate(timeout=CHECK_S)
    except subprocess.TimeoutExpired:
        raise JudgeError(f"a process with {share:g} of a core took over {CHECK_S:g} s") from None
    dilation.end()
    found = []
    for line in out.splitlines():
        work_s, wait_s, rate, *walls = map(float, line.split())
        found.append((work_s, wait_s, walls, rate))
    return found


def _work(work_s: float) -> tuple[float, int]:
    """Multiply matrices for so much CPU time; returns wall seconds and the number of products."""
    rows, weights = np.ones((16, 128), np.float32), np.ones((128, 128), np.float32)
    began, until = time.perf_counter(), time.thread_time() + work_s
    num_products = 0
    while time.thread_time() < until:
        rows @ weights
        num_products += 1
    return time.perf_counter() - began, num_products


def _measure(cases: Sequence[tuple[float, float]]) -> None:
    time.sleep(0.3)  # until it is placed
    for work_s, wait_s in cases:
        walls, num_products = [], 0
        for _ in range(CHECKED_TIMES):
            wall_s, num = _work(work_s)
            walls.append(wall_s)
            num_products += num
            time.sleep(wait_s)
        print(work_s, wait_s, num_products / (CHECKED_TIMES * work_s), *walls)


if __name__ == "__main__":
    _measure([(work_s, wait_s) for wait_s in (0, CHECKED_WAIT_S) for work_s in CHECKED_S])
