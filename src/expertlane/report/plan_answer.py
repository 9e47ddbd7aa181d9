"""What a plan answers on one screen: what to use, what ties with it, and how accurate that is."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace

from expertlane.report.document import Answer, Column, Figure, Section, Table, Words, number, text
from expertlane.report.loads import Served, cost_of, device_of
from expertlane.report.numbers import (
    COLUMNS,
    compact,
    counted,
    figures,
    low_high,
    low_high_compact,
    milliseconds,
    percent,
    setting_lines,
    shortened,
    whole,
)
from expertlane.report.planning import (
    against,
    engines_of,
    faster_pools,
    fastest,
    named,
    of_role,
    over_fastest,
    pools_named,
    serving,
    spaced,
    tie_or_gap,
    tpot,
    ttft,
    versus,
)
from expertlane.report.setup import cautions, how_judged, routing_of
from expertlane.results.estimate import Estimate
from expertlane.results.record import (
    BEST,
    DECODE_POOL,
    FAMILY,
    PREFILL_POOL,
    TWO_POOLS,
    DeploymentRecord,
    TieBreak,
)
from expertlane.results.results import NoPools, Results

_NO_POOLS: dict[NoPools, str] = {
    "no split": "the devices cannot be split",
    "too large": "the model does not fit both pools of any split",
    "over limits": "none meets the limits",
    "not simulated": "the best have too many replicas to simulate",
    "not run": "not what the engine runs",
}
_WON_BY: dict[TieBreak, str] = {  # the others that tie follow by TTFT
    "lowest TTFT": "the lowest TTFT wins",
    "fewest kinds": "{} of their TTFTs tie with the lowest within error; of these #1 has the "
    "fewest kinds of parallelism",
    "most tokens": "{} of their TTFTs tie with the lowest within error; of these with the fewest "
    "kinds of parallelism #1 has most tokens/s",
}
_MOST = 0.5  # of the time
_LINES = 40  # of the answer
_GAP = 2  # columns between those of a table
_FEW = 3  # rows: with fewer, what is said of gaps makes room
_LEAST_ROOM = 8  # for a layout, where the numbers of an odd profile fill the line
_SHORTEST_NAME = 12


def answer(results: Results) -> Answer:
    """At most 40 lines of 80 columns, whatever the names."""
    setting, found = _setting(results), headline(results)
    best = of_role(results, BEST)[0]
    cost = cost_of(results, Served(best, serving(best)))
    sure = " ".join((*how_ranked(results), *how_sure(results), *cautions(results)))
    chosen = [f"Aggregated: {tie}."] if faster_pools(results) and (tie := _tie(results)) else []
    engines = [by_engine] if (by_engine := _engines(results)) else []
    cost_of_first = [f"Cost of #1: {cost}."] if cost else []
    around = [*chosen, *engines, _two_pools(results), sure, *cost_of_first]
    after = Figure("", _next(results))
    said = *setting_lines(setting), found, *around
    num_taken = sum(map(_num_lines, said)) + len(after.lines)
    num_taken += 5 + len(around)  # blank lines, the table's head, and where the rest is
    table, gaps = _table(results), " ".join(_gaps(results))
    num_of_gaps = _num_lines(gaps) + 1 if gaps else 0
    fitting = _fitting(table, _LINES - num_taken - num_of_gaps)
    if len(fitting.rows) < min(_FEW, len(table.rows)):
        fitting, gaps = _fitting(table, _LINES - num_taken), ""
    parts: list[Words] = [fitting, *([gaps] if gaps else []), *around, after]
    return Answer(setting, found, tuple(parts))


def _num_lines(said: str) -> int:
    return len(textwrap.wrap(said, COLUMNS, break_on_hyphens=False))


def _fitting(table: Table, num_lines: int) -> Table:
    """The first rows, as many as there are lines for; one at least.

    Layouts that are too wide get spaces to be broken at.
    """
    place = [each.heading for each in table.columns].index("layout")
    texts = zip(*(row for row in table.rows), strict=True)
    widths = [
        max(len(column.heading), *map(len, cells)) + _GAP
        for column, cells in zip(table.columns, texts, strict=True)
    ]
    room = max(_LEAST_ROOM, COLUMNS - (sum(widths) - widths[place]))
    rows: list[tuple[str, ...]] = []
    for row in table.rows:
        name = row[place]
        if max(map(len, name.split())) > room:
            name = spaced(name)
        num_lines -= len(textwrap.wrap(name, room, break_on_hyphens=False))
        if rows and num_lines < 0:
            break
        rows.append((*row[:place], name, *row[place + 1 :]))
    return replace(table, rows=tuple(rows))


def verdict(results: Results) -> tuple[Section, Section]:
    """The answer in sentences; then what was tried, and how sure it is."""
    found = results.plans[0]
    tried = (
        f"Tried: {counted(found.num_candidates, 'deployment')} aggregated ({found.num_too_large:,} "
        f"do not fit, {found.num_over_limits:,} miss the limits), {found.num_pool_candidates:,} "
        "more disaggregated."
    )
    tie = [f"Aggregated: {said}."] if faster_pools(results) and (said := _tie(results)) else []
    engines = [by_engine] if (by_engine := _engines(results)) else []
    asked = (_setting(results), headline(results), *tie, *engines, _two_pools(results))
    sure = tried, *how_ranked(results), *how_sure(results), *cautions(results)
    return Section("Verdict", asked, "top", "answer"), Section("", sure, "top", "sure")


def _setting(results: Results) -> str:
    question, workload = results.question, results.question["workload"]
    lengths = f"{workload['prompt_len']:,} in / {workload['output_len']:,} out"
    limit = question["model"].get("max_position_embeddings", 0)
    if workload["prompt_len"] + workload["output_len"] - limit in (0, 1):  # the last is not read
        lengths += " (the model's limit)"
    load = f"{workload['num_sequences']:,} concurrent, {lengths}"
    where = f" on {results.projected_for.name}"
    room = COLUMNS - len(f"{where} | {load} |")
    name = shortened(question["model"]["name"], max(room, _SHORTEST_NAME))
    conditions = of_role(results, BEST)[0].conditions
    routing = [] if conditions is None else [routing_of(conditions)]
    only = [f"{each.title} {each.version}" for each in results.plans[0].engines]
    if results.plans[0].engine is None:
        only = []
    return " | ".join([f"{name}{where}", *only, load, *_limits(results), "projected", *routing])


def _limits(results: Results) -> list[str]:
    """Those that were asked for, `TPOT ≤ 20 ms`."""
    return [
        f"{name} ≤ {1e3 * results.question[key]:g} ms"
        for name, key in (("TPOT", "max_tpot_s"), ("TTFT", "max_ttft_s"))
        if results.question.get(key) is not None
    ]


def headline(results: Results) -> str:
    """What to use, and by what it was chosen."""
    best, *others = of_role(results, BEST)
    tps = serving(best).output_tps
    said = f"Use {named(best)}: {compact(tps)} tokens/s ({_plus_minus(tps)})"
    pools, over = faster_pools(results), over_fastest(results)
    if pools is not None and over is not None:
        tps = serving(pools).output_tps
        return (
            f"Use disaggregated pools, {_pools(results)}: {compact(tps)} tokens/s "
            f"({_plus_minus(tps)}), {figures(over)}× ({low_high(over)}) the best aggregated, "
            f"{named(fastest(results))}."
        )
    if tie := _tie(results):
        return f"{said}. {tie}."
    if others:
        return f"{said}; #2 is {versus(others[0])}."
    found, keeps = results.plans[0], "meet the limits" if _limits(results) else "fit"
    num = found.num_candidates - found.num_too_large - found.num_over_limits
    if num > 1:
        return f"{said}, the most of {num:,} that {keeps}."
    return f"{said}; no other deployment {keeps.replace('meet', 'meets').replace('fit', 'fits')}."


def _tie(results: Results) -> str:
    """How many tie, what decided among them, and what that costs; empty where one is alone."""
    found, rows = results.plans[0], of_role(results, BEST)
    if found.num_tied == 1 or found.tie_break is None:
        return ""
    tied = f"#1–#{found.num_tied}" if found.num_tied <= len(rows) else f"{found.num_tied} plans"
    by = _WON_BY[found.tie_break].format(found.num_ttft_tied)
    said = f"{tied} tie for most tokens/s ({percent(found.tie_spread)} apart): {by}"
    if found.fastest is None:
        return said
    (mine, soon), (most, later) = (
        (compact(serving(each).output_tps), _ms(ttft(each))) for each in (rows[0], found.fastest)
    )
    return (
        f"{said}. {mine} for TTFT {soon}; {named(found.fastest)} has {most} at {later}, within "
        "error"
    )


def _ms(seconds: Estimate | None) -> str:
    return "unbounded" if seconds is None else f"{milliseconds(seconds)} ms"


def _plus_minus(estimate: Estimate) -> str:
    low, value, high = estimate.bounds
    return f"−{1 - low / value:.0%}/+{high / value - 1:.0%}"


def _table(results: Results) -> Table:
    rows, wanted = of_role(results, BEST), results.question["workload"]["num_sequences"]
    third: Column[DeploymentRecord] = number(
        f"/{device_of(results)}", lambda each: serving(each).output_tps / each.num_ranks, compact
    )
    if any(serving(each).num_running != wanted for each in rows):
        third = number("seqs", lambda each: serving(each).num_running, whole)
    columns: tuple[Column[DeploymentRecord], ...] = (
        text("#", lambda each: 1 + rows.index(each)),
        text("layout", named),
        number("tok/s", lambda each: serving(each).output_tps, compact),
        number("range", lambda each: serving(each).output_tps, low_high_compact),
        third,
        number("TPOT ms", tpot, milliseconds),
        number("TTFT ms", ttft, milliseconds),
        number("vs #1", tie_or_gap),
    )
    return Table.of("", columns, rows)


def _gaps(results: Results) -> Iterator[str]:
    """Of the first that does not tie, and of the best with, or without, expert parallelism."""
    rows = of_role(results, BEST)
    slower = next((each for each in rows if each.why), None)
    if slower is not None:
        yield f"Gap of #{1 + rows.index(slower)} to #1: {slower.why}."
    has_experts = rows[0].known_layout.ep > 1
    other = next(
        (each for each in of_role(results, FAMILY) if (each.known_layout.ep > 1) != has_experts),
        None,
    )
    if other is not None and other.over_best is not None:
        kind = "without" if has_experts else "with"
        why = f"; {other.why}" if other.why else ""
        yield f"Best {kind} EP: {named(other)}, {versus(other)}{why}."


def _two_pools(results: Results) -> str:
    together, over = next(iter(of_role(results, TWO_POOLS)), None), over_fastest(results)
    if together is None or over is None:
        return f"Disaggregated: {_NO_POOLS[results.plans[0].no_two_pools or 'over limits']}."
    names = f", {_pools(results)}" if faster_pools(results) is None else ""
    best = results.plans[0].fastest
    return (
        f"Disaggregated{names}: {against(over, '#1' if best is None else named(best))}, TPOT "
        f"{_ms(tpot(together))}, TTFT {_ms(ttft(together))}, KV transfer "
        f"{milliseconds(serving(together).transfer_s or 0.0)} ms."
    )


def _pools(results: Results) -> str:
    (prefill,), (decode,) = (of_role(results, role) for role in (PREFILL_POOL, DECODE_POOL))
    return pools_named(prefill, decode)


def _engines(results: Results) -> str:
    """Which engines run what was chosen, and what the others run best; empty where all run it."""
    engines = engines_of(results)
    if results.plans[0].engine is not None or not any(each.why for each in engines):
        return ""
    places = {named(each): f"#{place}" for place, each in enumerate(of_role(results, BEST), 1)}
    by_best: dict[str, list[str]] = {}
    for each in engines:
        best = "none meets the limits"
        if (record := each.best) is not None:
            where = record.name if each.pools else places.get(named(record))
            if not each.why:
                where = "these pools" if faster_pools(results) else "#1"
            tps = compact(serving(record).output_tps)
            best = f"{tps} ({where or record.known_layout})"
        by_best.setdefault(best, []).append(each.title)
    said = [f"{_listed(titles)} {best}" for best, titles in by_best.items()]
    return f"Tokens/s by engine: {'; '.join(said)}."


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def how_ranked(results: Results) -> Iterator[str]:
    """By which numbers: those of other deployments are of another kind."""
    found = results.plans[0]
    if not found.num_simulated:
        return
    left = f"; {found.num_open:,} more may have more tokens/s" if found.num_open else ""
    yield (
        f"Ranked by simulating {found.num_simulated} request by request; the other "
        f"{found.num_candidates - found.num_simulated:,} were only screened, by a static "
        f"formula{left}."
    )


def how_sure(results: Results) -> Iterator[str]:
    """How far off such projections were, and where most of the best one's time is not measured."""
    yield how_judged(results)
    best = of_role(results, BEST)[0]
    if best.decode is None or best.prefill is None:
        return
    of_decode = min(1.0, best.decode.round_s.value / tpot(best).value)  # the rest is prefill
    steps = ((of_decode, best.decode), (1 - of_decode, best.prefill))
    bound = sum(part * step.basis_shares.get("bound", 0.0) for part, step in steps)
    extrapolated = sum(part * (step.extrapolated_share or 0.0) for part, step in steps)
    said = (
        (bound, "rests on datasheets and assumptions"),
        (extrapolated, "lies outside the measured sizes"),
    )
    most = [f"{words} ({percent(share)})" for share, words in said if share > _MOST]
    if most:
        is_ranking = len(of_role(results, BEST)) > 1 and extrapolated < _MOST
        so = "rankings are reliable, absolute values are not"
        if not is_ranking:
            so = "take the range, not the value"
        yield f"Most of the time of #1 {' and '.join(most)}: {so}."


def _next(results: Results) -> tuple[str, ...]:
    """How to go on; lines."""
    found, has_pools = results.plans[0], faster_pools(results) is not None
    lines = []
    if found.experiment is not None:
        line = f"Next, on such a cluster: expertlane compare {found.experiment}"
        if len(line) > COLUMNS:
            line = f"Next: expertlane compare {found.experiment}"
        short = "Next: expertlane compare, on the experiment.toml that was written"
        lines.append(line if len(line) <= COLUMNS else short)
        if has_pools:
            lines.append("It has the best aggregated ones; compare runs no disaggregated pools.")
    titles = [each.title for each in engines_of(results) if each.commands]
    return (*lines, f"Commands of {_listed(titles)}: --full") if titles else tuple(lines)
