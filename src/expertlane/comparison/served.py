"""One server, started here or running already: measured, and its record.

Servers are measured by the requests of `client`. If an engine cannot run a deployment, or its
server fails, its record has the reason.
"""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertlane.client.connection import (
    ClosedEarly,
    ConnectionFailed,
    Connections,
    Url,
)
from expertlane.client.measure import Round, Stop, load_record
from expertlane.client.run import (
    MeasureOptions,
    Target,
    check_answered,
    headers_of,
    one_round,
    run_until_told,
    warm_up,
)
from expertlane.client.server import (
    PROBE_S,
    Server,
    Unreachable,
    Vocabulary,
    find_server,
    flush_caches,
)
from expertlane.comparison.engines.engine import CannotServe, Engine, LaunchCommand
from expertlane.comparison.server_process import ServerError, ServerProcess, command_line
from expertlane.errors import UserError
from expertlane.printable import printable
from expertlane.progress import Progress
from expertlane.results.record import (
    EXPERIMENT,
    DeploymentRecord,
    ServerRecord,
)
from expertlane.spec.deployment import Deployment
from expertlane.spec.workload import Load

HOST = "127.0.0.1"
_MOST_VALUE = 200  # letters of a setting
_READY_S = 5.0  # timeout of one readiness request
_FOLDER = re.compile(r"[^A-Za-z0-9._=-]+")


@dataclass(frozen=True)
class EngineLauncher:
    """An engine, and the commands of its servers.

    Attributes:
        start: gives the command of a deployment's server at a port.
    """

    engine: Engine
    start: Callable[[Deployment, int], LaunchCommand]


@dataclass(frozen=True)
class Setting:
    """Conditions that all servers of a comparison share.

    Attributes:
        load: the experiment's workload.
        asked: how requests are sent.
        start_timeout_s: seconds in which a server must become ready.
        folder: folder with one subfolder for each server, in which it runs and logs.
        kv_tokens: tokens that engines' commands set KV caches to; None for their own choice.
        server_cores, client_cores: cores of servers that are started here, and those that the
            client has for itself; empty for all, and for none.
    """

    load: Load
    asked: MeasureOptions
    start_timeout_s: float
    folder: Path
    progress: Progress
    kv_tokens: int | None = None
    server_cores: tuple[int, ...] = ()
    client_cores: tuple[int, ...] = ()


@dataclass(eq=False)
class MeasuredServer:
    """A server of a comparison, and its measurements.

    Attributes:
        name: its name in results.
        up: holds the server that runs now, if it was started here.
        deployment: None for a server whose layout is unknown.
        engines: None for a server that runs already.
        target: the server's address; None until it is started.
        rounds: completed rounds, in order.
        failure: why it is not measured any more; empty while it is.
        measured_s: seconds of all rounds.
        start_s: seconds of each start until the server was ready.
        seen: the server as the client found it last.
        started: its command; None for a server that runs already.
        log: its log file.
        settings: settings that it tells, if it runs already; None unless it is SGLang.
        is_unflushed: whether its prefix cache could not be emptied, though that was asked.
    """

    name: str
    setting: Setting
    up: "RunningServer"
    deployment: Deployment | None = None
    engines: EngineLauncher | None = None
    target: Target | None = None
    rounds: list[Round] = field(default_factory=list, init=False)
    failure: str = field(default="", init=False)
    measured_s: float = field(default=0.0, init=False)
    start_s: list[float] = field(default_factory=list, init=False)
    seen: Server | None = field(default=None, init=False)
    started: LaunchCommand | None = field(default=None, init=False)
    log: Path | None = field(default=None, init=False)
    settings: Mapping[str, Any] | None = field(default=None, init=False)
    is_unflushed: bool = field(default=False, init=False)

    @property
    def folder(self) -> Path:
        """Folder in which its server runs."""
        return self.setting.folder / (_FOLDER.sub("-", self.name).strip("-") or "server")

    @property
    def num_runs(self) -> int:
        """Number of completed rounds."""
        return len(self.rounds)

    @property
    def is_over(self) -> bool:
        """True once it has failed."""
        return bool(self.failure)

    @property
    def tps(self) -> float:
        """Output tokens per second of all rounds; 0 where none was answered."""
        serving = load_record(self.setting.load, self.rounds, ())
        return 0.0 if serving is None else serving.output_tps.value

    def measure(self, *, deploy: bool) -> None:
        """Run one more round of the workload; an error is stored in `failure`.

        Args:
            deploy: unused; the server is started if it does not run.
        """
        setting, load = self.setting, self.setting.load
        number = self.num_runs
        again = f", round {number + 1}" if number else ""
        setting.progress.task(f"{self.name}{again}", load.num_requests)
        try:
            is_new = self.up.ensure(self) or number == 0
            found = self._round(number, is_new=is_new)
            self.rounds.append(found)
            self.measured_s += found.driven.wall_s
        except (CannotServe, ServerError) as error:
            self.failure = str(error)
            self.up.stop()
        except (Unreachable, UserError) as error:
            self.failure = f"{error}{self.up.end_of(self)}"
            self.up.stop()
        finally:
            setting.progress.done()

    def _round(self, number: int, *, is_new: bool) -> Round:
        assert self.target is not None, "it is up"
        return run_until_told(self._measured(self.target, number, is_new=is_new))

    async def _measured(self, target: Target, number: int, *, is_new: bool) -> Round:
        setting, asked, stop = self.setting, self.setting.asked, Stop()
        async with self.session(target) as server:
            self.seen = server
            if is_new:
                await warm_up(server, setting.load, asked, 0, stop)
            if asked.flushes_caches and not await flush_caches(server.connections):
                self.is_unflushed = True
            found = await one_round(server, setting.load, asked, 0, number, stop, setting.progress)
            check_answered([found.driven], server)
            return found

    @asynccontextmanager
    async def session(self, target: Target) -> AsyncIterator[Server]:
        """The server as the client sees it."""
        asked, connections = self.setting.asked, Connections(target.url, headers_of(target))
        try:
            found = await find_server(
                *(connections, target.model, asked.tokenizer or self.up.vocabulary),
                is_chat=asked.is_chat,
                timeout_s=min(PROBE_S, asked.timeout_s),
            )
            self.up.vocabulary = found.vocabulary  # so that all get the same prompts
            yield found
        finally:
            connections.close()

    def record(self) -> DeploymentRecord:
        """The deployment's record: its measurements, or the reason of its failure."""
        deployment, setting = self.deployment, self.setting
        serving = load_record(setting.load, self.rounds, setting.asked.slos)
        started = self.started
        return DeploymentRecord(
            name=self.name,
            layout=None if deployment is None else deployment.layout,
            options=None if deployment is None else deployment.options,
            source="measured",
            is_baseline=deployment is not None and deployment.is_baseline,
            roles=(EXPERIMENT,),
            serving=() if serving is None else (serving,),
            server=ServerRecord(
                engine=self.engines.engine.title if self.engines else "",
                software=self.seen.software if self.seen else "",
                deployment="" if deployment is None else deployment.name,
                command=command_line(started.argv, started.environment) if started else "",
                files=dict(started.files) if started else {},
                url=str(self.target.url) if self.target and self.seen else "",
                start_s=tuple(self.start_s),
                failure=self.failure,
                log=str(self.log) if self.log else "",
                kv_tokens=self.seen.watch.kv_tokens if self.seen and self.seen.watch else None,
                settings={
                    name: printable(str(value))[:_MOST_VALUE]
                    for name, value in (self.settings or {}).items()
                    if value is not None
                },
            ),
        )


class RunningServer:
    """The server that was started here and runs now; there is at most one. A context manager.

    Attributes:
        vocabulary: token ids of all prompts, from the first server that was measured.
    """

    def __init__(self) -> None:
        self.vocabulary: Vocabulary | None = None
        self._served: MeasuredServer | None = None
        self._process: ServerProcess | None = None

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ensure(self, served: MeasuredServer) -> bool:
        """Start a deployment's server unless it runs; return whether it was started.

        Raises:
            CannotServe: the engine cannot run the deployment.
            ServerError: the server did not become ready.
        """
        engines, deployment, setting = served.engines, served.deployment, served.setting
        if engines is None:
            self.stop()  # no server runs here while one at a URL is measured
            return False
        if served is self._served:
            return False
        assert deployment is not None, "what is started has a layout"
        self.stop()
        port = free_port()
        start = served.started = engines.start(deployment, port)
        self._process = ServerProcess(
            *(start.argv, start.environment, served.folder, start.files),
            setting.server_cores if setting.client_cores else (),
        )
        self._served, served.log = served, self._process.log
        url = Url(HOST, port, False, "")
        path = engines.engine.ready_path
        served.start_s.append(
            self._process.wait_until(lambda: is_ready(url, path), setting.start_timeout_s)
        )
        served.target = Target(url)
        return True

    def stop(self) -> None:
        """Stop the server and all its descendants."""
        process, self._process, self._served = self._process, None, None
        if process is not None:
            process.stop()

    def end_of(self, served: MeasuredServer) -> str:
        """Exit status and last error of a server, after a semicolon; empty if there is neither."""
        if served is not self._served or self._process is None:
            return ""
        status = self._process.exit_status_soon()
        words = self._process.errors()
        if status is not None:
            return f"; it ended, {self._process.end_of(status)}"
        return f"; its log: {words}" if words else ""


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def is_ready(url: Url, path: str) -> bool:
    """True if a server answers a path with status 200 within `_READY_S`."""

    async def ask() -> bool:
        connections = Connections(url, {})
        try:
            async with asyncio.timeout(_READY_S):
                return (await connections.ask("GET", path)).status == 200
        except (ConnectionFailed, ClosedEarly, TimeoutError):
            return False
        finally:
            connections.close()

    return run_until_told(ask())
