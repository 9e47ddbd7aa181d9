"""What `expertlane bench` found, as tables."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from expertlane.experiment.serving_results import Point, ServingResults, Spread
from expertlane.report.numbers import NONE, bytes_si, counted, figures, milliseconds, percent

_FOREIGN_LOAD = 0.05  # of the cores; less is noise
_NUM_WORDS = 2  # columns of a table that are words; the rest are numbers


def show(results: ServingResults, console: Console) -> None:
    """Print throughput, latency and notes, no wider than the console."""
    title = (
        f"expertlane bench: {results.model}, prompts of {results.prompt_len} and outputs of "
        f"{results.output_len} tokens"
    )
    console.print(Text(title, style="bold"))
    _print_table(
        console,
        "Throughput, tokens a second",
        ("layout", "load", "requests", "output", "total", "prefill", "requests/s"),
        [[_throughput(point)] for point in results.points],
    )
    _print_table(
        console,
        "Latency, ms",
        ("layout", "load", "", "mean", "p50", "p95", "p99"),
        [_latency(point) for point in results.points],
    )
    console.print()
    for note in _notes(results):
        console.print(Padding(Text(note), (0, 0, 0, 1), expand=False))


def _throughput(point: Point) -> tuple[str, ...]:
    return (
        str(point.layout.layout),
        _load(point),
        f"{point.num_requests:,}",
        figures(point.output_tps),
        figures(point.total_tps),
        NONE if point.prefill_tps is None else figures(point.prefill_tps),
        figures(point.requests_per_s),
    )


def _latency(point: Point) -> list[tuple[str, ...]]:
    rows: list[tuple[str, Spread | None]] = [
        ("TTFT", point.ttft_s),
        ("TPOT", point.tpot_s),
        ("ITL", point.itl_s),
        ("E2E", point.e2e_s),
    ]
    names = [(str(point.layout.layout), _load(point)), *[("", "")] * (len(rows) - 1)]
    return [
        (*of_row, metric, *_spread(spread))
        for of_row, (metric, spread) in zip(names, rows, strict=True)
    ]


def _spread(spread: Spread | None) -> tuple[str, ...]:
    if spread is None:
        return (NONE,) * 4
    return tuple(map(milliseconds, (spread.mean, spread.p50, spread.p95, spread.p99)))


def _load(point: Point) -> str:
    return f"{point.rate:g} req/s" if point.batch is None else f"batch {point.batch}"


def _notes(results: ServingResults) -> list[str]:
    machine, versions = results.machine, results.versions
    num_ranks = max(point.layout.layout.world_size for point in results.points)
    notes = [
        f"Measured {results.created} on {machine.cpu_name}, "
        f"{counted(machine.num_cores, 'core')}, {bytes_si(machine.memory_bytes)}, device "
        f"{machine.device}, {machine.dtype}, kernels of {machine.kernels}; "
        f"options: {results.options}; "
        f"expertlane {versions.expertlane}, torch {versions.torch}."
    ]
    if machine.is_oversubscribed_by(num_ranks):
        notes.append(
            f"{num_ranks} ranks share {counted(machine.num_cores, 'core')}: this compares work and "
            "waiting on this machine, not a cluster."
        )
    if num_preemptions := sum(point.num_preemptions for point in results.points):
        notes.append(
            f"{counted(num_preemptions, 'preemption')}: the cache was too small for all that ran."
        )
    if results.foreign_cpu_share >= _FOREIGN_LOAD:
        notes.append(
            f"Other processes used {percent(results.foreign_cpu_share)} of the cores meanwhile: "
            "repeat it on an idle machine."
        )
    return notes


def _print_table(
    console: Console,
    title: str,
    headings: Sequence[str],
    points: Sequence[Sequence[tuple[str, ...]]],
) -> None:
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for position, heading in enumerate(headings):
        is_word = position < _NUM_WORDS or not heading
        drawn.add_column(
            Text(heading),
            justify="left" if is_word else "right",
            no_wrap=not is_word or bool(position),
            overflow="fold",
        )
    for rows in points:
        for row in rows:
            drawn.add_row(*map(Text, row))
    console.print()
    console.print(Padding(Text(title, style="bold cyan"), (0, 0, 0, 1), expand=False))
    console.print(Padding(drawn, (0, 0, 0, 1), expand=False))
