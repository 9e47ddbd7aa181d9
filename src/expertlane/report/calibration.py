"""The answer of `expertlane calibrate`: rates of one rank of this machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expertlane.cost.laws.profile import Profile, Term
from expertlane.cost.laws.times import Surface
from expertlane.report.document import Answer, Column, Report, Section, Table, Words, number, text
from expertlane.report.numbers import figures, percent, rate_si

_OVERHEADS = {
    "scheduler overhead": "driver_s",
    "overhead per operation": "overhead_s",
    "overhead per transfer": "overhead_s.transfer",
    "shortest all-to-all": "floor_s.all_to_all.all_links",
    "kernel launch": "launch_s",
}


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Rounds of measuring a machine, and their disturbances.

    Attributes:
        dtype: number type of the ranks.
        num_rounds, most_rounds: rounds made, and rounds that an idle machine has time for.
        num_kept, num_disturbed: measurements, and those of them that were disturbed every time.
        foreign_cpu_share: the most that other programs took of all cores during what was kept.
        again_s: time spent on measuring again.
    """

    dtype: str
    num_rounds: int
    most_rounds: int
    num_kept: int
    num_disturbed: int
    foreign_cpu_share: float
    again_s: float

    def __str__(self) -> str:
        return f"{self.num_rounds} of {self.most_rounds} rounds"


def report_of(profile: Profile, rounds: Rounds, path: Path, command: str, created: str) -> Report:
    """The answer, and the laws of time that were measured.

    Args:
        path: path of the profile's file.
    """
    machine = f"{profile.ranks_per_node} × {profile.device.name}, {rounds.dtype}"
    setting = f"{profile.name} | {machine} | {rounds}"
    headline = _headline(profile, rounds.dtype)
    parts: tuple[Words, ...] = (_overheads(profile), " ".join(_trust(rounds)))
    laws = ", ".join(sorted({name.partition(".")[0] for name in profile.surfaces}))
    usage = f"Next: expertlane plan MODEL --cluster {path}x{profile.ranks_per_node}"
    return Report(
        title=f"expertlane calibrate: {profile.name}",
        answer=Answer(setting, headline, (*parts, usage)),
        source="measured",
        command=command,
        created=created,
        sections=(
            Section("This machine", (setting, headline, *parts)),
            Section("Laws of time", (f"{laws}.", _surfaces(profile))),
        ),
    )


def _headline(profile: Profile, dtype: str) -> str:
    device = profile.device
    parts = [
        f"{rate_si(device.flops_per_s[dtype], 'FLOP')} of matrix product",
        f"{rate_si(device.memory_bytes_per_s, 'B')} of memory",
    ]
    parts += [f"{rate_si(link.bytes_per_s, 'B')} to another" for link in profile.links.values()][:1]
    return f"One rank has {', '.join(parts)}."


def _overheads(profile: Profile) -> Table:
    rows = [
        (label, term)
        for label, name in _OVERHEADS.items()
        if (term := profile.terms.get(name)) is not None
    ]

    def microseconds(value: float) -> str:
        return figures(1e6 * value)

    columns: list[Column[tuple[str, Term]]] = [
        text("µs", lambda row: row[0]),
        number("median", lambda row: row[1].value, microseconds),
        number("low", lambda row: row[1].low, microseconds),
        number("high", lambda row: row[1].high, microseconds),
    ]
    return Table.of("", columns, rows)


def _trust(rounds: Rounds) -> Iterator[str]:
    """Sentences on how far to trust the numbers."""
    if not rounds.num_disturbed:
        yield f"No measurement was disturbed by other programs, of {rounds.num_kept:,}."
    else:
        share = rounds.num_disturbed / rounds.num_kept
        yield (
            f"Disturbed: {percent(share)} of {rounds.num_kept:,} measurements, by "
            f"other programs with up to {percent(rounds.foreign_cpu_share)} of the cores, although "
            f"{rounds.again_s:.0f} s went into measuring again: calibrate again on a quiet machine."
        )
    if rounds.num_rounds < rounds.most_rounds:
        yield (f"{rounds}, as each took long: low and high say little of the spread.")


def _surfaces(profile: Profile) -> Table:
    columns: list[Column[tuple[str, Surface]]] = [
        text("law", lambda each: each[0]),
        number("low", lambda each: each[1].low, figures),
        number("high", lambda each: each[1].high, figures),
        text("from", lambda each: each[1].origin),
    ]
    return Table.of("Bounds, as factors of the time:", columns, sorted(profile.surfaces.items()))
