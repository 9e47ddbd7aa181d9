"""The report of `expertlane diff`: changes between two results."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from math import ceil
from typing import get_args

from expertlane.report.document import Answer, Column, Report, Section, Table, number, text
from expertlane.report.numbers import counted, figures, percent, with_bounds
from expertlane.results.diff import Change, Difference, Verdict
from expertlane.results.estimate import Estimate

_MOST_LINES = 8  # of each table of the answer, and how many characters of a name a line has
_NAME_WIDTH = 18
_MOST_NAMES = 3
_CLOCKS = {"virtual": "virtual time", "measured": "wall time", "projected": "projected"}
_WITH_TABLE = ("slower", "faster", "noise unknown")
_UNKNOWN = (
    "Noise unknown: too few repetitions in A or B, or other processes used the cores. Such changes "
    "are no regressions; measure with expertlane compare on a quiet machine."
)


def report_of_difference(found: Difference, command: str, created: str) -> Report:
    """The whole report: the answer, and every change."""
    first, clock = headline(found), _CLOCKS[found.source]
    setting = f"A: {found.names[0]} | B: {found.names[1]} | {clock}"
    notes = _notes(found)
    sections = (
        Section("Verdict", (first, *notes)),
        Section("What changed", (_table(found.changes, in_full=True),)),
    )
    answer = Answer(setting, first, (*_tables(found), *notes))
    title = f"expertlane diff: {found.names[0]} → {found.names[1]}"
    return Report(title, answer, clock, command, created, sections)


def headline(found: Difference) -> str:
    """Whether there is a regression, or too little in common, and how many metrics changed."""
    regressions, beyond = found.regressions, f"{100 * found.threshold:g}%"
    by_verdict = _by_verdict(found.changes)
    if [*by_verdict] == ["identical"]:
        return f"No regression: {counted(len(found.changes), 'metric')}, all identical."
    changed = ", ".join(f"{len(changes)} {verdict}" for verdict, changes in by_verdict.items())
    if found.has_few_pairs:
        return f"{too_little_in_common(found).capitalize()} ({changed})."
    of_all = f"Of {counted(len(found.changes), 'metric')}, {changed}."
    if not regressions:
        return f"No regression beyond {beyond}. {of_all}"
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
        f"too little in common for a verdict: {found.num_unpaired} of "
        f"{counted(len(found.changes), 'metric')} have no partner"
    )


def _by_verdict(changes: Sequence[Change]) -> dict[Verdict, list[Change]]:
    order = get_args(Verdict)
    ordered = sorted(changes, key=lambda change: order.index(change.verdict))
    return {verdict: [*found] for verdict, found in groupby(ordered, lambda each: each.verdict)}


def _tables(found: Difference) -> Iterator[Table | str]:
    """Tables of changes, the largest first; for the rest, names of deployments."""
    for verdict, changes in _by_verdict(found.changes).items():
        if verdict in _WITH_TABLE:
            ordered = sorted(changes, key=lambda change: -abs(change.gain or 0.0))
            shown = _that_fit(ordered)
            of = f", the {len(shown)} most changed of {len(ordered)}"
            title = verdict.capitalize() + (" in B" if verdict != "noise unknown" else "")
            yield _table(shown, title if len(shown) == len(ordered) else title + of)
        else:
            names = [*dict.fromkeys(f"{each.deployment} {each.where}" for each in changes)]
            more = len(names) - _MOST_NAMES
            listed = "; ".join(names[:_MOST_NAMES]) + (f"; and {more} more" if more > 0 else "")
            yield f"{verdict[0].upper()}{verdict[1:]}: {listed}"


def _that_fit(changes: Sequence[Change]) -> Sequence[Change]:
    """The first changes that have room; at least one."""
    lines = accumulate(ceil(len(each.deployment) / _NAME_WIDTH) for each in changes)
    return changes[: max(1, sum(each <= _MOST_LINES for each in lines))]


def _table(changes: Sequence[Change], title: str = "", *, in_full: bool = False) -> Table:
    columns: list[Column[Change]] = [
        text("deployment", lambda change: change.deployment),
        text("at", lambda change: change.where),
        text("metric", lambda change: change.metric),
        number("A", lambda change: change.before, with_bounds if in_full else figures),
        number("B", lambda change: change.after, with_bounds if in_full else figures),
        number("change", _change),
        number("interval", lambda change: _interval(change.ratio)),
    ]
    if in_full:
        columns.append(text("verdict", lambda change: change.verdict))
    return Table.of(title, columns, changes)


def _change(change: Change) -> str | None:
    return None if change.ratio is None else _signed(change.ratio.value)


def _interval(ratio: Estimate | None) -> str | None:
    if ratio is None or ratio.low is None or ratio.high is None:
        return None
    return f"{_signed(ratio.low).removesuffix('%')} to {_signed(ratio.high)}"


def _signed(ratio: float) -> str:
    """A ratio as a change, `+12%` for 1.12."""
    share = ratio - 1
    return f"{'+' if share > 0 else ''}{percent(share)}"


def _notes(found: Difference) -> list[str]:
    """Settings that are not the same, and why noise is unknown: a line each."""
    notes = []
    if found.settings:
        shown = ", ".join(f"{name} {a} → {b}" for name, a, b in found.settings[:_MOST_NAMES])
        more = len(found.settings) - _MOST_NAMES
        notes.append(f"Not the same in A and B: {shown}{f', and {more} more' if more > 0 else ''}")
    if found.of_verdict("noise unknown"):
        notes.append(_UNKNOWN)
    return notes
