"""A server that is killed and started again, and ranks of it."""

import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from server.soak_client import SOAK_S

LAYOUT = "dp=2,ep=2"
_MAIN = "from expertlane.cli.main import main; main()"


class Front:
    """`expertlane serve` at one port, in one process after another."""

    def __init__(self, folder: Path, journal: Path, log: Path, port: int) -> None:
        self._command = [sys.executable, "-P", "-c", _MAIN, "serve", str(folder)]
        self._command += ["--layout", LAYOUT, "--dtype", "float32", "--port", str(port), "--json"]
        self._command += ["--served-model-name", "tiny", "--journal", str(journal)]
        self._command += ["--reconnect-s", "300", "--block-size", "4", "--num-blocks", "512"]
        self._log = log.open("a")
        self._process: subprocess.Popen[str] | None = None

    @property
    def said(self) -> str:
        """The end of what it wrote to stderr."""
        return Path(self._log.name).read_text()[-3000:]

    def start(self) -> None:
        """Wait until it takes requests.

        Raises:
            AssertionError: it ends before.
        """
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.said

    def kill_rank(self, dice: random.Random) -> bool:
        """As somebody else; gives whether there is one yet."""
        with suppress(psutil.NoSuchProcess):
            assert self._process is not None
            servers = psutil.Process(self._process.pid).children()
            ranks = [rank for server in servers for rank in server.children()]
            if ranks:
                dice.choice(ranks).kill()
                return True
        return False

    def kill(self) -> None:
        """As the system does that has no memory left."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def end(self) -> None:
        """As a user does.

        Raises:
            AssertionError: it does not end well.
        """
        assert self._process is not None
        self._process.terminate()
        code = self._process.wait(SOAK_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()
        assert code == 0, self.said


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
