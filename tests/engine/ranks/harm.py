"""Runs in which a drawn rank dies or stops at a drawn moment of an exchange.

As a command: `python -m engine.ranks.harm FILE --to 1000`. It goes on where FILE ends.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

from distributed.running import LONG, LONG_MODEL, deployment, run_deployment
from engine.ranks.harmed_ranks import (
    ALL_KINDS,
    Happened,
    Harm,
    build_harmed_messages,
    install,
)
from engine.ranks.processes import session_is_gone, wait_until
from expertlane.engine.ops.backend import backend_of_cpu
from expertlane.engine.ranks import fork_server, local_ranks
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import RankError

TIMEOUT_S = 2.0
_DEPLOYMENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tp=2", {}),
    ("dp=2,ep=2", {}),
    ("pp=2", {}),
    ("dp=3,ep=3", {"overlap": True}),
    ("tp=4", {}),
    ("dp=4,ep=4", {"overlap": True}),
    ("dp=4,ep=2", {"dispatch": "all_gather"}),
    ("dp=2,tp=2,ep=4", {}),
    ("pp=2,tp=2", {"num_micro_batches": 2, "micro_batch_schedule": "rotating"}),
    ("pp=2,dp=2,ep=2", {"num_micro_batches": 2}),
    ("pp=4", {"num_micro_batches": 4, "micro_batch_schedule": "rotating"}),
    ("replicas=2,dp=2,ep=2", {}),
    ("tp=8", {}),
    ("dp=8,ep=8", {}),
    ("dp=8,ep=8", {"dispatch": "hierarchical"}),
    ("pp=2,dp=2,tp=2,ep=4", {"num_micro_batches": 2}),
)
_RANKS_PER_NODE = 4  # as they are counted, and for the hierarchical form
_HEAPS = (64 << 20, 1 << 14, 1 << 12)  # bytes; of the smaller ones, messages take pieces, and wait


@dataclass(frozen=True)
class Draw:
    """A run, and what happens in it.

    Attributes:
        deployment: the place of one in the list.
        heap_bytes: for the messages of each rank.
    """

    deployment: int
    heap_bytes: int
    harm: Harm

    @staticmethod
    def of(number: int) -> "Draw":
        """The draw of a number."""
        random = np.random.default_rng([34, number])  # the first 18 hold all kinds
        chosen = int(random.integers(len(_DEPLOYMENTS)))
        num_ranks = deployment(_DEPLOYMENTS[chosen][0]).layout.world_size
        harm = Harm(
            rank=int(random.integers(num_ranks)),
            number=int(random.choice([signal.SIGKILL, signal.SIGSTOP])),
            exchange=int(random.integers(1, 120)),
            kind=str(random.choice(ALL_KINDS)),
            num_before=int(random.integers(12)),
            delay_us=int(random.integers(3000)),
        )
        return Draw(chosen, int(random.choice(_HEAPS)), harm)

    def __str__(self) -> str:
        layout, options = _DEPLOYMENTS[self.deployment]
        named = [layout, *(f"{name}={value}" for name, value in options.items())]
        harm = self.harm
        name = signal.Signals(harm.number).name
        return (
            f"{name} to rank {harm.rank} of {' '.join(named)}, heap {self.heap_bytes}: "
            f"exchange {harm.exchange}, {harm.kind} {harm.num_before}"
        )


class ForkedServer:
    """As a `Popen` of the fork server, without another import of torch: a fork of this process.

    Args:
        prepare: is called in it, before it forks ranks.
    """

    def __init__(
        self, prepare: Any, command: Sequence[str], *, pass_fds: Sequence[int], **_: object
    ) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.dup2(2, 1)
                for fd in map(int, os.listdir("/proc/self/fd")):
                    if fd > 2 and fd not in pass_fds:
                        with contextlib.suppress(OSError):
                            os.close(fd)
                prepare()
                sys.argv[1:] = command[-1:]
                fork_server.main()
                code = 0
            finally:
                os._exit(code)

    def wait(self, timeout_s: float) -> int:
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        raise subprocess.TimeoutExpired("the fork server", timeout_s)


def files_and_names() -> set[str]:
    """What could be left over: this process's files, and names in shared and temporary folders."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    temporary = [n for n in os.listdir(tempfile.gettempdir()) if n.startswith("expertlane-")]
    files = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the list
            files.add(f"fd {fd} of {os.readlink(f'/proc/self/fd/{fd}')}")
    return {*names, *temporary, *files}


def _until_it_ends(draw: Draw, prepare: Any) -> tuple[str, str, int]:
    """Run a deployment until a rank is missing.

    Returns:
        the error, where the harmed rank was, and the fork server's process.
    """
    layout, options = _DEPLOYMENTS[draw.deployment]
    chosen = deployment(layout, **options)
    popen = SimpleNamespace(
        Popen=partial(ForkedServer, prepare),
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    with mock.patch.object(local_ranks, "subprocess", popen):
        ranks = LocalRanks(chosen.layout.world_size, TIMEOUT_S, "float32")
    with RankPool(ranks, TIMEOUT_S) as pool:
        try:
            run_deployment(pool, LONG_MODEL, chosen, LONG, ranks_per_node=_RANKS_PER_NODE)
            line = "no error"
        except RankError as error:
            line = str(error)
    return line, str(pool.position(draw.harm.rank)), ranks._server.pid


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        wrong: what was not as it should be.
        took_s: from the harm to the end of everything; None if none was done.
        is_late: whether the rank came to no such moment, so that another one had to do.
    """

    wrong: list[str]
    took_s: float | None = None
    is_late: bool = False


def run(draw: Draw, library: Path) -> Outcome:
    """Run a draw."""
    harm, happened, before = draw.harm, Happened(), files_and_names()
    prepare = partial(install, harm, happened, library, draw.heap_bytes)
    line, position, server_pid = _until_it_ends(draw, prepare)
    if not happened.time_ns.value:
        return Outcome([f"no harm was done: {line}"])
    took_s = time.monotonic() - happened.time_ns.value / 1e9
    wrong = []
    if harm.number == signal.SIGKILL:
        how = "was killed by SIGKILL (by someone, or by the system for lack of memory)"
        wanted, least_s = f"rank {harm.rank} {how} in {position}; all ranks were ended", 0.0
    else:
        how = f"(its process is stopped): no progress for {TIMEOUT_S:g} s; all ranks were ended"
        wanted, least_s = f"rank {harm.rank} hung in {position} {how}", TIMEOUT_S
    if line != wanted:
        wrong.append(f"said {line!r}, not {wanted!r}")
    if not least_s <= took_s < least_s + 10:
        wrong.append(f"ended after {took_s:.2f} s")
    if not session_is_gone(server_pid, seconds=60):
        wrong.append("a process is left")
    gc.collect()
    if not wait_until(lambda: files_and_names() <= before):
        wrong.append(f"left: {sorted(files_and_names() - before)}")
    return Outcome(wrong, round(took_s, 3), bool(happened.is_late.value))


def read(file: Path) -> list[dict[str, Any]]:
    """The lines so far, by number; the last one may be half written."""
    text = file.read_bytes() if file.exists() else b""
    lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
    return sorted(lines, key=lambda line: line["number"])


def remaining(file: Path, first: int, end: int) -> list[int]:
    """Numbers of the runs that are not in the file yet; a half-written last line is cut off."""
    lines = read(file)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {line["number"] for line in lines}
    return [number for number in range(first, end) if number not in done]


def numbered(num_runs: int, num_quick: int) -> list[Any]:
    """Numbers of runs for `parametrize`; those of `make test` come first."""
    full = (pytest.param(number, marks=pytest.mark.full) for number in range(num_quick, num_runs))
    return [*range(num_quick), *full]


def asked_for(request: pytest.FixtureRequest) -> int:
    """Runs that the tests of a file ask for, by their parameter `number`."""
    items = (each for each in request.session.items if each.path == request.path)
    return 1 + max(each.callspec.params["number"] for each in items if hasattr(each, "callspec"))


@contextlib.contextmanager
def lines_of(command: Sequence[str], file: Path, patience_s: float) -> Iterator[Any]:
    """While a command adds lines to a file: what gives the line of a run that has ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    found: dict[int, dict[str, Any]] = {}

    def line(number: int) -> dict[str, Any]:
        def is_there() -> bool:
            found.update((each["number"], each) for each in read(file))
            return number in found or process.poll() is not None

        wait_until(is_there, seconds=patience_s, pause_s=0.1)  # runs take seconds
        return found[number]

    yield line
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_each(numbers: Sequence[int], library: Path | None, file: Path) -> None:
    """Run draws, and add a line to the file after each."""
    for number in numbers:
        draw = Draw.of(number)
        line: dict[str, object] = {"number": number, "what": str(draw)}
        if library is None:
            line["skipped"] = "no C++ compiler"
        else:
            line |= run(draw, library)._asdict()
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")


def arguments_of(doc: str | None, end: int) -> argparse.ArgumentParser:
    """The arguments of a command that runs numbered cases and adds a line to a file after each."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("file", type=Path, help="takes a line for each case that has ended")
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first")
    parser.add_argument("--to", type=int, default=end, dest="end", help="one past the last's")
    parser.add_argument("--at-once", type=int, default=2, help="cases under way at a time")
    return parser


def in_workers(numbers: Sequence[int], at_once: int, run_each: Callable[..., None]) -> bool:
    """Have processes run a part of the numbers each; gives whether all ended well."""
    backend_of_cpu()  # loads our kernels, once for all ranks
    workers, own_pid = [], os.getpid()
    for worker in range(at_once):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                fork_server._end_with_server(own_pid)
                run_each(numbers[worker::at_once])
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        workers.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in workers]
    return not any(statuses)


def main() -> None:
    arguments = arguments_of(__doc__, 1000).parse_args()
    file = arguments.file
    numbers = remaining(file, arguments.first, arguments.end)
    with tempfile.TemporaryDirectory() as folder:
        library = build_harmed_messages(Path(folder))
        has_run = in_workers(
            numbers, arguments.at_once, lambda numbers: run_each(numbers, library, file)
        )
    failed = [each for each in read(file) if each.get("wrong")]
    print(f"{len(read(file))} runs, {len(failed)} failed")
    for each in failed:
        print(f"{each['number']}: {each['what']}: {'; '.join(each['wrong'])}")
    sys.exit(1 if failed or not has_run else 0)


if __name__ == "__main__":
    main()
