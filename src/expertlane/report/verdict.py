"""The verdict on two deployments: which is faster, by what factor, how surely, and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from expertlane.report.compared import (
    LEAST_SHARE,
    OTHER,
    Comparison,
    Row,
    StepDifference,
    difference_of,
    step_difference,
)
from expertlane.report.numbers import (
    counted,
    figures,
    low_high,
    milliseconds,
    percent,
    signed,
    times,
)
from expertlane.results.estimate import Estimate, is_told_apart
from expertlane.results.hardware import VirtualTime
from expertlane.results.results import Results
from expertlane.spec.names import Phase

_Causes = tuple[tuple[str, Estimate], ...]
Rank = Literal["faster", "slower", "level", "undecided"]

_LEVEL = 0.05  # an interval no further from 1 is level


@dataclass(frozen=True)
class Verdict:
    """The deployment that the first sentence is about, and the best of the others.

    Attributes:
        ratio: TPS of `one` over that of `other`; with a 90 % interval where repetitions allow one,
            on links half to twice as fast as assumed; with bounds where it is projected.
        num_runs: repetitions of each; None for a projection.
        steps_s: seconds of a step of each, on the clock of the ratio.
        reasons, counter: milliseconds of a step of `one` less those of `other` by cause, of the
            causes that differ by more than their noise, or of all where that is not known, and by
            0.5 % of the step: those that make the ratio, and those that go against it; the
            largest first.
    """

    one: Row
    other: Row
    ratio: Estimate
    num_runs: int | None
    steps_s: tuple[float, float]
    reasons: _Causes
    counter: _Causes

    @property
    def slower_and_faster(self) -> tuple[Row, Row]:
        """The two in this order by the ratio, whichever the verdict is about."""
        return (self.other, self.one) if self.ratio.value >= 1 else (self.one, self.other)

    @property
    def difference(self) -> StepDifference:
        """From the step of `other` to that of `one`, by the causes that are named."""
        one_ms, other_ms = (1e3 * seconds for seconds in self.steps_s)
        causes_ms = {cause: ms.value for cause, ms in (*self.reasons, *self.counter)}
        return difference_of(other_ms, one_ms, causes_ms)

    @property
    def has_interval(self) -> bool:
        """True if the ratio has an interval or bounds."""
        return self.ratio.low is not None

    @property
    def is_told_apart(self) -> bool:
        """True if the interval of the ratio leaves out 1."""
        return is_told_apart(self.ratio, 1.0)


@dataclass(frozen=True)
class Factor:
    """Speed of one deployment over another, for a sentence.

    Attributes:
        other: name of the other in the sentence.
        ratio: as in `Verdict`.
        depends_on_links: true if the ratio is decided for the assumed links, but not for all links
            half to twice as fast.
    """

    other: str
    ratio: Estimate
    depends_on_links: bool = False

    @property
    def rank(self) -> Rank:
        """`faster`, `slower`, `level` (all of the interval near 1) or `undecided`."""
        low, value, high = self.ratio.bounds
        if self.ratio.low is not None and low <= 1 <= high:
            is_level = low >= 1 - _LEVEL and high <= 1 + _LEVEL
            return "level" if is_level else "undecided"
        return "faster" if value > 1 else "slower"


def judge(comparison: Comparison) -> Verdict | None:
    """The deployment of the first sentence against the best of the others.

    The same two on every clock; None of a single deployment.
    """
    if not comparison.compared:
        return None
    one, other = comparison.compared[:2]
    found = comparison.pair_of(one, other)
    if found is None:
        return _judge_once(comparison, one, other)
    causes_ms = {cause: seconds * 1e3 for cause, seconds in found.causes_s.items()}
    least_ms = 1e3 * LEAST_SHARE * found.other_step_s
    told = {
        cause: ms
        for cause, ms in causes_ms.items()
        if abs(ms.value) >= least_ms and (ms.low is None or is_told_apart(ms, 0.0))
    }
    steps_s = found.step_s, found.other_step_s
    ratio = _with_links(comparison, one, other, found.ratio)
    return Verdict(one, other, ratio, found.num_runs, steps_s, *_reasons(told, ratio))


def _with_links(comparison: Comparison, one: Row, other: Row, ratio: Estimate) -> Estimate:
    """A ratio whose interval also covers faster and slower links."""
    if ratio.low is None or ratio.high is None:
        return ratio
    least, _, most = comparison.on_links(one, other).bounds
    return Estimate(ratio.value, ratio.low * least, ratio.high * most)


def workload_headline(results: Results, modelled: Comparison) -> str | None:
    """Sentence that compares deployments on the whole workload; None if that was not simulated."""
    found = results.workload
    if found is None:
        return None
    where = f"over the whole workload, projected for {results.projected_for.name}"
    all_served = {row.name: row.record.serving[0] for row in modelled.rows if row.record.serving}
    served = all_served[found.name]
    none = "" if served.keeps_slos else "No deployment meets the limits: "
    if found.over:
        one, *others = modelled.compared
        against = [Factor(_called(modelled, each), found.over[each.name]) for each in others]
        return none + sentence(one.name, against[::-1], where)
    alone = "no other one meets the limits" if len(all_served) > 1 else "no other one fits"
    if len(modelled.rows) == 1:
        alone = "nothing to compare it with"
    return none + (
        f"{found.name} alone: {figures(served.output_tps)} tokens/s "
        f"({low_high(served.output_tps)}), {where}; {alone}."
    )


def factors(comparison: Comparison) -> tuple[Factor, ...]:
    """The deployment of the first sentence against the first one, then the best of the others."""
    one, *others = comparison.compared
    found = []
    for other in others:
        pair = comparison.pair_of(one, other)
        own = pair.ratio if pair else _ratio_once(comparison, one, other)
        ratio = _with_links(comparison, one, other, own)
        depends = is_told_apart(own, 1.0) and not is_told_apart(ratio, 1.0)
        found.append(Factor(_called(comparison, other), ratio, depends))
    return tuple(reversed(found))


def _called(comparison: Comparison, row: Row) -> str:
    """Name of a deployment, with its role where there are more than two."""
    if row is not comparison.compared[1] or len(comparison.rows) < 3:
        return row.name
    kind = "baseline" if row.record.is_baseline and comparison.proposals else "of the others"
    return f"the best {kind}, {row.name}"


def spoken_of(comparison: Comparison, results: Results) -> list[Row]:
    """The first deployment and those that are compared, in the experiment's order."""
    numbers = {row.number for row in (comparison.first, *comparison.compared)}
    return [row for row in comparison.rows if row.number in numbers]


def _reasons(causes_ms: Mapping[str, Estimate], ratio: Estimate) -> tuple[_Causes, _Causes]:
    """Causes with the sign of the ratio, and the others."""
    ordered = sorted(causes_ms.items(), key=lambda item: -abs(item[1].value))
    saved, added = (tuple(each for each in ordered if each[1].value * sign > 0) for sign in (-1, 1))
    return (saved, added) if ratio.value >= 1 else (added, saved)


def _ratio_once(comparison: Comparison, one: Row, other: Row) -> Estimate:
    """TPS ratio without runs in turns: of a projection, with bounds, or of single runs."""
    value = one.tps / other.tps
    if comparison.is_run:
        return Estimate(value)
    low, _, high = one.step.tps.bounds
    least, _, most = other.step.tps.bounds
    return Estimate(value, low / most, high / least)


def _judge_once(comparison: Comparison, one: Row, other: Row) -> Verdict:
    of_tps, num_runs = _ratio_once(comparison, one, other), len(one.step.tps_of_runs)
    difference = step_difference(other, one)
    causes_ms = {cause: Estimate(ms) for cause, ms in difference.causes if cause != OTHER}
    return Verdict(
        one,
        other,
        of_tps,
        num_runs if comparison.is_run else None,
        (difference.faster_ms / 1e3, difference.slower_ms / 1e3),
        *_reasons(causes_ms, of_tps),
    )


def ratio(value: float) -> str:
    """`1.06`."""
    return f"{value:.2f}" if 0.1 <= value < 100 else figures(value)


def _interval(estimate: Estimate) -> str:
    low, _, high = estimate.bounds
    return f"{ratio(low)}–{ratio(high)}"


def headline(comparison: Comparison, results: Results) -> str:
    """One sentence: how much faster, with which interval, on which clock."""
    judged = judge(comparison)
    where = f"in {comparison.phase}, {_clock(comparison, results)}"
    if judged is None:
        return _alone(comparison, where)
    if judged.num_runs is not None and not judged.has_interval:
        where += f" ({counted(judged.num_runs, 'run')}: too few for an interval)"
    return sentence(judged.one.name, factors(comparison), where)


def sentence(one: str, against: Sequence[Factor], where: str) -> str:
    """A sentence that compares one deployment with others.

    For example `A is 1.66× as fast as B (1.60–1.72) and level with the best baseline, C
    (0.97–1.03), in decode.`
    """
    first, *others = against
    words = _clause(one, first)
    for before, each in pairwise((first, *others)):
        if "undecided" in (before.rank, each.rank):
            words += f"; {_clause('it', each)}"
            continue
        link = "but" if {before.rank, each.rank} == {"faster", "slower"} else "and"
        words += f" {link} {_predicate(each)}"
    return f"{words[0].upper() if first.rank == 'undecided' else words[0]}{words[1:]}, {where}."


def _clause(one: str, factor: Factor) -> str:
    if factor.rank != "undecided":
        return f"{one} is {_predicate(factor)}"
    why = ": depends on links" if factor.depends_on_links else ""
    found = f"{ratio(factor.ratio.value)}×, {_interval(factor.ratio)}{why}"
    other = f"{factor.other}," if ", " in factor.other else factor.other
    return f"whether {one} is faster than {other} is not decided ({found})"


def _predicate(factor: Factor) -> str:
    within = "" if factor.ratio.low is None else f" ({_interval(factor.ratio)})"
    if factor.rank == "level":
        return f"level with {factor.other}{within}"
    return f"{ratio(factor.ratio.value)}× as fast as {factor.other}{within}"


def _alone(comparison: Comparison, where: str) -> str:
    only = comparison.first
    tps, num_runs = only.step.tps, len(only.step.tps_of_runs)
    how = f" ({low_high(tps)}, {counted(num_runs, 'run')})" if tps.low is not None else ""
    return (
        f"{only.name} alone: {figures(tps)} tok/s {where}{how}, {comparison.latency_name} "
        f"{milliseconds(only.latency_s)} ms; nothing to compare it with."
    )


def verdict(comparison: Comparison, results: Results) -> tuple[str, ...]:
    """Paragraphs on top: which is faster and why; then cautions."""
    judged, first = judge(comparison), headline(comparison, results)
    if judged is None:
        return (first,)
    sentences = [first, _numbers(comparison, judged), why(comparison, judged)]
    if comparison.source == "measured" and results.measured_on.is_oversubscribed:
        sentences += [_by_critical_path(judged)]
    named = {row.number: row for row in (comparison.first, judged.one, judged.other)}
    return (*filter(None, sentences), *rounding([*named.values()]))


def _clock(comparison: Comparison, results: Results) -> str:
    if comparison.is_run:
        return comparison.clock
    return f"projected for {results.projected_for.name}"


def in_wall_time(wall: Comparison, results: Results) -> str:
    """The verdict on the same two in wall time, and which clock answers what."""
    return "" if judge(wall) is None else f"{headline(wall, results)} {which_clock(results)}"


def which_clock(results: Results) -> str:
    """Which clock answers which question, where there are two."""
    virtual, machine = results.virtual_time, results.machine
    if virtual is None or machine is None:
        return ""
    return (
        f"Believe virtual time for a cluster (a core per rank, {_links(virtual)}), wall time for "
        f"this machine ({machine.num_ranks} ranks on {counted(machine.num_cores, 'core')})."
    )


def _links(virtual: VirtualTime) -> str:
    """Links of virtual time in words: their profile, and how they differ from it."""
    if not virtual.links:
        return "transfers that take no time"
    words = f"links of {virtual.links}"
    if virtual.byte_scale != 1:
        share = f"a transfer takes the share of a step that it takes on {virtual.links}"
        return f"{words}, slowed so that {share}"
    return words if virtual.scale == 1 else f"{words}, transfers {times(virtual.scale)} as long"


def _numbers(comparison: Comparison, judged: Verdict) -> str:
    """TPS and latency of both, in words."""
    one, other = judged.one, judged.other
    return (
        f"{figures(one.tps)} against {figures(other.tps)} tok/s; {comparison.latency_name} "
        f"{milliseconds(one.latency_s)} against {milliseconds(other.latency_s)} ms."
    )


def why(comparison: Comparison, judged: Verdict) -> str:
    """Difference of the two steps in words, each cause with its sign, no more than is sure."""
    one, other = judged.one, judged.other
    step = "a decode step" if comparison.phase is Phase.DECODE else "the prefill"
    if comparison.context is not None:
        step += f" at {comparison.context:,} tokens of context"
    lengths = (
        f"{step} takes {milliseconds(judged.steps_s[0])} ms with {one.name}, "
        f"{milliseconds(judged.steps_s[1])} with {other.name}"
    )
    if not judged.reasons and not judged.counter:
        return f"Why: {lengths}; no cause differs by more than its noise."
    sentence = f"Why: {lengths}."
    if judged.reasons:
        (cause, most), *others = judged.reasons
        sentence += f" First reason: {cause}, {signed(most.value)} ms"
        if most.low is not None and most.high is not None:
            sentence += f" ({signed(most.low)} to {signed(most.high)})"
        if others:
            sentence += f"; then {_listed(others)}"
        sentence += "."
    if judged.counter:
        sentence += f" Against it: {_listed(judged.counter)}."
    if rest := dict(judged.difference.causes).get(OTHER):
        sentence += f" Other causes: {signed(rest)}."
    largest, share = one.step.largest
    return f"{sentence} Largest cost of {one.name}: {largest}, {percent(share)}."


def _listed(causes_ms: Sequence[tuple[str, Estimate]]) -> str:
    return ", ".join(f"{cause} {signed(ms.value)}" for cause, ms in causes_ms)


def _by_critical_path(judged: Verdict) -> str:
    """The two by critical-path CPU time, which may contradict the verdict."""
    one, other = judged.one, judged.other
    tps, tps_of_other = one.critical_path_tps, other.critical_path_tps
    if not tps or not tps_of_other:
        return ""
    return (
        f"By critical-path CPU time (one core per rank, transfers free), {one.name} is "
        f"{ratio(tps / tps_of_other)}× as fast: {figures(tps)} against {figures(tps_of_other)} "
        "TPS. This favours deployments that communicate most."
    )


def rounding(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence for each that rounds more than the others: its computation differs."""
    rounded = [row.record.options.rounded if row.record.options else () for row in rows]
    for row, numbers in zip(rows, rounded, strict=True):
        if numbers and len(set(rounded)) > 1:
            yield f"{row.name} rounds {', '.join(numbers)}: its outputs differ slightly."
        error = row.step.traffic.payload_error if row.step.traffic else None
        if error:
            yield (
                f"{row.name} rounds hidden states to {row.record.known_options.payload} on their "
                f"way to experts, by {error_in_words(error)}: its outputs differ slightly."
            )


def error_in_words(error: float) -> str:
    """`0.165% (root mean square)`; `error`: over the root mean square of the hidden states."""
    return f"{figures(100 * error)}% (root mean square)"
