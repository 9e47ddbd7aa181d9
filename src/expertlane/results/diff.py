"""Differences of two files of results: pairs of metrics, their ratio, its interval, a verdict."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import comb, exp, hypot, log
from typing import Any, Literal

from expertlane.errors import UserError
from expertlane.results.estimate import LEAST_RUNS, Estimate, median_interval
from expertlane.results.file import Row, flat
from expertlane.results.record import (
    FAMILY,
    PARETO,
    RUN,
    DeploymentRecord,
    Source,
    StepsRecord,
)
from expertlane.results.results import FOREIGN_LOAD, Results
from expertlane.results.serving_record import ServingRecord

Verdict = Literal[
    "slower", "faster", "noise unknown", "not significant", "identical", "only in A", "only in B"
]
_SCREENED = {FAMILY, PARETO}  # of plans: the same deployments once more, less exactly
_LEADING: tuple[Source, ...] = ("virtual", "measured", "projected")
_ORDERS = 20  # of all repetitions; two of them have those of A on one side of those of B
_SAME = 1e-6  # a relative change that comes of rounding
_LEAST = 1e-3  # smaller ones are never significant
_VERDICTS = ("drill", "verify")  # speed before a fault says nothing of what it did
_DEPLOYMENTS = ("experiment.deployments", "experiment.scaling", "experiment.name")
# How to get two results of one kind.
_ALIKE: dict[frozenset[str], str] = {
    frozenset(("plan", "comparison")): (
        "expertlane compare --project with the plan's experiment.toml gives a comparison"
    ),
    frozenset(("plan", "simulation")): "expertlane simulate --plan RESULTS#ROW gives a simulation",
    frozenset(("comparison", "simulation")): (
        "of a projection, expertlane simulate --plan RESULTS#ROW gives a simulation"
    ),
}


@dataclass(frozen=True)
class Change:
    """One metric of one deployment in A and in B.

    Attributes:
        where: phase of a step, or the load.
        metric: name of the metric, with its unit.
        before, after: in A and in B; None where it has none.
        ratio: B over A, with the interval of the ratio where both have one.
        gain: relative change for the better, below 0 for the worse; None where one is missing.
    """

    deployment: str
    source: Source
    where: str
    metric: str
    before: Estimate | None
    after: Estimate | None
    ratio: Estimate | None
    gain: float | None
    verdict: Verdict

    def row(self) -> Row:
        """The change as cells of a table."""
        return {
            cell: value
            for each in fields(self)
            for cell, value in flat(each.name, getattr(self, each.name)).items()
        }


@dataclass(frozen=True)
class Difference:
    """All changes from A to B.

    Attributes:
        names: names of A and B.
        kind: the command that both are of.
        settings: settings that differ, deployments aside: name, and values in A and B.
        source: the clock that both have.
        threshold: the share by which a metric may get worse.
    """

    names: tuple[str, str]
    kind: str
    settings: tuple[tuple[str, str, str], ...]
    source: Source
    changes: tuple[Change, ...]
    threshold: float

    @property
    def num_unpaired(self) -> int:
        """Number of metrics that only A or only B has."""
        return len(self.of_verdict("only in A", "only in B"))

    @property
    def has_few_pairs(self) -> bool:
        """True if most metrics have no partner, so that the others give no verdict.

        Of plans the first choices are always compared; the others come and go.
        """
        return self.kind != "plan" and 2 * self.num_unpaired > len(self.changes)

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Significant changes for the worse beyond the threshold; worst first."""
        worse = [
            each
            for each in self.of_verdict("slower")
            if each.gain is not None and each.gain < -self.threshold
        ]
        return tuple(sorted(worse, key=lambda change: change.gain or 0.0))

    def of_verdict(self, *verdicts: Verdict) -> tuple[Change, ...]:
        """The changes with one of these verdicts."""
        return tuple(each for each in self.changes if each.verdict in verdicts)


def difference(
    first: Results, second: Results, names: tuple[str, str], threshold: float
) -> Difference:
    """Compare B with A.

    Args:
        names: names of the two.
        threshold: the share by which a metric may get worse before it is a regression.

    Raises:
        UserError: they are of different commands or models, or of one that answers by a verdict,
            or have nothing in common.
    """
    if first.kind != second.kind:
        alike = _ALIKE.get(frozenset((first.kind, second.kind)), "")
        raise UserError(
            f"{names[0]} is of a {first.kind} and {names[1]} of a {second.kind}; "
            f"give two of the same command{alike and ': '}{alike}"
        )
    if first.kind in _VERDICTS:
        both = zip(names, map(_verdict, (first, second)), strict=True)
        verdicts = "; ".join(map(" ".join, both))
        raise UserError(f"diff compares speed, and a {first.kind} is a verdict: {verdicts}")
    changes = list(_changes(first, second))
    paired = {each.source for each in changes if each.before is not None and each.after is not None}
    source = next((each for each in _LEADING if each in paired), None)
    if source is None:
        raise UserError(
            f"nothing to compare: {names[0]} has {_clocks(first)}, {names[1]} has {_clocks(second)}"
        )
    _check_models(first, second, names)
    return Difference(
        names,
        first.kind,
        tuple(_different_settings(first, second)),
        source,
        tuple(each for each in changes if each.source == source),
        threshold,
    )


def _verdict(results: Results) -> str:
    """The verdict of a command that gives one."""
    (record,) = results.deployments
    if record.verified is not None:
        return f"says {record.verified.verdict}"
    return "failed" if record.drill is not None and record.drill.is_failed else "passed"


def _clocks(results: Results) -> str:
    shown = [f"{each.name} ({each.source})" for each in _compared(results)]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _check_models(first: Results, second: Results, names: tuple[str, str]) -> None:
    """Refuse two models: of one model, settings may differ, and of one architecture, the name.

    Raises:
        UserError: neither is the same.
    """
    models = [each.question.get("experiment", each.question)["model"] for each in (first, second)]
    if not all(isinstance(each, Mapping) for each in models):
        return  # a server tells no more than a name, which it chooses
    rest = [{key: each[key] for key in each if key != "name"} for each in models]
    if first.model_name != second.model_name and rest[0] != rest[1]:
        raise UserError(
            f"{names[0]} is of {first.model_name} and {names[1]} of {second.model_name}, another "
            "model; give two of the same model"
        )


def _different_settings(first: Results, second: Results) -> Iterator[tuple[str, str, str]]:
    """Settings that differ, deployments aside: name, and the value in each; the question first."""
    here, there = _settings(first), _settings(second)
    for name in here | there:
        a, b = (each.get(name, "—") for each in (here, there))
        if a != b:
            yield name, a, b


def _settings(results: Results) -> dict[str, str]:
    """Settings that all deployments share, by name."""
    cluster, virtual = results.cluster, results.virtual_time
    tables = {
        "": {"cluster": cluster and cluster.name, "links": virtual and (virtual.links or "none")},
        "question": {
            name.removeprefix("experiment."): value
            for name, value in _leaves(results.question)
            if not name.startswith(_DEPLOYMENTS)
        },
        "versions": {
            "expertlane": results.versions.expertlane,
            "torch": results.versions.torch,
        },
        "machine": {
            f"machine.{name}": getattr(results.machine, name, None)
            for name in ("cpu_name", "device", "num_cores", "dtype", "kernels", "backend")
        },
    }
    conditions = {each.conditions for each in results.select("projected")}
    if len(conditions) == 1 and (only := conditions.pop()) is not None:
        tables["conditions"] = asdict(only)
    return {
        name: str(value)
        for table in tables.values()
        for name, value in table.items()
        if value is not None
    }


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _compared(results: Results) -> list[DeploymentRecord]:
    return [each for each in results.deployments if not _SCREENED & {*each.roles}]


def _changes(first: Results, second: Results) -> Iterator[Change]:
    devices = [None if each.cluster is None else each.cluster.device for each in (first, second)]
    is_busy = max(first.foreign_cpu_share, second.foreign_cpu_share) >= FOREIGN_LOAD
    for record, other in _record_pairs(first, second):
        held = record or other
        assert held is not None, "a pair has one at least"
        name = " → ".join(dict.fromkeys(each.name for each in (record, other) if each is not None))
        is_run = held.source in RUN
        for metric in _metrics(record, other):
            is_noise_known = not is_run or (metric.is_repeated and not is_busy)
            is_shared = not is_run and devices[0] == devices[1]
            yield _change(name, held.source, metric, is_noise_known, is_shared)


_Pair = tuple[DeploymentRecord | None, DeploymentRecord | None]


def _record_pairs(first: Results, second: Results) -> Iterator[_Pair]:
    """Records of one source and name; of plans first what was chosen, whatever it is."""
    by_conditions = any(
        len({each.conditions for each in _compared(r) if each.source == "projected"}) > 1
        for r in (first, second)
    )

    def key(record: DeploymentRecord) -> Hashable:
        return record.name, record.roles[:1], record.conditions if by_conditions else None

    for source in _LEADING:
        here, there = (
            [each for each in _compared(results) if each.source == source]
            for results in (first, second)
        )
        if first.kind == "plan" and here and there and here[0].name != there[0].name:
            yield here[0], there[0]
        yield from _pairs(here, there, key)


def _pairs(
    first: Sequence[Any], second: Sequence[Any], key: Callable[[Any], Hashable]
) -> Iterator[tuple[Any, Any]]:
    """Pairs with equal keys, in order; single items are paired whatever their keys."""
    if len(first) == len(second) == 1:
        yield first[0], second[0]
        return
    here, there = _by_key(first, key), _by_key(second, key)
    for each in [*here, *(each for each in there if each not in here)]:
        yield here.get(each), there.get(each)


def _by_key(items: Iterable[Any], key: Callable[[Any], Hashable]) -> dict[object, Any]:
    found: dict[object, Any] = {}
    for item in items:
        ordinal = 0
        while (key(item), ordinal) in found:
            ordinal += 1
        found[key(item), ordinal] = item
    return found


@dataclass(frozen=True)
class _Metric:
    """One metric of a pair.

    Attributes:
        before, after: bounds are 90 % intervals, or the range for fewer than `LEAST_RUNS`
            repetitions.
        num_runs: repetitions of each; 1 where nothing was repeated.
    """

    where: str
    name: str
    before: Estimate | None
    after: Estimate | None
    num_runs: tuple[int, int]

    @property
    def is_repeated(self) -> bool:
        """Whether repetitions tell noise, 3 in both or 2 and 5.

        A change that is beyond their ranges is due to chance at most once in 10.
        """
        return comb(sum(self.num_runs), self.num_runs[0]) >= _ORDERS


def _metrics(first: DeploymentRecord | None, second: DeploymentRecord | None) -> Iterator[_Metric]:
    """Metrics of requests under load if there are any, else of steps."""
    records = first, second
    key: Callable[[Any], Hashable]
    name: Callable[[Any], str]
    if any(each is not None and each.serving for each in records):
        key, name, metrics = _load, _load, _SERVED
        parts: list[Sequence[Any]] = [() if each is None else each.serving for each in records]
    else:
        key, name, metrics = _steps, _where, _OF_STEPS
        parts = [() if each is None else each.steps for each in records]
    for before, after in _pairs(parts[0], parts[1], key):
        both = [name(each) for each in (before, after) if each is not None]
        where = " → ".join(dict.fromkeys(both))
        for metric, get in metrics:
            values = [None if each is None else get(each) for each in (before, after)]
            known = [each if each is not None and each.value > 0 else None for each in values]
            if known != [None, None]:
                num_runs = _num_runs(before), _num_runs(after)
                yield _Metric(where, metric, known[0], known[1], num_runs)


def _num_runs(record: StepsRecord | ServingRecord | None) -> int:
    return max(1, len(record.tps_of_runs)) if isinstance(record, StepsRecord) else 1


def _load(record: ServingRecord) -> str:
    if record.rate is not None:
        return f"{record.rate:g} req/s"
    if record.batch is not None:
        return f"batch {record.batch:,}"
    num = record.num_running  # as many as the limits, or memory, allow
    return "all requests" if num is None else f"{num:,} at once"


def _steps(record: StepsRecord) -> Hashable:
    """The key of a step; sequences of measured ones add up over repetitions, so are left out."""
    num_seqs = None if record.context is None else record.num_seqs
    return record.phase, record.pool, record.context, num_seqs


def _where(record: StepsRecord) -> str:
    if record.context is None:
        return str(record.phase)
    return f"{record.phase} at {record.context:,}, {record.num_seqs:,} sequences"


def _tps(record: StepsRecord) -> Estimate:
    """Tokens/s with bounds; a projection has its own."""
    runs = record.tps_of_runs
    if record.tps.low is not None or len(runs) < 2:
        return record.tps
    found = median_interval(runs)
    bounds = (found.low, found.high) if found.low is not None else (min(runs), max(runs))
    return Estimate(record.tps.value, *bounds)


def _typical(name: str) -> Callable[[ServingRecord], Estimate | None]:
    """The median of a time in milliseconds; its mean in a steady state, or without a median."""

    def get(record: ServingRecord) -> Estimate | None:
        summary = getattr(record, name)
        if summary is None:
            return None
        median = summary.median if record.sample is None else None
        typical = median or summary.mean
        return None if typical is None else typical * 1e3

    return get


_LATENCIES = {"TTFT ms": "ttft_s", "TPOT ms": "tpot_s"}  # the less the better
_SERVED: list[tuple[str, Callable[[Any], Estimate | None]]] = [
    ("tokens/s", lambda record: record.output_tps),
    *((metric, _typical(name)) for metric, name in _LATENCIES.items()),
]
_OF_STEPS: list[tuple[str, Callable[[Any], Estimate | None]]] = [("tokens/s", _tps)]


def _change(
    deployment: str, source: Source, metric: _Metric, is_noise_known: bool, is_shared: bool
) -> Change:
    """The change of one metric.

    Args:
        is_shared: whether the bounds of both are of the same terms, whose errors cancel.
    """
    before, after = metric.before, metric.after
    of = deployment, source, metric.where, metric.name, before, after
    if before is None or after is None:
        return Change(*of, None, None, "only in B" if before is None else "only in A")
    ratio = _ratio(before, after, "shared" if is_shared else metric.num_runs)
    gain = 1 - ratio.value if metric.name in _LATENCIES else ratio.value - 1
    low, _, high = ratio.bounds
    verdict: Verdict
    if abs(ratio.value - 1) <= _SAME:
        verdict = "identical"
    elif abs(ratio.value - 1) < _LEAST or low - _SAME <= 1 <= high + _SAME:
        verdict = "not significant"
    elif not is_noise_known:
        verdict = "noise unknown"
    else:
        verdict = "faster" if gain > 0 else "slower"
    return Change(*of, ratio, gain, verdict)


def _ratio(before: Estimate, after: Estimate, how: Literal["shared"] | tuple[int, int]) -> Estimate:
    """B over A; where one of them has no bounds, neither has the ratio.

    Of independent intervals their logarithms are subtracted, and the distances to the ends added
    in quadrature (MOVER: Zou and Donner, Statistics in Medicine 27, 2008); ranges are set against
    each other at their worst.

    Args:
        how: shared terms, or the numbers of repetitions.
    """
    value = after.value / before.value
    ends = before.low, before.high, after.low, after.high
    if any(each is None or each <= 0 for each in ends):
        return Estimate(value)
    (a_low, a, a_high), (b_low, b, b_high) = before.bounds, after.bounds
    if how == "shared":
        return Estimate.between((b_low / a_low, value, b_high / a_high))
    if min(how) < LEAST_RUNS:
        return Estimate(value, b_low / a_high, b_high / a_low)
    down, up = hypot(log(b / b_low), log(a_high / a)), hypot(log(b_high / b), log(a / a_low))
    return Estimate(value, value / exp(down), value * exp(up))
