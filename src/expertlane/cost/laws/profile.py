"""A cluster as the cost model knows it: datasheet figures and laws of time, in one TOML file.

Shipped profiles and a user's are read strictly. A surface's table is a string of whole numbers,
thousandths of a logarithm, one line for every knot of all axes but the last. `like` takes the laws
of another shipped profile over to this one's datasheet where it has none of its own, as bounds and
wider; but for those that its `without` names.

Below: `Terms`, the launches and other single numbers that a timeline takes from a profile.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from expertlane.cost.laws import shipped_profiles
from expertlane.cost.laws.times import Basis, Surface
from expertlane.cost.step.operation import ITEM_BYTES, WEIGHT_BYTES, Floats, Operation, Transfer
from expertlane.cost.step.step_list import ENGINE, ENGINE_ON_GPUS, GPU_LIBRARIES, KernelSet
from expertlane.errors import SpecError, UserError, did_you_mean, naming
from expertlane.spec.files import CONFIG_BYTES, build, read_toml, write_text
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link
from expertlane.spec.ranges import RANGES, Strict, shown


@dataclass(frozen=True)
class Term:
    """One number with its bounds, and where it comes from.

    Attributes:
        basis, origin: as in `Surface`.
    """

    value: float
    low: float
    high: float
    basis: Basis
    origin: str


@dataclass(frozen=True)
class Device(Strict):
    """One GPU, or one rank's share of a CPU.

    Attributes:
        memory_bytes, memory_bytes_per_s: its memory and what reads it at best.
        flops_per_s: dense peak of products with weights of a type: `float32`, `float16`,
            `bfloat16`, `float8`, `nvfp4`, `mxfp4`; of a type that is widened as it is read, the
            peak of what it becomes.
        origin: source of these figures.
        float8_attention: the type that attention over a float8 cache computes in: keys and values
            are widened as they are read, or multiplied as they are.
    """

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    origin: str
    float8_attention: str = "bfloat16"


@dataclass(frozen=True)
class LinkSheet(Strict):
    """One kind of link, per device and direction.

    Attributes:
        bytes_per_s: rate by the datasheet.
        origin: source of the figure.
    """

    bytes_per_s: float
    origin: str


@dataclass(frozen=True, eq=False)
class Profile:
    """A device, its links, and the laws of time of both.

    Attributes:
        ranks_per_node: devices of a node, which is an NVLink domain if there is NVLink.
        links: by kind of link.
        surfaces: by what they are for and a type or variant: `gemm.bfloat16`,
            `all_gather.intra_node`; `cost.laws.device` and `cost.laws.links` say which they use.
        terms: single numbers by name: floors, overheads, contention.
        devices_per_host: devices per operating system, where a node spans several; else 0.
        framework: whose corrections its laws and terms have, by name; "" for none.
        step_factor: factor that those corrections put on laws.
        has_nvlink: whether devices of a node reach each other's memory; else over PCIe alone.
        corrected: corrections that its laws have, and what those were fitted to; "" for none.
        own_basis: the firmest basis of its laws before they were corrected.
        factors: by kind of operation, the factor that corrections put on its laws.
        compute_factor: low, likely and high: of what is bound by FLOPs, besides.
    """

    name: str
    device: Device
    ranks_per_node: int
    links: Mapping[Link, LinkSheet]
    surfaces: Mapping[str, Surface] = field(default_factory=dict)
    terms: Mapping[str, Term] = field(default_factory=dict)
    devices_per_host: int = 0
    framework: str = ""
    step_factor: float = 1.0
    has_nvlink: bool = True
    corrected: str = ""
    own_basis: Basis | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    compute_factor: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def num_hosts(self, num_devices: int) -> int:
        """Machines that a deployment is started on."""
        return -(-num_devices // (self.devices_per_host or self.ranks_per_node))

    def link_rate(self, link: Link) -> float:
        """Bytes per second of a link.

        Raises:
            SpecError: the profile has no figure for it.
        """
        sheet = self.links.get(link)
        if sheet is None:
            raise SpecError(
                f"profile {self.name} has no links.{link.name.lower()}, which this layout needs"
            )
        return sheet.bytes_per_s


Law = TypeVar("Law", Surface, Term)

_PER_LOGARITHM = 1000  # numbers of a table are thousandths of a logarithm
_LARGEST = 20 * _PER_LOGARITHM  # exp(20): no correction is that far from a roofline


def read_profile(name_or_path: str | Path) -> Profile:
    """Read a shipped profile by name, or a file.

    Raises:
        SpecError: there is none, or the file breaks a rule; one line that names file and key.
    """
    given = str(name_or_path)
    is_name = Path(given).name == given and not given.endswith(".toml")
    shipped = shipped_profiles()
    if is_name and given not in shipped:
        hint = did_you_mean(given, shipped) or f"there are {', '.join(shipped)}"
        raise SpecError(
            f"no cluster profile is called {given}; {hint} (or give a file that ends in .toml)"
        )
    path = shipped[given] if is_name else Path(given)
    data = read_toml(path, CONFIG_BYTES)
    with naming(path):
        return _profile(build(_File, data))


@dataclass(frozen=True)
class Like(Strict):
    """Another profile to take missing laws from, and the factor by which their bounds widen.

    Attributes:
        without: beginnings of the names of laws that are not taken over: `dispatch` for all whose
            first word it is.
    """

    profile: str
    wider: float
    without: tuple[str, ...] = ()


def write_profile(profile: Profile, path: Path, like: Like | None = None) -> Path:
    """Write a profile whole or not at all; return its path.

    Raises:
        UserError: its folder can't be written to.
    """
    return write_text(path, to_toml(profile, like))


def to_toml(profile: Profile, like: Like | None = None) -> str:
    """The text of a profile's file."""
    import tomli_w  # not needed to read

    hosts = {"devices_per_host": profile.devices_per_host} if profile.devices_per_host else {}
    nvlink = {} if profile.has_nvlink else {"has_nvlink": False}
    data = {
        "name": profile.name,
        "ranks_per_node": profile.ranks_per_node,
        **hosts,
        **nvlink,
        **({} if like is None else {"like": {k: v for k, v in asdict(like).items() if v}}),
        "device": asdict(profile.device),
        "links": {link.name.lower(): asdict(sheet) for link, sheet in profile.links.items()},
        "terms": {name: _as_table(term) for name, term in profile.terms.items()},
    }
    text = tomli_w.dumps(data, indent=0)
    return text + "".join(_surface_text(*each) for each in profile.surfaces.items())


def _surface_text(name: str, surface: Surface) -> str:
    """A surface's part of the file; by hand, for axes and tables on one line a row."""
    import tomli_w

    head = tomli_w.dumps(_as_table(surface))
    axes = ", ".join(
        f"{axis} = [{', '.join(f'{knot:.6g}' for knot in knots)}]"
        for axis, knots in surface.axes.items()
    )
    rounded = np.rint(np.asarray(surface.correction) * _PER_LOGARITHM).astype(np.int64)
    rows = rounded.reshape(-1, rounded.shape[-1] if rounded.ndim else 1)
    table = "\n".join(" ".join(map(str, row)) for row in rows.tolist())
    return (
        f'\n[surfaces."{name}"]\n{head}axes = {{ {axes} }}\n'
        f'correction_thousandths = """\n{table}"""\n'
    )


def _as_table(law: Law) -> dict[str, Any]:
    """The table of a law in a profile's file, without arrays."""
    keys = ("value", "low", "high") if isinstance(law, Term) else ("low", "high")
    numbers = {key: float(f"{getattr(law, key):.4g}") for key in keys}
    return {**numbers, "basis": law.basis.label, "origin": law.origin}


@dataclass(frozen=True)
class _Law(Strict):
    low: float
    high: float
    basis: Literal["measured", "fitted", "bound"]
    origin: str


@dataclass(frozen=True)
class _Term(_Law):
    value: float


@dataclass(frozen=True)
class _Surface(_Law):
    axes: dict[str, tuple[float, ...]]
    correction_thousandths: str


@dataclass(frozen=True)
class _File(Strict):
    name: str
    device: Device
    ranks_per_node: int
    links: dict[str, LinkSheet] = field(default_factory=dict)
    surfaces: dict[str, _Surface] = field(default_factory=dict)
    terms: dict[str, _Term] = field(default_factory=dict)
    devices_per_host: int = 0
    has_nvlink: bool = True
    like: Like | None = None


def _profile(file: _File) -> Profile:
    RANGES["num_devices"].take("ranks_per_node", file.ranks_per_node)
    RANGES["ranks_per_node"].take("devices_per_host", file.devices_per_host)
    _check(file, "")
    _check(file.device, "device.")
    for dtype, flops_per_s in file.device.flops_per_s.items():
        if dtype not in WEIGHT_BYTES:
            raise SpecError(f"device.flops_per_s.{dtype} is an unknown key")
        RANGES["flops_per_s"].take(f"device.flops_per_s.{dtype}", flops_per_s)
    if file.device.float8_attention not in ITEM_BYTES:
        raise SpecError(
            f"device.float8_attention is {shown(file.device.float8_attention)}; it must be one of "
            f"{', '.join(ITEM_BYTES)}"
        )
    own = Profile(
        name=file.name,
        device=file.device,
        ranks_per_node=file.ranks_per_node,
        links=_links(file.links),
        surfaces={name: _surface(each, f"surfaces.{name}") for name, each in file.surfaces.items()},
        terms={name: _term(each, f"terms.{name}") for name, each in file.terms.items()},
        devices_per_host=file.devices_per_host,
        has_nvlink=file.has_nvlink,
    )
    if file.like is None:
        return own
    _check(file.like, "like.")
    return _with_laws_of(own, file.like)


def _check(table: Strict, place: str, range_name: str | None = None) -> None:
    """Check that texts are not empty, and numbers in range: of `range_name`, else of their keys."""
    for key, value in vars(table).items():
        if value == "":
            raise SpecError(f"{place}{key} is empty; it must be text")
        if isinstance(value, float):
            RANGES[range_name or key].take(f"{place}{key}", value)


def _with_laws_of(own: Profile, like: Like) -> Profile:
    """`own` with the laws of another where it has none of its own."""
    name, wider = like.profile, like.wider
    if name == own.name:
        raise SpecError("like.profile is this profile itself")
    other = read_profile(name)
    for begin in like.without:
        if not any(_begins(key, (begin,)) for key in other.surfaces):
            raise SpecError(f"like.without: no law of {name} is called {shown(begin)}")

    def widened(laws: Mapping[str, Law], origin: str) -> dict[str, Law]:
        return {
            key: replace(
                law,
                low=law.low / wider,
                high=law.high * wider,
                basis=Basis.BOUND,
                origin=f"{origin}: {law.origin}",
            )
            for key, law in laws.items()
        }

    # Of an operation that has a law of its own, another library's is no hole.
    of_other = {
        key: replace(law, wider=law.wider * wider)
        for key, law in other.surfaces.items()
        if key.rpartition(".")[0] not in own.surfaces and not _begins(key, like.without)
    }
    surfaces = widened(of_other, f"as {name}, over this datasheet's roofline")
    # Floors of a law belong to its surface.
    of_others = {
        key: term
        for key, term in other.terms.items()
        if key.partition(".")[2] not in own.surfaces
        and not _begins(key.partition(".")[2], like.without)
    }
    terms = widened(of_others, f"as {name}")
    return replace(own, surfaces={**surfaces, **own.surfaces}, terms={**terms, **own.terms})


def _begins(law: str, names: Sequence[str]) -> bool:
    return any(f"{law}.".startswith(f"{name}.") for name in names)


def _links(sheets: Mapping[str, LinkSheet]) -> dict[Link, LinkSheet]:
    known = {link.name.lower(): link for link in Link}
    for name, sheet in sheets.items():
        if name not in known:
            raise SpecError(f"links.{name} must be one of {', '.join(known)}")
        _check(sheet, f"links.{name}.")
    return {known[name]: sheet for name, sheet in sheets.items()}


def _term(law: _Term, place: str) -> Term:
    _check(law, f"{place}.", "term")
    if not law.low <= law.value <= law.high:
        raise SpecError(
            f"{place}.value must lie between low and high: {law.low:g}, {law.value:g}, {law.high:g}"
        )
    return Term(law.value, law.low, law.high, Basis[law.basis.upper()], law.origin)


def _surface(law: _Surface, place: str) -> Surface:
    _check(law, f"{place}.", "correction")
    if not law.low <= 1 <= law.high:
        raise SpecError(
            f"{place}.low and high must lie on both sides of 1: {law.low:g}, {law.high:g}"
        )
    for name, knots in law.axes.items():
        if not knots:
            raise SpecError(f"{place}.axes.{name} is empty; it must be a list of knots")
        for knot in knots:
            RANGES["knot"].take(f"{place}.axes.{name}", knot, "holds")
        if any(b <= a for a, b in pairwise(knots)):
            raise SpecError(f"{place}.axes.{name} must rise")
    shape = tuple(map(len, law.axes.values()))
    thousandths = _numbers(law.correction_thousandths, shape, f"{place}.correction_thousandths")
    return Surface(
        law.axes,
        thousandths / _PER_LOGARITHM,
        law.low,
        law.high,
        Basis[law.basis.upper()],
        law.origin,
    )


def _numbers(text: str, shape: tuple[int, ...], place: str) -> np.ndarray[Any, Any]:
    try:
        numbers = np.array([int(word) for word in text.split()], dtype=np.float64)
    except ValueError as error:
        raise SpecError(f"{place} must hold whole numbers: {error}") from None
    if len(numbers) != math.prod(shape):
        raise SpecError(f"{place} has {len(numbers)} numbers; the axes need {math.prod(shape)}")
    if np.abs(numbers).max(initial=0) > _LARGEST:
        raise SpecError(f"{place} has a number beyond ±{_LARGEST}")
    return numbers.reshape(shape)


_NAMED = re.compile(r"(?P<profile>.+)x(?P<count>[0-9]{1,7})")


@dataclass(frozen=True, eq=False)
class ModelledCluster:
    """Devices of one kind on nodes of `profile.ranks_per_node`; the last node may hold fewer."""

    profile: Profile
    num_devices: int

    @property
    def num_nodes(self) -> int:
        """Nodes that hold a device."""
        return -(-self.num_devices // self.profile.ranks_per_node)

    def __str__(self) -> str:
        return f"{self.profile.name}x{self.num_devices}"


def parse_cluster(text: str) -> ModelledCluster:
    """Read `h100x16`, or `mine.tomlx2` for a profile that `expertlane calibrate` wrote.

    Raises:
        SpecError: not of this form, no device, an unknown profile, or a damaged file.
    """
    found = _NAMED.fullmatch(text.strip())
    count = None if found is None else RANGES["num_devices"].parse(found["count"])
    if found is None or count is None:
        raise SpecError(
            f"cluster {shown(text)} is not PROFILExCOUNT, for example h100x16 (COUNT: "
            f"{RANGES['num_devices']}); profiles: "
            f"{', '.join(shipped_profiles())}, or a TOML file of expertlane calibrate"
        )
    return ModelledCluster(read_profile(found["profile"]), int(count))


BOUNDS = ("low", "seconds", "high")  # the first axis of every clock
LIKELY = BOUNDS.index("seconds")

ADMISSION_S = "admission_s"
ARRIVAL_S = "arrival_s"
DRIVER_S = "driver_s"
DRIVER_PER_RANK_S = "driver_per_rank_s"
DP_SYNC_S = "dp_sync_s"
GRAPH_LAUNCH_S = "graph_launch_s"
LAUNCH_S = "launch_s"
OVERHEAD_S = "overhead_s"
OF_TRANSFERS = "transfer"  # in place of a stage, after `overhead_s.`

# Of serving engines, whose data-parallel ranks have a scheduler each: before every step they tell
# each other how many tokens they have, since all take part in its collectives.
ASSUMED_DP_SYNC = Term(
    20e-6, 5e-6, 100e-6, Basis.BOUND, "assumption: a message between hosts or a small all-reduce"
)


class Execution(StrEnum):
    """The host's work for each operation."""

    EAGER = "eager"  # launches every kernel, ahead of the device
    GRAPH = "graph"  # launches a micro-batch's kernels at once
    SERIAL = "serial"  # is the device: a CPU's calls and its work take turns


@dataclass(frozen=True, eq=False)
class Terms:
    """The single numbers that a timeline needs, each [B]: of a profile, low, likely and high.

    Attributes:
        launch_s: to launch a kernel, a whole graph, or an operation in series, by `execution`.
        driver_s: between steps: scheduling a step and sending it to the ranks.
        in_series: where all is in series, of operations by stage and of transfers, in place of
            `launch_s`; from the profile's terms `overhead_s.<stage>` and `overhead_s.transfer`.
        driver_per_rank_s: for every rank of a replica after the first.
        dp_sync_s: between data-parallel ranks that have a scheduler each, for every doubling of
            them; nothing where all is in series: there one driver plans for all.
        arrival_s: time from when a request is sent until it can be scheduled.
        admission_s: before that, of each request by itself: a front end takes one after the other.
        hiding: how well transfers are hidden by what computes beside them: perfectly (low), as is
            likely, not at all (high).
    """

    execution: Execution
    launch_s: Floats
    driver_s: Floats
    in_series: Mapping[str, Floats] = field(default_factory=dict)
    driver_per_rank_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)))
    dp_sync_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)))
    arrival_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)))
    admission_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)))
    hiding: Sequence[str] = BOUNDS

    @property
    def num_clocks(self) -> int:
        """B; those of `BOUNDS` come first."""
        return len(self.driver_s)

    def step_s(self, layout: Layout) -> Floats:
        """[B]; the driver's part of a step of a replica."""
        of_ranks = (layout.replica_size - 1) * self.driver_per_rank_s
        return self.driver_s + of_ranks + log2(layout.dp) * self.dp_sync_s

    def overhead_s(self, step: Operation | Transfer) -> Floats:
        """[3]; overhead of a step in series beyond its law: the engine's own work around it."""
        place = step.stage.label if isinstance(step, Operation) else OF_TRANSFERS
        return self.in_series.get(place, self.launch_s)

    @classmethod
    def of(cls, profile: Profile, execution: Execution) -> "Terms":
        """From a profile; one that has `overhead_s` is a CPU's, where all is in series.

        Raises:
            UserError: the profile lacks one of them.
        """
        if OVERHEAD_S in profile.terms:
            execution = Execution.SERIAL
        name = {
            Execution.EAGER: LAUNCH_S,
            Execution.GRAPH: GRAPH_LAUNCH_S,
            Execution.SERIAL: OVERHEAD_S,
        }[execution]
        known = {
            term: np.array([each.low, each.value, each.high])
            for term, each in profile.terms.items()
        }
        for term in (name, DRIVER_S):
            if term not in known:
                raise UserError(
                    f"profile {profile.name} has no term {term!r}; it has: "
                    f"{', '.join(sorted(known)) or 'none'}"
                )
        none = np.zeros(len(BOUNDS))
        sync = profile.terms.get(DP_SYNC_S, ASSUMED_DP_SYNC)
        sync_s = np.array([sync.low, sync.value, sync.high])
        begin = f"{OVERHEAD_S}."
        return cls(
            execution=execution,
            launch_s=known[name],
            driver_s=known[DRIVER_S],
            in_series={
                term.removeprefix(begin): each
                for term, each in known.items()
                if term.startswith(begin)
            },
            driver_per_rank_s=known.get(DRIVER_PER_RANK_S, none),
            dp_sync_s=none if execution is Execution.SERIAL else sync_s,
            arrival_s=known.get(ARRIVAL_S, none),
            admission_s=known.get(ADMISSION_S, none),
        )

    def changed(self, change: Callable[[str, Floats], Floats], hiding: Sequence[str]) -> "Terms":
        """The terms on other clocks.

        Args:
            change: makes a term's seconds of those there are; by its name, or place in series.
        """
        names = [each.name for each in fields(self) if each.name.endswith("_s")]
        return Terms(
            execution=self.execution,
            in_series={place: change(place, each) for place, each in self.in_series.items()},
            hiding=hiding,
            **{name: change(name, getattr(self, name)) for name in names},
        )

    @property
    def only_likely(self) -> "Terms":
        """The terms with low and high replaced by the likely ones."""
        hiding = [BOUNDS[LIKELY]] * len(BOUNDS)
        return self.changed(lambda _, each: np.full(len(BOUNDS), each[LIKELY]), hiding)

    @classmethod
    def free(cls) -> "Terms":
        """Launches and driver that take no time."""
        none = np.zeros(len(BOUNDS))
        return cls(Execution.SERIAL, none, none)


def kernels_of(profile: Profile) -> KernelSet:
    """The kernels that a profile's laws are of: the engine's if `expertlane calibrate` made it.

    Only that measures what the engine launches; shipped profiles assume it.
    """
    if OVERHEAD_S in profile.terms:
        return ENGINE
    launch = profile.terms.get(LAUNCH_S)
    is_measured = launch is not None and launch.basis is Basis.MEASURED
    return ENGINE_ON_GPUS if is_measured else GPU_LIBRARIES
