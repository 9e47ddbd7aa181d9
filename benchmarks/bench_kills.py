"""A server under a steady open load while its ranks are killed again and again.

    python benchmarks/bench_kills.py [--layout dp=2,ep=2] [--every-s 10] [--minutes 10] [--rate 3]

Starts `expertlane serve paper-small --on-failure replace`, sends it requests at a rate
(`expertlane bench --url`), first for a quarter of the time with nothing else, then with a rank,
drawn at random, killed (SIGKILL) every so many seconds. Prints both loads, what was lost, how
memory, descriptors and processes of the server changed from the first kill to the last, and whether
anything is left in /dev/shm or as a zombie; then one JSON line.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from expertlane import __version__

MODEL, PROMPT_LEN, OUTPUT_LEN = "paper-small", 32, 32
# What is told of a load, and where it is.
_FACTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "requests": lambda load: str(load["num_requests"]),
    "failed": lambda load: str(load["client"]["num_failed"]),
    "output tokens": lambda load: str(load["num_output_tokens"]),
    "output tokens/s": lambda load: f"{load['output_tps']['value']:.1f}",
    "TTFT p50, p99 ms": lambda load: _percentiles(load["ttft_s"]),
    "ITL p50, p99 ms": lambda load: _percentiles(load["itl_s"]),
}


def _percentiles(times: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{1e3 * times[name]['value']:.0f}" for name in ("median", "p99"))


def expertlane(*arguments: str) -> list[str]:
    """A command line of this Python's expertlane."""
    return [sys.executable, "-m", "expertlane", *arguments]


class Served:
    """A server of its own, and what its processes hold."""

    def __init__(self, layout: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = expertlane("serve", MODEL, "--layout", layout, "--port", str(port))
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--on-failure", "replace"], stdout=file, stderr=file
            )
        self.front = psutil.Process(self.process.pid)
        until_s = time.monotonic() + 120
        while not self._is_healthy():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < until_s, "it does not start"
            time.sleep(0.1)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def ranks(self) -> list[psutil.Process]:
        """Of the one fork server, whose children they are."""
        return [rank for server in self.front.children() for rank in server.children()]

    def holds(self) -> dict[str, int]:
        """Memory, descriptors and processes now."""
        servers = self.front.children()
        every = [self.front, *servers, *self.ranks()]
        return {
            "front_rss_bytes": self.front.memory_info().rss,
            "front_descriptors": self.front.num_fds(),
            "fork_server_rss_bytes": sum(each.memory_info().rss for each in servers),
            "fork_server_descriptors": sum(each.num_fds() for each in servers),
            "processes": len(every),
            "zombies": sum(each.status() == psutil.STATUS_ZOMBIE for each in every),
        }


def load(url: str, rate: float, seconds: float, out: str) -> dict[str, Any]:
    """Requests at a rate for some time, by a client of its own."""
    number = str(max(1, round(rate * seconds)))
    command = expertlane(
        *("bench", "--url", url, "--rate", str(rate), "--num-requests", number, "--json"),
        *("--prompt-len", str(PROMPT_LEN), "--output-len", str(OUTPUT_LEN), "--out", out),
    )
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    serving: dict[str, Any] = json.loads(answer.stdout)["deployments"][0]["serving"][0]
    return serving


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--layout", default="dp=2,ep=2")
    parser.add_argument("--every-s", type=float, default=10.0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=3.0, help="requests per second")
    given = parser.parse_args()
    shm = set(os.listdir("/dev/shm"))
    drawn, is_over, kills = random.Random(0), threading.Event(), 0
    with tempfile.TemporaryDirectory() as folder:
        served = Served(given.layout, Path(folder) / "server.log")
        calm = load(served.url, given.rate, given.minutes * 15, f"{folder}/calm")
        before = served.holds()

        def kill_each() -> None:
            nonlocal kills
            while not is_over.wait(given.every_s):
                if ranks := served.ranks():
                    drawn.choice(ranks).kill()
                    kills += 1

        thread = threading.Thread(target=kill_each)
        thread.start()
        disturbed = load(served.url, given.rate, given.minutes * 60, f"{folder}/kills")
        is_over.set()
        thread.join()
        time.sleep(given.every_s)
        after = served.holds()
        every = [served.front, *served.front.children(recursive=True)]
        served.process.send_signal(signal.SIGTERM)
        code = served.process.wait(60)
        _, alive = psutil.wait_procs(every, timeout=5)
    found = {
        "benchmark": "kills",
        "version": __version__,
        "layout": given.layout,
        "kills": kills,
        "calm": calm,
        "disturbed": disturbed,
        "before": before,
        "after": after,
        "exit_code": code,
        "left": [str(each) for each in alive],
        "left_in_shm": sorted(set(os.listdir("/dev/shm")) - shm),
    }
    shown = Table("", "before", "after")
    for name, value in before.items():
        shown.add_row(name, f"{value:,}", f"{after[name]:,}")
    loads = Table("", "calm", "with kills")
    for name, get in _FACTS.items():
        loads.add_row(name, get(calm), get(disturbed))
    console = Console()
    console.print(
        f"{kills} ranks killed, one every {given.every_s:g} s; {disturbed['client']['num_failed']} "
        f"of {disturbed['num_requests']} requests failed"
    )
    console.print(loads, shown)
    console.print(f"left: {found['left'] or 'no process'}, {found['left_in_shm'] or 'no file'}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
