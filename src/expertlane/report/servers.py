"""The answer and the report of `bench --url`: servers measured from outside."""

from collections.abc import Iterator, Sequence
from typing import Any

from expertlane.report.document import (
    Answer,
    Column,
    Section,
    Table,
    Words,
    number,
    text,
)
from expertlane.report.engine_counts import at, counted_by_servers, engine_notes, over_time
from expertlane.report.loads import (
    NAME_COLUMNS,
    LoadPoint,
    Note,
    answer,
    best_of,
    headline,
    served,
)
from expertlane.report.numbers import (
    counted,
    figures,
    low_high,
    milliseconds,
    percent,
    shortened,
    whole,
)
from expertlane.report.serving import by_load
from expertlane.report.setup import cautions
from expertlane.results.estimate import LEAST_RUNS
from expertlane.results.record import RatioRecord
from expertlane.results.results import Results
from expertlane.results.serving_record import ClientRecord, FailureRecord

_BUSY = 0.8  # share of a core, from which on the client may be the bottleneck
_LATE_S = 0.01
_OFF = 0.02  # share of the tokens that were asked for
_MANY = 0.01  # share of requests that failed
_MOST_ERRORS = 3
_MOST_RATIOS = 8
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
        [
            *errors_of(found),
            *doubts_of(found),
            *notes_of_engines(results, found),
            ("Confidence", _sure(results, found)),
        ],
        verdict(results) or headline(results),
    )


def notes_of_engines(results: Results, found: Sequence[LoadPoint]) -> Iterator[Note]:
    """What the servers' own counts put in doubt."""
    load = results.question["workload"]
    # Requests of a file may begin alike, too.
    shares_prefixes = bool(load.get("prefix_len")) or load.get("requests") is not None
    # An experiment's prompts are the same in every run.
    seed = "another seed in [workload]" if "experiment" in results.question else "another --seed"
    return engine_notes(found, shares_prefixes=shares_prefixes, seed=seed)


def _called(urls: Sequence[str]) -> list[str]:
    if len(urls) == 1:
        return [urls[0]]
    return [f"{letter}: {url}" for letter, url in zip("AB", urls, strict=True)]


def verdict(results: Results) -> str:
    """Which of two servers is faster at the best load; empty for one server."""
    load = best_of(served(results)).load
    return ratio_sentence(
        [each for each in results.ratios if each.load == load], f"At {load} ", "A", "B"
    )


def ratio_sentence(ratios: Sequence[RatioRecord], at: str, one: str, other: str) -> str:
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
        f"{at}{one} gives {ratio_words(first)} the output tokens/s of {other}, {_sentence(first)}"
        + "".join(f"; {each.metric} {ratio_words(each)}" for each in more)
        + "."
    )


def ratio_words(ratio: RatioRecord) -> str:
    """`1.32 × (1.28–1.36)`."""
    interval = "" if ratio.ratio.low is None else f" ({low_high(ratio.ratio)})"
    return f"{figures(ratio.ratio)} ×{interval}"


def _sentence(ratio: RatioRecord) -> str:
    if ratio.ratio.low is None:
        return "too few rounds to tell a difference from noise"
    return "a significant difference" if ratio.is_significant else "no significant difference"


def _which(ratio: RatioRecord) -> str:
    if ratio.ratio.low is None:
        return "unknown"
    if not ratio.is_significant:
        return "no difference"
    return f"{'A' if ratio.is_better else 'B'} is better"


_RATIOS: tuple[Column[RatioRecord], ...] = (
    text("load", lambda each: each.load),
    text("metric", lambda each: each.metric),
    number("A / B", lambda each: each.ratio, figures),
    number("90 % interval", lambda each: each.ratio if each.ratio.low else None, low_high),
    text("", _which),
)


def _ratio_table(ratios: Sequence[RatioRecord]) -> Table:
    return Table.of("A over B, median of rounds in pairs", _RATIOS, ratios)


def clients_of(found: Sequence[LoadPoint]) -> list[tuple[LoadPoint, ClientRecord]]:
    """The client's numbers of each load."""
    return [(each, each.serving.client) for each in found if each.serving.client is not None]


def errors_of(found: Sequence[LoadPoint]) -> Iterator[Note]:
    """Failed requests of each load, by kind."""
    for each, client in clients_of(found):
        if client.num_failed:
            num_all = client.num_failed + (each.serving.num_requests or 0)
            told = "; ".join(map(_failure, client.failures[:_MOST_ERRORS]))
            more = len(client.failures) - _MOST_ERRORS
            told += f"; {more} kinds more" if more > 0 else ""
            yield (
                "Errors",
                f"{client.num_failed:,} of {num_all:,} requests at {at(found, each)}: {told}",
            )


def _failure(failure: FailureRecord) -> str:
    message = f", {shortened(failure.message, 60)}" if failure.message else ""
    return f"{failure.name} × {failure.num_requests:,}{message}"


def doubts_of(found: Sequence[LoadPoint]) -> Iterator[Note]:
    """Notes on what distorts numbers; one sentence a kind, for the worst load."""
    clients = clients_of(found)
    ended = [client for _, client in clients if client.why_ended]
    if ended:
        num = sum(client.num_unsent for client in ended)
        yield "Partial", f"{ended[0].why_ended}; {counted(num, 'request')} not measured"
    each, client = max(clients, key=lambda pair: pair[1].cpu_share)
    if client.cpu_share > _BUSY:
        yield (
            "Client",
            f"used {percent(client.cpu_share)} of a core at {at(found, each)}: it may be what "
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
            f"requests were sent up to {milliseconds(late_s)} ms late (p99) at {at(found, one)}; "
            "latencies count from when they were due",
        )
    yield from _lengths(clients)


def _lengths(clients: Sequence[tuple[LoadPoint, ClientRecord]]) -> Iterator[Note]:
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


def _sure(results: Results, found: Sequence[LoadPoint]) -> str:
    rounds = results.question["rounds"]
    num = found[0].serving.num_requests or 0
    if rounds == 1:
        return f"one round of {counted(num, 'request')} per load, not repeated"
    told = f"{rounds} rounds per load, {counted(num, 'request')} in all"
    return told if rounds >= LEAST_RUNS else f"{told}; {LEAST_RUNS} or more give an interval"


_LOAD: tuple[Column[tuple[LoadPoint, Any]], ...] = (
    text("server", lambda pair: pair[0].record.name),
    text("load", lambda pair: pair[0].load),
)
_OF_CLIENT: tuple[Column[tuple[LoadPoint, ClientRecord]], ...] = (
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
_FAILED: tuple[Column[tuple[LoadPoint, FailureRecord]], ...] = (
    *_LOAD,
    text("error", lambda pair: pair[1].name),
    number("requests", lambda pair: pair[1].num_requests, whole),
    text("the first one's message", lambda pair: pair[1].message),
)


def of_servers(results: Results) -> tuple[Section, ...]:
    """All sections of a client's measurements."""
    compared = (_ratio_table(results.ratios),) if results.ratios else ()
    return (
        Section("Verdict", (verdict(results) or headline(results),), "top", "answer"),
        Section("", tuple(cautions(results)), "top", "sure"),
        Section("Differences", compared, "top", "answer"),
        *by_load(results),
        *client_and_servers(results),
    )


def client_and_servers(results: Results) -> tuple[Section, ...]:
    """Sections of the client's numbers, and of the servers' own metrics."""
    found = served(results)
    clients = clients_of(found)
    failures = [(each, one) for each, client in clients for one in client.failures]
    failed = (Table.of("Failed requests", _FAILED, failures),) if failures else ()
    return (
        Section("Client", (Table.of("", _OF_CLIENT, clients), *failed), chapter="sure"),
        counted_by_servers(found, list(notes_of_engines(results, found))),
        over_time(found),
    )
