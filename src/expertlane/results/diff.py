"""Differences of two files of results, by deployment and load, and of what they were made under."""

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

_MISSING = "—"


def different_settings(first: Results, second: Results) -> Iterator[tuple[str, str, str]]:
    """Settings that differ, deployments aside: name, and the value in each of the two.

    What was asked comes first: model, cluster and workload.
    """
    here, there = _setting(first), _setting(second)
    names = [*here, *(each for each in there if each not in here)]
    for name in sorted(names, key=lambda name: _part_of_question(name) is None):
        values = [each.get(name, _MISSING) for each in (here, there)]
        if values[0] != values[1]:
            yield name, values[0], values[1]


_DEPLOYMENTS = ("experiment.deployments", "experiment.scaling", "experiment.name", "traffic")
_OF_MACHINE = ("cpu_name", "device", "num_cores", "dtype", "kernels", "backend")


_PARTS = ("model", "cluster", "workload")


def _part_of_question(setting: str) -> str | None:
    """The part of the question that a setting says which one it is of; None for any other."""
    if setting in ("model", "model.name", "cluster"):
        return setting.split(".")[0]
    is_of_load = setting.startswith(("workload.", "load.")) and not setting.endswith(".seed")
    return "workload" if is_of_load else None


def _check_models(first: Results, second: Results, names: tuple[str, str]) -> None:
    """Refuse two models: of one model, settings may differ, and of one architecture, the name.

    Raises:
        UserError: neither is the same.
    """
    tables = [_model_of(each) for each in (first, second)]
    if not all(isinstance(each, Mapping) for each in tables):
        return  # servers tell a name alone, which they choose
    rest = [{key: each[key] for key in each if key != "name"} for each in tables]
    if first.model_name != second.model_name and rest[0] != rest[1]:
        raise UserError(
            f"{names[0]} is of {first.model_name} and {names[1]} of {second.model_name}, another "
            "model; give two of the same model"
        )


def _model_of(results: Results) -> Any:
    return results.question.get("experiment", results.question)["model"]


def _setting(results: Results) -> dict[str, str]:
    """Settings shared by all deployments, by name."""
    found = {
        name.removeprefix("experiment."): value
        for name, value in _leaves(results.question)
        if not name.startswith(_DEPLOYMENTS)
    }
    found["expertlane"] = results.versions.expertlane
    found["torch"] = results.versions.torch or _MISSING
    if results.machine is not None:
        found |= {f"machine.{each}": str(getattr(results.machine, each)) for each in _OF_MACHINE}
    if results.cluster is not None:
        found["cluster"] = results.cluster.name
    if results.virtual_time is not None:
        found["links"] = results.virtual_time.links or "none"
    conditions = {each.conditions for each in results.select("projected")}
    if len(conditions) == 1 and (only := conditions.pop()) is not None:
        found |= {name: str(value) for name, value in asdict(only).items()}
    return found


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _MISSING if value is None else str(value)


Verdict = Literal["faster", "slower", "not significant", "identical", "only in A", "only in B"]
_AS_SCREENED = {FAMILY, PARETO}  # of plans: the same deployments once more, less exactly
_LEADING: tuple[Source, ...] = ("virtual", "measured", "projected")
_ORDERS = 20  # of all repetitions; two of them have those of A on one side of those of B
_SAME = 1e-6  # a relative change that comes of rounding
_SHARE = 0.05  # of a step, by which a cause is another one
_JUDGED = ("drill", "verify")  # speed before a fault says nothing of what it did
_LEAST = 1e-3  # smaller ones are never significant
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
        is_noise_known: whether there are repetitions enough, 3 in both or 2 and 5, for a change
            that is beyond their ranges to be due to chance at most once in 10.
        is_of_other_load: whether A and B had another concurrency or rate there.
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
    is_noise_known: bool = True
    is_of_other_load: bool = False

    def row(self) -> Row:
        """The change as cells of a table."""
        return {
            cell: value for name in _ROW for cell, value in flat(name, getattr(self, name)).items()
        }

    def is_worse(self, threshold: float) -> bool:
        """True if it is worse by more than `threshold`, and by more than its known noise."""
        return self.verdict == "slower" and self.gain is not None and self.gain < -threshold


_ROW = [each.name for each in fields(Change)]


@dataclass(frozen=True)
class Difference:
    """All changes from A to B.

    Attributes:
        names: names of A and B.
        settings: settings that differ, deployments aside: name, and values in A and B.
        has_other_causes: whether steps of `leading` spend their time on other causes, which no
            change tells.
        leading: the source whose changes count.
        changes: changes of that source; `others` are those of the others.
        threshold: the share by which a metric may get worse.
        foreign_cpu_shares: shares of the cores used by other processes while A and B ran.
        strict: whether changes that are not trustworthy count as regressions too.
    """

    names: tuple[str, str]
    kind: str
    settings: tuple[tuple[str, str, str], ...]
    has_other_causes: bool
    leading: Source
    changes: tuple[Change, ...]
    others: tuple[Change, ...]
    threshold: float
    foreign_cpu_shares: tuple[float, float]
    strict: bool = False

    @property
    def is_busy(self) -> bool:
        """True if other processes may have caused changes; never for projections."""
        return self.leading in RUN and max(self.foreign_cpu_shares) >= FOREIGN_LOAD

    @property
    def other_parts(self) -> tuple[str, ...]:
        """Parts of the question that differ: `model` (its name), `cluster`, `workload`."""
        found = {_part_of_question(name) for name, _, _ in self.settings}
        if any(each.is_of_other_load for each in self.changes):
            found.add("workload")
        return tuple(each for each in _PARTS if each in found)

    @property
    def unpaired(self) -> tuple[Change, ...]:
        """Metrics that only A or only B has."""
        return self.with_verdict("only in A", "only in B")

    @property
    def has_few_pairs(self) -> bool:
        """True if most metrics have no partner, so that the others give no verdict.

        Of plans the first choices are always compared; the others come and go.
        """
        return self.kind != "plan" and 2 * len(self.unpaired) > len(self.changes)

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Changes for the worse beyond threshold and noise that are trustworthy; worst first.

        Trustworthy: on a quiet machine, with enough repetitions to know the noise. If `strict`,
        the others count as well.
        """
        return tuple(each for each in self._worse if self.strict or self._is_trusted(each))

    @property
    def untrusted(self) -> tuple[Change, ...]:
        """Changes for the worse beyond the threshold that are not trusted, so no regressions."""
        return tuple(each for each in self._worse if not self.strict and not self._is_trusted(each))

    @property
    def _worse(self) -> list[Change]:
        found = [each for each in self.changes if each.is_worse(self.threshold)]
        return sorted(found, key=lambda change: change.gain or 0.0)

    def _is_trusted(self, change: Change) -> bool:
        return change.is_noise_known and not self.is_busy

    def with_verdict(self, *verdicts: Verdict) -> tuple[Change, ...]:
        """The changes with one of these verdicts."""
        return tuple(each for each in self.changes if each.verdict in verdicts)


def difference(
    first: Results, second: Results, names: tuple[str, str], threshold: float, strict: bool = False
) -> Difference:
    """Compare B with A.

    Args:
        names: names of the two.
        threshold: the share by which a metric may get worse before it is a regression.
        strict: whether changes that are not trustworthy count as regressions too.

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
    if first.kind in _JUDGED:
        told = [
            f"{name} {_judged(each)}" for name, each in zip(names, (first, second), strict=True)
        ]
        raise UserError(f"diff compares speed, and a {first.kind} is a verdict: {'; '.join(told)}")
    changes = list(_changes(first, second))
    both = {each.source for each in changes if each.before is not None and each.after is not None}
    leading = next((source for source in _LEADING if source in both), None)
    if leading is None:
        raise UserError(
            f"nothing to compare: {names[0]} has {_held(first)}, {names[1]} has {_held(second)}"
        )
    _check_models(first, second, names)
    return Difference(
        names,
        first.kind,
        tuple(different_settings(first, second)),
        _have_other_causes(first, second, leading),
        leading,
        tuple(each for each in changes if each.source == leading),
        tuple(each for each in changes if each.source != leading),
        threshold,
        (first.foreign_cpu_share, second.foreign_cpu_share),
        strict,
    )


def _judged(results: Results) -> str:
    """The verdict of a command that gives one."""
    (record,) = results.deployments
    if record.verified is not None:
        return f"says {record.verified.verdict}"
    return "failed" if record.drill is not None and record.drill.is_failed else "passed"


def _held(results: Results) -> str:
    shown = [f"{each.name}{_loads(each)} ({each.source})" for each in _compared(results)]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _loads(record: DeploymentRecord) -> str:
    """` at batch 8, batch 16`; empty where nothing was served."""
    loads = list(dict.fromkeys(map(_load, record.serving)))
    more = f" and {len(loads) - 4} more" if len(loads) > 4 else ""
    return f" at {', '.join(loads[:4])}{more}" if loads else ""


def _compared(results: Results) -> list[DeploymentRecord]:
    return [each for each in results.deployments if not _AS_SCREENED & {*each.roles}]


def _projected(results: Results) -> list[DeploymentRecord]:
    return [each for each in _compared(results) if each.source == "projected"]


def _changes(first: Results, second: Results) -> Iterator[Change]:
    is_paired = _device(first) == _device(second)
    for record, other in _record_pairs(first, second):
        held = record or other
        assert held is not None, "a pair has one at least"
        name = held.name
        if record is not None and other is not None and record.name != other.name:
            name = f"{record.name} → {other.name}"
        shared = is_paired and held.source not in RUN
        for metric in _metrics(record, other):
            yield _change(name, held.source, metric, shared)


def _device(results: Results) -> str | None:
    return None if results.cluster is None else results.cluster.device


_Pair = tuple[DeploymentRecord | None, DeploymentRecord | None]


def _record_pairs(first: Results, second: Results) -> Iterator[_Pair]:
    """Records of one source and name; of plans first what was chosen, whatever it is."""
    by_conditions = any(
        len({each.conditions for each in _projected(r)}) > 1 for r in (first, second)
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


def _have_other_causes(first: Results, second: Results, source: Source) -> bool:
    """True if a cause's share of a step differs by more than runs of the same differ."""
    for record, other in _record_pairs(first, second):
        if record is None or other is None or record.source != source:
            continue
        for before, after in _pairs(record.steps, other.steps, _steps):
            if before is not None and after is not None:
                one, two = before.shares, after.shares
                if any(abs(one.get(c, 0.0) - two.get(c, 0.0)) > _SHARE for c in {*one, *two}):
                    return True
    return False


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
        is_of_other_load: whether the two had another concurrency or rate.
    """

    where: str
    name: str
    before: Estimate | None
    after: Estimate | None
    num_runs: tuple[int, int]
    is_of_other_load: bool


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
        is_other = _is_other_load(before, after)
        for metric, get in metrics:
            values = [None if each is None else get(each) for each in (before, after)]
            known = [each if each is not None and each.value > 0 else None for each in values]
            if known != [None, None]:
                num_runs = _num_runs(before), _num_runs(after)
                yield _Metric(where, metric, known[0], known[1], num_runs, is_other)


def _is_other_load(before: Any, after: Any) -> bool:
    loads = [(each.batch, each.rate) for each in (before, after) if isinstance(each, ServingRecord)]
    return len({*loads}) > 1


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


def _change(deployment: str, source: Source, metric: _Metric, shared: bool) -> Change:
    """Args: shared: whether the bounds of both are of the same terms, whose errors cancel."""
    before, after = metric.before, metric.after
    of = deployment, source, metric.where, metric.name, before, after
    if before is None or after is None:
        return Change(*of, None, None, "only in B" if before is None else "only in A")
    ratio = _ratio(before, after, "shared" if shared else metric.num_runs)
    gain = 1 - ratio.value if metric.name in _LATENCIES else ratio.value - 1
    low, _, high = ratio.bounds
    verdict: Verdict
    if abs(ratio.value - 1) <= _SAME:
        verdict = "identical"
    elif abs(ratio.value - 1) < _LEAST or low - _SAME <= 1 <= high + _SAME:
        verdict = "not significant"
    else:
        verdict = "faster" if gain > 0 else "slower"
    is_known = source not in RUN or comb(sum(metric.num_runs), metric.num_runs[0]) >= _ORDERS
    return Change(*of, ratio, gain, verdict, is_known, metric.is_of_other_load)


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
