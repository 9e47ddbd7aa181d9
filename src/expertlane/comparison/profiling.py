"""The passes of `compare --profile`: a step's time by cause, and which experts are chosen.

Both are apart from the measured rounds, since they slow a server. Causes come from traces of
torch's profiler. Routing comes from SGLang's expert distribution recorder
(python/sglang/srt/entrypoints/http_server.py, python/sglang/srt/eplb/expert_distribution.py), whose
file `balance` reads.
"""

import os
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any

from expertlane.balance.engine_routing import read_routing
from expertlane.client.connection import (
    ClosedEarly,
    ConnectionFailed,
    Connections,
    error_message,
)
from expertlane.client.measure import Stop
from expertlane.client.run import check_answered, one_round, run_until_told, warm_up
from expertlane.client.server import RECORDER, Unreachable
from expertlane.comparison.engines.engine import CannotServe, Engine
from expertlane.comparison.served import EngineLauncher, MeasuredServer, RoutingFile
from expertlane.comparison.server_process import ServerError
from expertlane.comparison.traces.torch_trace import read_step_causes, steps_record
from expertlane.errors import UserError
from expertlane.progress import Progress
from expertlane.spec.files import strict_json
from expertlane.spec.names import Phase
from expertlane.spec.workload import LengthRange, Load

_TRACED_LEN = 8  # output tokens of a traced request
_LOOK_S = 2.0  # between looks at files that are being written
_APPEAR_S = 120.0  # until files must have appeared
_GUESSED_S = 10.0  # the same where the folder is a guess
_TRACES, _RECORDS = "**/*.json*", "expert_distribution_recorder_*.pt"
_ROUTES = tuple(f"/{word}_expert_distribution_record" for word in ("start", "stop", "dump"))
_Post = tuple[str, Mapping[str, object]]  # a route, and JSON fields
_USUAL_RANKS = 8  # to plan for where a server has one
_LOOPBACK = "127.0.0.1", "localhost", "::1"


def profile_steps(served: MeasuredServer) -> None:
    """Trace a short load with torch's profiler, in a new server if it is started here.

    An error is stored in `why_no_causes`.
    """
    if served.failure:
        return
    with _pass_of(served, "profiled", "why_no_causes"):
        engines = served.engines
        paths = _traces_of_url(served) if engines is None else _traces(served, engines)
        if paths is not None:
            causes = read_step_causes(paths)
            served.steps = [*filter(None, (steps_record(causes, each) for each in Phase))]


def record_routing(servers: Sequence[MeasuredServer]) -> None:
    """Record which experts a round of the load chooses, where a server can: SGLang.

    Of servers that are started here, one of each engine, with the most expert-parallel ranks:
    what a model chooses does not depend on the layout. An error is stored in `why_no_routing`.
    """
    own: dict[Engine, MeasuredServer] = {}
    for each in servers:
        if each.failure:
            continue
        if each.engines is None:
            with _pass_of(each, "routing", "why_no_routing"):
                _record_of_url(each)
            continue
        before = own.setdefault(each.engines.engine, each)
        if _num_ranks(each) > _num_ranks(before):
            own[each.engines.engine] = each
    for engine, each in own.items():
        with _pass_of(each, "routing", "why_no_routing"):
            _record_of_engine(each, engine)


@contextmanager
def _pass_of(served: MeasuredServer, name: str, reason: str) -> Iterator[None]:
    """A pass over one server, which is stopped after it; its error becomes a reason."""
    progress = served.setting.progress
    progress.task(f"{served.name}, {name}", 1)
    try:
        yield
    except (CannotServe, ServerError, Unreachable, UserError) as error:
        setattr(served, reason, f"{error}{served.up.end_of(served)}")
    finally:
        served.up.stop()
        progress.done()


# Causes


def _traces(served: MeasuredServer, engines: EngineLauncher) -> Sequence[Path] | None:
    """Traces of a server that is started for them; None where it writes none."""
    folder = _new_folder(served.folder, "profile-")
    if not served.up.ensure(served, partial(engines.engine.profiled, folder=folder)):
        served.why_no_causes = f"{engines.engine.title} cannot write torch profiler traces"
        return None
    _trace(served, engines.engine.profile_request(folder))
    return _files_in(folder, _TRACES)


def _traces_of_url(served: MeasuredServer) -> Sequence[Path] | None:
    """Traces that appear in the folder of a server that runs already; None without one."""
    if served.traces is None:
        served.why_no_causes = (
            "its traces are on its own disk; if that can be read here, give --traces "
            f"{served.name}=DIR"
        )
        return None
    before = set(_files_in(served.traces, _TRACES))
    served.up.ensure(served)  # ends a server that was started here
    _trace(served, {"with_stack": False})
    return _new_files(served.traces, _TRACES, before)


def _trace(served: MeasuredServer, fields: Mapping[str, object]) -> None:
    """Run a short load between start and stop of a trace.

    Args:
        fields: JSON fields of the request that starts the trace.
    """
    load = served.setting.load
    output_len = min(_TRACED_LEN, load.output_len.low)
    short = replace(load, output_len=LengthRange(output_len, output_len))
    ends: tuple[_Post, _Post] = ("/start_profile", fields), ("/stop_profile", {})
    run_until_told(_between(served, short, served.num_runs, *ends))


async def _between(
    served: MeasuredServer,
    load: Load,
    number: int,
    start: _Post,
    stop: _Post,
    *then: _Post,
) -> None:
    """Run a load once between two POSTs, each with its JSON fields.

    Args:
        number: its round, a further one, so that prompts are new.
        then: POSTs after these two, if the load was served.
    """
    assert served.target is not None, "it is up"
    asked, told = served.setting.asked, Stop()
    async with served.session(served.target) as server:
        await warm_up(server, load, asked, 0, told)
        await _post(server.connections, *start)
        try:
            found = await one_round(server, load, asked, 0, number, told, Progress())
        finally:
            await _post(server.connections, *stop)
        check_answered([found.driven], server)
        for each in then:
            await _post(server.connections, *each)


# Routing


def _record_of_engine(served: MeasuredServer, engine: Engine) -> None:
    """Start a server that can record, and record; nothing where its engine cannot."""
    folder = _new_folder(served.folder, "routing-")
    if not served.up.ensure(served, partial(engine.recorded, folder=folder)):
        folder.rmdir()
        return
    _record(served)
    served.routing = _routing_file(_new_files(folder, _RECORDS, ()), _num_ranks(served), 0)


def _record_of_url(served: MeasuredServer) -> None:
    """Record on a server that runs already; nothing where it is not SGLang.

    Some versions of SGLang end where a record is started without its recorder: they are not asked.
    """
    assert served.target is not None, "it runs"
    settings = served.settings
    if settings is None:
        return
    if settings.get(RECORDER) is None:
        served.why_no_routing = (
            "start SGLang with --expert-distribution-recorder-mode stat to record it"
        )
        return
    folder, timeout_s = served.traces, _APPEAR_S
    if folder is None and served.target.url.host in _LOOPBACK:
        folder, timeout_s = Path(gettempdir()), _GUESSED_S  # SGLang's default
    before = set() if folder is None else set(_files_in(folder, _RECORDS))
    served.up.ensure(served)  # ends a server that was started here
    _record(served)
    ranks = _num_ranks(served) or _number(settings, "ep_size") or _number(settings, "tp_size")
    nodes = _number(settings, "nnodes")
    found: Sequence[Path] = ()
    if folder is not None:
        with suppress(UserError):
            found = _new_files(folder, _RECORDS, before, timeout_s)
    served.routing = _routing_file(found, ranks, nodes)


def _record(served: MeasuredServer) -> None:
    """Record one round of the load, and have the server write the record."""
    posts: list[_Post] = [(route, {}) for route in _ROUTES]
    run_until_told(_between(served, served.setting.load, served.num_runs + 1, *posts))


def _routing_file(paths: Sequence[Path], num_ranks: int, num_nodes: int) -> RoutingFile:
    """The last of the records, and the command that plans a placement for the server's ranks.

    Args:
        paths: none if the record is on the server's own disk.
        num_nodes: 0 if it is not known.

    Raises:
        UserError: it has no routing, or is damaged.
    """
    ranks = num_ranks if num_ranks > 1 else _USUAL_RANKS
    words = ["expertlane", "balance", "FILE.pt", "--ep", str(ranks)]
    num_redundant = ranks
    path = max(paths, key=lambda each: each.stat().st_mtime_ns, default=None)
    if path is not None:
        words[2] = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
        # SGLang's slots are as many on each rank: ep_size divides physical experts.
        num_redundant = -read_routing(path).num_experts % ranks or ranks
    if num_nodes > 1 and ranks % num_nodes == 0:
        words += ["--ranks-per-node", str(ranks // num_nodes)]
    words += ["--num-redundant-experts", str(num_redundant)]
    return RoutingFile(shlex.join(words), path)


def _num_ranks(served: MeasuredServer) -> int:
    """Ranks that experts are, or could be, spread over; 0 if the layout is unknown."""
    if served.deployment is None:
        return 0
    layout = served.deployment.layout
    return layout.ep if layout.ep > 1 else layout.stage_size


def _number(settings: Mapping[str, Any], name: str) -> int:
    """A size in a server's settings; 0 if it is not above 1."""
    value = settings.get(name)
    return value if type(value) is int and 1 < value < 2**16 else 0


# Requests and files


async def _post(connections: Connections, path: str, fields: Mapping[str, object]) -> None:
    """POST fields as JSON.

    Raises:
        UserError: the server does not answer, or not with status 200.
    """
    try:
        answer = await connections.ask("POST", path, strict_json(fields).encode())
    except (ConnectionFailed, ClosedEarly) as error:
        raise UserError(f"{path}: {error}") from None
    if answer.status != 200:
        raise UserError(f"{path}: HTTP {answer.status} {error_message(bytes(answer.body))}")


def _files_in(folder: Path, pattern: str) -> list[Path]:
    """Files by a pattern, in order."""
    return sorted(folder.glob(pattern))


def _size(path: Path) -> int:
    """Bytes of a file; 0 of one that is gone, as one that was renamed."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _new_files(
    folder: Path, pattern: str, before: Collection[Path], timeout_s: float | None = None
) -> list[Path]:
    """Files that appear in a folder, once they are whole: some engines answer before.

    Raises:
        UserError: none does.
    """
    sizes: dict[Path, int] = {}
    timeout_s = _APPEAR_S if timeout_s is None else timeout_s
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        now = {path: _size(path) for path in _files_in(folder, pattern) if path not in before}
        if now and now == sizes:
            return [*now]
        sizes = now
        time.sleep(_LOOK_S)
    kind = "traces" if pattern == _TRACES else "record"
    raise UserError(f"no whole {kind} appeared in {folder} within {timeout_s:g} s")


def _new_folder(within: Path, prefix: str) -> Path:
    """Make a new folder, so that no files of an earlier run are in it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        within.mkdir(parents=True, exist_ok=True)
        return Path(mkdtemp(prefix=prefix, dir=within))
    except OSError as error:
        raise UserError(f"cannot write to {within}: {error.strerror}") from None
