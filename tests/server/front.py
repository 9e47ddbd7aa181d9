"""`expertlane serve` in processes of its own, which can be killed, as can its ranks."""

import json
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from server.soak_client import SOAK_S

_MAIN = ("-c", "from expertlane.cli.main import main; main()")
KEPT = ("--reconnect-s", "300", "--block-size", "4", "--num-blocks", "512")


class Front:
    """A server of a checkpoint, in one process after another.

    Args:
        log: where its stderr goes.
        options: options of `expertlane serve`.
        program: what Python runs in place of the command.

    Attributes:
        url: without `/v1`.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        *options: str,
        layout: str = "dp=2,ep=2",
        port: int = 0,
        program: Sequence[str] = _MAIN,
    ) -> None:
        self._command = [sys.executable, "-P", *program, "serve", str(folder), *options, "--json"]
        self._command += ["--layout", layout, "--port", str(port), "--served-model-name", "tiny"]
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def process(self) -> psutil.Process:
        """The process that serves."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    @property
    def said(self) -> str:
        """The end of what it wrote to stderr."""
        return self._log.read_text()[-3000:]

    def start(self) -> None:
        """Wait until it takes requests.

        Raises:
            AssertionError: it ends before.
        """
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.said
        self.url = json.loads(line)["url"].removesuffix("/v1")

    def kill_rank(self, dice: random.Random) -> bool:
        """Kill a rank; False if there is none yet."""
        with suppress(psutil.NoSuchProcess):
            ranks = [rank for server in self.process.children() for rank in server.children()]
            if ranks:
                dice.choice(ranks).kill()
                return True
        return False

    def kill(self) -> None:
        """Kill it, as a system does that has no memory left."""
        assert self._process is not None
        self._process.kill()
        self._wait()

    def end(self) -> None:
        """End it as a user does.

        Raises:
            AssertionError: it does not end well.
        """
        assert self._process is not None
        self._process.terminate()
        assert self._wait() == 0, self.said

    def _wait(self) -> int:
        assert self._process is not None
        code = self._process.wait(SOAK_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
