"""The answers and reports of servers measured from outside: `bench --url`, `compare --engine`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from expertlane.report.answer import short
from expertlane.report.compared import Row, step_difference
from expertlane.report.document import (
    Answer,
    Column,
    Figure,
    Heading,
    Section,
    Table,
    Words,
    number,
    text,
)
from expertlane.report.loads import (
    NAME_COLUMNS,
    Note,
    Served,
    answer,
    best_of,
    headline,
    served,
)
from expertlane.report.numbers import (
    NONE,
    compact,
    counted,
    figures,
    low_high,
    low_high_compact,
    milliseconds,
    percent,
    shortened,
    signed,
    whole,
)
from expertlane.report.serving import by_load, latency
from expertlane.report.setup import cautions
from expertlane.report.speed import IN_ALL, causes
from expertlane.results.estimate import LEAST_RUNS, Estimate, Summary
from expertlane.results.record import DeploymentRecord, RatioRecord
from expertlane.results.results import Results
from expertlane.results.serving_record import ClientRecord, FailureRecord
from expertlane.spec.names import Phase

_BUSY = 0.8  # share of a core, from which on the client may be the bottleneck
_LATE_S = 0.01
_OFF = 0.02  # share of the tokens that were asked for
_MANY = 0.01  # share of requests that failed
_MOST_ERRORS = 3
_MOST_RATIOS = 8
_MOST_FAILURE = 240  # letters
_MOST_CAUSES = 6
_IN_ANSWER = ("output tokens/s", "goodput", "TTFT median", "TTFT p99", "TPOT median")


def server_answer(results: Results) -> Answer:
    """The result of each server, the ratio of two, and failures."""
    urls = results.question["urls"]
    found = served(results)
    setting = [shortened(results.question["model"], NAME_COLUMNS), *_called(urls)]
    setting.append(results.question["endpoint"])
    parts: list[Words] = []
    if results.ratios:
        shown = [each for each in results.ratios if each.metric in _IN_ANSWER]
        is_best = [each for each in shown if each.load == best_of(found).load]
        parts.append(_ratio_table(is_best if len(shown) > _MOST_RATIOS else shown))
    return answer(
        results,
        " | ".join(setting),
        "",
        parts,
        [*_errors(found), *_doubts(found), ("Confidence", _sure(results, found))],
        verdict(results) or headline(results),
    )


def _called(urls: Sequence[str]) -> list[str]:
    if len(urls) == 1:
        return [urls[0]]
    return [f"{letter}: {url}" for letter, url in zip("AB", urls, strict=True)]


def verdict(results: Results) -> str:
    """Which of two servers is faster at the best load; empty for one server."""
    load = best_of(served(results)).load
    return _compared(
        [each for each in results.ratios if each.load == load], f"At {load} ", "A", "B"
    )


def _compared(ratios: Sequence[RatioRecord], at: str, one: str, other: str) -> str:
    """Throughput and latency of one server over another's; empty without ratios.

    Args:
        at: the load, with a space after it; may be empty.
    """
    own = {each.metric: each for each in ratios}
    first = own.get("output tokens/s")
    if first is None:
        return ""
    more = [own[name] for name in ("TTFT median", "TPOT median") if name in own]
    return (
        f"{at}{one} gives {_said(first)} the output tokens/s of {other}, {_sentence(first)}"
        + "".join(f"; {each.metric} {_said(each)}" for each in more)
        + "."
    )


def _said(ratio: RatioRecord) -> str:
    interval = "" if ratio.ratio.low is None else f" ({low_high(ratio.ratio)})"
    return f"{figures(ratio.ratio)} ×{interval}"


def _sentence(ratio: RatioRecord) -> str:
    if ratio.ratio.low is None:
        return "of too few rounds to tell a difference from noise"
    return "a significant difference" if ratio.is_significant else "no significant difference"


def _which(ratio: RatioRecord) -> str:
    if ratio.ratio.low is None:
        return "unknown"
    if not ratio.is_significant:
        return "no difference"
    return f"{'A' if ratio.is_better else 'B'} is better"


def _interval(estimate: Estimate) -> str:
    return NONE if estimate.low is None else low_high_compact(estimate)


def _median(record: DeploymentRecord, metric: str) -> Estimate | None:
    summary: Summary | None = getattr(record.serving[0], metric) if record.serving else None
    return None if summary is None else summary.median


def _p99(record: DeploymentRecord, metric: str) -> Estimate | None:
    summary: Summary | None = getattr(record.serving[0], metric) if record.serving else None
    return None if summary is None else summary.p99


def _rounds(record: DeploymentRecord) -> int | None:
    client = record.serving[0].client if record.serving else None
    return None if client is None else client.num_rounds


def _start_s(record: DeploymentRecord) -> float | None:
    times_s = record.server.start_s if record.server is not None else ()
    return median(times_s) if times_s else None


_RATIOS: tuple[Column[RatioRecord], ...] = (
    text("load", lambda each: each.load),
    text("metric", lambda each: each.metric),
    number("A / B", lambda each: each.ratio, figures),
    number("90 % interval", lambda each: each.ratio if each.ratio.low else None, low_high),
    text("", _which),
)


def _ratio_table(ratios: Sequence[RatioRecord]) -> Table:
    return Table.of("A over B, median of rounds in pairs", _RATIOS, ratios)


def _clients(found: Sequence[Served]) -> list[tuple[Served, ClientRecord]]:
    return [(each, each.serving.client) for each in found if each.serving.client is not None]


def _errors(found: Sequence[Served]) -> Iterator[Note]:
    for each, client in _clients(found):
        if client.num_failed:
            num_all = client.num_failed + (each.serving.num_requests or 0)
            told = "; ".join(map(_failure, client.failures[:_MOST_ERRORS]))
            more = len(client.failures) - _MOST_ERRORS
            told += f"; {more} kinds more" if more > 0 else ""
            yield (
                "Errors",
                f"{client.num_failed:,} of {num_all:,} requests at {_at(found, each)}: {told}",
            )


def _at(found: Sequence[Served], each: Served) -> str:
    several = len({id(one.record) for one in found}) > 1
    return f"{each.load} of {each.record.name}" if several else each.load


def _failure(failure: FailureRecord) -> str:
    message = f", {shortened(failure.message, 60)}" if failure.message else ""
    return f"{failure.name} × {failure.num_requests:,}{message}"


def _doubts(found: Sequence[Served]) -> Iterator[Note]:
    """Notes on what distorts numbers; one sentence a kind, for the worst load."""
    clients = _clients(found)
    ended = [client for _, client in clients if client.why_ended]
    if ended:
        num = sum(client.num_unsent for client in ended)
        yield "Partial", f"{ended[0].why_ended}; {counted(num, 'request')} not measured"
    each, client = max(clients, key=lambda pair: pair[1].cpu_share)
    if client.cpu_share > _BUSY:
        yield (
            "Client",
            f"used {percent(client.cpu_share)} of a core at {_at(found, each)}: it may be what "
            "was measured",
        )
    late = [
        (one, p99.value)
        for one, of in clients
        if of.late_s is not None and (p99 := of.late_s.p99) is not None
    ]
    if late and max(late, key=lambda pair: pair[1])[1] > _LATE_S:
        one, late_s = max(late, key=lambda pair: pair[1])
        yield (
            "Send delay",
            f"requests were sent up to {milliseconds(late_s)} ms late (p99) at {_at(found, one)}; "
            "latencies count from when they were due",
        )
    yield from _lengths(clients)


def _lengths(clients: Sequence[tuple[Served, ClientRecord]]) -> Iterator[Note]:
    for name, asked_of, found_of in (
        ("prompts", "asked_prompt_len", "num_prompt_tokens"),
        ("outputs", "asked_output_len", "num_output_tokens"),
    ):
        for each, client in clients:
            asked = getattr(client, asked_of)
            mean = (getattr(each.serving, found_of) or 0) / (each.serving.num_requests or 1)
            if asked and abs(mean / asked - 1) > _OFF:
                yield (
                    "Lengths",
                    f"{name} had {figures(mean)} tokens on average, asked for were "
                    f"{figures(asked)}",
                )
                break
    num_uncounted = sum(client.num_uncounted for _, client in clients)
    if num_uncounted:
        yield (
            "Tokens",
            f"{counted(num_uncounted, 'answer')} without usage: each event counts as a token",
        )
    num_tokens = sum(each.serving.num_output_tokens or 0 for each, _ in clients)
    num_events = sum(client.num_events for _, client in clients)
    if num_tokens and abs(num_events / num_tokens - 1) > _OFF:
        yield "Events", f"{figures(num_tokens / num_events)} tokens in each; ITL is between events"


def _sure(results: Results, found: Sequence[Served]) -> str:
    rounds = results.question["rounds"]
    num = found[0].serving.num_requests or 0
    if rounds == 1:
        return f"one round of {counted(num, 'request')} per load, not repeated"
    told = f"{rounds} rounds per load, {counted(num, 'request')} in all"
    return told if rounds >= LEAST_RUNS else f"{told}; {LEAST_RUNS} or more give an interval"


_LOAD: tuple[Column[tuple[Served, Any]], ...] = (
    text("server", lambda pair: pair[0].record.name),
    text("load", lambda pair: pair[0].load),
)
_OF_CLIENT: tuple[Column[tuple[Served, ClientRecord]], ...] = (
    *_LOAD,
    number("answered", lambda pair: pair[0].serving.num_requests, whole),
    number("failed", lambda pair: pair[1].num_failed, whole),
    number("events", lambda pair: pair[1].num_events, whole),
    number("send delay p99, ms", lambda pair: pair[1].late_s and pair[1].late_s.p99, milliseconds),
    number("client, of a core", lambda pair: pair[1].cpu_share, percent),
    number(
        "µs CPU per token",
        lambda pair: 1e6 * pair[1].cpu_s / (pair[0].serving.num_output_tokens or 1),
        figures,
    ),
)
_FAILURES: tuple[Column[tuple[Served, FailureRecord]], ...] = (
    *_LOAD,
    text("error", lambda pair: pair[1].name),
    number("requests", lambda pair: pair[1].num_requests, whole),
    text("the first one's message", lambda pair: pair[1].message),
)


def of_servers(results: Results) -> tuple[Section, ...]:
    """All sections of a client's measurements."""
    found = served(results)
    clients = _clients(found)
    failures = [(each, one) for each, client in clients for one in client.failures]
    compared = (_ratio_table(results.ratios),) if results.ratios else ()
    failed = (Table.of("Failed requests", _FAILURES, failures),) if failures else ()
    client = Table.of("", _OF_CLIENT, clients)
    return (
        Section("Verdict", (verdict(results) or headline(results),), "top", "answer"),
        Section("", tuple(cautions(results)), "top", "sure"),
        Section("Differences", compared, "top", "answer"),
        *by_load(results),
        Section("Client", (client, *failed), chapter="sure"),
    )


# A comparison of servers.


def _measured(results: Results) -> Results:
    """The measured deployments alone."""
    return replace(results, deployments=results.select("measured"))


def compared_verdict(results: Results) -> str:
    """The fastest deployment against the best it was compared with, and others in brief."""
    by_other: dict[tuple[str, str], list[RatioRecord]] = {}
    for each in results.ratios:
        by_other.setdefault((each.name, each.other), []).append(each)
    if not by_other:
        return headline(_measured(results))
    (names, first), *more = by_other.items()
    told = [_compared(first, "", *names)]
    for (_, other), own in more:
        ratio = next(each for each in own if each.metric == "output tokens/s")
        told.append(f"Over {other}: {_said(ratio)}.")
    return " ".join(told)


def _software(record: DeploymentRecord) -> str:
    server = record.server
    assert server is not None, "it is of servers"
    return server.software or server.engine


_OF_SERVER: tuple[Column[DeploymentRecord], ...] = (
    text("deployment", lambda each: each.name),
    number("tok/s", lambda each: each.serving[0].output_tps if each.serving else None, compact),
    number("90 %", lambda each: each.serving[0].output_tps if each.serving else None, _interval),
    number("TPOT", lambda each: _median(each, "tpot_s"), milliseconds),
    number("TTFT", lambda each: _median(each, "ttft_s"), milliseconds),
    number("ITL p99", lambda each: _p99(each, "itl_s"), milliseconds),
    number("rounds", lambda each: _rounds(each), whole),
)


def _table(records: Sequence[DeploymentRecord], base: DeploymentRecord | None) -> Table:
    """Throughput and latency of each; failed ones have no numbers.

    Args:
        base: the deployment that `rel` is against; None for no such column.
    """
    columns = list(_OF_SERVER)
    if not any(each.serving and each.serving[0].output_tps.low for each in records):
        columns = [each for each in columns if each.heading != "90 %"]
    if base is not None and len(records) > 1:
        against = base.serving[0].output_tps.value

        def rel(each: DeploymentRecord) -> float | None:
            return each.serving[0].output_tps.value / against if each.serving else None

        columns.append(number("rel", rel, figures))
    return Table.of(
        "Output tokens/s; TPOT, TTFT and ITL in ms, medians but for p99", columns, records
    )


def compared_answer(name: str, results: Results) -> Answer:
    """Which deployment is faster, all beside each other, and what failed.

    Args:
        name: name of the experiment, with its changes.
    """
    measured = _measured(results)
    records, found = measured.deployments, served(measured)
    lengths = results.question["workload"]
    answered = [each for each in records if each.serving]
    software = ", ".join(dict.fromkeys(filter(None, map(_software, answered))))
    workload = results.question["experiment"]["workload"]
    setting = (
        f"{name} | {software} | {workload['num_sequences']:,} requests at once, "
        f"{int(lengths['prompt_len']):,} in / {int(lengths['output_len']):,} out | measured"
    )
    by_name = {each.name: each for each in records}
    base = by_name.get(results.ratios[0].other) if results.ratios else None
    notes: list[Note] = [*_failed(records), *_errors(found), *_doubts(found)]
    notes += [("Caution", each) for each in results.cautions]
    notes.append(("Fairness", FAIR))
    notes.append(("Confidence", _certainty(records)))
    said = Table("", (Heading("", False), Heading("", False)), tuple(notes))
    why = filter(None, (_why(results),))
    return Answer(setting, compared_verdict(results), (_table(records, base), *why, said))


def _why(results: Results) -> Figure | None:
    """Difference of a step of the two in the first sentence; None unless both were profiled."""
    by_name = {each.name: each for each in results.select("measured")}
    if not results.ratios:
        return None
    names = results.ratios[0].name, results.ratios[0].other
    steps = [by_name[name].decode for name in names]
    if None in steps:
        return None
    one, other = (
        Row(None, by_name[name], step) for name, step in zip(names, steps, strict=True) if step
    )
    found = step_difference(other, one)
    title = (
        f"Why, ms per decode step, profiled: {other.name} {figures(found.slower_ms)} → {one.name} "
        f"{figures(found.faster_ms)}"
    )
    words = (f"{short(cause)} {signed(ms)}" for cause, ms in found.causes[:_MOST_CAUSES])
    return Figure("", (title, "  " + "   ".join(words)))


def _steps(results: Results) -> Iterator[Words]:
    """Shares of a step's time by cause of each deployment that was profiled, by phase."""
    for phase in reversed(Phase):
        found = [
            (each.name, step)
            for each in results.deployments
            for step in each.steps
            if step.phase is phase
        ]
        if found:
            yield from causes(f"{phase.capitalize()} steps, profiled", found, (IN_ALL,))
            unknown = [
                (name, kernel, seconds / sum(step.breakdown_s.values()))
                for name, step in found
                for kernel, seconds in step.unknown_kernels.items()
            ]
            if unknown:
                yield Table.of("Kernels of no known stage", _UNKNOWN, unknown)


FAIR = (
    "same prompts for all, new in each round, prefix caches off where engines are started here; "
    "TPOT: mean time of a request's tokens after the first"
)


def _failed(records: Sequence[DeploymentRecord]) -> Iterator[Note]:
    for each in records:
        if each.server is not None and each.server.failure:
            yield "Failed", f"{each.name}: {shortened(each.server.failure, _MOST_FAILURE)}"


def _certainty(records: Sequence[DeploymentRecord]) -> str:
    nums = sorted({_rounds(each) or 0 for each in records if each.serving})
    told = f"{nums[-1]} rounds of those in the first sentence, in turns"
    if nums[-1] == 1:
        told = "one round each"
    elif nums[0] < nums[-1]:
        told += f"; {nums[0]} of the others"
    return told if nums[-1] >= LEAST_RUNS else f"{told}; {LEAST_RUNS} or more give an interval"


def compared_sections(results: Results) -> tuple[Section, ...]:
    """All sections of a comparison of servers."""
    measured = _measured(results)
    found = served(measured)
    clients = _clients(found)
    failures = [(each, one) for each, client in clients for one in client.failures]
    failed = (Table.of("Failed requests", _FAILURES, failures),) if failures else ()
    pairs = (Table.of("", _PAIRS, results.ratios),) if results.ratios else ()
    by_name = {each.name: each for each in measured.deployments}
    base = by_name.get(results.ratios[0].other) if results.ratios else None
    return (
        Section("Verdict", (compared_verdict(results),), "top", "answer"),
        Section("", (*(f"{a}: {b}." for a, b in _failed(measured.deployments)),), "top", "answer"),
        Section("", tuple(cautions(results)), "top", "sure"),
        Section("Deployments (measured)", (_table(measured.deployments, base),), "top", "answer"),
        Section("Differences, in pairs of rounds", pairs, "top", "answer"),
        Section("Latency, ms (measured)", (latency(measured),), chapter="loads"),
        Section("Where the time goes", tuple(_steps(measured)), chapter="why"),
        Section("Client", (Table.of("", _OF_CLIENT, clients), *failed), chapter="sure"),
        Section("Servers", tuple(_servers(measured)), chapter="setup"),
    )


_PAIRS: tuple[Column[RatioRecord], ...] = (
    text("deployment", lambda each: each.name),
    text("over", lambda each: each.other),
    text("metric", lambda each: each.metric),
    number("ratio", lambda each: each.ratio, figures),
    number("90 % interval", lambda each: each.ratio if each.ratio.low else None, low_high),
    number("pairs", lambda each: each.num_rounds, whole),
)
_UNKNOWN: tuple[Column[tuple[str, str, float]], ...] = (
    text("deployment", lambda each: each[0]),
    text("kernel", lambda each: each[1]),
    number("of the step", lambda each: each[2], percent),
)
_SERVERS: tuple[Column[DeploymentRecord], ...] = (
    text("deployment", lambda each: each.name),
    text("layout", lambda each: each.layout),
    text("software", _software),
    number("start, s", lambda each: _start_s(each), figures),
    text("command or URL", lambda each: each.server and (each.server.command or each.server.url)),
)


def _servers(results: Results) -> Iterator[Words]:
    """Software, command and files of each server."""
    yield Table.of("", _SERVERS, results.deployments)
    for each in results.deployments:
        for name, content in each.server.files.items() if each.server else ():
            yield Figure(f"{name} of {each.name}", (content,))
    yield f"{FAIR[0].upper()}{FAIR[1:]}."
