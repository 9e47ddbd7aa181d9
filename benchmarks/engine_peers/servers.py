"""Servers on the same checkpoint: how each is started and ended, and what its processes take."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
from engine_peers.contender import ContenderError, instruction_limit, vllm_environment

NAME = "served"
START_TIMEOUT_S = 600.0
END_TIMEOUT_S = 60.0


class CpuSeconds(NamedTuple):
    """Processor time: of the front's main thread, of its others, and of all other processes."""

    main: float
    others: float
    ranks: float

    def since(self, before: "CpuSeconds") -> "CpuSeconds":
        """What was added."""
        return CpuSeconds(*(now - then for now, then in zip(self, before, strict=True)))


@dataclass
class Server:
    """A server that takes requests.

    Attributes:
        front: the process that speaks HTTP.
        first_token_s: from its start until it had given a first token.
    """

    name: str
    url: str
    front: psutil.Process
    first_token_s: float

    def cpu_seconds(self) -> CpuSeconds:
        """Processor time so far."""
        main, others = _threads(self.front.pid)
        children = self.front.children(recursive=True)
        return CpuSeconds(main, others, sum(sum(_threads(child.pid)) for child in children))


def _threads(pid: int) -> tuple[float, float]:
    """Seconds on a processor, of a process's main thread and of its others."""
    main = others = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        if task.name == str(pid):
            main = seconds
        else:
            others += seconds
    return main, others


@contextmanager
def serving(
    name: str, checkpoint: Path, num_cores: int, vllm_python: Path | None, cpu_isa: str | None
) -> Iterator[Server]:
    """Start a server and wait for its first token; it is ended in the end.

    Args:
        name: `ours:LAYOUT`, perhaps with `,OPTION` after it, or `vllm:CORES`, where CORES is
            `auto` for its own choice, or those that it computes on, as `0,1`.

    Raises:
        ContenderError: it does not start.
    """
    kind, _, option = name.partition(":")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    environment |= instruction_limit(cpu_isa)
    environment.pop("OMP_NUM_THREADS", None)
    if kind == "vllm":
        if vllm_python is None:
            raise ContenderError(f"{name}: no --vllm-python")
        command = _vllm_command(vllm_python, checkpoint)
        environment |= vllm_environment(vllm_python, checkpoint, num_cores, 1)
        environment["VLLM_CPU_OMP_THREADS_BIND"] = option
    else:
        layout, *more = option.split(",--")
        command = [sys.executable, "-m", "expertlane", "serve", str(checkpoint)]
        command += ["--layout", layout, "--served-model-name", NAME]
        command += [part for each in more for part in f"--{each}".split("=", 1)]
    log = checkpoint.parent / f"serve-{name.translate(str.maketrans(':,=', '---'))}.log"
    with log.open("wb") as file:
        began_s = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=file, stderr=file, env=environment
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for_token(url, process, log)
        yield Server(name, url, psutil.Process(process.pid), time.perf_counter() - began_s)
    finally:
        _end(process)


def _vllm_command(python: Path, checkpoint: Path) -> list[str]:
    # Its command line asks for metadata of a package `vllm`, which the CPU's package is not.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(checkpoint), "--served-model-name", NAME, "--host", "127.0.0.1"]
    return [*command, "--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "256"]


def _wait_for_token(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    body = {"model": NAME, "prompt": [300, 301, 302], "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise ContenderError(f"it ended with status {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as answer:
                json.load(answer)
                return
        except urllib.error.HTTPError as error:
            raise ContenderError(f"{error}: {error.read()[:300]!r}; see {log}") from None
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise ContenderError(f"no token in {START_TIMEOUT_S:.0f} s; see {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in psutil.wait_procs(tree, timeout=10)[1]:
        child.kill()
    process.wait()
