"""An experiment: one model, one workload, one seed, one cluster; several deployments.

With the options of its projection, `[projection]` in its file, which commands have too.
"""

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from expertlane.errors import SpecError, UserError, naming
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.files import (
    CONFIG_BYTES,
    build,
    check_keys,
    field_names,
    nearest,
    read_toml,
    shown_json,
)
from expertlane.spec.from_hf import read_model
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.names import CacheType, GpuExecution, NumberType
from expertlane.spec.ranges import RANGES, Strict, shown, take, take_fields
from expertlane.spec.workload import SLO, LengthRange, Load, Workload, parse_slos

_PATHS = "routing_trace", "requests", "corrections"


@dataclass(frozen=True, kw_only=True)
class _OnCluster(Strict):
    """A modelled cluster, and how the model runs on it.

    Attributes:
        skew: None for the default with its bounds.
        routing_trace, corrections: paths of the files.
    """

    cluster: str
    framework: str | None = None
    skew: float | None = None
    routing_trace: str | None = None
    execution: GpuExecution = "graph"
    corrections: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProjectionSetup(_OnCluster):
    """Options of a projection beside its workload, as on the command line.

    Attributes:
        mtp: draft tokens per step.
    """

    mtp: int = 0
    mtp_acceptance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Projection(_OnCluster):
    """Options of an experiment's projection; runs on real ranks ignore them.

    Attributes:
        slo: limits, as `--slo` takes them.
        dtype: number type of weights; None for the checkpoint's own.
        kv_dtype: number type of keys and values.
        prompt_len, output_len: lengths in place of the workload's, as `--prompt-len` takes them.
        requests: path of recorded requests, whose lengths are taken.
        prefix_len, num_prefixes: shared prefixes, as `--prefix-len` and `--num-prefixes` take them.
        num_running: by deployment, concurrent sequences of the whole system; fewer where they miss
            a limit. Deployments not named run as many as the limits allow.

    Raises:
        UserError: a value is out of its range, or two exclude each other.
    """

    slo: str | None = None
    dtype: NumberType | None = None
    kv_dtype: CacheType = "model"
    prompt_len: str | None = None
    output_len: str | None = None
    requests: str | None = None
    prefix_len: int = 0
    num_prefixes: int = 1
    num_running: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with naming("projection"):
            self._check()

    def _check(self) -> None:
        if self.skew is not None:
            take("skew", self.skew)
        if self.skew is not None and self.routing_trace is not None:
            raise SpecError("skew and routing_trace exclude each other")
        if self.requests is not None and (self.prompt_len or self.output_len or self.prefix_len):
            raise SpecError("requests has lengths; leave out prompt_len, output_len and prefix_len")
        for name in ("prompt_len", "output_len"):
            self._range(name, 1)
        for name, num in self.num_running.items():
            take("num_sequences", num, f"num_running of {name!r}")
        _ = self.slos

    @property
    def slos(self) -> tuple[SLO, ...]:
        """The limits."""
        return () if self.slo is None else parse_slos([self.slo], "slo")

    def _range(self, name: str, mean: int) -> LengthRange:
        """A range of lengths that is given, else the workload's mean.

        Raises:
            SpecError: it is no range of lengths.
        """
        text = getattr(self, name)
        found = LengthRange(mean, mean) if text is None else LengthRange.parse(name, text)
        if found is None:
            raise SpecError(
                f"{name} is {shown(text)}; it must be {RANGES[name]}, or two, the lower one "
                'first: "32:512"'
            )
        return found

    def load(self, workload: Workload) -> Load | None:
        """The lengths that are served in a closed loop; None for those of the workload.

        Raises:
            UserError: the file of requests cannot be read.
        """
        num = workload.num_sequences
        if self.requests is not None:
            from expertlane.spec.request_file import read_requests

            # Lengths are drawn from them, so they may be fewer than sequences.
            return Load.of(read_requests(Path(self.requests)), num).of_lengths()
        if self.prompt_len is None and self.output_len is None and not self.prefix_len:
            return None
        prompt = self._range("prompt_len", workload.prompt_len)
        output = self._range("output_len", workload.output_len)
        return Load(
            num, prompt, output, num, prefix_len=self.prefix_len, num_prefixes=self.num_prefixes
        )

    def located(self, base: Path) -> "Projection":
        """The projection with absolute paths; `base` is where relative ones begin."""
        paths = {
            name: os.path.abspath(base / path)
            for name in _PATHS
            if (path := getattr(self, name)) is not None
        }
        profile, mark, count = self.cluster.rpartition("x")
        if profile.endswith(".toml"):
            paths["cluster"] = f"{os.path.abspath(base / profile)}{mark}{count}"
        return replace(self, **paths)


@dataclass(frozen=True)
class Cluster(Strict):
    """The nodes that ranks sit on.

    Attributes:
        ranks_per_node: consecutive ranks that share a node; 0 takes what the launcher knows
            (all local ranks on one node). Declaring 8 lets 16 local ranks count their traffic
            as two nodes of 8.
    """

    ranks_per_node: int = 0

    def __post_init__(self) -> None:
        take_fields(self, "cluster: {}".format)


@dataclass(frozen=True)
class Experiment:
    """Deployments that differ in nothing but layout and options.

    Attributes:
        deployments: the first one is the baseline that factors are given against.
        scaling: layouts of one family, run beside the deployments, from which the scaling of
            the last deployment is shown.
        seed: seed of the model's weights, where they come from no checkpoint.
        checkpoint: the folder the weights are in; None for seeded ones.
        projection: options of its projection; None where the file has none.

    Raises:
        SpecError: a seed out of its range, no deployment, a name or a scaling size given twice, or
            a layout or workload that the model cannot take.
    """

    name: str
    model: ModelConfig
    workload: Workload
    deployments: tuple[Deployment, ...]
    scaling: tuple[Deployment, ...] = ()
    cluster: Cluster = field(default_factory=Cluster)
    seed: int = 0
    checkpoint: str | None = None
    projection: Projection | None = None

    def __post_init__(self) -> None:
        take_fields(self)
        if not self.deployments:
            raise SpecError(
                f"experiment {self.name} has no deployment; add a [[deployments]] table"
            )
        names = [deployment.name for deployment in self.deployments + self.scaling]
        for name in names:
            if names.count(name) > 1:
                raise SpecError(f"experiment {self.name}: two deployments are named {name!r}")
        sizes = [deployment.layout.ep for deployment in self.scaling]
        for size in sizes:
            if sizes.count(size) > 1:
                raise SpecError(f"experiment {self.name}: two scaling layouts have ep={size}")
        self.workload.check_model(self.model)
        self.workload.check_size()
        for deployment in self.deployments + self.scaling:
            with naming(f"deployment {deployment.name!r}"):
                deployment.layout.check_model(self.model)

    @property
    def num_ranks(self) -> int:
        """Ranks of the largest deployment."""
        return max(deployment.layout.world_size for deployment in self.deployments + self.scaling)

    @property
    def question(self) -> dict[str, Any]:
        """The experiment without its `[projection]`, as results record it."""
        return {name: each for name, each in asdict(self).items() if name != "projection"}

    def only(self, names: str) -> "Experiment":
        """The experiment with these deployments alone, and no scaling layouts.

        Args:
            names: names or numbers from 1, with commas between; names may have commas in them, and
                x stands for × too.

        Raises:
            SpecError: one is unknown, or given twice.
        """
        places = {_plain(each.name): place for place, each in enumerate(self.deployments)}
        for place in range(len(self.deployments)):
            places.setdefault(str(place + 1), place)
        wanted, rest = [], names.strip()
        while rest:
            parts = rest.split(",")
            beginnings = (",".join(parts[:num]).strip() for num in range(len(parts), 0, -1))
            found = next((each for each in beginnings if _plain(each) in places), None)
            if found is None:
                raise SpecError(f"no deployment {parts[0]!r}; valid: {self._numbered()}")
            place = places[_plain(found)]
            if place in wanted:
                raise SpecError(f"{self.deployments[place].name!r} is given twice")
            wanted.append(place)
            rest = rest[rest.index(found) + len(found) :].lstrip().removeprefix(",").lstrip()
        if not wanted:
            raise SpecError("no deployment is named")
        kept = tuple(self.deployments[place] for place in sorted(wanted))
        return replace(self, deployments=kept, scaling=())

    def _numbered(self) -> str:
        names = enumerate((each.name for each in self.deployments), 1)
        return "; ".join(f"{number}: {name}" for number, name in names)

    def num_sequences_alike(self, layout: Layout) -> int:
        """Sequences that give a rank of `layout` as many as the largest deployment's ranks have."""
        return max(1, self.workload.num_sequences // self.num_ranks) * layout.world_size


def _plain(name: str) -> str:
    return " ".join(name.replace("×", "x").lower().split())


_TABLES = ("model", "workload", "cluster", "projection")
_ARRAYS = ("deployments", "scaling")
_BESIDE_CHECKPOINT = "num_experts_per_tok"  # the one value of a checkpoint's that can be changed

FindCheckpoint = Callable[[str, Path], Path]
_ReadModel = Callable[[Path, str], ModelConfig]


@dataclass(frozen=True)
class _Header(Strict):
    name: str
    seed: int = 0


@dataclass(frozen=True)
class _Head(Strict):
    """A deployment's table without its options."""

    name: str
    layout: str
    baseline: bool = False


def shipped_experiments() -> dict[str, Path]:
    """The experiments that come with expertlane, by name."""
    here = Path(__file__)
    in_wheel, in_checkout = here.parents[1] / "experiments", here.parents[3] / "experiments"
    folder = in_wheel if in_wheel.is_dir() else in_checkout
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_experiment(argument: str) -> Path:
    """The file that `argument` means: a path, or the bare name of a shipped experiment.

    Raises:
        SpecError: a bare name that is neither a file here nor shipped.
    """
    path = Path(argument)
    if path.name != argument or path.suffix == ".toml":
        return path
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise SpecError(f"{argument[:40]!r}…: {error.strerror}") from None
    shipped = shipped_experiments()
    if argument in shipped:
        return shipped[argument]
    if path.exists():
        return path
    raise SpecError(
        f"{argument!r} is neither a file nor an experiment's name{nearest(argument, shipped)}"
    )


def _folder_below(checkpoint: str, base: Path) -> Path:
    """The folder that a path means; `base` is where a relative one begins."""
    return base / checkpoint


def read_experiment(
    path: Path, find_checkpoint: FindCheckpoint = _folder_below, *, is_run_here: bool = True
) -> Experiment:
    """Read and check a whole experiment.

    Args:
        find_checkpoint: gives the folder that the file's checkpoint means, by its text and the
            folder of the file.
        is_run_here: our engine will read the checkpoint's weights; else another one, or none.

    Raises:
        SpecError: the file cannot be read, is no TOML, or breaks a rule; the text is one line that
            begins with the path.
    """
    document = read_toml(path, CONFIG_BYTES)
    with naming(path):
        read = partial(read_model, weights=is_run_here)
        return _experiment(document, path.parent, find_checkpoint, read)


def _experiment(
    document: dict[str, Any], base: Path, find: FindCheckpoint, read: _ReadModel
) -> Experiment:
    check_keys(document, (*field_names(_Header), *_TABLES, *_ARRAYS), "the top level")
    for table in _TABLES:
        if not isinstance(value := document.get(table, {}), dict):
            raise SpecError(f"{table} is {shown_json(value)}; it must be a table, [{table}]")
    for table in ("model", "workload"):
        if table not in document:
            raise SpecError(f"the table [{table}] is missing")
    header = build(_Header, {k: v for k, v in document.items() if k in ("name", "seed")}, "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", header.name):
        raise SpecError(
            f"name is {shown_json(header.name)}; it names the folder of results, so it must be "
            "letters and digits, with . _ - between them"
        )
    model, checkpoint = _model(document["model"], base, find, read)
    return Experiment(
        name=header.name,
        seed=header.seed,
        model=model,
        checkpoint=checkpoint,
        workload=build(Workload, document["workload"], "[workload]"),
        cluster=build(Cluster, document.get("cluster", {}), "[cluster]"),
        deployments=_deployments(document, "deployments", base),
        scaling=_deployments(document, "scaling", base),
        projection=_projection(document, base),
    )


def _projection(document: dict[str, Any], base: Path) -> Projection | None:
    if "projection" not in document:
        return None
    found = build(Projection, document["projection"], "[projection]")
    names = [each.get("name") for each in document.get("deployments", [])]
    check_keys(found.num_running, names, "[projection.num_running]")
    return found.located(base)


def _model(
    table: dict[str, Any], base: Path, find: FindCheckpoint, read: _ReadModel
) -> tuple[ModelConfig, str | None]:
    """The model, and the folder of its checkpoint if it has one."""
    check_keys(table, ("preset", "checkpoint", *field_names(ModelConfig)), "[model]")
    if "checkpoint" in table:
        return _checkpoint(table, base, find, read)
    overrides = dict(table)
    preset = overrides.pop("preset", None)
    if preset is None:
        return build(ModelConfig, overrides, "[model]"), None
    if not isinstance(preset, str):
        raise SpecError(f"[model]: preset is {shown_json(preset)}; it must be a string")
    if preset not in PRESETS:
        raise SpecError(f"[model]: unknown preset {preset!r}{nearest(preset, PRESETS)}")
    return build(ModelConfig, asdict(PRESETS[preset]) | overrides, "[model]"), None


def _checkpoint(
    table: dict[str, Any], base: Path, find: FindCheckpoint, read: _ReadModel
) -> tuple[ModelConfig, str]:
    overrides = dict(table)
    given = overrides.pop("checkpoint")
    if not isinstance(given, str):
        raise SpecError(f"[model]: checkpoint is {shown_json(given)}; it must be a string")
    for key in overrides:
        if key != _BESIDE_CHECKPOINT:
            raise SpecError(
                f"[model]: checkpoint and {key} exclude each other; valid beside a checkpoint: "
                f"{_BESIDE_CHECKPOINT}"
            )
    try:
        folder = find(given, base)
        model = read(folder, os.path.join(base, given))
    except UserError as error:
        raise SpecError(f"[model]: {error}") from None
    return build(ModelConfig, asdict(model) | overrides, "[model]"), os.path.abspath(folder)


def _deployments(document: dict[str, Any], key: str, base: Path) -> tuple[Deployment, ...]:
    tables = document.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SpecError(f"{key} is {shown_json(tables)}; it must be one or more tables, [[{key}]]")
    deployments = []
    for number, table in enumerate(tables, start=1):
        where = f"[[{key}]] {number}"
        head_keys = [k for k in field_names(_Head) if key == "deployments" or k != "baseline"]
        check_keys(table, (*head_keys, *field_names(Options)), where)
        if key == "deployments" and number == 1:
            if table.get("baseline") is False:
                raise SpecError(
                    f"{where}: baseline is false, but the first deployment is always one"
                )
            table = {"baseline": True} | table
        with naming(where):
            head = build(_Head, {k: v for k, v in table.items() if k in head_keys}, "")
            options = build(Options, {k: v for k, v in table.items() if k not in head_keys}, "")
            if options.placement_file is not None:
                if not options.placement_file or "\0" in options.placement_file:
                    raise SpecError(
                        f"placement_file is {shown_json(options.placement_file)}; it must be a path"
                    )
                path = os.path.abspath(base / options.placement_file)
                options = replace(options, placement_file=path)
            layout = Layout.parse(head.layout)
            deployments.append(Deployment(head.name, layout, options, head.baseline))
    return tuple(deployments)
