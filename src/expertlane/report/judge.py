"""The report of `expertlane judge`: which assumption explains the difference, and corrections."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from expertlane.comparison.judge import Candidate, JudgedNumber, Judgement, Term
from expertlane.comparison.judged import EXPERTS_LOAD, TIME, TPS
from expertlane.cost.laws.corrections import Assumed, Correction, FittedOn
from expertlane.report.document import Answer, Column, Report, Section, Table, Words, number, text
from expertlane.report.numbers import counted, figures, milliseconds, percent, shortened, times

_NOTHING = 1e-6  # of a measured number: what is projected is zero, but for rounding
_MOST_ROWS, _MOST_TERMS, _MOST_CANDIDATES = 8, 6, 3  # of the answer
_NAME_WIDTH = 28
_MOST_NAMED = 3  # assumptions that the headline names
_CERTAIN = 0.99  # the largest confidence that is printed as a number
_LITTLE = 0.3  # share of the difference: an assumption that explains less is no explanation
_BANDWIDTH = {str(Assumed.INTRA_NODE), str(Assumed.INTER_NODE)}
_SEPARATING = {
    frozenset({Assumed.HOST, Assumed.SCHEDULER}): (
        "a model with more or fewer layers: launches grow with them, scheduling does not"
    ),
    frozenset({Assumed.EXPERTS, Assumed.SKEW}): (
        "a layout with ep=1, whose ranks all have a part of every expert; or a routing trace"
    ),
    frozenset({Assumed.ATTENTION, Assumed.GEMM}): ("another context: only attention grows with it"),
    frozenset({Assumed.EXPERTS, Assumed.GEMM}): (
        "another number of sequences: it changes how many experts are read"
    ),
    frozenset({Assumed.EXPERTS, Assumed.COMPUTE}): (
        "decode steps beside prefill steps: only those of many tokens are bound by computing"
    ),
    frozenset({Assumed.ARRIVAL, Assumed.SCHEDULER}): (
        "a longer output: scheduling grows with it, admission does not"
    ),
    **{
        frozenset({link, Assumed.LATENCY}): (
            "another number of tokens in a step: bytes grow with it, messages do not"
        )
        for link in (Assumed.INTRA_NODE, Assumed.INTER_NODE)
    },
    frozenset({Assumed.INTRA_NODE, Assumed.INTER_NODE}): (
        "a deployment inside one node, and one over several nodes"
    ),
}


def report_of_judgement(
    found: Judgement, command: str, created: str, corrections: Path | None
) -> Report:
    """The report of a judgement, with its answer.

    Args:
        corrections: path of the corrections file; None if none was written.
    """
    on = found.corrections.fitted_on
    setting = (
        f"{found.model} on {found.cluster} | {found.source}: {found.engine} | "
        f"{counted(len(on.deployments), 'deployment')}, {counted(on.num_points, 'number')}"
    )
    said = headline(found)
    whole, terms = _whole(found.whole), found.terms
    largest = sorted(terms, key=lambda each: -abs(each.measured_s - each.projected_s))
    unidentified = tuple(_unidentified(found))
    answer: list[Words] = [_whole(_farthest(found.whole), _title(found.whole))]
    answer.append(_candidates(found.candidates[:_MOST_CANDIDATES]))
    if terms:
        answer.append(_terms(largest[:_MOST_TERMS], "Largest differences by term"))
    answer += [*unidentified, *_use(found, corrections)]
    sections = (
        Section("Verdict", (said, *unidentified, *found.cautions)),
        Section("Measured against projected", (whole,)),
        Section("Assumptions", (_candidates(found.candidates),)),
        Section("Terms", (_terms(terms),) if terms else ()),
        Section("Every number", (_every(found.numbers),)),
        Section("Corrections", (_fitted_on(on), _factors(found), *_use(found, corrections))),
    )
    title = f"expertlane judge: {found.model} on {found.cluster}"
    return Report(
        title, Answer(setting, said, tuple(answer)), found.source, command, created, sections
    )


def headline(found: Judgement) -> str:
    """The sentence on what explains the difference, how much of it, with what confidence."""
    ratio = found.ratio
    size = (
        f"Measured times are {times(ratio)} the projected ones (median of "
        f"{counted(len(found.whole) or len(found.numbers), 'number')})"
    )
    if found.is_noise or not found.candidates:
        return f"{size}: the difference is within noise, so no assumption is in doubt."
    first = found.candidates[0]
    if first.explained < _LITTLE:
        return (
            f"{size}. No single assumption explains much of the difference; {_named(first)} "
            f"explains the most, {percent(first.explained)}."
        )
    if len(found.likeliest) == 1:
        return (
            f"{size}. {percent(first.explained)} of the difference is explained by "
            f"{_named(first)}, with a confidence of {_confidence(first)}."
        )
    candidates = [each for each in found.candidates if each.name in found.likeliest]
    names = " or ".join(map(_named, candidates[:_MOST_NAMED]))
    more = len(candidates) - _MOST_NAMED
    return (
        f"{size}, which is explained by {names}"
        + (f", or one of {more} more" if more > 0 else "")
        + ": these measurements do not identify which. "
        f"Each explains at most {percent(first.explained)} of the difference."
    )


def _confidence(candidate: Candidate) -> str:
    return ">99%" if candidate.confidence > _CERTAIN else percent(candidate.confidence)


def _named(candidate: Candidate) -> str:
    """`links between nodes at 0.50× the bandwidth`, `host overhead at 3.00× the time`."""
    if candidate.name == Assumed.SKEW:
        now, was = figures(candidate.factor), figures(candidate.was)
        return f"{candidate.label} with exponent {now}, not {was}"
    if candidate.name in _BANDWIDTH:
        return f"{candidate.label} at {times(1 / candidate.factor)} the bandwidth"
    return f"{candidate.label} at {times(candidate.factor)} the time"


def _title(whole: Sequence[JudgedNumber]) -> str:
    shown = _farthest(whole)
    more = f", the {len(shown)} farthest off of {len(whole)}" if len(shown) < len(whole) else ""
    return f"Measured against projected{more}"


def _farthest(whole: Sequence[JudgedNumber]) -> Sequence[JudgedNumber]:
    if len(whole) <= _MOST_ROWS:
        return whole
    farthest = sorted(whole, key=lambda each: -max(each.ratio, 1 / each.ratio))[:_MOST_ROWS]
    return [each for each in whole if each in farthest]


def _metric(each: JudgedNumber) -> str:
    return {TIME: "ms", TPS: TPS}.get(each.metric, f"{each.metric} ms")


def _value(each: JudgedNumber, value: float) -> str:
    is_amount = each.metric in (TPS, EXPERTS_LOAD)
    return figures(value) if is_amount else milliseconds(value)


def _columns() -> list[Column[JudgedNumber]]:
    return [
        text("deployment", lambda each: shortened(each.deployment, _NAME_WIDTH)),
        text("at", lambda each: each.where),
        text("metric", _metric),
        number("measured", lambda each: _value(each, each.measured)),
        number("projected", lambda each: _value(each, each.projected)),
        number("ratio", lambda each: _ratio(each.measured, each.projected)),
        number("corrected", lambda each: _ratio(each.measured, each.corrected)),
    ]


def _ratio(measured: float, other: float) -> str | None:
    return figures(measured / other) if other > _NOTHING * measured else None


def _whole(numbers: Sequence[JudgedNumber], title: str = "") -> Table:
    return Table.of(title, _columns(), numbers)


def _every(numbers: Sequence[JudgedNumber]) -> Table:
    return Table.of("", _columns(), numbers)


def _candidates(candidates: Sequence[Candidate]) -> Table:
    columns: list[Column[Candidate]] = [
        text("assumption", lambda each: _labelled(Assumed(each.name))),
        number("projected", lambda each: _amount(each, each.was)),
        number("best fit", lambda each: _amount(each, each.factor)),
        number("explains", lambda each: percent(max(each.explained, 0.0))),
        number("confidence", _confidence),
    ]
    title = "Each assumption by itself: the factor (×) on its time, or its exponent"
    return Table.of(title, columns, candidates)


def _labelled(assumption: Assumed) -> str:
    return f"{assumption.label} (exponent)" if assumption is Assumed.SKEW else assumption.label


def _amount(candidate: Candidate, value: float) -> str:
    return figures(value) if candidate.name == Assumed.SKEW else times(value)


def _terms(terms: Sequence[Term], title: str = "") -> Table:
    columns: list[Column[Term]] = [
        text("term", lambda each: each.name),
        text("step", lambda each: each.where),
        number("measured ms", lambda each: milliseconds(each.measured_s)),
        number("projected ms", lambda each: milliseconds(each.projected_s)),
        number("ratio", lambda each: _ratio(each.measured_s, each.projected_s)),
        number("corrected", lambda each: _ratio(each.measured_s, each.corrected_s)),
    ]
    return Table.of(title, columns, terms)


def _unidentified(found: Judgement) -> Iterator[str]:
    """Sentences on assumptions that these measurements do not identify, and what would."""
    candidates = [each for each in found.candidates if each.name in found.likeliest]
    if len(candidates) > 1 and not found.is_noise:
        one, other = candidates[:2]
        separating = _SEPARATING.get(frozenset({Assumed(one.name), Assumed(other.name)}))
        if not found.has_terms:
            advice = "step times by cause (--profile, or compare on ranks)"
            advice += f"; or {separating}" if separating else ""
            why = "only whole times were measured"
        else:
            advice = separating or "deployments that differ more: layouts, batch sizes, contexts"
            why = "both have the same effect on the measured numbers"
        yield (
            f"{one.label.capitalize()} and {other.label} cannot be separated: {why}. "
            f"To separate them, measure {advice}."
        )
    confounded: dict[str, list[str]] = defaultdict(list)
    for first, second in found.confounded:
        confounded[first].append(second)
    for first, others in list(confounded.items())[:1]:
        kept = {Assumed(name).label for name in found.corrections.factors}
        if kept & {first, *others}:
            yield (
                f"Corrections of {first} and {' and '.join(others)} have the same effect on all "
                "numbers: only their combined effect is certain."
            )
    if found.without_effect:
        yield f"These deployments do not depend on: {', '.join(found.without_effect)}."


def _use(found: Judgement, corrections: Path | None) -> Iterator[str]:
    on = found.corrections.fitted_on
    if not found.corrections.factors:
        yield "Nothing to correct: no factor differs from 1."
        return
    said = (
        f"Corrections: the median error goes from {percent(on.error_before)} to "
        f"{percent(on.error_after)} on the numbers that they were fitted to."
    )
    if corrections is not None:
        said += f" Next: expertlane plan MODEL --corrections {corrections}"
    yield said


@dataclass(frozen=True)
class _Factor:
    name: str
    correction: Correction


def _factors(found: Judgement) -> Table:
    columns: list[Column[_Factor]] = [
        text("correction", lambda each: _labelled(Assumed(each.name))),
        number("factor", lambda each: each.correction.factor, figures),
        number("low", lambda each: each.correction.low, figures),
        number("high", lambda each: each.correction.high, figures),
        number("shortest µs", lambda each: _us(each.correction.least_s)),
        number("longest µs", lambda each: _us(each.correction.most_s)),
    ]
    factors = [_Factor(name, each) for name, each in found.corrections.factors.items()]
    return Table.of("", columns, factors)


def _us(seconds: float | None) -> str | None:
    return None if seconds is None else figures(1e6 * seconds)


def _fitted_on(on: FittedOn) -> Table:
    def ends(span: tuple[int, int]) -> str:
        return f"{span[0]:,}" if span[0] == span[1] else f"{span[0]:,} to {span[1]:,}"

    return Table.facts(
        [
            ("model", on.model),
            ("cluster", on.cluster),
            ("engine", on.engine),
            ("deployments", "; ".join(on.deployments)),
            ("measured numbers", f"{on.num_points:,}"),
            ("ranks", ends(on.num_ranks)),
            ("sequences in a step", ends(on.num_seqs)),
            ("context", ends(on.context)),
        ],
        "Fitted to",
    )
