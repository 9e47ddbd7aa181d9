"""Corrections of a projection's assumptions, fitted to measurements: a TOML file of factors.

`compare --fit-corrections` fits them; `plan`, `simulate` and `compare --project` apply them to a
cluster's profile with `corrected`. A factor multiplies times: 2 on a link is half its bandwidth.

- a family of kernels: its laws, or the assumed law if the profile has none;
- compute: the part of these kernels that FLOPs bound, more so where FLOPs take longer than bytes:
  another engine's kernels may be fast at many tokens and slow at few;
- links inside nodes, and links between nodes: divides their bandwidth;
- latency: the time of an empty message;
- host: launches of kernels or graphs, and a CPU's overhead per operation;
- scheduler: the driver's time between steps, and the synchronisation of data-parallel ranks;
- arrival: the time from sending a request until it can be scheduled, one request after the other;
- skew is no factor: it is the exponent of the popularity of experts, if `--skew` is not given.

If a profile has almost no driver or arrival time, the factor is on a usual time (`_USUAL_S`): an
engine that was not measured may take long.

A corrected law counts as `fitted`. The bounds of the factor and those of a measured or fitted law
add as independent errors do. A law that was only a bound takes the factor's bounds, which include
the scatter that the fit left. For operations longer or shorter than those that were fitted, bounds
widen by a tenth for every doubling of the time, as outside the knots of a table (`times`); bounds
of single terms widen for every doubling of devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import exp, hypot, log, log2
from pathlib import Path
from typing import Any

from expertlane.cost.laws.device import assumed_law
from expertlane.cost.laws.links import ASSUMED_TERMS
from expertlane.cost.laws.profile import (
    ADMISSION_S,
    ARRIVAL_S,
    ASSUMED_DP_SYNC,
    DP_SYNC_S,
    DRIVER_PER_RANK_S,
    DRIVER_S,
    GRAPH_LAUNCH_S,
    LAUNCH_S,
    OF_TRANSFERS,
    OVERHEAD_S,
    LinkSheet,
    ModelledCluster,
    Profile,
    Term,
)
from expertlane.cost.laws.times import WIDER_PER_DOUBLING, Basis, Surface
from expertlane.cost.step.operation import ATTENTION, OF_MIXERS, OpKind
from expertlane.errors import SpecError, naming
from expertlane.spec.files import CONFIG_BYTES, as_path, build, read_toml, write_text
from expertlane.spec.names import Link
from expertlane.spec.ranges import RANGES, Strict

SCHEMA_VERSION = 1
_MOST = 100.0  # largest factor, and its inverse the smallest
_SURE = 1.001  # narrowest bounds of a corrected law, as a factor


class LawKind(StrEnum):
    """Assumptions of a projection that measurements may correct."""

    INTRA_NODE = "intra_node_link"
    INTER_NODE = "inter_node_link"
    LATENCY = "latency"
    ATTENTION = "attention"
    GEMM = "gemm"
    EXPERTS = "experts"
    MEMORY = "memory"
    COMPUTE = "compute"
    HOST = "host"
    SCHEDULER = "scheduler"
    ARRIVAL = "arrival"
    SKEW = "skew"

    @property
    def label(self) -> str:
        """The assumption's name in reports."""
        return _LABELS[self]


_LABELS = {
    LawKind.INTRA_NODE: "links inside a node",
    LawKind.INTER_NODE: "links between nodes",
    LawKind.LATENCY: "latency of transfers",
    LawKind.ATTENTION: "attention kernels",
    LawKind.GEMM: "matrix products",
    LawKind.EXPERTS: "expert kernels",
    LawKind.MEMORY: "memory-bound kernels",
    LawKind.COMPUTE: "computing of many tokens",
    LawKind.HOST: "host overhead",
    LawKind.SCHEDULER: "scheduler overhead",
    LawKind.ARRIVAL: "admission of requests",
    LawKind.SKEW: "routing skew",
}
LINKS = LawKind.INTRA_NODE, LawKind.INTER_NODE, LawKind.LATENCY
KERNELS = {
    **dict.fromkeys((*ATTENTION, *OF_MIXERS), LawKind.ATTENTION),
    OpKind.GEMM: LawKind.GEMM,
    OpKind.EXPERTS: LawKind.EXPERTS,
    OpKind.MEMORY: LawKind.MEMORY,
}
_LINK = {Link.INTRA_NODE: LawKind.INTRA_NODE, Link.INTER_NODE: LawKind.INTER_NODE}
_FLOORS = "floor_s.", "floor_per_peer_s.", "floor_per_doubling_s."
_AROUND_TRANSFERS = f"{OVERHEAD_S}.{OF_TRANSFERS}"
_LAUNCHES = LAUNCH_S, GRAPH_LAUNCH_S, OVERHEAD_S
_SCHEDULING = DRIVER_S, DRIVER_PER_RANK_S, DP_SYNC_S
_USUAL_S = {DRIVER_S: 2e-4, ADMISSION_S: 1e-3}  # as in shipped profiles; a front end in Python
_USUAL_ON_CPU_S = {DRIVER_S: 3e-3, ADMISSION_S: 5e-3}  # of cores that compute besides


@dataclass(frozen=True)
class Correction(Strict):
    """A factor on the time of an assumption; for routing skew, the exponent itself.

    Attributes:
        low, high: its 90 % interval, with the scatter that the fit left.
        least_s, most_s: seconds of the shortest and the longest operation that it was fitted to;
            None for assumptions without operations.

    Raises:
        SpecError: a number is out of its range.
    """

    factor: float
    low: float
    high: float
    least_s: float | None = None
    most_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.factor <= self.high <= _MOST:
            raise SpecError(
                f"low, factor and high must rise, from 0 to {_MOST:g}: "
                f"{self.low:g}, {self.factor:g}, {self.high:g}"
            )
        spread = self.least_s, self.most_s
        if (self.least_s is None) != (self.most_s is None) or not all(
            each is None or 0 < each < 1e6 for each in spread
        ):
            raise SpecError("least_s and most_s must both be there, and above 0, or neither")

    @classmethod
    def exactly(cls, factor: float) -> "Correction":
        """A factor without an interval, to project under another assumption."""
        return cls(factor, factor, factor)

    @property
    def spread(self) -> tuple[float, float]:
        """Logarithms of low / factor and of high / factor."""
        return log(max(self.low, 1e-9) / self.factor), log(self.high / self.factor)


Span = tuple[float, float]


@dataclass(frozen=True)
class FitSource(Strict):
    """The measurements that corrections were fitted to.

    Attributes:
        engine: the engine that was measured, with its version.
        num_points: number of measured numbers: times of steps, their parts, latencies, throughputs.
        num_ranks, num_seqs, context: least and most ranks of a deployment, sequences in a step, and
            cached positions before a step.
        error_before, error_after: median relative error of whole steps and load metrics.
        framework: serving framework whose fitted factors the projection had too; empty for none.
        created: time of the measurement, ISO 8601, UTC.
    """

    model: str
    cluster: str
    engine: str
    deployments: tuple[str, ...]
    num_points: int
    num_ranks: tuple[int, int]
    num_seqs: tuple[int, int]
    context: tuple[int, int]
    error_before: float
    error_after: float
    framework: str = ""
    created: str = ""


@dataclass(frozen=True)
class Corrections(Strict):
    """The corrections of a file.

    Attributes:
        factors: by `LawKind`; assumptions without a factor stay as they are.

    Raises:
        SpecError: a factor has an unknown name, or is 0.
    """

    fitted_on: FitSource
    factors: dict[str, Correction] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise SpecError(
                f"schema_version is {self.schema_version}; this expertlane reads {SCHEMA_VERSION}: "
                "write it again by compare --fit-corrections"
            )
        known = {str(each) for each in LawKind}
        for name, each in self.factors.items():
            if name not in known:
                raise SpecError(f"factors.{name} must be one of {', '.join(sorted(known))}")
            if name == LawKind.SKEW:
                RANGES["skew"].take("factors.skew", each.factor)
            elif each.low <= 0:
                raise SpecError(f"factors.{name}.low is {each.low:g}; it must be above 0")

    @property
    def skew(self) -> float | None:
        """The exponent of the popularity of experts; None if it is not corrected."""
        found = self.factors.get(LawKind.SKEW)
        return None if found is None else found.factor

    def write(self, path: str | Path) -> Path:
        """Write the file that `corrections` of plan, simulate and compare takes; return its path.

        Raises:
            UserError: its folder cannot be written to.
        """
        return write_text(as_path("path", path), to_toml(self))

    @property
    def words(self) -> str:
        """The factors and what they were fitted to, in a sentence for lists of assumptions."""
        on = self.fitted_on
        factors = "; ".join(
            f"{LawKind(name).label} exponent {each.factor:.2g}"
            if name == LawKind.SKEW
            else f"{LawKind(name).label} × {each.factor:.2f} ({each.low:.2f} to {each.high:.2f})"
            for name, each in self.factors.items()
        )
        num = len(on.deployments)
        return (
            f"times of {factors or 'nothing'}: fitted to {on.num_points} measured numbers of {num} "
            f"deployment{'' if num == 1 else 's'} of {on.model} on {on.cluster} with {on.engine}, "
            f"{_span(on.num_ranks)} ranks, {_span(on.num_seqs)} sequences"
        )


def _span(ends: tuple[int, int]) -> str:
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,} to {ends[1]:,}"


def read_corrections(path: Path) -> Corrections:
    """Read a corrections file.

    Raises:
        SpecError: the file is missing or damaged; the message names file and key.
    """
    data = read_toml(path, CONFIG_BYTES)
    with naming(path):
        return build(Corrections, data)


def to_toml(corrections: Corrections) -> str:
    """Corrections as the text of a TOML file."""
    import tomli_w  # not needed to read

    def table(each: Any) -> dict[str, Any]:
        shown = {name: _short(value) for name, value in vars(each).items()}
        return {name: value for name, value in shown.items() if value is not None}

    data = {
        "schema_version": corrections.schema_version,
        "fitted_on": table(corrections.fitted_on),
        "factors": {str(name): table(each) for name, each in corrections.factors.items()},
    }
    return tomli_w.dumps(data)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return list(value) if isinstance(value, tuple) else value


def corrected(cluster: ModelledCluster, corrections: Corrections) -> ModelledCluster:
    """The cluster with corrected laws; a corrected routing skew is not applied here."""
    fewest, most = corrections.fitted_on.num_ranks
    num = cluster.num_devices
    beyond = max(log2(num / max(most, 1)), log2(max(fewest, 1) / num), 0.0)
    known = {LawKind(name): each for name, each in corrections.factors.items()}
    profile = scaled(cluster.profile, known, 1 + WIDER_PER_DOUBLING * beyond)
    return replace(cluster, profile=replace(profile, corrected=corrections.words))


def scaled(
    profile: Profile, corrections: Mapping[LawKind, Correction], wider: float = 1.0
) -> Profile:
    """The profile with factors on its laws and terms, and with their bounds.

    Args:
        wider: factor that widens the bounds of single terms.
    """
    if not corrections:
        return profile
    firmest = min((law.basis for law in profile.surfaces.values()), default=None)
    of_compute = corrections.get(LawKind.COMPUTE, Correction.exactly(1.0))
    return replace(
        profile,
        own_basis=firmest,
        compute_factor=(of_compute.low, of_compute.factor, of_compute.high),
        links={link: _sheet(each, corrections.get(_LINK[link])) for link, each in _links(profile)},
        surfaces=_surfaces(profile, corrections),
        terms=_terms(profile, corrections, wider),
        factors={
            kind: corrections[assumed].factor
            for kind, assumed in KERNELS.items()
            if assumed in corrections
        },
    )


def _links(profile: Profile) -> list[tuple[Link, LinkSheet]]:
    return list(profile.links.items())


def _sheet(sheet: LinkSheet, by: Correction | None) -> LinkSheet:
    if by is None:
        return sheet
    return LinkSheet(sheet.bytes_per_s / by.factor, f"{sheet.origin}; corrected / {by.factor:.3g}")


def assumed_of(law: str) -> LawKind:
    """The assumption that a law belongs to, by the law's name in a profile."""
    first = law.partition(".")[0]
    if first in KERNELS:
        return KERNELS[OpKind(first)]
    return LawKind.INTER_NODE if law.endswith("inter_node") else LawKind.INTRA_NODE


def _surfaces(profile: Profile, corrections: Mapping[LawKind, Correction]) -> dict[str, Surface]:
    laws = dict(profile.surfaces)
    for kind, assumed in KERNELS.items():
        # For number types without a measured law; mixers without one stay between their bounds.
        if assumed in corrections and kind not in OF_MIXERS:
            laws.setdefault(str(kind), assumed_law())
    return {name: _surface(law, assumed_of(name), corrections) for name, law in laws.items()}


def _surface(law: Surface, of: LawKind, corrections: Mapping[LawKind, Correction]) -> Surface:
    by, is_link = corrections.get(of), of in LINKS
    if by is None and is_link:
        by = corrections.get(LawKind.LATENCY)
    if by is None:
        return law
    low, high = _spread(law.basis, log(law.low), log(law.high), by)
    factor = 1.0 if is_link else by.factor  # a link's factor is on its bandwidth or its floors
    spread = None
    if by.least_s is not None and by.most_s is not None:
        spread = by.least_s, by.most_s
    return replace(
        law,
        correction=law.correction + log(factor),
        low=exp(low),
        high=exp(high),
        basis=Basis.FITTED,
        origin=f"{law.origin}; corrected × {by.factor:.3g}",
        wider=1.0 if law.basis is Basis.BOUND else law.wider,
        fitted_s=spread,
    )


def _spread(basis: Basis, low: float, high: float, by: Correction) -> Span:
    """Logarithms of bounds: of the factor, and of the law unless it was only a bound."""
    if basis is Basis.BOUND:
        low = high = 0.0
    of_low, of_high = by.spread
    return min(-hypot(low, of_low), -log(_SURE)), max(hypot(high, of_high), log(_SURE))


def _terms(
    profile: Profile, corrections: Mapping[LawKind, Correction], wider: float
) -> dict[str, Term]:
    terms = dict(profile.terms)
    if LawKind.LATENCY in corrections or any(each in corrections for each in _LINK.values()):
        terms = {
            name: each for name, each in ASSUMED_TERMS.items() if not name.startswith("contention")
        } | terms
    if LawKind.SCHEDULER in corrections:
        terms.setdefault(DP_SYNC_S, ASSUMED_DP_SYNC)
    if LawKind.ARRIVAL in corrections and ARRIVAL_S not in terms:
        terms.setdefault(ADMISSION_S, _NONE)
    usual_s = _USUAL_ON_CPU_S if OVERHEAD_S in terms else _USUAL_S
    return {
        name: _term(name, term, corrections, wider, usual_s.get(name, 0.0))
        for name, term in terms.items()
    }


_NONE = Term(0.0, 0.0, 0.0, Basis.BOUND, "assumption: none")


def _term(
    name: str,
    term: Term,
    corrections: Mapping[LawKind, Correction],
    wider: float,
    usual_s: float,
) -> Term:
    head, _, last = name.partition(".")
    if name.startswith(_FLOORS) or name == _AROUND_TRANSFERS:
        by = corrections.get(LawKind.LATENCY)
    elif head in _LAUNCHES:
        by = corrections.get(LawKind.HOST)
    elif name in _SCHEDULING:
        by = corrections.get(LawKind.SCHEDULER)
    elif name in (ADMISSION_S, ARRIVAL_S):
        by = corrections.get(LawKind.ARRIVAL)
    elif head in ("efficiency", "forwarding_bytes_per_s"):
        is_far = last.endswith("inter_node")
        by = corrections.get(LawKind.INTER_NODE if is_far else LawKind.INTRA_NODE)
        if by is None:
            return term
        if head == "efficiency":  # the factor is on the link's bandwidth already
            return replace(term, basis=Basis.FITTED, origin=f"{term.origin}; corrected link")
        by = Correction(1 / by.factor, 1 / by.high, 1 / max(by.low, 1 / _MOST))  # a rate
    else:
        by = None
    if by is not None and term.value < usual_s:
        return _beyond(term, by, usual_s, wider)
    if by is None or not term.value:
        return term
    value = term.value * by.factor
    own = log(term.low / term.value) if term.low > 0 else -log(_MOST)
    low, high = _spread(term.basis, own, log(term.high / term.value), by)
    return Term(
        value,
        value * exp(low) / wider,
        value * exp(high) * wider,
        Basis.FITTED,
        f"{term.origin}; corrected × {by.factor:.3g}",
    )


def _beyond(term: Term, by: Correction, usual_s: float, wider: float) -> Term:
    """A term that is less than usual, with what a factor on the usual adds or takes off."""

    def added(own: float, factor: float) -> float:
        return max(own + usual_s * (factor - 1), 0.0)

    return Term(
        added(term.value, by.factor),
        added(term.low, by.low) / wider,
        added(term.high, by.high) * wider,
        Basis.FITTED,
        f"{term.origin}; corrected by {by.factor - 1:+.3g} × {usual_s:g} s",
    )
