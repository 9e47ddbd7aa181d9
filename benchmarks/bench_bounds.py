"""What one hostile request costs a server: memory, and how long others wait.

    PYTHONPATH=src:tests python benchmarks/bench_bounds.py [--only NAME…] [--rounds 3]

Each body of tests/server/hostile.py is sent to `expertlane serve` once per round. Meanwhile another
process asks for `/health` every 2 ms. Printed are by how much the longest of these waits exceeds
the longest one without any other request, and how far the server's memory grew while it had the
body.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import psutil
from model.chat_checkpoint import save_chat_checkpoint

from server.hostile import MUCH, TOO_MUCH

QUIET_S, PAUSE_S, LIMIT_S = 2.0, 0.002, 120.0
CASES = TOO_MUCH | MUCH
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@contextmanager
def server() -> Iterator[tuple[psutil.Process, str]]:
    """The front process of a server, and its address."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_chat_checkpoint(Path(folder), TEMPLATE)
        command = [sys.executable, "-m", "expertlane", "serve", str(checkpoint), "--port", "0"]
        process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            yield (
                psutil.Process(process.pid),
                json.loads(process.stdout.readline())["url"].removesuffix("/v1"),
            )
        finally:
            process.terminate()
            process.wait(LIMIT_S)


WATCH = """
import socket, sys, threading, time
ends, longest = threading.Event(), 0.0
threading.Thread(target=lambda: (sys.stdin.read(), ends.set()), daemon=True).start()
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    while not ends.is_set():
        began_s = time.perf_counter()
        connection.sendall(b"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        if longest == 0.0:
            print("asks", flush=True)
        longest = max(longest, time.perf_counter() - began_s)
        time.sleep(float(sys.argv[2]))
print(longest)
"""


@contextmanager
def watched(port: int) -> Iterator[list[float]]:
    """A list, which has the longest wait of `/health`, in seconds, once the block has ended."""
    found: list[float] = []
    command = [sys.executable, "-I", "-c", WATCH, str(port), str(PAUSE_S)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "asks\n"
        yield found
        found.append(float(process.communicate()[0]))


def peak_bytes(process: psutil.Process) -> int:
    """Most memory of a process since `forget_peak`."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def forget_peak(process: psutil.Process) -> None:
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[*CASES], choices=[*CASES])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    headers = {"Content-Type": "application/json"}
    rows = []
    with server() as (process, url), httpx.Client(timeout=LIMIT_S) as client:
        port = httpx.URL(url).port
        assert port is not None
        with watched(port) as quiet:
            time.sleep(QUIET_S)
        for name in options.only:
            path, make, status = CASES[name]
            body = make()
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            waits, grown = [], []
            for _ in range(options.rounds):
                with watched(port) as longest:
                    before = process.memory_info().rss
                    forget_peak(process)
                    answer = client.post(f"{url}{path}", content=data, headers=headers)
                    assert answer.status_code == status, answer.text
                    grown.append(peak_bytes(process) - before)
                waits.append(longest[0] - quiet[0])
            rows.append(
                {
                    "request": name,
                    "body_MB": round(len(data) / 1e6, 1),
                    "wait_ms": round(1e3 * median(waits), 1),
                    "longest_wait_ms": round(1e3 * max(waits), 1),
                    "memory_MB": round(max(grown) / 1e6, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    found = {"benchmark": "bounds", "quiet_wait_ms": round(1e3 * quiet[0], 1), "requests": rows}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
