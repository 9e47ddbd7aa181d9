"""A plan's answer on one screen: the recommendation, ties, and accuracy."""

import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from expertlane.report.document import Answer, Column, Figure, Section, Table, number, text
from expertlane.report.loads import LoadPoint, cost_of, device_of, lengths_of, places
from expertlane.report.numbers import (
    COLUMNS,
    compact,
    counted,
    duration,
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
    as_asked,
    asked_rate,
    best_of_other_kind,
    engines_of,
    how_served,
    mean_tpot,
    mean_ttft,
    most_requests,
    named,
    of_role,
    place_of,
    pools_named,
    rival_of,
    rows_of,
    serving,
    spaced,
    tpot,
    versus,
    versus_column,
    what_would_change,
)
from expertlane.report.setup import cautions, how_judged, limits_of, routing_of, source_of
from expertlane.results.estimate import Estimate
from expertlane.results.record import (
    BEST,
    DECODE_POOL,
    PREFILL_POOL,
    TWO_POOLS,
    DeploymentRecord,
    TieBreak,
)
from expertlane.results.results import NoPools, Results, ServedLoad

_NO_POOLS: dict[NoPools, str] = {
    "no split": "the devices cannot be split",
    "too large": "the model does not fit both pools of any split",
    "over limits": "none meets the limits",
    "not simulated": "the best have too many replicas to simulate",
    "not run": "not what the engine runs",
}
_WON_BY: dict[TieBreak, str] = {  # the other tied plans follow by tokens/s
    "most tokens": "#1 is highest",
    "farther from the limit": "of those with the most, #1 is farthest below the limit",
}
_MOST = 0.5  # share of the time that counts as most
_LINES = 40  # lines of the answer
_GAP = 2  # columns between those of a table
_FEW = 3  # rows: with fewer, what is said of gaps makes room
_LEAST_ROOM = 8  # for a layout, where the numbers of an odd profile fill the line
_SHORTEST_NAME = 12


def answer(results: Results) -> Answer:
    """At most 40 lines of 80 columns, whatever the names.

    Rows that tie, or that paragraphs name, are in the table; a paragraph is dropped where they find
    no room.
    """
    setting, after = _setting(results), Figure("", _next(results))
    around = _around(results, (1,))  # rows that are not in the table are named at length
    said = *setting_lines(setting), headline(results), *around
    num_taken = sum(map(_num_lines, said)) + len(after.lines)
    num_taken += 5 + len(around)  # blank lines, the table's head, and where the rest is
    table, of_rows = _table(results), _of_rows(results)
    for tied, first in product((_tied_rows(results), set[int]()), range(1 + len(of_rows))):
        told = of_rows[first:]
        room = _LINES - num_taken - sum(1 + _num_lines(words) for words, _ in told)
        found = _fitting(table, room, {place for _, places in told for place in places} | tied)
        if found is not None and (not told or len(found) >= min(_FEW, len(table.rows))):
            break
    shown, rows = found or (1,), _broken(table)
    fitting = replace(table, rows=tuple(rows[place - 1] for place in shown))
    words = [each for each, _ in told] + _around(results, shown)
    return Answer(setting, headline(results, shown), (fitting, *words, after))


def _tied_rows(results: Results) -> set[int]:
    """Rows, from 1, that tie for most tokens a second."""
    return set(range(1, 1 + min(results.plans[0].num_tied, len(rows_of(results)))))


def _all_rows(results: Results) -> Collection[int]:
    return range(1, 1 + len(rows_of(results)))


def _around(results: Results, shown: Collection[int]) -> list[str]:
    """Paragraphs after the table.

    Args:
        shown: rows of the table, from 1.
    """
    best = of_role(results, BEST)[0]
    tie = _tie(results, shown) if results.faster_pools is not None else ""
    costs = [
        f"Cost of {name}: {cost}."
        for name, each in (("the pools", results.faster_pools), ("#1", best))
        if each is not None and (cost := cost_of(results, LoadPoint(each, as_asked(each))))
    ]
    return [
        *([f"Aggregated: {tie}."] if tie else []),
        *([engines] if (engines := _engines(results, shown)) else []),
        _two_pools(results),
        " ".join((*how_ranked(results), *how_sure(results), *cautions(results))),
        *([" ".join(costs)] if costs else []),
    ]


def _num_lines(said: str) -> int:
    return len(textwrap.wrap(said, COLUMNS, break_on_hyphens=False))


def _fitting(table: Table, num_lines: int, wanted: Collection[int]) -> tuple[int, ...] | None:
    """Rows, from 1, that fit into `num_lines`: those wanted, then the first.

    None where there is no room for those wanted; the first is always among them.
    """
    place = _place_of_layout(table)
    room = _room_for_layout(table)
    num_of = [
        len(textwrap.wrap(row[place], room, break_on_hyphens=False)) for row in _broken(table)
    ]
    shown = sorted({1, *wanted})
    left = num_lines - sum(num_of[each - 1] for each in shown)
    if left < 0 and len(shown) > 1:
        return None
    for each in range(1, 1 + len(num_of)):
        if each in shown:
            continue
        left -= num_of[each - 1]
        if left < 0:
            break
        shown.append(each)
    return tuple(sorted(shown))


def _place_of_layout(table: Table) -> int:
    return [each.heading for each in table.columns].index("layout")


def _room_for_layout(table: Table) -> int:
    """Characters left for a layout beside the other columns."""
    widths = [
        max(len(column.heading), *map(len, cells)) + _GAP
        for column, cells in zip(table.columns, zip(*table.rows, strict=True), strict=True)
    ]
    return max(_LEAST_ROOM, COLUMNS - (sum(widths) - widths[_place_of_layout(table)]))


def _broken(table: Table) -> list[tuple[str, ...]]:
    """The rows; layouts that are too wide get spaces to be broken at."""
    place, room = _place_of_layout(table), _room_for_layout(table)
    return [
        (*row[:place], spaced(row[place]), *row[place + 1 :])
        if max(map(len, row[place].split())) > room
        else row
        for row in table.rows
    ]


def verdict(results: Results) -> tuple[Section, Section]:
    """The answer in sentences; then what was tried, and how sure it is."""
    found, shown = results.plans[0], _all_rows(results)
    tried = (
        f"Tried: {counted(found.num_candidates, 'deployment')} aggregated (too large: "
        f"{found.num_too_large:,}, over the limits: {found.num_over_limits:,}), "
        f"{found.num_pool_candidates:,} more disaggregated."
    )
    tie = _tie(results, shown) if results.faster_pools is not None else ""
    more = [f"Aggregated: {tie}."] if tie else []
    if engines := _engines(results, shown):
        more.append(engines)
    asked = (_setting(results), headline(results), *more, _two_pools(results))
    sure = tried, *how_ranked(results), *how_sure(results), *cautions(results)
    return Section("Verdict", asked, "top", "answer"), Section("", sure, "top", "sure")


def _setting(results: Results) -> str:
    question, workload = results.question, results.question["workload"]
    limit = question["model"].get("max_position_embeddings", 0)
    # The last token is not read. Outputs have no room to differ then.
    is_full = workload["prompt_len"] + workload["output_len"] - limit in (0, 1)
    lengths = lengths_of(question.get("load") or {}, workload, 0 if is_full else limit)
    if is_full:
        lengths += " (the model's limit)"
    rate = asked_rate(results)
    load = f"{workload['num_sequences']:,} concurrent" if rate is None else f"{rate:,g} requests/s"
    load = f"{load}, {lengths}"
    where = f" on {results.projected_for.name}"
    room = COLUMNS - len(f"{where} | {load} |")
    name = shortened(question["model"]["name"], max(room, _SHORTEST_NAME))
    conditions = of_role(results, BEST)[0].conditions
    routing = [] if conditions is None else [routing_of(conditions)]
    only = [f"{each.title} {each.version}" for each in results.plans[0].engines]
    if results.plans[0].engine is None:
        only = []
    source = source_of(results, "projected")
    return " | ".join([f"{name}{where}", *only, load, *limits_of(results), source, *routing])


def headline(results: Results, shown: Collection[int] | None = None) -> str:
    """Recommendation, what decided it, and how long requests wait that it has no place for.

    Args:
        shown: rows of the table, from 1; None for all.
    """
    said, chosen = _chosen(results, shown), results.faster_pools or of_role(results, BEST)[0]
    if (rate := asked_rate(results)) is not None:
        more = ""
        if as_asked(chosen).ttft_s is None:
            more = f"Devices for {rate:,g} requests/s: --cluster {_auto_cluster(results)}."
        return " ".join([*_devices(results), said, *([more] if more else [])])
    memory = chosen.pools[0].num_resident if chosen.pools else None
    is_full = memory is not None and (serving(chosen).num_running or 0) >= memory
    by = " in memory" if is_full or not limits_of(results) else " within the limits"
    waiting = places(serving(chosen), results.question["workload"]["num_sequences"], by)
    return " ".join([*_devices(results), said, *([f"It {waiting}."] if waiting else [])])


def _devices(results: Results) -> Iterator[str]:
    """Devices needed, where `--cluster` asked for as few as serve the load."""
    fewer, num = results.plans[0].fewer_devices, results.projected_for.num_devices
    if fewer is None:
        return
    asked, rate = results.question["workload"]["num_sequences"], asked_rate(results)
    within = " within the limits" if limits_of(results) else ""
    devices = counted(num, device_of(results))
    load = f"all {asked:,} at once" if rate is None else f"{rate:,g} requests/s"
    said = f"{devices} serve{'s' * (num == 1)} {load}{within}"
    if fewer.num_devices:
        said += f", {fewer.num_devices:,} {_amount(fewer, rate)}"
    yield f"{said}."


def _amount(fewer: ServedLoad, rate: float | None) -> str:
    """The part of the load that a smaller cluster serves, in words."""
    verb = "serves" if fewer.num_devices == 1 else "serve"
    if not fewer.num_served:
        return "holds none" if fewer.num_devices == 1 else "hold none"
    if rate is None or fewer.requests_per_s is None:
        return f"{verb} {fewer.num_served:,}"
    if fewer.requests_per_s < rate:
        return f"{verb} {figures(fewer.requests_per_s)}"
    return f"{'misses' if fewer.num_devices == 1 else 'miss'} a limit at that rate"


def _output(results: Results, record: DeploymentRecord) -> str:
    """Tokens/s of a deployment; for an open load, how it is served, and the most requests/s."""
    if (rate := asked_rate(results)) is None:
        tps = serving(record).output_tps
        return f"{compact(tps)} tokens/s ({_plus_minus(tps)})"
    found, most = as_asked(record), most_requests(results, record)
    within = " within the limits" if limits_of(results) else ""
    at_most = f"{figures(most)} ({low_high(most)})"
    if found.ttft_s is None:
        return f"at most {at_most} of the {rate:,g} requests/s{within}"
    times = f"{rate:,g} requests/s with TPOT {_ms(mean_tpot(found))}, TTFT {_ms(mean_ttft(found))}"
    if (missed := how_served(results, record)) != "all":
        return f"{times}, which {missed}; at most {at_most}{within}"
    return f"{times}; at most {at_most}{within}"


def _auto_cluster(results: Results) -> str:
    """Value of `--cluster` for the fewest devices that serve the load."""
    cluster = results.projected_for
    return f"{cluster.name.removesuffix(str(cluster.num_devices))}auto"


def _chosen(results: Results, shown: Collection[int] | None) -> str:
    """The recommendation, and the numbers behind it."""
    best, *others = of_role(results, BEST)
    said = f"Use {named(best)}: {_output(results, best)}"
    pools = results.faster_pools
    if pools is not None and (over := pools.over_best) is not None:
        return (
            f"Use disaggregated pools, {_pools(results)}: {_output(results, pools)}, "
            f"{figures(over)}× ({low_high(over)}) the best aggregated, {named(best)}."
        )
    if tie := _tie(results, range(1, 2 + len(others)) if shown is None else shown):
        return f"{said}. {tie}."
    if others and (shown is None or 2 in shown):
        return f"{said}; #2 is {versus(results, others[0])}."
    found, keeps = results.plans[0], "meet the limits" if limits_of(results) else "fit"
    num = found.num_candidates - found.num_too_large - found.num_over_limits
    if num > 1:
        return f"{said}, the most of {num:,} that {keeps}."
    return f"{said}; no other deployment {keeps.replace('meet', 'meets').replace('fit', 'fits')}."


def _tie(results: Results, shown: Collection[int]) -> str:
    """Number of plans that tie, and what decided among them; empty without a tie."""
    found = results.plans[0]
    if found.num_tied == 1 or found.tie_break is None:
        return ""
    tied = f"{found.num_tied} plans (--full names them)"
    if all(each in shown for each in range(1, 1 + found.num_tied)):
        tied = f"#1–#{found.num_tied}"
    by = _WON_BY[found.tie_break]
    most = "tokens/s" if asked_rate(results) is None else "requests/s"
    apart = f"{percent(found.tie_spread)} apart, within the error of their ratio"
    return f"{tied} tie for the most {most} ({apart}): {by}"


def _ms(seconds: Estimate | None) -> str:
    return "unbounded" if seconds is None else f"{milliseconds(seconds)} ms"


def _plus_minus(estimate: Estimate) -> str:
    low, value, high = estimate.bounds
    return f"−{1 - low / value:.0%}/+{high / value - 1:.0%}"


def _table(results: Results) -> Table:
    """Tokens/s of each row, or for an open load its most requests/s, and latencies."""
    rows, wanted = rows_of(results), results.question["workload"]["num_sequences"]
    heading, show, show_range, at = "tok/s", compact, low_high_compact, serving
    if is_at_rate := asked_rate(results) is not None:
        heading, show, show_range, at = "most req/s", figures, low_high, as_asked

    def output(record: DeploymentRecord) -> Estimate:
        return most_requests(results, record) if is_at_rate else serving(record).output_tps

    third: Column[DeploymentRecord] = number(
        f"/{device_of(results)}", lambda each: serving(each).output_tps / each.num_ranks, compact
    )
    if is_at_rate or any(serving(each).num_running != wanted for each in rows):
        third = number("seqs", lambda each: serving(each).num_running, whole)
    columns: tuple[Column[DeploymentRecord], ...] = (
        text("#", lambda each: 1 + rows.index(each)),
        text("layout", named),
        number(heading, output, show),
        number("range", output, show_range),
        third,
        number("TPOT ms", lambda each: mean_tpot(at(each)), milliseconds),
        number("TTFT ms", lambda each: mean_ttft(at(each)), milliseconds),
        versus_column(results),
    )
    return Table.of("", columns, rows)


def _of_rows(results: Results) -> list[tuple[str, set[int]]]:
    """Paragraphs about rows, with the rows' numbers; where room is short, the first go first."""
    slower, other = _first_slower(results), best_of_other_kind(results)
    places = slower, None if other is None else place_of(results, other)
    paragraphs = (
        (" ".join(_gaps(results)), places),
        (" ".join(what_would_change(results)), (rival_of(results),)),
    )
    return [(words, {each for each in of if each is not None}) for words, of in paragraphs if words]


def _first_slower(results: Results) -> int | None:
    """Number of the first row that does not tie and has a reason; None without one."""
    rows = of_role(results, BEST)
    return next((place for place, each in enumerate(rows, 1) if each.why), None)


def _gaps(results: Results) -> Iterator[str]:
    """Gaps to #1: of the first row that does not tie, and of the best with, or without, EP."""
    rows, slower = rows_of(results), _first_slower(results)
    if slower is not None:
        yield f"Gap of #{slower} to #1: {rows[slower - 1].why}."
    other = best_of_other_kind(results)
    if other is not None and other.over_best is not None:
        place = place_of(results, other)
        kind = "with" if other.known_layout.ep > 1 else "without"
        why = f"; {other.why}" if other.why and place != slower else ""
        yield f"Best {kind} EP: #{place}, {versus(results, other)}{why}."


def _two_pools(results: Results) -> str:
    together = next(iter(of_role(results, TWO_POOLS)), None)
    if together is None or together.over_best is None:
        why = results.plans[0].no_two_pools or "over limits"
        is_of_limits = why != "over limits" or limits_of(results)
        return f"Disaggregated: {_NO_POOLS[why] if is_of_limits else 'none serves the load'}."
    names = f", {_pools(results)}" if results.faster_pools is None else ""
    found, rate = as_asked(together), asked_rate(results)
    at = "" if rate is None else f"at {rate:,g} requests/s "
    wait_s = found.place_wait_s
    after = "" if wait_s is None else f" after {duration(wait_s)} for a place"
    return (
        f"Disaggregated{names}: {against(together.over_best, '#1')}, {at}TPOT "
        f"{_ms(mean_tpot(found))}, TTFT {_ms(mean_ttft(found))}{after}, KV transfer "
        f"{milliseconds(serving(together).transfer_s or 0.0)} ms."
    )


def _pools(results: Results) -> str:
    (prefill,), (decode,) = (of_role(results, role) for role in (PREFILL_POOL, DECODE_POOL))
    return pools_named(prefill, decode)


def _engines(results: Results, shown: Collection[int]) -> str:
    """Engines that run the plan's choice, and what the others run best; empty where all run it.

    Args:
        shown: rows of the table, from 1; others are named by their layouts.
    """
    engines = engines_of(results)
    if results.plans[0].engine is not None or not any(each.why for each in engines):
        return ""
    rows = rows_of(results)
    places = {named(rows[place - 1]): f"#{place}" for place in shown}
    by_best: dict[str, list[str]] = {}
    for each in engines:
        best = "none that meets the limits" if limits_of(results) else "none that fits"
        if (record := each.best) is not None:
            where = record.name if each.pools else places.get(named(record))
            if not each.why:
                where = "these pools" if results.faster_pools else "#1"
            tps = compact(serving(record).output_tps)
            if asked_rate(results) is not None:
                tps = figures(most_requests(results, record))
            usd = as_asked(record).usd_per_million_output
            cost = "" if usd is None else f" at ${figures(usd)}/M"
            best = f"{tps}{cost} ({where or record.known_layout})"
        by_best.setdefault(best, []).append(each.title)
    said = [f"{_listed(titles)} {best}" for best, titles in by_best.items()]
    what = "Tokens/s" if asked_rate(results) is None else "Most requests/s"
    return f"{what} by engine: {'; '.join(said)}."


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def how_ranked(results: Results) -> Iterator[str]:
    """How rows were ranked: numbers of deployments that were only screened differ in kind."""
    found = results.plans[0]
    if not found.num_simulated:
        return
    left = f"; {found.num_open:,} more may have more tokens/s" if found.num_open else ""
    yield (
        f"{found.num_simulated} were simulated request by request and ranked; the other "
        f"{found.num_candidates - found.num_simulated:,} were only screened, by a static "
        f"formula{left}."
    )


def how_sure(results: Results) -> Iterator[str]:
    """Errors of such projections, and the part of the best one's time that is not measured."""
    yield how_judged(results)
    nearest = results.projected_for.nearest
    if results.faster_pools is not None and nearest is not None and not nearest.has_two_pools:
        others = "no such pools were measured"
        if results.projected_for.framework:
            others += f" with --framework {results.projected_for.framework}"
        yield f"Of the pools: {others}."
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


def _engine_option(results: Results) -> str | None:
    """The option of `compare` that names an engine, where ours runs no plan; None if none does."""
    engines = engines_of(results)
    own = [each for each in engines if each.engine == "expertlane"]
    if not own or own[0].aggregated is not None:
        return ""
    other = next((each.engine for each in engines if each.commands), None)
    return None if other is None else f" --engine {other}"


def _next(results: Results) -> tuple[str, ...]:
    """Lines on how to go on."""
    found, has_pools = results.plans[0], results.faster_pools is not None
    lines = []
    engine = _engine_option(results)
    if found.experiment is not None and engine is not None:
        line = f"Next, on such a cluster: expertlane compare {found.experiment}{engine}"
        if len(line) > COLUMNS:
            line = f"Next: expertlane compare {found.experiment}{engine}"
        short = f"Next: expertlane compare{engine}, on the experiment.toml that was written"
        lines.append(line if len(line) <= COLUMNS else short)
        if has_pools:
            lines.append("It has the best aggregated ones; compare runs no disaggregated pools.")
    if found.experiment is not None:
        row = "pools" if has_pools else "1"
        again = f"Again: expertlane simulate --plan {Path(found.experiment).parent}#{row}"
        lines += [again] if len(again) <= COLUMNS else []
    titles = [each.title for each in engines_of(results) if each.commands]
    if titles:
        lines.append(f"Commands of {_listed(titles)}: --full")
    if found.scripts is not None:
        scripts = f"Scripts for Slurm and Kubernetes: {found.scripts}"
        short = "Scripts for Slurm and Kubernetes: in the folder of --scripts"
        lines.append(scripts if len(scripts) <= COLUMNS else short)
    return tuple(lines)
