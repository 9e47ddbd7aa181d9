"""An experiment's deployments as servers, started here or running already, measured in turns.

Servers are measured from outside, by the requests of `client`. One that is started here has the
machine to itself: it is started for its turn, and has ended when the next one starts. What an
engine does not run, or dies of, is a record with its last words; the others go on.
"""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp

import uvloop

from expertlane.client.connection import (
    ClosedEarly,
    ConnectionFailed,
    Connections,
    Url,
    error_message,
)
from expertlane.client.measure import Round, Stop, load_record, ratios
from expertlane.client.run import (
    Asked,
    Target,
    allow_connections,
    check_answered,
    headers_of,
    one_round,
    warm_up,
)
from expertlane.client.server import PROBE_S, Server, Unreachable, Vocabulary, find_server
from expertlane.comparison.engines.engine import CannotServe, Engine, Start
from expertlane.comparison.server_process import ServerError, ServerProcess, command_line
from expertlane.comparison.traces.torch_trace import read_step_causes, steps_record
from expertlane.comparison.turns import Repeats, measure_in_turns
from expertlane.errors import ExpertlaneError, UserError
from expertlane.progress import Progress
from expertlane.results.hardware import own_cores, this_machine
from expertlane.results.record import (
    EXPERIMENT,
    DeploymentRecord,
    ServerRecord,
    StepsRecord,
    choose_compared,
)
from expertlane.results.results import Results
from expertlane.spec.deployment import Deployment
from expertlane.spec.experiment import Experiment
from expertlane.spec.files import strict_json
from expertlane.spec.names import Phase
from expertlane.spec.workload import LengthRange, Load, Workload

HOST = "127.0.0.1"
_FEW_CORES = 4
_TRACED_LEN = 8  # output tokens of a traced request
_READY_S = 5.0  # that one question whether a server is ready may take
_FOLDER = re.compile(r"[^A-Za-z0-9._=-]+")


@dataclass(frozen=True)
class Engines:
    """How an engine's servers are started.

    Attributes:
        start: the start of a deployment's server at a port.
    """

    engine: Engine
    start: Callable[[Deployment, int], Start]


@dataclass(frozen=True)
class Setting:
    """Conditions that all servers of a comparison share.

    Attributes:
        load: the experiment's workload.
        asked: how requests are sent.
        start_timeout_s: seconds until a server that is started must be ready.
        folder: where servers run, each in a folder of its own with its log.
    """

    load: Load
    asked: Asked
    start_timeout_s: float
    folder: Path
    progress: Progress


@dataclass(eq=False)
class Served:
    """A deployment on a server, and what was measured of it.

    Attributes:
        name: its name in results.
        deployment: None for a server whose layout is not known.
        engines: None for a server that runs already.
        target: the server; None while it is not started.
        rounds: those that were answered, in order.
        failure: why it is not measured any more; empty while it is.
        steps: a step's time by cause, where it was profiled.
        why_no_causes: why there are none; empty where nothing kept it from them.
    """

    name: str
    setting: Setting
    up: "_Up"
    deployment: Deployment | None = None
    engines: Engines | None = None
    target: Target | None = None
    rounds: list[Round] = field(default_factory=list, init=False)
    failure: str = field(default="", init=False)
    measured_s: float = field(default=0.0, init=False)
    start_s: list[float] = field(default_factory=list, init=False)
    seen: Server | None = field(default=None, init=False)
    started: Start | None = field(default=None, init=False)
    log: Path | None = field(default=None, init=False)
    steps: Sequence[StepsRecord] = field(default=(), init=False)
    why_no_causes: str = field(default="", init=False)

    @property
    def folder(self) -> Path:
        """Where its server runs."""
        return self.setting.folder / (_FOLDER.sub("-", self.name).strip("-") or "server")

    @property
    def num_runs(self) -> int:
        """Rounds that were answered."""
        return len(self.rounds)

    @property
    def is_over(self) -> bool:
        """True if it failed."""
        return bool(self.failure)

    def measure(self, *, deploy: bool) -> None:
        """Put the workload on it once more; a failure is kept in `failure`."""
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
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._measured(self.target, number, is_new=is_new))

    async def _measured(self, target: Target, number: int, *, is_new: bool) -> Round:
        setting, asked, stop = self.setting, self.setting.asked, Stop()
        async with self._server(target) as server:
            self.seen = server
            if is_new:
                await warm_up(server, setting.load, asked, 0, stop)
            found = await one_round(server, setting.load, asked, 0, number, stop, setting.progress)
            check_answered([found.driven], server)
            return found

    @asynccontextmanager
    async def _server(self, target: Target) -> AsyncIterator[Server]:
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

    def profile(self) -> None:
        """Trace a short load by torch's profiler, in a server of its own: profiling slows it.

        What keeps it from that is kept in `why_no_causes`.
        """
        engines, setting = self.engines, self.setting
        if engines is None or self.failure:
            return
        setting.progress.task(f"{self.name}, profiled", 1)
        try:
            folder = _new_folder(self.folder)
            if not self.up.ensure(self, traces=folder):
                self.why_no_causes = f"{engines.engine.title} writes no torch profiler traces"
                return
            assert self.target is not None, "it is up"
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._traced(self.target, engines.engine.profile_request(folder)))
            causes = read_step_causes(sorted(folder.rglob("*.json*")))
            self.steps = [*filter(None, (steps_record(causes, each) for each in Phase))]
        except (CannotServe, ServerError, Unreachable, UserError) as error:
            self.why_no_causes = f"{error}{self.up.end_of(self)}"
        finally:
            self.up.stop()
            setting.progress.done()

    async def _traced(self, target: Target, fields: Mapping[str, object]) -> None:
        """Put a short load on the server between the beginning and the end of a trace."""
        setting, stop = self.setting, Stop()
        output_len = min(_TRACED_LEN, setting.load.output_len.low)
        short = replace(setting.load, output_len=LengthRange(output_len, output_len))
        async with self._server(target) as server:
            await warm_up(server, short, setting.asked, 0, stop)
            connections = server.connections
            await _post(connections, "/start_profile", fields)
            number = self.num_runs  # requests that no round had
            found = await one_round(server, short, setting.asked, 0, number, stop, Progress())
            await _post(connections, "/stop_profile", {})
            check_answered([found.driven], server)

    def record(self) -> DeploymentRecord:
        """Its record: of all rounds, or of why there are none."""
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
            steps=tuple(self.steps),
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
            ),
        )


class _Up:
    """The one server that was started here and runs, if any; used as a context manager.

    Attributes:
        vocabulary: tokens of all prompts: those that the first server told.
    """

    def __init__(self) -> None:
        self.vocabulary: Vocabulary | None = None
        self._served: Served | None = None
        self._process: ServerProcess | None = None

    def __enter__(self) -> "_Up":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ensure(self, served: Served, traces: Path | None = None) -> bool:
        """Start a deployment's server if it does not run; gives whether it was started now.

        Args:
            traces: start it anew, to write torch profiler traces there; it is not started if it
                cannot.

        Raises:
            CannotServe: its engine does not run it.
            ServerError: it did not start.
        """
        engines, deployment, setting = served.engines, served.deployment, served.setting
        if engines is None:
            self.stop()  # so that nothing else runs on this machine
            return False
        if served is self._served and traces is None:
            return False
        assert deployment is not None, "what is started has a layout"
        self.stop()
        port = free_port()
        start = engines.start(deployment, port)
        if traces is None:
            served.started = start
        elif (profiled := engines.engine.profiled(start, traces)) is None:
            return False
        else:
            start = profiled
        self._process = ServerProcess(start.argv, start.environment, served.folder, start.files)
        self._served, served.log = served, self._process.log
        url = Url(HOST, port, False, "")
        path = engines.engine.ready_path
        start_s = self._process.wait_until(lambda: is_ready(url, path), setting.start_timeout_s)
        if traces is None:
            served.start_s.append(start_s)
        served.target = Target(url)
        return True

    def stop(self) -> None:
        """End the server, with all that it started."""
        process, self._process, self._served = self._process, None, None
        if process is not None:
            process.stop()

    def end_of(self, served: Served) -> str:
        """How a server that has ended did so, after a semicolon; empty while it runs."""
        if served is not self._served or self._process is None:
            return ""
        status = self._process.exit_status_soon()
        words = self._process.last_error()
        if status is not None:
            return f"; it ended, {self._process.end_of(status)}"
        return f"; its log: {words}" if words else ""


async def _post(connections: Connections, path: str, fields: Mapping[str, object]) -> None:
    """Tell a server something.

    Raises:
        UserError: it refuses.
    """
    try:
        answer = await connections.ask("POST", path, strict_json(fields).encode())
    except (ConnectionFailed, ClosedEarly) as error:
        raise UserError(f"{path}: {error}") from None
    if answer.status != 200:
        raise UserError(f"{path}: HTTP {answer.status} {error_message(bytes(answer.body))}")


def _new_folder(within: Path) -> Path:
    """A folder without traces of an earlier run.

    Raises:
        UserError: it cannot be made.
    """
    try:
        within.mkdir(parents=True, exist_ok=True)
        return Path(mkdtemp(prefix="profile-", dir=within))
    except OSError as error:
        raise UserError(f"cannot write to {within}: {error.strerror}") from None


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def is_ready(url: Url, path: str) -> bool:
    """Whether a server answers 200 there, soon."""

    async def ask() -> bool:
        connections = Connections(url, {})
        try:
            async with asyncio.timeout(_READY_S):
                return (await connections.ask("GET", path)).status == 200
        except (ConnectionFailed, ClosedEarly, TimeoutError):
            return False
        finally:
            connections.close()

    return asyncio.run(ask())


def measure_servers(
    experiment: Experiment,
    engines: Sequence[Engines],
    targets: Mapping[str, Target],
    setting: Setting,
    repeats: Repeats,
    command: str,
    dtype: str,
    *,
    profile: bool = False,
) -> Results:
    """Measure the experiment's deployments on each engine, and servers that run already.

    Args:
        targets: servers that run already, by name; that of one of the experiment's deployments
            means that it has its layout.
        dtype: number type of weights that engines are asked for.
        profile: then trace each that was started here, for the causes of a step's time.

    Raises:
        UserError: two would have one name.
        ExpertlaneError: none could be measured; the text says why, of each.
    """
    allow_connections()
    with _Up() as up:
        own = [*_subjects(experiment, engines, targets, setting, up)]
        names = [each.name for each in own]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two servers would be called {twice[0]!r}; give --url another name")

        def choose() -> list[Served]:
            return _chosen([each for each in own if each.rounds])

        compared = measure_in_turns(own, repeats, choose)
        for each in own if profile else ():
            each.profile()
    if not any(each.rounds for each in own):
        reasons = "; ".join(f"{each.name}: {each.failure}" for each in own)
        raise ExpertlaneError(f"no deployment could be measured: {reasons}")
    answered = [each for each in compared if each.rounds]
    paired = [
        ratio
        for other in answered[1:]
        for ratio in ratios(
            *(setting.load, answered[0].rounds, other.rounds),
            (answered[0].name, other.name),
        )
    ]
    return Results.now(
        "comparison",
        command,
        {
            "experiment": experiment.question,
            "workload": _lengths(experiment.workload),
            "servers": len(own),
        },
        [each.record() for each in own],
        machine=this_machine(experiment.num_ranks, dtype) if engines else None,
        ratios=tuple(paired),
        cautions=tuple(_cautions(own)),
    )


def _subjects(
    experiment: Experiment,
    engines: Sequence[Engines],
    targets: Mapping[str, Target],
    setting: Setting,
    up: _Up,
) -> Iterator[Served]:
    deployments = {each.name: each for each in experiment.deployments}
    for name, target in targets.items():
        yield Served(name, setting, up, deployments.get(name), None, target)
    for each in engines:
        for deployment in experiment.deployments:
            name = deployment.name
            if len(engines) > 1 or name in targets:
                name = f"{each.engine.title} {name}"
            yield Served(name, setting, up, deployment, each)


def _chosen(answered: Sequence[Served]) -> list[Served]:
    """The fastest of each engine, in order of speed; of one engine by `choose_compared`."""
    records = [each.record() for each in answered]
    tps = [each.serving[0].output_tps.value for each in records]
    by_tps = sorted(range(len(answered)), key=lambda place: -tps[place])
    best: dict[Engine | None, Served] = {}
    for place in by_tps:
        engines = answered[place].engines
        best.setdefault(engines.engine if engines else None, answered[place])
    if len(best) > 1:
        return [*best.values()]
    return [answered[place] for place in choose_compared(records, tps)]


def _lengths(workload: Workload) -> dict[str, object]:
    """The question of a load, as `bench` has it."""
    return {
        "prompt_len": str(workload.prompt_len),
        "output_len": str(workload.output_len),
        "seed": workload.seed,
        "requests": None,
    }


def _cautions(own: Sequence[Served]) -> Iterator[str]:
    """Conditions that differ between servers, or that disturb them."""
    shares = [
        each.driven.cpu_s / each.driven.wall_s
        for served in own
        if served.engines is not None
        for each in served.rounds
        if each.driven.wall_s
    ]
    num_cores = len(own_cores())
    if shares and num_cores <= _FEW_CORES:
        yield (
            f"The client shares the {num_cores} cores with the servers, and uses "
            f"{max(shares):.0%} of one."
        )
    reasons: dict[str, list[str]] = {}
    for each in own:
        if each.why_no_causes:
            reasons.setdefault(each.why_no_causes, []).append(each.name)
    for why, names in reasons.items():
        yield f"No causes of {', '.join(names)}: {why}."
    forms = {each.seen.form for each in own if each.seen is not None}
    if len(forms) > 1:
        yield "Servers took requests in different forms, as texts or token ids."
