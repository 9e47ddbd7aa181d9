"""The report of `expertlane diff`: changes between two results."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from math import ceil
from operator import attrgetter

from expertlane.report.document import Answer, Column, Report, Section, Table, number, text
from expertlane.report.numbers import counted, figures, percent, with_bounds
from expertlane.results.diff import Change, Difference, Verdict
from expertlane.results.estimate import Estimate

_MOST_LINES = 8  # of each table of the answer, and how many characters of a name a line has
_NAME_WIDTH = 18
_MOST_NAMES = 3
_CLOCKS = {"virtual": "virtual time", "measured": "wall time", "projected": "projected"}
_WORDS: dict[Verdict, str] = {
    "slower": "Slower in B",
    "faster": "Faster in B",
    "not significant": "Not significant",
    "identical": "Identical",
    "only in A": "Only in A",
    "only in B": "Only in B",
}


def report_of_difference(found: Difference, command: str, created: str) -> Report:
    """The whole report: the answer, every change, and other differences."""
    shown = [("What changed", found.changes)]
    for source, of_source in groupby(found.others, lambda change: change.source):
        shown.append((f"Also: {_CLOCKS[source]}", tuple(of_source)))
    said = (headline(found), *_notes(found))
    sections = [
        Section("Verdict", said),
        *(Section(heading, (_table(changes, in_full=True),)) for heading, changes in shown),
        Section("What else differs", (_settings(found),) if found.settings else ()),
    ]
    setting = f"A: {found.names[0]} | B: {found.names[1]} | {_CLOCKS[found.leading]}"
    answer = Answer(setting, said[0], (*_tables(found), *_notes(found)))
    title = f"expertlane diff: {found.names[0]} → {found.names[1]}"
    return Report(title, answer, _CLOCKS[found.leading], command, created, tuple(sections))


def headline(found: Difference) -> str:
    """Whether there is a regression, or too little in common, and how many metrics changed.

    First, whether that is the answer to two questions.
    """
    first = f"Not of the same {' and '.join(found.other_parts)}. " if found.other_parts else ""
    return first + _headline(found)


def _headline(found: Difference) -> str:
    regressions, beyond = found.regressions, f"{100 * found.threshold:g}%"
    counts = [(len(found.with_verdict(verdict)), verdict) for verdict in _WORDS]
    changed = ", ".join(f"{count} {verdict}" for count, verdict in counts if count)
    of_all = f"Of {counted(len(found.changes), 'metric')}, {changed}."
    if len(found.with_verdict("identical")) == len(found.changes):
        return f"No regression: {counted(len(found.changes), 'metric')}, all identical."
    if found.has_few_pairs:
        return f"{too_little_in_common(found).capitalize()} ({changed})."
    if not regressions:
        doubt = ""
        if found.untrusted:
            why = "busy machine" if found.is_busy else "noise unknown"
            is_or_are = "is" if len(found.untrusted) == 1 else "are"
            doubt = f"; {len(found.untrusted)} beyond it {is_or_are} not trustworthy ({why})"
        return f"No regression beyond {beyond}{doubt}. {of_all}"
    worst = regressions[0]
    interval = _interval(worst.ratio)
    return (
        f"{counted(len(regressions), 'regression')} beyond {beyond}, the largest {worst.metric} "
        f"of {worst.deployment} ({worst.where}): {_change(worst)}"
        + (f" ({interval})" if interval else "")
        + f". {of_all}"
    )


def too_little_in_common(found: Difference) -> str:
    """The number of metrics without a partner, in words."""
    return (
        f"too little in common for a verdict: {len(found.unpaired)} of "
        f"{counted(len(found.changes), 'metric')} have no partner"
    )


def _tables(found: Difference) -> Iterator[Table | str]:
    """Tables of changes, the largest first; for the rest, names of deployments."""
    for verdict, words in _WORDS.items():
        changes = found.with_verdict(verdict)
        if not changes:
            continue
        if verdict in ("slower", "faster"):
            ordered = sorted(changes, key=lambda change: -abs(change.gain or 0.0))
            shown = _that_fit(ordered)
            of = f", the {len(shown)} most changed of {len(ordered)}"
            yield _table(shown, words if len(shown) == len(ordered) else words + of)
        else:
            names = _named(found, changes)
            more = len(names) - _MOST_NAMES
            listed = "; ".join(names[:_MOST_NAMES]) + (f"; and {more} more" if more > 0 else "")
            yield f"{words}: {listed}"


def _named(found: Difference, changes: Sequence[Change]) -> list[str]:
    """Deployments with phase or load; with metrics, where others of these changed differently."""
    names = []
    key = attrgetter("deployment", "where")
    for place, of_place in groupby(changes, key):
        metrics = [change.metric for change in of_place]
        is_all = len(metrics) == sum(key(each) == place for each in found.changes)
        names.append(" ".join(place) + ("" if is_all else f" ({', '.join(metrics)})"))
    return names


def _that_fit(changes: Sequence[Change]) -> Sequence[Change]:
    """The first changes that have room; at least one."""
    lines = accumulate(ceil(len(each.deployment) / _NAME_WIDTH) for each in changes)
    return changes[: max(1, sum(each <= _MOST_LINES for each in lines))]


def _table(changes: Sequence[Change], title: str = "", *, in_full: bool = False) -> Table:
    columns: list[Column[Change]] = [
        text("deployment", lambda change: change.deployment),
        text("at", lambda change: change.where),
        text("metric", lambda change: change.metric),
        number("A", lambda change: _value(change.before, in_full)),
        number("B", lambda change: _value(change.after, in_full)),
        number("change", _change),
        number("interval", lambda change: _interval(change.ratio)),
    ]
    if in_full:
        columns.append(text("verdict", lambda change: change.verdict))
    return Table.of(title, columns, changes)


def _value(estimate: Estimate | None, in_full: bool) -> str | None:
    if estimate is None:
        return None
    has_bounds = estimate.low is not None
    return with_bounds(estimate) if in_full and has_bounds else figures(estimate)


def _change(change: Change) -> str | None:
    return None if change.ratio is None else f"{_signed(change.ratio.value)}"


def _interval(ratio: Estimate | None) -> str | None:
    if ratio is None or ratio.low is None or ratio.high is None:
        return None
    return f"{_signed(ratio.low).removesuffix('%')} to {_signed(ratio.high)}"


def _signed(ratio: float) -> str:
    """A ratio as a change, `+12%` for 1.12."""
    share = ratio - 1
    return f"{'+' if share > 0 else ''}{percent(share)}"


def _notes(found: Difference) -> tuple[str, ...]:
    """Other differences, and where noise is unknown: a line each."""
    notes = []
    if found.settings:
        shown = [f"{name} {a} → {b}" for name, a, b in found.settings[:_MOST_NAMES]]
        more = len(found.settings) - len(shown)
        rest = f", and {more} more" if more else ""
        notes.append(f"Not the same in A and B: {', '.join(shown)}{rest}")
    if found.has_other_causes and not found.with_verdict("faster", "slower"):
        notes.append(
            "Compared: throughput and latency. Where the time of a step goes differs; see both "
            "reports"
        )
    unknown = [
        each for each in found.changes if not each.is_noise_known and each.verdict != "identical"
    ]
    if unknown:
        notes.append(
            f"Noise unknown for {counted(len(unknown), 'metric')}, too few repetitions in A or B: "
            + _counting(found)
        )
    busy = [percent(each) for each in found.foreign_cpu_shares]
    if found.is_busy and len(found.with_verdict("identical")) < len(found.changes):
        notes.append(
            f"Busy machine, other processes used {busy[0]} of the cores in A, {busy[1]} in B: "
            + _counting(found)
        )
    return tuple(notes)


def _counting(found: Difference) -> str:
    return "counted all the same (--strict)." if found.strict else "not counted without --strict."


def _settings(found: Difference) -> Table:
    columns: list[Column[tuple[str, str, str]]] = [
        text("what", lambda each: each[0]),
        text("A", lambda each: each[1]),
        text("B", lambda each: each[2]),
    ]
    return Table.of("", columns, found.settings)
