"""`expertlane compare --engine` and `--url`: an experiment's deployments on servers."""

import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import randbelow
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.option_groups import given
from expertlane.cli.options import scripts_option
from expertlane.cli.server_options import (
    ENGINE_ARGS,
    ENGINE_PYTHON,
    FLUSH_CACHES,
    START_TIMEOUT,
    api_key_file_option,
    one_key_each,
    request_timeout_option,
    vocabulary,
)
from expertlane.errors import UserError
from expertlane.printable import printable
from expertlane.spec.files import strict_json, write_text

if TYPE_CHECKING:
    from expertlane.cli.load import ServedLoad
    from expertlane.client.run import MeasureOptions, Target
    from expertlane.client.server import Vocabulary
    from expertlane.comparison.engines.engine import Engine, LaunchCommand, LaunchRequest
    from expertlane.comparison.served import EngineLauncher, Setting
    from expertlane.comparison.turns import Repeats
    from expertlane.results.results import Results
    from expertlane.spec.deployment import Deployment
    from expertlane.spec.experiment import Experiment
    from expertlane.spec.workload import Load

OWN = "expertlane"
_SEEDS = 2**31
_OF_RANKS = frozenset({"--experts-per-token", "--resume", "--trace"})
_OF_STARTED = ("--engine-python", "--engine-args", "--kv-tokens", "--start-timeout-s")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Engines to start, and servers that run already."""

    panel: ClassVar = Panel.MORE_SERVER
    engine: list[str] | None = typer.Option(
        None,
        rich_help_panel=Panel.SERVER,
        metavar="vllm|sglang|trtllm|expertlane",
        show_default="expertlane, without servers",
        help="Engine that serves. Each deployment is started as a server of this engine, measured "
        "over HTTP, and stopped. Other packages may add engines.",
    )
    url: list[str] | None = typer.Option(
        None,
        metavar="[NAME=]URL",
        rich_help_panel=Panel.SERVER,
        help="Measure a server with the OpenAI API. It runs already, and needs no EXPERIMENT; with "
        "one, the NAME of a deployment says that it has its layout.",
    )
    engine_python: list[str] | None = ENGINE_PYTHON
    engine_args: list[str] | None = ENGINE_ARGS
    kv_tokens: int | None = typer.Option(
        None,
        show_default="each engine's choice",
        help="Total tokens in the KV caches of each server started by --engine.",
    )
    tokenizer: Path | None = typer.Option(
        None,
        metavar="DIR",
        show_default="the checkpoint's, else the server's /tokenize",
        help="Folder of the model's tokenizer.",
    )
    served_model: list[str] | None = typer.Option(
        None,
        metavar="[NAME=]MODEL",
        show_default="the only one of its /v1/models",
        help="Model's name at the server, if it has several. NAME: only for that --url.",
    )
    api_key_file: list[str] | None = api_key_file_option(
        " NAME: only for that --url.", metavar="[NAME=]FILE"
    )
    flush_caches: bool = FLUSH_CACHES
    start_timeout_s: float = START_TIMEOUT
    request_timeout_s: float | None = request_timeout_option("600")
    dry_run: bool = typer.Option(False, help="Only print the commands that start the servers.")
    scripts: Path | None = scripts_option(
        "With --dry-run; they start each deployment on the nodes of --cluster.", Panel.MORE_SERVER
    )

    def __post_init__(self) -> None:
        if self.scripts is not None and not self.dry_run:
            raise UserError("--scripts starts nothing; give --dry-run too")
        if self.dry_run and self.url and not self.engine:
            raise UserError("--dry-run prints the commands of engines; give --engine")
        unused = [each for each in given(self) if each in _OF_STARTED]
        if self.url and not self.engine and unused:
            raise UserError(f"{unused[0]} is for servers that --engine starts; none is given")

    @property
    def is_asked(self) -> bool:
        """True if servers are measured: a single `--engine expertlane` is the default."""
        return bool(self.url) or self.engine not in (None, [], [OWN]) or self.dry_run

    def check_without_ranks(self, own: Any, *of_ranks: Any) -> None:
        """Refuse options for ranks if servers are measured.

        Args:
            own: the command's own options, some of which are for ranks.
            of_ranks: groups of options that are only for ranks.

        Raises:
            UserError: one is given.
        """
        unused = [each for each in given(own) if each in _OF_RANKS]
        for group in of_ranks:
            unused += given(group)
        if unused:
            asked = "--url" if self.url else "--engine"
            raise UserError(f"{unused[0]} is for ranks that run here; leave it out with {asked}")

    def engines(self) -> "list[Engine]":
        """The engines asked for.

        Raises:
            UserError: one is unknown, or named twice.
        """
        from expertlane.comparison.engines.engine import find_engine

        names = self.engine or ([OWN] if self.dry_run and not self.url else [])
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"--engine {name} is given twice")
        return [find_engine(name) for name in names]

    def targets(self, model: str | None = None) -> "dict[str, Target]":
        """The servers that run already, by name.

        Args:
            model: its name at servers for which there is no `--served-model`.

        Raises:
            UserError: one has the name or the address of another, or a URL or a key is wrong.
        """
        from expertlane.client.connection import Url
        from expertlane.client.run import Target

        found: dict[str, Target] = {}
        for text in self.url or ():
            name, mark, address = text.rpartition("=")  # names of deployments have = too
            if "//" in name:
                name, mark, address = "", "", text
            if (mark and not name.strip()) or not name.isprintable():
                raise UserError(f"--url is {text!r}; it must be like tp8=http://127.0.0.1:8000")
            url = Url.parse(address)
            name = name.strip() or f"{url.authority}{url.path}"
            if name in found:
                raise UserError(f"--url {name} is given twice")
            if twice := next((each for each, other in found.items() if other.url == url), None):
                raise UserError(
                    f"--url {name} and {twice} are one server, {url}: it would answer the second "
                    "from its prefix cache"
                )
            found[name] = Target(url)
        models = _by_server(self.served_model, found)
        if models and not found:
            raise UserError("--served-model is of a --url; none is given")
        return {
            name: replace(
                each, key=self._key(name, found), model=models.get(name, models.get("", model))
            )
            for name, each in found.items()
        }

    def _key(self, name: str, servers: "Mapping[str, Target]") -> str | None:
        """The API key for a server; None for none."""
        found = _by_server(self.api_key_file, servers)
        text = found.get(name, found.get(""))
        return one_key_each([] if text is None else [Path(text)])[0]

    def for_engine(self, option: str, engine: str) -> str | None:
        """The last value of `--engine-python` or `--engine-args` for an engine; None without one.

        Raises:
            UserError: it names an engine that is not asked for.
        """
        names = self.engine or [OWN]
        found = None
        for text in getattr(self, option) or ():
            name, mark, value = text.partition("=")
            if not mark or not name.isidentifier():
                name, value = "", text
            if name and name not in names:
                spelled = f"--{option.replace('_', '-')}"
                raise UserError(f"{spelled} {text}: no --engine {name} is given")
            if name in ("", engine):
                found = value
        return found


def _by_server(texts: Collection[str] | None, servers: Collection[str]) -> dict[str, str]:
    """The values of an option [NAME=]VALUE, by the server's name; under "" that of all others."""
    found: dict[str, str] = {}
    for text in texts or ():
        named = (each for each in servers if text.startswith(f"{each}="))  # it may have = too
        of = max(named, key=len, default="")
        found[of] = text.removeprefix(f"{of}=") if of else text
    return found


def named_experiment(experiment: str | None, servers: ServerOptions, traffic: "ServedLoad") -> str:
    """The experiment, which has the workload.

    Raises:
        UserError: there is none, or options of a workload are given beside it.
    """
    if experiment is None:
        raise UserError(
            f"--engine {(servers.engine or [OWN])[0]} needs an EXPERIMENT, a TOML file with model, "
            "workload and deployments; expertlane plan writes one"
        )
    if unused := given(traffic):
        raise UserError(
            f"{unused[0]} is for --url without an EXPERIMENT; that of {experiment} is in its file, "
            "[workload]"
        )
    return experiment


def compare_servers(
    experiment: "Experiment",
    options: ServerOptions,
    repeats: "Repeats",
    dtype: str | None,
    folder: Path | None,
    command: str,
    ended: list[BaseException] | None = None,
) -> "Results":
    """Measure an experiment's deployments on servers; prints nothing on standard output.

    Args:
        dtype: number type of weights and activations; None for the checkpoint's own.
        folder: of the results, where logs go too; None keeps none.
        ended: as `measure_servers` has it.

    Raises:
        UserError: an engine, a server or an option is wrong.
        ExpertlaneError: nothing could be measured.
    """
    from expertlane.comparison.servers_in_turns import measure_servers

    targets = options.targets()
    engines = [launcher_of(each, experiment, options, dtype) for each in options.engines()]
    workload = experiment.workload
    asked = _asked(workload.load, workload.seed, options, vocabulary_of(experiment, options))
    with _setting(asked, options, folder) as setting:
        if engines:
            of_servers, of_client = _parted_cores(experiment)
            setting = replace(setting, server_cores=of_servers, client_cores=of_client)
        types = dtype or experiment.model.own_dtype or "bfloat16"
        return measure_servers(
            *(experiment, engines, targets, setting, repeats, command, types),
            ended=ended,
        )


def compare_running(
    traffic: "ServedLoad",
    model: str | None,
    options: ServerOptions,
    repeats: "Repeats",
    folder: Path | None,
    command: str,
    ended: list[BaseException] | None = None,
) -> "Results":
    """Measure servers that run already under a load, without an experiment.

    Args:
        model: its name at the servers; None for the only one there.
        folder: of the results; None keeps none.
        ended: as `measure_servers` has it.

    Raises:
        UserError: a server or an option is wrong.
        ExpertlaneError: nothing could be measured.
    """
    from expertlane.comparison.servers_in_turns import measure_running

    load, seed = traffic.load(), traffic.seed
    if seed is None:
        seed = randbelow(_SEEDS)  # a fixed one's prompts may be in prefix caches from last time
    targets = options.targets(model)
    asked = _asked(load, seed, options, vocabulary(options.tokenizer, model))
    workload = traffic.asked_of(load, seed)
    with _setting(asked, options, folder) as setting:
        return measure_running(
            *(targets, setting, workload, repeats, command),
            ended=ended,
        )


@contextmanager
def _setting(
    asked: "MeasureOptions", options: ServerOptions, folder: Path | None
) -> "Iterator[Setting]":
    """The conditions that all servers share; a temporary folder lives as long as the context."""
    from expertlane.comparison.served import Setting

    with (
        TemporaryDirectory(prefix="expertlane-") as temporary,
        output.progress_on_stderr() as progress,
    ):
        own = ((folder or Path(temporary)) / "servers").absolute()
        kv_tokens = options.kv_tokens
        yield Setting(asked.loads[0], asked, options.start_timeout_s, own, progress, kv_tokens)


def _asked(
    load: "Load", seed: int, options: ServerOptions, tokenizer: "Vocabulary | None"
) -> "MeasureOptions":
    from expertlane.client.run import MeasureOptions

    more: dict[str, Any] = {}
    if options.request_timeout_s is not None:
        more["timeout_s"] = options.request_timeout_s
    return MeasureOptions(
        [load], seed, tokenizer=tokenizer, flushes_caches=options.flush_caches, **more
    )


def vocabulary_of(experiment: "Experiment", options: ServerOptions) -> "Vocabulary | None":
    """The token ids of prompts, the same for all servers; None for those of the first server."""
    from expertlane.client.server import Vocabulary

    given_one = vocabulary(options.tokenizer, None)
    if given_one is not None or experiment.checkpoint is None:
        return given_one
    folder = Path(experiment.checkpoint)
    if (folder / "tokenizer.json").is_file():
        return Vocabulary.of_folder(folder)
    return Vocabulary(range(experiment.model.vocab_size))


def launcher_of(
    engine: "Engine", experiment: "Experiment", options: ServerOptions, dtype: str | None
) -> "EngineLauncher":
    """An engine with the commands of its servers; options are checked here.

    Raises:
        UserError: there is no checkpoint, or no such Python.
    """
    from expertlane.comparison.served import EngineLauncher

    asked = _launch_request(engine, experiment, options, dtype)

    def start(deployment: "Deployment", port: int) -> "LaunchCommand":
        place = replace(asked.place, port=port)
        return engine.start(replace(asked, deployment=deployment, place=place))

    return EngineLauncher(engine, start)


def _parted_cores(experiment: "Experiment") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cores of the servers, and those of the client alone."""
    from expertlane.results.hardware import gpu_names, parted_cores

    sizes = {each.layout.world_size for each in experiment.deployments}
    return parted_cores(() if gpu_names() else sizes)


def _launch_request(
    engine: "Engine", experiment: "Experiment", options: ServerOptions, dtype: str | None
) -> "LaunchRequest":
    """The launch request of an engine, with the first deployment; the others replace that.

    Raises:
        UserError: there is no checkpoint, or no such Python.
    """
    from expertlane.comparison.engines.engine import LaunchRequest
    from expertlane.comparison.served import HOST
    from expertlane.cost.step.operation import NumberTypes
    from expertlane.planner.server_start import Place, ServeTarget
    from expertlane.results.hardware import gpu_names
    from expertlane.spec.hf_config import quantization_of, read_config

    if experiment.checkpoint is None:
        raise UserError(
            f"--engine {engine.name} loads a checkpoint, and {experiment.name} has none: give its "
            "folder with --model"
        )
    python = options.for_engine("engine_python", engine.name)
    if python is not None:
        path = Path(python)
        if not path.is_file():
            raise UserError(f"--engine-python {python}: there is no such file")
        python = str(path.absolute())  # not resolved: an environment's Python is a link
    elif engine.name == OWN:
        python = sys.executable
    words = options.for_engine("engine_args", engine.name) or ""
    try:
        arguments = shlex.split(words)
    except ValueError:
        raise UserError(f"--engine-args {words}: a quotation mark is not closed") from None
    folder, model = Path(experiment.checkpoint), experiment.model
    stored = quantization_of(read_config(folder))
    weights = dtype or (stored.number_type if stored else None) or model.own_dtype or "bfloat16"
    gpus, (cores, _) = gpu_names(), _parted_cores(experiment)
    place = Place(
        (HOST,),
        listens=HOST,
        kind="cuda" if gpus else "cpu",
        cores=() if gpus else cores,
        python=python,
        caches_prefixes=False,
    )
    return LaunchRequest(
        experiment.deployments[0],
        model,
        experiment.workload,
        ServeTarget(str(folder), stored),
        NumberTypes.asked(weights, "model"),
        place,
        len(gpus) or len(cores),
        tuple(arguments),
        options.kv_tokens,
    )


def print_commands(
    experiment: "Experiment",
    options: ServerOptions,
    dtype: str | None,
    cluster: str | None,
    *,
    as_json: bool,
) -> None:
    """Print the command of each deployment, or why the engine cannot run it; write its scripts.

    Args:
        cluster: cluster that scripts are for; None for that of the experiment's `[projection]`.

    Raises:
        UserError: no engine is to be started, or there is no cluster.
    """
    from expertlane.comparison.engines.engine import CannotServe
    from expertlane.comparison.server_process import command_line
    from expertlane.planner.server_start import PORT

    rows: list[dict[str, Any]] = []
    for engines in [launcher_of(each, experiment, options, dtype) for each in options.engines()]:
        for deployment in experiment.deployments:
            row: dict[str, Any] = {"engine": engines.engine.name, "deployment": deployment.name}
            try:
                start = engines.start(deployment, PORT)
            except CannotServe as error:
                rows.append(row | {"why_not": str(error)})
                continue
            line = command_line(start.argv, start.environment, start.files)
            rows.append(row | {"command": line})
    written = _scripts(experiment, options, dtype, cluster)
    if as_json:
        output.print_json(strict_json({"commands": rows, "scripts": [*map(str, written)]}))
        return
    for row in rows:
        print(printable(f"# {row['deployment']} on {row['engine']}"))
        print(printable(row.get("command") or f"# not run: {row['why_not']}"))
    if written:
        output.print_message(f"written: {', '.join(map(str, written))}")
        output.print_message("expertlane: start each there, then give compare its --url NAME=URL")


def _scripts(
    experiment: "Experiment", options: ServerOptions, dtype: str | None, cluster: str | None
) -> list[Path]:
    """Write scripts that start each deployment on a cluster; return their paths.

    Raises:
        UserError: there is no cluster, or the folder cannot be written to.
    """
    from expertlane.comparison.engines.engine import CannotServe
    from expertlane.cost.laws.profile import parse_cluster

    if options.scripts is None:
        return []
    if cluster is None and experiment.projection is not None:
        cluster = experiment.projection.cluster
    if cluster is None:
        raise UserError("--scripts needs the nodes that they are for: --cluster h100x16")
    there = parse_cluster(cluster)
    output.check_folder(options.scripts)
    made: dict[str, str] = {}
    for engine in options.engines():
        asked = _launch_request(engine, experiment, options, dtype)
        asked = replace(asked, num_devices=there.profile.ranks_per_node)
        for deployment in experiment.deployments:
            try:
                found = engine.scripts(replace(asked, deployment=deployment))
            except CannotServe as error:
                line = f"expertlane: no script of {deployment.name}: {error}"
                output.print_message(line)
                continue
            name = output.slug(deployment.name)
            made |= {f"{name}.{file}": text for file, text in found.items()}
    return [write_text(options.scripts / name, text) for name, text in made.items()]
