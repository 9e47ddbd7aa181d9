"""Gains of parallelism: experts at once, communication hidden by overlap, growing sizes."""

from collections.abc import Callable, Sequence

from expertlane.report.compared import (
    OTHER,
    Comparison,
    OverlapPair,
    Size,
    scaling,
    step_difference,
    step_of,
    weight_bytes_of_rank,
)
from expertlane.report.document import Column, ColumnSource, Section, Table, Words, number, text
from expertlane.report.numbers import (
    NONE,
    bytes_si,
    counted,
    figures,
    milliseconds,
    percent,
    times,
)
from expertlane.report.speed import BEYOND, tps, unit_of
from expertlane.results.record import RUN, Source
from expertlane.results.results import Results

_MOST_NAMED = 2  # causes, in a sentence


def _heading(source: Source, words: str) -> str:
    return words if source in RUN else f"Projected: {words[0].lower()}{words[1:]}"


def overlap(comparison: Comparison) -> Section:
    """Communication hidden by overlap, for each two deployments that differ in overlap alone."""
    pairs = comparison.overlapped
    heading = _heading(comparison.source, "Communication hidden by overlap")
    if not pairs:
        return Section(heading, ("No two deployments differ in overlap alone.",))
    num_paying = sum(pair.gained_s > 0 for pair in pairs)
    is_virtual = comparison.source == "virtual"
    columns: tuple[Column[OverlapPair], ...] = (
        text("without, with", lambda pair: f"#{pair.off.number}, #{pair.on.number}"),
        number("step without, ms", lambda pair: pair.off.step.round_s, milliseconds),
        number("with, ms", lambda pair: pair.on.step.round_s, milliseconds),
        number("exposed without, ms", lambda pair: pair.exposed_s, milliseconds),
        number("hidden", lambda pair: pair.hidden, percent),
        *([number("slower compute, ms", lambda pair: pair.added_s, milliseconds)] * is_virtual),
        number(
            "more weights read",
            lambda pair: weight_bytes_of_rank(pair.on) - weight_bytes_of_rank(pair.off),
            bytes_si,
        ),
        number("prefill TPS gained", _prefill_gain, percent),
    )
    return Section(
        heading,
        (
            f"Overlap shortens the decode step in {num_paying} of "
            f"{counted(len(pairs), 'pair')}. Each half batch reads the weights again: "
            "where a step is bound by weight reads, that costs more than overlap hides. Exposed: "
            "blocked in dispatch and combine; hidden: "
            + (
                "share of the transfer time that no rank waits "
                "for. Slower compute: what attention, router, experts and head take longer "
                "in half batches."
                if is_virtual
                else "the share of that which is not blocked with it."
            ),
            Table.of("", columns, pairs),
        ),
    )


def overlap_sentence(pair: OverlapPair) -> str:
    """A sentence: whether overlap pays, and why."""
    name, total_s = pair.on.name, abs(pair.gained_s)
    if pair.hidden is None:
        return f"{name} has nothing to hide."
    share = percent(pair.hidden)
    exposed = f"of the {milliseconds(pair.exposed_s)} ms in dispatch and combine"
    if pair.gained_s > 0:
        return f"{name} saves {milliseconds(total_s)} ms per step: it hides {share} {exposed}."
    causes = step_difference(pair.off, pair.on).causes
    added = [f"{cause} +{figures(ms)} ms" for cause, ms in causes if ms > 0 and cause != OTHER]
    why = f", but adds more: {', '.join(added[:_MOST_NAMED])}" if added else ""
    return f"{name} costs {milliseconds(total_s)} ms per step: it hides {share} {exposed}{why}."


def _prefill_gain(pair: OverlapPair) -> float | None:
    off, on = pair.off.record.prefill, pair.on.record.prefill
    return on.tps.value / off.tps.value - 1 if off and on else None


def sizes(results: Results, comparison: Comparison) -> Section:
    """Decoding by expert-parallel size, and by rank."""
    found, source = scaling(results, comparison.source), comparison.source
    unit = unit_of(source)
    parts: list[Words] = ["This experiment runs no layouts of growing ep."]
    if found:
        parts = [sizes_sentence(found, unit), *_sizes_tables(found, source)]
        parts += _beyond(found) if source == "projected" else []
    if source == "measured" and results.measured_on.is_oversubscribed:
        machine = results.measured_on
        num_cores = counted(machine.num_cores, "core")
        parts.append(
            f"{machine.num_ranks} ranks share {num_cores}, so TPS per rank must fall; "
            f"read the critical path instead."
        )
    return Section(_heading(source, "Scaling"), tuple(parts))


def sizes_sentence(found: Sequence[Size], unit: str) -> str:
    """A sentence: change of TPS per rank from the first to the last size."""
    first, last = found[0], found[-1]

    def factor(get: Callable[[Size], float]) -> str:
        return times(get(last) / get(first)) if get(first) else NONE

    head = (
        f"From {counted(first.record.num_ranks, unit)} (ep={first.record.known_layout.ep}) to "
        f"{counted(last.record.num_ranks, unit)} (ep={last.record.known_layout.ep}), the same "
        "workload: "
    )
    same = factor(lambda size: size.tps_per_rank)
    if last.record.source == "virtual":
        alike = factor(lambda size: size.share_tps_per_rank)
        return (
            f"{head}TPS per rank becomes {same}; with the same sequences per rank {alike}; "
            "linear would be 1.00×."
        )
    if last.record.source == "measured":
        critical = factor(lambda size: size.critical_path_tps_per_rank)
        share = factor(lambda size: size.critical_path_share_tps_per_rank)
        return (
            f"{head}critical-path TPS per rank becomes {critical}, TPS per rank {same}; with the "
            f"same sequences per rank, critical-path TPS per rank {share}; linear would be "
            "1.00×."
        )
    return (
        f"{head}TPS per GPU becomes {same}; with the same sequences per GPU "
        f"{factor(lambda size: size.share_tps_per_rank)}, since a GPU that holds fewer experts "
        "reads fewer weights; linear would be 1.00×."
    )


def _sizes_tables(found: Sequence[Size], source: Source) -> list[Table]:
    first = found[0]

    def against_first(
        heading: str, get: Callable[[Size], float], of: ColumnSource = None
    ) -> tuple[Column[Size], ...]:
        return (
            number(heading, get, figures, of),
            number("vs the first", lambda size: get(size) / get(first), times, of),
        )

    columns: tuple[Column[Size], ...] = (
        number("ep", lambda size: size.record.known_layout.ep),
        number("ranks", lambda size: size.record.num_ranks, str, "measured"),
        number(
            "experts per GPU",
            lambda size: size.record.pools[0].num_slots_per_rank,
            str,
            "projected",
        ),
        number(
            "weights per GPU", lambda size: size.record.pools[0].weight_bytes, bytes_si, "projected"
        ),
        number("TPS", step_of, tps),
        *against_first(f"per {unit_of(source)}", lambda size: size.tps_per_rank),
        *against_first(
            "critical-path TPS per rank", lambda size: size.critical_path_tps_per_rank, "wall"
        ),
        number("TPS, same sequences per GPU", lambda size: size.share, tps, "projected"),
        *against_first("per GPU", lambda size: size.share_tps_per_rank, "projected"),
    )
    of_share: tuple[Column[Size], ...] = (
        *columns[:2],
        number("TPS", lambda size: size.share, tps),
        *against_first("per rank", lambda size: size.share_tps_per_rank),
        *against_first(
            "critical-path TPS per rank",
            lambda size: size.critical_path_share_tps_per_rank,
            "wall",
        ),
    )
    tables = [Table.of("Growing ep", columns, found, source)]
    if source != "projected":
        tables.append(Table.of("Growing ep, same sequences per rank", of_share, found, source))
    return tables


def _beyond(found: Sequence[Size]) -> list[str]:
    """Sentences on sizes that do not fit, and where experts are copied."""
    parts = []
    too_large = [each for each in found if not each.step.fits]
    if too_large:
        size = too_large[0].record
        names = ", ".join(f"ep={each.record.known_layout.ep}" for each in too_large)
        parts.append(
            f"{BEYOND} Not all sequences fit; shown ignoring the memory limit: {names}. "
            f"ep={size.known_layout.ep} has {bytes_si(size.pools[0].weight_bytes or 0)} of weights "
            f"per GPU, of {bytes_si(size.pools[0].allowed_bytes or 0)} that may be used."
        )
    slots = [
        (each.record.pools[0].num_slots_per_rank or 0) * each.record.known_layout.ep
        for each in found
    ]
    if max(slots) > slots[0]:
        parts.append("Beyond one expert per GPU, GPUs hold redundant experts.")
    return parts
