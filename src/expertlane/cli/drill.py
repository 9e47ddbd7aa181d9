"""`expertlane drill`: kill or stop a part of a server under load, and say what was lost."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from expertlane.cli import output
from expertlane.cli.compare_servers import ServerOptions, launcher_of, vocabulary_of
from expertlane.cli.help import Panel
from expertlane.cli.load import DrillLoad
from expertlane.cli.option_groups import given, publishes
from expertlane.cli.options import MODEL_HELP, dtype_option, known_models, layout_option
from expertlane.cli.server_options import (
    ENGINE_ARGS,
    ENGINE_PYTHON,
    START_TIMEOUT,
    PromptOptions,
    api_key_file_option,
    one_key_each,
    vocabulary,
)
from expertlane.errors import UserError
from expertlane.spec.layout import Layout
from expertlane.spec.names import Dtype

if TYPE_CHECKING:
    from expertlane.client.run import Target
    from expertlane.endpoint.drill import DrillOptions, DrillResult
    from expertlane.endpoint.faults import Fault, Signal
    from expertlane.endpoint.started import StartedServer
    from expertlane.results.record import DeploymentRecord, ServerRecord
    from expertlane.results.results import Results
    from expertlane.spec.experiment import Experiment

_KILL_WITHIN_S = 60.0  # that a command may take


@dataclass(frozen=True, kw_only=True)
class _Fault:
    panel: ClassVar = Panel.SERVER
    kill: str | None = typer.Option(
        None,
        metavar="COMMAND",
        help="Command that kills or stops something; your shell runs it once, for at most "
        f"{_KILL_WITHIN_S:g} s.",
    )
    pid: int | None = typer.Option(None, help="Process of this machine to signal.")
    rank: int | None = typer.Option(
        None,
        help="Rank to signal, of a server on this machine; --layout where that has more than one "
        "kind of parallelism.",
    )
    kubectl: str | None = typer.Option(
        None,
        metavar="[NAMESPACE/]POD",
        rich_help_panel=Panel.MORE_SERVER,
        help="Pod to delete, by kubectl; also with its options, such as 'vllm-0 -n prod --context "
        "staging'.",
    )
    signal: Literal["KILL", "STOP", "TERM"] = typer.Option(
        "KILL",
        help="Signal for --pid and --rank. STOP: the process hangs. With --kubectl, KILL deletes "
        "at once, TERM with its grace period.",
    )
    after_s: float = typer.Option(
        10.0,
        rich_help_panel=Panel.MORE_SERVER,
        help="Steady load before the fault, for so long.",
    )
    observe_s: float = typer.Option(60.0, help="Watch for so long after the fault.")
    hang_s: float = typer.Option(
        10.0,
        rich_help_panel=Panel.MORE_SERVER,
        help="A request that gets no token for so long has hung; it is given up.",
    )
    health_s: float = typer.Option(
        5.0,
        rich_help_panel=Panel.MORE_SERVER,
        help="/health may be wrong for so long at a time.",
    )

    def __post_init__(self) -> None:
        found = [each for each in ("kill", "pid", "rank", "kubectl") if self._is_given(each)]
        if len(found) != 1:
            names = " and ".join(f"--{each}" for each in found)
            raise UserError(
                f"{names} exclude each other; give one"
                if found
                else "say what to kill: --kill COMMAND, --pid N, --rank N or --kubectl POD"
            )
        if self.kill is not None and self.signal != "KILL":
            raise UserError("--signal is for --pid, --rank and --kubectl; --kill says it itself")

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) is not None

    def fault_of(
        self, rank_titles: Sequence[str], layout: Layout
    ) -> "Callable[[int | None], Fault]":
        """A function from the server's first process to the fault.

        Args:
            rank_titles: patterns of the titles of its ranks, and `layout` its layout.
        """
        from expertlane.endpoint import faults
        from expertlane.endpoint.processes import processes, rank_process

        how: Signal = self.signal

        def fault(root: int | None) -> "Fault":
            if self.kill is not None:
                return faults.by_shell(self.kill, _KILL_WITHIN_S)
            if self.kubectl is not None:
                return faults.by_kubectl(self.kubectl, how, _KILL_WITHIN_S)
            if self.pid is not None:
                found = processes().get(self.pid)
                name = "" if found is None else f" ({found.title})"
                return faults.SignalFault(self.pid, how, f"process {self.pid}{name}")
            assert self.rank is not None, "one is given"
            if root is None:
                raise UserError(
                    f"--rank {self.rank}: no process that may be seen here listens at the server's "
                    "port; run drill on its machine, as its user, or give --kill"
                )
            process = rank_process(root, rank_titles, layout, self.rank)
            name = f"rank {self.rank} (process {process.pid}, {process.title})"
            return faults.SignalFault(process.pid, how, name)

        return fault


@dataclass(frozen=True, kw_only=True)
class _Start:
    panel: ClassVar = Panel.DEPLOYMENT
    engine: str | None = typer.Option(
        None,
        metavar="vllm|sglang|trtllm|expertlane",
        rich_help_panel=Panel.SERVER,
        help="Engine that serves. It is started here with --model and --layout in place of a URL, "
        "and ended.",
    )
    model: str | None = typer.Option(
        None,
        metavar="MODEL",
        show_default="the server's only one",
        autocompletion=known_models,
        rich_help_panel=Panel.SERVER,
        help=f"{MODEL_HELP} With a URL: the model's name there.",
    )
    layout: str = layout_option("tp=1")
    dtype: Dtype | None = dtype_option("the checkpoint's", Panel.MORE_DEPLOYMENT)
    engine_python: str | None = ENGINE_PYTHON
    engine_args: str | None = ENGINE_ARGS
    start_timeout_s: float = START_TIMEOUT

    def as_server_options(self) -> ServerOptions:
        """The same as `compare` has them."""
        python, arguments = self.engine_python, self.engine_args
        return ServerOptions(
            engine=[self.engine or ""],
            url=None,
            engine_python=None if python is None else [python],
            engine_args=None if arguments is None else [arguments],
            tokenizer=None,
            start_timeout_s=self.start_timeout_s,
            request_timeout_s=None,
            scripts=None,
            api_key_file=None,
            flush_caches=False,
            dry_run=False,
        )

    def check_unused(self, *, has_rank: bool) -> None:
        """Refuse options of a start where none is asked for.

        Raises:
            UserError: one is given.
        """
        used = ("--model", "--layout") if has_rank else ("--model",)
        unused = [each for each in given(self) if each not in used]
        if unused:
            raise UserError(f"{unused[0]} is for a server that is started here; give --engine")


@dataclass(frozen=True, kw_only=True)
class _Client(PromptOptions):
    api_key_file: Path | None = api_key_file_option()


@publishes
def drill(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="The server, as http://HOST:PORT.")
    ] = None,
    *,
    fault: _Fault,
    start: _Start,
    load: DrillLoad,
    client: _Client,
    call: output.Call,
) -> output.Found:
    """Kill or stop one part of a server under load, and say what was lost.

    First every prompt is answered twice, so that the greedy tokens of the undisturbed server are
    known, and how many of them change by themselves. Then the load goes on, the fault strikes once,
    and the load is watched: when the first request failed, how many failed, hung, were cut short,
    or got tokens twice, too few or others; when the rate was full again; whether /health told the
    truth; and, where the server's processes run on this machine, what was left behind.

    What is killed or stopped stays so: drill starts nothing again. A server that --engine starts is
    ended.

    \b
    Exit code
      1   the server fails: a request was lost (failed, hung or cut short), got
          tokens twice, too few or others (more often than undisturbed ones), or
          was counted wrongly; or /health said 200 while no request got a token,
          or anything else while all was well, for longer than --health-s
      2   the drill could not be done: no such process, the command failed, or the
          server fails without a fault
      0   otherwise; a lower rate, or things left behind, are reported and fail
          nothing

    \b
    Examples:
      expertlane drill http://127.0.0.1:8000 --pid 4711
          kill a process of that server
      expertlane drill http://127.0.0.1:8000 --rank 1 --signal STOP --hang-s 30
          have a rank hang
      expertlane drill http://serve:8000 --kill 'ssh node2 pkill -9 -f VLLM::Worker'
          whatever a command can do, for example on another machine
      expertlane drill http://serve:8000 --kubectl prod/vllm-0 --observe-s 600
          delete a pod, and wait for its successor
      expertlane drill --engine vllm --model ./my-checkpoint --layout tp=2 --rank 1
          a server that is started for it, and any of its ranks
      expertlane drill http://127.0.0.1:8000 --pid 4711 --json |
          jq '.deployments[0].drill.why_failed'
    """
    from expertlane.endpoint.drill import DrillOptions

    asked = DrillOptions(
        load.load(),
        load.seed,
        fault.after_s,
        fault.observe_s,
        fault.hang_s,
        fault.health_s,
        client.endpoint == "chat",
        vocabulary(client.tokenizer, start.model),
    )
    if (url is None) == (start.engine is None):
        raise UserError("give either a server's URL, or --engine to start one")
    if url is not None:
        return _run_url(url, fault, start, load, client, asked, call)
    return _run_engine(fault, start, load, asked, call)


def _run_url(
    text: str,
    fault: _Fault,
    start: _Start,
    load: DrillLoad,
    client: _Client,
    asked: "DrillOptions",
    call: output.Call,
) -> output.Found:
    """Drill a server that runs."""
    from expertlane.client.connection import Url
    from expertlane.client.run import Target
    from expertlane.endpoint.drill import drill as drilled
    from expertlane.results.record import ServerRecord

    start.check_unused(has_rank=fault.rank is not None)
    fault_of = fault.fault_of(_known_titles(), Layout.parse(start.layout))
    files = [] if client.api_key_file is None else [client.api_key_file]
    target = Target(Url.parse(text, "URL"), one_key_each(files)[0], start.model)
    folder = call.folder(output.slug("drill", f"{target.url.host}-{target.url.port}"))
    with output.progress_on_stderr() as progress:
        found = drilled(target, asked, fault_of, progress)
    server = ServerRecord("", found.software, url=str(target.url))
    record = _record(found, str(target.url), server)
    return _published(_results(found, record, asked, load, target, call), folder)


def _known_titles() -> list[str]:
    """Patterns of the titles of ranks, of all engines that can be loaded."""
    from expertlane.comparison.engines.engine import find_engine, known_engines

    found = []
    for name in known_engines():
        with suppress(UserError):
            found.append(find_engine(name).rank_title)
    return [each for each in found if each]


def _record(found: "DrillResult", name: str, server: "ServerRecord") -> "DeploymentRecord":
    from expertlane.results.record import DeploymentRecord

    return DeploymentRecord(
        name,
        None,
        None,
        "measured",
        serving=(found.undisturbed,),
        server=server,
        drill=found.record,
    )


def _results(
    found: "DrillResult",
    record: "DeploymentRecord",
    asked: "DrillOptions",
    load: DrillLoad,
    target: "Target",
    call: output.Call,
) -> "Results":
    from expertlane.results.results import Results

    return Results.now(
        "drill",
        call.command,
        {
            "model": found.model,
            "workload": load.question(asked.load),
            "url": str(target.url),
            "batch": asked.load.batch,
            "rate": asked.load.rate,
            "fault": found.record.fault,
        },
        [record],
    )


def _published(results: "Results", folder: Path | None) -> output.Found:
    """The results; the command fails where the server did."""
    record = results.deployments[0].drill
    is_failed = record is not None and record.is_failed
    return output.Found(results, folder, exit_code=int(is_failed))


def _run_engine(
    fault: _Fault, start: _Start, load: DrillLoad, asked: "DrillOptions", call: output.Call
) -> output.Found:
    """Start a server, drill it, and end it."""
    from expertlane.client.run import Target
    from expertlane.comparison.engines.engine import find_engine
    from expertlane.endpoint.drill import drill as drilled
    from expertlane.endpoint.started import started
    from expertlane.results.hardware import this_machine

    assert start.engine is not None, "checked"
    engine = find_engine(start.engine)
    if fault.rank is not None and not engine.rank_title:
        raise UserError(f"--rank: the ranks of {engine.title} are not known; give --kill")
    experiment = _experiment(start, asked)
    (deployment,) = experiment.deployments
    options = start.as_server_options()
    engines = launcher_of(engine, experiment, options, start.dtype)
    if asked.tokenizer is None:
        asked = replace(asked, tokenizer=vocabulary_of(experiment, options))
    folder = call.folder(output.slug("drill", engine.name, deployment.name))
    with (
        TemporaryDirectory(prefix="expertlane-") as temporary,
        output.progress_on_stderr() as progress,
    ):
        within = ((folder or Path(temporary)) / "server").absolute()
        progress.task(f"starting {engine.title} {deployment.name}", 1)
        with started(engines, deployment, within, start.start_timeout_s) as server:
            progress.done()
            target = Target(server.url)
            of_rank = fault.fault_of([engine.rank_title], deployment.layout)
            found = drilled(target, asked, of_rank, progress, server.root)
        found = found.with_left_after_end()
        record = _started_record(found, server, engine.title, deployment.name)
    record = replace(record, layout=deployment.layout, options=deployment.options)
    results = _results(found, record, asked, load, target, call)
    dtype = start.dtype or experiment.model.own_dtype or "bfloat16"
    machine = this_machine(experiment.num_ranks, dtype)
    return _published(replace(results, machine=machine), folder)


def _started_record(
    found: "DrillResult", server: "StartedServer", title: str, name: str
) -> "DeploymentRecord":
    from expertlane.comparison.server_process import command_line
    from expertlane.results.record import ServerRecord

    return _record(
        found,
        f"{title} {name}",
        ServerRecord(
            title,
            found.software,
            name,
            command_line(server.start.argv, server.start.environment),
            dict(server.start.files),
            str(server.url),
            (server.start_s,),
            log=str(server.log),
        ),
    )


def _experiment(start: _Start, asked: "DrillOptions") -> "Experiment":
    """One deployment of a checkpoint, under the load.

    Raises:
        UserError: there is no such checkpoint, or it cannot be laid out so.
    """
    from expertlane.spec.deployment import Deployment
    from expertlane.spec.experiment import Experiment
    from expertlane.spec.from_hf import read_model
    from expertlane.spec.hf_config import resolve_model
    from expertlane.spec.model import PRESETS
    from expertlane.spec.workload import Workload

    if start.model is None:
        raise UserError("--engine serves a checkpoint: give its folder with --model")
    layout = Layout.parse(start.layout)
    if start.model in PRESETS:
        raise UserError(
            f"--engine loads a checkpoint, and {start.model} has none: give a folder, or start "
            f"expertlane serve {start.model} and give its URL"
        )
    folder = resolve_model(start.model, weights=True)
    model = read_model(folder, start.model, weights=False)
    layout.check_model(model)
    load = asked.load
    workload = Workload(
        num_sequences=load.batch or load.num_requests,
        prompt_len=load.prompt_len.high,
        output_len=load.output_len.high,
    )
    deployment = Deployment(str(layout), layout)
    return Experiment(model.name, model, workload, (deployment,), checkpoint=str(folder))
