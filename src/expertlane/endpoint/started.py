"""A server of an engine, started here to be drilled."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from expertlane.client.connection import Url
from expertlane.comparison.engines.engine import CannotServe, LaunchCommand
from expertlane.comparison.served import HOST, EngineLauncher, free_port, is_ready
from expertlane.comparison.server_process import ServerProcess
from expertlane.endpoint.processes import processes
from expertlane.errors import UserError
from expertlane.spec.deployment import Deployment


@dataclass(frozen=True)
class StartedServer:
    """A server that is ready.

    Attributes:
        root: its first process.
        start_s: seconds that it took to start.
        log: file with its output.
    """

    url: Url
    root: int
    start: LaunchCommand
    start_s: float
    log: Path


@contextmanager
def started(
    engines: EngineLauncher, deployment: Deployment, folder: Path, timeout_s: float
) -> Iterator[StartedServer]:
    """Start a deployment's server in a folder; it is ended with all that it started.

    What it leaves behind if it dies is left until then.

    Raises:
        UserError: its engine does not run it.
        ServerError: it did not start in time.
    """
    port = free_port()
    try:
        start = engines.start(deployment, port)
    except CannotServe as error:
        raise UserError(f"--engine {engines.engine.name}: {error}") from None
    url = Url(HOST, port, False, "")
    with ServerProcess(start.argv, start.environment, folder, start.files) as process:
        path = engines.engine.ready_path
        start_s = process.wait_until(lambda: is_ready(url, path), timeout_s)
        process.linger()
        children = [e.pid for e in processes().values() if e.parent == process.guard_pid]
        yield StartedServer(url, min(children, default=0), start, start_s, process.log)
