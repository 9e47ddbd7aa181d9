"""The answer of `expertlane calibrate`: what one rank of this machine does in a second."""

from collections.abc import Iterator
from pathlib import Path

from expertlane.calibrate.run import Calibration
from expertlane.cost.laws.profile import Profile, Term
from expertlane.cost.laws.surface import Surface
from expertlane.report.document import Answer, Column, Report, Section, Table, Words, number, text
from expertlane.report.numbers import figures, percent, rate_si

_OVERHEADS = {
    "scheduler overhead": "driver_s",
    "overhead per operation": "overhead_s",
    "overhead per transfer": "overhead_s.transfer",
    "shortest all-to-all": "floor_s.all_to_all.all_links",
    "kernel launch": "launch_s",
}


def report_of(
    profile: Profile, calibration: Calibration, path: Path, command: str, created: str
) -> Report:
    """The answer, and for what there is a law of time.

    Args:
        path: of the profile's file.
    """
    machine = f"{profile.ranks_per_node} × {profile.device.name}, {calibration.machine.dtype}"
    setting = f"{profile.name} | {machine} | {_rounds(calibration)}"
    headline = _headline(profile, calibration.machine.dtype)
    parts: tuple[Words, ...] = (_overheads(profile), " ".join(_trust(calibration)))
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


def _rounds(calibration: Calibration) -> str:
    num_rounds = len(calibration.measured.operations)
    return f"{num_rounds} of {calibration.grid.num_rounds} rounds"


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


def _trust(calibration: Calibration) -> Iterator[str]:
    """How far to trust the numbers."""
    quiet, num_rounds = calibration.quiet, len(calibration.measured.operations)
    if not quiet.num_disturbed:
        yield f"No measurement was disturbed by other programs, of {quiet.num_kept:,}."
    else:
        yield (
            f"Disturbed: {percent(quiet.disturbed_share)} of {quiet.num_kept:,} measurements, by "
            f"other programs with up to {percent(quiet.foreign_cpu_share)} of the cores, although "
            f"{quiet.again_s:.0f} s went into measuring again: calibrate again on a quiet machine."
        )
    if num_rounds < calibration.grid.num_rounds:
        yield (f"{_rounds(calibration)}, as each took long: low and high say little of the spread.")


def _surfaces(profile: Profile) -> Table:
    columns: list[Column[tuple[str, Surface]]] = [
        text("law", lambda each: each[0]),
        number("low", lambda each: each[1].low, figures),
        number("high", lambda each: each[1].high, figures),
        text("from", lambda each: each[1].origin),
    ]
    return Table.of("Bounds, as factors of the time:", columns, sorted(profile.surfaces.items()))
