"""What `expertlane bench` found, as sections of a report."""

from collections.abc import Iterator

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import NONE, bytes_si, counted, figures, milliseconds, percent
from expertlane.results.serving import Point, ServingResults, Spread

_FOREIGN_LOAD = 0.05  # of the cores; less is noise


def title(results: ServingResults) -> str:
    """The report's heading."""
    return (
        f"expertlane bench: {results.model}, prompts of {results.prompt_len} and outputs of "
        f"{results.output_len} tokens"
    )


def sections(results: ServingResults) -> tuple[Section, ...]:
    """Everything below the heading, in order."""
    return (
        Section("Verdict", verdict(results), leads=True),
        Section("Throughput, tokens a second (measured)", (_throughput(results),), leads=True),
        Section("Latency, ms (measured)", (_latency(results),)),
        _setup(results),
    )


def load_name(point: Point) -> str:
    """`batch 8` or `2.5 req/s`."""
    return f"{point.rate:g} req/s" if point.batch is None else f"batch {point.batch}"


def verdict(results: ServingResults) -> tuple[str, ...]:
    """What gave most output, and what to keep in mind of it."""
    return (_fastest(results), *_caveats(results))


def _fastest(results: ServingResults) -> str:
    best = max(results.points, key=lambda point: point.output_tps)
    tpot = "" if best.tpot_s is None else f", TPOT {milliseconds(best.tpot_s.mean)} ms on average"
    return (
        f"Most output: {figures(best.output_tps)} tokens/s with {best.layout.layout} at "
        f"{load_name(best)}{tpot}."
    )


def _throughput(results: ServingResults) -> Table:
    return Table(
        "",
        (
            text("layout"),
            text("load"),
            number("requests"),
            number("output"),
            number("total"),
            number("prefill"),
            number("requests/s"),
        ),
        tuple(
            (
                str(point.layout.layout),
                load_name(point),
                f"{point.num_requests:,}",
                figures(point.output_tps),
                figures(point.total_tps),
                NONE if point.prefill_tps is None else figures(point.prefill_tps),
                figures(point.requests_per_s),
            )
            for point in results.points
        ),
    )


def _latency(results: ServingResults) -> Table:
    return Table(
        "",
        (
            text("layout"),
            text("load"),
            text(""),
            *(number(each) for each in ("mean", "p50", "p95", "p99")),
        ),
        tuple(row for point in results.points for row in _latency_rows(point)),
    )


def _latency_rows(point: Point) -> Iterator[tuple[str, ...]]:
    rows: tuple[tuple[str, Spread | None], ...] = (
        ("TTFT", point.ttft_s),
        ("TPOT", point.tpot_s),
        ("ITL", point.itl_s),
        ("E2E", point.e2e_s),
    )
    of_row = str(point.layout.layout), load_name(point)
    for metric, spread in rows:
        yield (*of_row, metric, *_spread(spread))
        of_row = "", ""


def _spread(spread: Spread | None) -> tuple[str, ...]:
    if spread is None:
        return (NONE,) * 4
    return tuple(map(milliseconds, (spread.mean, spread.p50, spread.p95, spread.p99)))


def _caveats(results: ServingResults) -> Iterator[str]:
    num_cores = results.machine.num_cores
    num_ranks = max(point.layout.layout.world_size for point in results.points)
    if results.machine.is_oversubscribed_by(num_ranks):
        yield (
            f"{num_ranks} ranks share {counted(num_cores, 'core')}: this compares work and "
            "waiting on this machine, not a cluster."
        )
    if num_preemptions := sum(point.num_preemptions for point in results.points):
        yield f"{counted(num_preemptions, 'preemption')}: the cache was too small for all that ran."
    if results.foreign_cpu_share >= _FOREIGN_LOAD:
        yield (
            f"Other processes used {percent(results.foreign_cpu_share)} of the cores meanwhile: "
            "repeat it on an idle machine."
        )


def _setup(results: ServingResults) -> Section:
    machine, versions = results.machine, results.versions
    rows = (
        (
            "machine",
            f"{machine.cpu_name}, {counted(machine.num_cores, 'core')}, "
            f"{bytes_si(machine.memory_bytes)}, device {machine.device}, {machine.backend}",
        ),
        ("dtype", f"{machine.dtype}, kernels of {machine.kernels}"),
        ("options", str(results.options)),
        ("seed", str(results.seed)),
        (
            "software",
            f"expertlane {versions.expertlane}, torch {versions.torch}, Python {versions.python}",
        ),
        ("run", f"{results.command}, {results.created}"),
    )
    return Section("What was measured", (Table("", (text("what"), text("value")), rows),))
