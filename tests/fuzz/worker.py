"""Runs command lines, each in a process of its own with limits on memory and time.

A process that has everything imported reads cases from its standard input, a JSON object a line,
forks for each, and answers with what came of it. Ranks are never started.
"""

import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path

MEMORY_BYTES = 2 * 10**9
CPU_SECONDS = 20  # of its own: other programs may have the cores
SECONDS = 120.0  # on the clock, for what waits and computes nothing


def _no_ranks(*args: object, **options: object) -> object:
    from expertlane.errors import CapacityError

    raise CapacityError("no ranks are started here")


def _import_all() -> None:
    """What commands import when they run, so that no case waits for it."""
    import expertlane.cli.app
    import expertlane.cli.main
    import expertlane.comparison.projection
    import expertlane.comparison.run
    import expertlane.engine.launch
    import expertlane.engine.llm
    import expertlane.planner.results
    import expertlane.planner.search
    import expertlane.report.html
    import expertlane.report.markdown
    import expertlane.report.terminal
    import expertlane.results.file
    import expertlane.simulator.results

    expertlane.engine.launch.start_pool = _no_ranks  # type: ignore[assignment]
    expertlane.engine.llm.start_pool = _no_ranks  # type: ignore[assignment]


def _run(arguments: list[str], folder: Path) -> None:
    """In a forked child: never returns."""
    from expertlane.cli.main import main

    os.chdir(folder)
    for stream, name in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    sys.argv = ["expertlane", *arguments]
    code = 70  # as if a traceback had been printed; it is, below
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> int | None:
    """The exit code; None where it had to be killed."""
    descriptor = os.pidfd_open(child)
    try:
        is_done = bool(select.select([descriptor], [], [], SECONDS)[0])
    finally:
        os.close(descriptor)
    if not is_done:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if is_done else None


def main() -> None:
    """Answer until standard input ends."""
    _import_all()
    print("ready", flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        folder, started = Path(case["folder"]), time.monotonic()
        child = os.fork()
        if child == 0:
            _run(case["arguments"], folder)
        code = _wait(child)
        answer = {"code": code, "seconds": time.monotonic() - started}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
