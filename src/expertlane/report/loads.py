"""Answers about loads on deployments, of a simulation or a bench."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from expertlane.report.document import Answer, Column, Heading, Table, Words, number, text
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
    with_bounds,
)
from expertlane.report.setup import routing_of, source_of
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import DeploymentRecord
from expertlane.results.results import Results
from expertlane.results.serving_record import (
    ServingRecord,
    SLOResult,
    best_load,
)
from expertlane.spec.workload import LENGTHS_APART, LengthRange

_GAP = 2  # columns between those of an answer's table
_LEAST_NAME = 16  # columns for the names of layouts
NAME_COLUMNS = 36  # columns of a model's or a file's name
_MOST_LINES = 16  # rows of the table
_FEWER_LINES = 8  # rows below a setting that takes more lines than usual
_SETTING_LINES = 3
_MOST_SLOS = 3  # objectives that are shown, missed ones first


Note = tuple[str, str]  # subject, and a sentence


@dataclass(frozen=True, eq=False)
class LoadPoint:
    """A deployment under one load."""

    record: DeploymentRecord
    serving: ServingRecord

    @property
    def load(self) -> str:
        """`batch 8`, `2.5 req/s` or `recorded arrivals`."""
        kind, size = load_of(self.serving)
        return {"batch": f"batch {size}", "req/s": f"{size} req/s"}.get(kind, f"{size} arrivals")

    @property
    def name(self) -> str:
        """The layout; the record's name for a server, which may not tell it."""
        is_server = self.record.layout is None or self.record.server is not None
        return self.record.name if is_server else str(self.record.layout)

    @property
    def layout(self) -> str:
        """`name` with blanks, at which a line may break."""
        return self.name.replace(",", ", ")


def load_of(serving: ServingRecord) -> tuple[str, str]:
    """The kind of a load as a heading, and its size."""
    if serving.batch is not None:
        return "batch", whole(serving.batch)
    return ("load", "recorded") if serving.rate is None else ("req/s", f"{serving.rate:g}")


def served(results: Results) -> list[LoadPoint]:
    """Every load on every deployment."""
    return [LoadPoint(record, each) for record in results.deployments for each in record.serving]


def whose(results: Results) -> str:
    """Heading of the column that names deployments: server or layout."""
    if results.is_of_servers:
        return "deployment"
    return "server" if results.deployments[0].layout is None else "layout"


def best_of(found: Sequence[LoadPoint]) -> LoadPoint:
    """The load with most output that meets all objectives; if none does, with most goodput."""
    best = best_load([each.serving for each in found])
    return next(each for each in found if each.serving is best)


def is_on_cpus(results: Results) -> bool:
    """True if it was measured on CPUs."""
    return results.machine is not None and results.machine.device == "cpu"


def is_of_cpus(results: Results) -> bool:
    """True if it was measured on CPUs, or modelled by a profile of them."""
    cluster = results.cluster
    return is_on_cpus(results) or (
        cluster is not None and cluster.device.startswith("cpu rank of ")
    )


def typical_of(results: Results) -> Literal["mean", "median"]:
    """The statistic shown first: the mean of modelled latencies, as in plans; else the median."""
    return "mean" if results.kind == "simulation" else "median"


def device_of(results: Results) -> str:
    """The unit that throughput is divided by."""
    return "rank" if is_of_cpus(results) else "GPU"


def answer(
    results: Results,
    setting: str,
    why: str,
    parts: Sequence[Words],
    notes: Sequence[Note],
    lead: str = "",
) -> Answer:
    """The answer, on one screen.

    Args:
        setting: model and place of serving.
        why: bottleneck of the best load, in a sentence; may be empty.
        parts: details of `why`.
        notes: further notes, each under a name.
        lead: the finding, where that is not the best load.
    """
    workload, found = results.question["workload"], served(results)
    asked = _in_out(workload, is_modelled=results.kind == "simulation")
    if source := workload["requests"]:
        asked += f", {shortened(source, NAME_COLUMNS)}"
    first = results.deployments[0]
    routing = [] if first.conditions is None else [routing_of(first.conditions)]
    asked += _bursts(found)
    best = best_of(found)
    setting = " | ".join([setting, asked, source_of(results, first.source), *routing])
    heights = [len(textwrap.wrap(f"{line} |", COLUMNS)) for line in setting_lines(setting)]
    is_long = sum(heights) > _SETTING_LINES
    most = _FEWER_LINES if is_long else _MOST_LINES
    rows, num_left_out = _rows(found, best, len(results.deployments), most)
    cost = cost_of(results, best)
    said = [
        *(
            [("Omitted", f"{counted(num_left_out, 'row')}; --full shows all")]
            if num_left_out
            else ()
        ),
        *objectives(best),
        *([("Cost", f"{cost} (at {best.load})")] if cost else ()),
        *_prefixes(best),
        *notes,
    ]
    table = Table("", (Heading("", False), Heading("", False)), tuple(said))
    return Answer(
        setting,
        f"{lead or headline(results)} {why}".strip(),
        (_table(results, rows), *parts, table),
    )


def places(serving: ServingRecord, num_asked: int, by: str = "") -> str:
    """Requests served at once of a closed load, and their wait for a place; empty if all are.

    Args:
        by: the limit behind it, with a space before.
    """
    if serving.place_wait_s is None or serving.num_running is None:
        return ""
    num = num_asked - serving.num_running
    return (
        f"serves {serving.num_running:,} of {num_asked:,} at once{by}; {num:,} "
        f"wait{'s' * (num == 1)}, each request {duration(serving.place_wait_s)} on average"
    )


def headline(results: Results) -> str:
    """Throughput and latency of the best load; and the wait for a place, if there is one."""
    said, serving = _headline(results), best_of(served(results)).serving
    if serving.batch is not None and (waiting := places(serving, serving.batch)):
        return f"{said} It {waiting}."
    return said


def _headline(results: Results) -> str:
    found = served(results)
    best, several = best_of(found), len(found) > 1
    serving, where = best.serving, best.load
    if len(results.deployments) > 1:
        where = f"{best.layout} at {where}"
    tps = with_bounds(serving.output_tps)
    told = typical_of(results)
    medians = "".join(
        f", {name} {milliseconds(typical)} ms"
        for name, seconds in (("TPOT", serving.tpot_s), ("TTFT", serving.ttft_s))
        if (typical := getattr(seconds, told, None)) is not None
    )
    if not several:
        misses = "" if serving.keeps_slos else "Misses the SLOs: "
        return f"{misses}{tps} output tokens/s at {where}{medians} ({told}s)."
    if not serving.keeps_slos:
        is_any_good = serving.goodput is not None and serving.goodput.value > 0
        how = "has the highest goodput" if is_any_good else f"is nearest to them ({_worst(best)})"
        lead = f"No load meets the SLOs; {where} {how}"
    else:
        within = " within the SLOs" if serving.slos else ""
        lead = f"{where} has the highest throughput{within}"
        lead = lead[0].upper() + lead[1:] if len(results.deployments) == 1 else lead
    return f"{lead}: {tps} tokens/s{medians} ({told}s)."


def _bursts(found: Sequence[LoadPoint]) -> str:
    """Batches whose requests all start at once, with none after them; in words."""
    closed = {each.serving.batch: each.serving for each in found if each.serving.batch}
    bursts = [
        batch
        for batch, each in closed.items()
        if each.num_requests == batch and each.sample is None  # else as many happened to begin
    ]
    if not bursts:
        return ""
    of = "" if len(bursts) == len(closed) else f" at {', '.join(map(whole, bursts))}"
    return f", burst{of}"


def lengths_of(load: Mapping[str, Any], means: Mapping[str, int], num_positions: int) -> str:
    """`1,000 in (800 shared) / 100–300 out`; of recorded requests, the means.

    Args:
        num_positions: of the model: outputs are drawn around a single length, as far as it has
            some.
    """
    names = "prompt_len", "output_len"
    if load.get("requests") is not None:
        prompt, output = (f"{means[name]:,}" for name in names)
        return f"recorded, {prompt} in / {output} out on average"
    asked = {**means, **load}
    prompts, outputs = (LengthRange.parse(name, str(asked[name])) for name in names)
    if prompts is not None and outputs is not None:
        asked["output_len"] = str(outputs.varied(num_positions - prompts.high + 1))
    return _in_out(asked)


def _in_out(load: Mapping[str, Any], *, is_modelled: bool = True) -> str:
    """Lengths of prompts and outputs.

    Args:
        is_modelled: outputs are drawn around a single length.
    """
    prompt, output = (_lengths(str(load[name])) for name in ("prompt_len", "output_len"))
    if is_modelled:
        output = _around(str(load["output_len"])) or output
    shared = load.get("prefix_len")
    of_them = f" ({shared:,} shared)" if shared else ""
    return f"{prompt} in{of_them} / {output} out"


def _lengths(text: str) -> str:
    return "–".join(dict.fromkeys(f"{int(end):,}" for end in text.split(":")))


def _around(text: str) -> str:
    """`256 ±20%`, of a range like those that are drawn around a mean; empty of another."""
    ends = [int(end) for end in text.split(":")]
    mean, is_half = divmod(ends[0] + ends[-1], 2)
    share = percent((ends[-1] - mean) / mean)
    return "" if is_half or share != percent(LENGTHS_APART) else f"{mean:,} ±{share}"


def objectives(served: LoadPoint) -> Iterator[Note]:
    """Each objective under one load, and whether it was met."""
    serving = served.serving
    if serving.good_share is None or serving.goodput is None:
        return
    told = [_told(each) for each in sorted(serving.slos, key=lambda each: each.is_met)]
    more = f"; {len(told) - _MOST_SLOS} more" if len(told) > _MOST_SLOS else ""
    yield (
        "SLOs",
        f"{'; '.join(told[:_MOST_SLOS])}{more} (at {served.load}); goodput "
        f"{figures(serving.goodput)} requests/s: {percent(serving.good_share.value)} of "
        "requests meet all limits",
    )


def _worst(served: LoadPoint) -> str:
    worst = max(served.serving.slos, key=lambda each: each.excess)
    return _told(worst).removesuffix(", MISSED")


def _told(result: SLOResult) -> str:
    name = f"{result.slo.metric.upper()} {result.slo.statistic}"
    if result.is_endless:
        return f"{name} without end > {result.slo.limit}, MISSED"
    if result.value is None:
        return f"{name} of no request"
    how = "≤ {}, met" if result.is_met else "> {}, MISSED"
    return f"{name} {milliseconds(result.value)} ms {how.format(result.slo.limit)}"


def _prefixes(served: LoadPoint) -> Iterator[Note]:
    num_cached, num_prompt = served.serving.num_cached_tokens, served.serving.num_prompt_tokens
    if num_cached and num_prompt:
        yield (
            "Prefixes",
            f"{percent(num_cached / num_prompt)} of prompt tokens hit the prefix cache",
        )


def cost_of(results: Results, served: LoadPoint) -> str | None:
    """Dollars for a million tokens, in a few words; None without a price."""
    output, total = served.serving.usd_per_million_output, served.serving.usd_per_million_total
    if output is None or total is None:
        return None
    bounds = "" if output.low in (None, output.high) else f" ({low_high(output)})"
    num = served.record.num_ranks
    is_whole = is_on_cpus(results) or served.record.layout is None
    of = "in all" if is_whole else f"for each of {counted(num, device_of(results))}"
    return (
        f"${figures(output)}{bounds} per million output tokens, ${figures(total)} of all tokens, "
        f"at ${results.question['price']:g} an hour {of}"
    )


def per_device(served: LoadPoint) -> Estimate:
    """Output tokens a second of a device."""
    return served.serving.output_tps / served.record.num_ranks


def _of(metric: str, statistic: str) -> Callable[[LoadPoint], Estimate | None]:
    def get(each: LoadPoint) -> Estimate | None:
        summary: Summary | None = getattr(each.serving, f"{metric}_s")
        found: Estimate | None = getattr(summary, statistic, None)
        return found

    return get


_Ranked = tuple[int, Column[LoadPoint]]  # the highest is the first to be left out; 0 stays


def _columns(results: Results, rows: Sequence[LoadPoint]) -> Iterator[_Ranked]:
    kind, _ = load_of(rows[0].serving)
    if len(results.deployments) > 1:
        firsts = [
            each
            for place, each in enumerate(rows)
            if not place or rows[place - 1].record is not each.record
        ]
        yield 0, text(whose(results), lambda each: each.layout if each in firsts else "")
    yield 0, number(kind, lambda each: load_of(each.serving)[1])
    yield 0, number("tok/s", _tps, compact)
    yield 4, number("low–high", _tps, low_high_compact, "projected")
    if rows[0].record.layout is not None:
        yield 1, number(f"/{device_of(results)}", per_device, compact)
    for rank, metric in ((2, "tpot"), (3, "ttft")):
        yield 0, number(metric.upper(), _of(metric, typical_of(results)), milliseconds)
        yield rank, number("p95", _of(metric, "p95"), milliseconds)
    serving = rows[0].serving
    if serving.goodput is not None:
        yield 0, number("goodput", lambda each: each.serving.goodput, compact)
        yield 5, number("good", lambda each: each.serving.good_share, _share)
    if serving.usd_per_million_output is not None:
        yield 6, number("$/M out", lambda each: each.serving.usd_per_million_output, figures)


def _tps(served: LoadPoint) -> Estimate:
    return served.serving.output_tps


def _share(share: Estimate) -> str:
    return percent(share.value)


def _table(results: Results, rows: Sequence[LoadPoint]) -> Table:
    """The table of loads, with as many columns as there is room for."""
    title = f"Output tokens/s; TPOT and TTFT in ms, {typical_of(results)} and p95"
    title += "; goodput in requests/s" if rows[0].serving.slos else ""
    kept = list(_columns(results, rows))
    while True:
        table = Table.of(title, [each for _, each in kept], rows, rows[0].record.source)
        least = max(rank for rank, _ in kept)
        if _width(table) <= COLUMNS or not least:
            return table
        kept = [each for each in kept if each[0] < least]


def _width(table: Table) -> int:
    widths = []
    for place, heading in enumerate(table.columns):
        widest = max(len(heading.heading), *(len(row[place]) for row in table.rows))
        widths.append(widest if heading.is_number else min(widest, _LEAST_NAME))
    return sum(widths) + _GAP * (len(widths) - 1)


def _rows(
    found: Sequence[LoadPoint], best: LoadPoint, num_layouts: int, most_lines: int
) -> tuple[list[LoadPoint], int]:
    """Rows that there are lines for, in their order, and how many are left out.

    First the best, then the best of each other deployment, then the best's other loads.
    """

    def importance(place: int) -> int:
        each = found[place]
        if each is best:
            return 0
        if each.serving is each.record.best_load:
            return 1
        return 2 if each.record is best.record else 3

    num_lines, chosen, named = 0, list[int](), set[str]()
    for place in sorted(range(len(found)), key=importance):
        each, height = found[place], 1
        if num_layouts > 1 and each.record.name not in named:
            height = len(textwrap.wrap(each.layout, _LEAST_NAME))
        if num_lines + height <= most_lines:
            num_lines += height
            chosen.append(place)
            named.add(each.record.name)
    return [found[place] for place in sorted(chosen)], len(found) - len(chosen)
