"""`expertlane compare --engine` and `--url`: an experiment's deployments on servers."""

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.option_groups import given
from expertlane.cli.options import api_keys, request_timeout_option
from expertlane.errors import UserError, naming
from expertlane.printable import printable
from expertlane.spec.files import strict_json

if TYPE_CHECKING:
    from expertlane.client.run import Asked, Target
    from expertlane.client.server import Vocabulary
    from expertlane.comparison.engines.engine import Engine, Start
    from expertlane.comparison.served import Engines
    from expertlane.comparison.turns import Repeats
    from expertlane.results.results import Results
    from expertlane.spec.deployment import Deployment
    from expertlane.spec.experiment import Experiment

OWN = "expertlane"
_START_TIMEOUT_S = 1_200.0
_OF_RANKS = frozenset({"--experts-per-token", "--resume", "--traffic", "--trace"})


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Engines to start, and servers that run already."""

    panel: ClassVar = Panel.SERVER
    engine: list[str] | None = typer.Option(
        None,
        metavar="vllm|sglang|trtllm|expertlane",
        show_default="expertlane, without servers",
        help="Engine that serves. Each deployment is started as its server, and measured from "
        "outside; the name of another package's engine is taken too.",
    )
    url: list[str] | None = typer.Option(
        None,
        metavar="NAME=URL",
        help="Measure a server with the OpenAI API. It runs already; the NAME of a deployment says "
        "that it has its layout.",
    )
    engine_python: list[str] | None = typer.Option(
        None,
        metavar="[NAME=]PATH",
        rich_help_panel=Panel.MORE_SERVER,
        show_default="commands on the PATH",
        help="Python of the environment that the engine is installed in.",
    )
    engine_args: list[str] | None = typer.Option(
        None,
        metavar="[NAME=]ARGS",
        rich_help_panel=Panel.MORE_SERVER,
        help='Further arguments of the engine\'s command, as "--enforce-eager".',
    )
    tokenizer: Path | None = typer.Option(
        None,
        metavar="DIR",
        rich_help_panel=Panel.MORE_SERVER,
        show_default="the checkpoint's, else the server's /tokenize",
        help="Folder of the model's tokenizer.",
    )
    start_timeout_s: float = typer.Option(
        _START_TIMEOUT_S,
        metavar="SECONDS",
        rich_help_panel=Panel.MORE_SERVER,
        help="Time limit of a server's start.",
    )
    request_timeout_s: float | None = request_timeout_option("600", panel=Panel.MORE_SERVER)
    profile: bool = typer.Option(
        False,
        rich_help_panel=Panel.MORE_SERVER,
        help="Then trace each engine started here by torch's profiler, in a pass of its own: says "
        "where a step's time goes.",
    )
    dry_run: bool = typer.Option(
        False,
        rich_help_panel=Panel.MORE_SERVER,
        help="Print the commands that would start the servers, and start none.",
    )

    @property
    def is_asked(self) -> bool:
        """True if servers are measured: a single `--engine expertlane` is the default."""
        return bool(self.url) or self.engine not in (None, [], [OWN]) or self.dry_run

    def check_without_ranks(self, own: Any, *of_ranks: Any) -> None:
        """Refuse options of ranks where servers are measured.

        Args:
            own: the command's own options, of which some are for ranks.
            of_ranks: groups of options for ranks alone.

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

    def targets(self) -> "dict[str, Target]":
        """The servers that run already, by name.

        Raises:
            UserError: one has no name, or that of another, or a URL is wrong.
        """
        from expertlane.client.connection import Url
        from expertlane.client.run import Target

        keys = api_keys({})
        key = keys[0] if keys else None
        found: dict[str, Target] = {}
        for text in self.url or ():
            name, mark, url = text.rpartition("=")  # names of deployments have = too
            if not mark or "//" in name or not name.strip() or not name.isprintable():
                raise UserError(f"--url is {text!r}; it must be like tp8=http://127.0.0.1:8000")
            if (name := name.strip()) in found:
                raise UserError(f"--url {name} is given twice")
            found[name] = Target(Url.parse(url), key)
        return found

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


def compare_servers(
    experiment: "Experiment",
    options: ServerOptions,
    repeats: "Repeats",
    dtype: str | None,
    folder: Path | None,
    command: str,
) -> "Results":
    """Measure an experiment's deployments on servers; prints nothing on standard output.

    Args:
        dtype: number type of weights and activations; None for the checkpoint's own.
        folder: of the results, where logs go too; None keeps none.

    Raises:
        UserError: an engine, a server or an option is wrong.
        ExpertlaneError: nothing could be measured.
    """
    from expertlane.comparison.served import Setting, measure_servers

    targets = options.targets()
    engines = [engines_of(each, experiment, options, dtype) for each in options.engines()]
    with (
        TemporaryDirectory(prefix="expertlane-") as temporary,
        output.progress_on_stderr() as progress,
    ):
        setting = Setting(
            experiment.workload.load,
            _asked(experiment, options),
            options.start_timeout_s,
            ((folder or Path(temporary)) / "servers").absolute(),
            progress,
        )
        types = dtype or experiment.model.own_dtype or "bfloat16"
        return measure_servers(
            *(experiment, engines, targets, setting, repeats, command, types),
            profile=options.profile,
        )


def _asked(experiment: "Experiment", options: ServerOptions) -> "Asked":
    from expertlane.client.run import Asked

    more: dict[str, Any] = {}
    if options.request_timeout_s is not None:
        more["timeout_s"] = options.request_timeout_s
    workload = experiment.workload
    return Asked(
        [workload.load], workload.seed, tokenizer=vocabulary_of(experiment, options), **more
    )


def vocabulary_of(experiment: "Experiment", options: ServerOptions) -> "Vocabulary | None":
    """Tokens of prompts: the same for all servers, whatever they say of theirs."""
    from expertlane.client.server import Vocabulary

    if options.tokenizer is not None:
        with naming("--tokenizer"):
            return Vocabulary.of_folder(options.tokenizer)
    if experiment.checkpoint is None:
        return None
    folder = Path(experiment.checkpoint)
    if (folder / "tokenizer.json").is_file():
        return Vocabulary.of_folder(folder)
    return Vocabulary(range(experiment.model.vocab_size))


def engines_of(
    engine: "Engine", experiment: "Experiment", options: ServerOptions, dtype: str | None
) -> "Engines":
    """How an engine's servers are started, all that can be checked before checked.

    Raises:
        UserError: there is no checkpoint, or no such Python.
    """
    from expertlane.comparison.engines.engine import Asked
    from expertlane.comparison.served import HOST, Engines
    from expertlane.cost.step.operation import NumberTypes
    from expertlane.planner.server_start import Place, ServeTarget
    from expertlane.results.hardware import gpu_names, own_cores
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
    arguments = shlex.split(options.for_engine("engine_args", engine.name) or "")
    folder, model = Path(experiment.checkpoint), experiment.model
    stored = quantization_of(read_config(folder))
    weights = dtype or (stored.number_type if stored else None) or model.own_dtype or "bfloat16"
    gpus, cores = gpu_names(), own_cores()
    place = Place(
        (HOST,),
        listens=HOST,
        kind="cuda" if gpus else "cpu",
        cores=() if gpus else tuple(cores),
        python=python,
        caches_prefixes=False,
    )
    asked = Asked(
        experiment.deployments[0],
        model,
        experiment.workload,
        ServeTarget(str(folder), stored),
        NumberTypes.asked(weights, "model"),
        place,
        len(gpus) or len(cores),
        tuple(arguments),
    )

    def start(deployment: "Deployment", port: int) -> "Start":
        return engine.start(replace(asked, deployment=deployment, place=replace(place, port=port)))

    return Engines(engine, start)


def print_commands(
    experiment: "Experiment", options: ServerOptions, dtype: str | None, *, as_json: bool
) -> None:
    """Print how each deployment would be started, or why it would not.

    Raises:
        UserError: no engine is to be started.
    """
    from expertlane.comparison.engines.engine import CannotServe
    from expertlane.comparison.server_process import command_line
    from expertlane.planner.server_start import PORT

    if options.url and not options.engine:
        raise UserError("--dry-run prints what starts engines; give --engine")
    rows: list[dict[str, Any]] = []
    for engines in [engines_of(each, experiment, options, dtype) for each in options.engines()]:
        for deployment in experiment.deployments:
            row: dict[str, Any] = {"engine": engines.engine.name, "deployment": deployment.name}
            try:
                start = engines.start(deployment, PORT)
            except CannotServe as error:
                rows.append(row | {"why_not": str(error)})
                continue
            line = command_line(start.argv, start.environment, start.files)
            rows.append(row | {"command": line})
    if as_json:
        output.print_json(strict_json({"commands": rows}))
        return
    for row in rows:
        print(printable(f"# {row['deployment']} on {row['engine']}"))
        print(printable(row.get("command") or f"# not run: {row['why_not']}"))
