"""The answer and the report of a comparison of servers: `compare --engine` and `--url`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from expertlane.report.charts.bars import FASTER, SLOWER, Bar, throughput_chart
from expertlane.report.differences import differs_in, table_of
from expertlane.report.document import (
    Answer,
    Chart,
    Column,
    Figure,
    Heading,
    Section,
    Table,
    Words,
    number,
    text,
)
from expertlane.report.load_plots import MOST_SPREADS, spread_of
from expertlane.report.loads import Note, headline, served
from expertlane.report.numbers import (
    NONE,
    compact,
    figures,
    low_high,
    low_high_compact,
    milliseconds,
    shortened,
    whole,
)
from expertlane.report.servers import (
    client_and_servers,
    doubts_of,
    errors_of,
    notes_of_engines,
    ratio_sentence,
    ratio_words,
)
from expertlane.report.serving import latency
from expertlane.report.setup import cautions
from expertlane.results.estimate import LEAST_RUNS, Estimate, Summary
from expertlane.results.record import DeploymentRecord, RatioRecord
from expertlane.results.results import Results

_MOST_FAILURE = 240  # letters
_MOST_NAME = 30


def _measured(results: Results) -> Results:
    """The results with their measured deployments only."""
    return replace(results, deployments=results.select("measured"))


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


def _verdict(results: Results) -> str:
    """The sentence on the two that were compared in pairs, and the ratios to further ones."""
    by_other: dict[tuple[str, str], list[RatioRecord]] = {}
    for each in results.ratios:
        by_other.setdefault((each.name, each.other), []).append(each)
    if not by_other:
        return headline(_measured(results))
    (names, first), *more = by_other.items()
    parts = [ratio_sentence(first, "", *names)]
    for (_, other), own in more:
        ratio = next(each for each in own if each.metric == "output tokens/s")
        parts.append(f"Against {other}: {ratio_words(ratio)}.")
    return " ".join(parts)


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
    """Throughput and latency of each deployment; failed ones have no numbers.

    Args:
        base: the deployment that column `rel` is relative to; None for no such column.
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


def servers_answer(name: str, results: Results) -> Answer:
    """The answer: which deployment is faster, a table of all, and what failed.

    Args:
        name: name of the experiment, with its changes.
    """
    measured = _measured(results)
    records, found = measured.deployments, served(measured)
    answered = [each for each in records if each.serving]
    software = ", ".join(dict.fromkeys(filter(None, map(_software, answered))))
    setting = f"{name} | {software} | {_load_words(results, answered[0])} | measured"
    by_name = {each.name: each for each in records}
    base = by_name.get(results.ratios[0].other) if results.ratios else None
    notes: list[Note] = [*_failed(records), *errors_of(found), *doubts_of(found)]
    notes += notes_of_engines(results, found)
    notes += [("Caution", each) for each in results.cautions]
    if differing := differs_in(records):
        notes.append(("Differs in", differing))
    notes.append(("Fairness", _fair(records)))
    notes += _of_ratios(results)
    notes.append(("Confidence", _certainty(records)))
    said = Table("", (Heading("", False), Heading("", False)), tuple(notes))
    return Answer(setting, _verdict(results), (_table(records, base), said))


def _load_words(results: Results, of: DeploymentRecord) -> str:
    """How requests come, and their lengths."""
    asked, load = results.question["workload"], of.serving[0]
    how = "recorded arrivals" if load.rate is None else f"{load.rate:g} requests/s"
    if load.batch is not None:
        how = f"{load.batch:,} requests at once"
    if asked.get("requests"):
        return f"{how}, lengths of {shortened(Path(asked['requests']).name, _MOST_NAME)}"
    prefix = f", {asked['prefix_len']:,} of them shared" if asked.get("prefix_len") else ""
    return f"{how}, {_len(asked['prompt_len'])} in{prefix} / {_len(asked['output_len'])} out"


def _len(text: str) -> str:
    return "–".join(f"{int(each):,}" for each in text.split(":"))


def _bars(results: Results) -> Chart | None:
    """A chart of the throughput of every measured deployment."""
    found = [each for each in results.deployments if each.serving]
    roles: dict[str, str] = {}
    if results.ratios:
        first = results.ratios[0]
        is_faster = first.ratio.value >= 1
        roles = {first.name: FASTER, first.other: SLOWER}
        if not is_faster:
            roles = {first.name: SLOWER, first.other: FASTER}
    bars = [
        Bar(each.name, each.serving[0].output_tps, roles.get(each.name, "other")) for each in found
    ]
    best = max(found, key=lambda each: each.serving[0].output_tps.value)
    title = f"{best.name} serves {figures(best.serving[0].output_tps)} tokens/s"
    return throughput_chart(title, "output tokens/s", bars, between="90 % interval", least=2)


def _latencies(results: Results) -> Chart | None:
    """A chart of each latency's statistics, server by server; None of one or of many servers."""
    deployments = tuple(each for each in results.deployments if each.serving)
    answered = replace(results, deployments=deployments)
    if not 1 < len(answered.deployments) <= MOST_SPREADS:
        return None
    return spread_of(answered)


def _fair(records: Sequence[DeploymentRecord]) -> str:
    are_started = [bool(each.server and each.server.engine) for each in records]
    caches = "; prefix caches are off" if any(are_started) else ""
    if caches and not all(are_started):
        caches += " in engines started here"
    return (
        f"all servers get the same prompts, new in each round{caches}; TPOT: mean time per output "
        "token after the first"
    )


def _how(records: Sequence[DeploymentRecord]) -> Iterator[str]:
    """Sentences on fairness and on the number of rounds."""
    for words in (_fair(records), _certainty(records)):
        yield f"{words[0].upper()}{words[1:]}."


def _failed(records: Sequence[DeploymentRecord]) -> Iterator[Note]:
    for each in records:
        if each.server is not None and each.server.failure:
            yield "Failed", f"{each.name}: {shortened(each.server.failure, _MOST_FAILURE)}"


def _of_ratios(results: Results) -> Iterator[Note]:
    """A note on how the headline's ratios differ from column `rel`, if there were rounds."""
    if any(each.num_rounds > 1 for each in results.ratios):
        yield "Ratios", "of the sentence: median over pairs of rounds; rel: over all rounds"


def _certainty(records: Sequence[DeploymentRecord]) -> str:
    nums = sorted({_rounds(each) or 0 for each in records if each.serving})
    words = f"{nums[-1]} rounds of each deployment in the first sentence, in turns"
    if nums[-1] == 1:
        words = "one round each"
    elif nums[0] < nums[-1]:
        words += f"; {nums[0]} of the others"
    return words if nums[-1] >= LEAST_RUNS else f"{words}; an interval needs {LEAST_RUNS} or more"


def servers_sections(results: Results) -> tuple[Section, ...]:
    """All sections of a comparison of servers."""
    measured = _measured(results)
    failures_told = tuple(f"{words}." for _, words in _failed(measured.deployments))
    pairs = (Table.of("", _PAIRS, results.ratios),) if results.ratios else ()
    by_name = {each.name: each for each in measured.deployments}
    base = by_name.get(results.ratios[0].other) if results.ratios else None
    return (
        Section("Verdict", (_verdict(results),), "top", "answer"),
        Section("How it was measured", tuple(_how(measured.deployments)), "top", "answer"),
        Section("", tuple(cautions(results)), "top", "sure"),
        Section(
            "Output tokens/s (measured)",
            tuple(filter(None, (_bars(measured), _latencies(measured)))),
            "first",
            "answer",
        ),
        Section("Differences, in pairs of rounds", pairs, "top", "answer"),
        Section("Deployments (measured)", (_table(measured.deployments, base),), "top", "answer"),
        Section("Failed", failures_told, "top", "sure"),
        Section("Latency, ms (measured)", (latency(measured),), chapter="answer"),
        *client_and_servers(measured),
        Section(
            "Differences between servers",
            tuple(filter(None, (table_of(measured.deployments),))),
            chapter="setup",
        ),
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
_SERVERS: tuple[Column[DeploymentRecord], ...] = (
    text("deployment", lambda each: each.name),
    text("layout", lambda each: each.layout),
    text("software", _software),
    number("start, s", lambda each: _start_s(each), figures),
    text("command or URL", lambda each: each.server and (each.server.command or each.server.url)),
)


def _servers(results: Results) -> Iterator[Words]:
    """Layout, software, command and files of each server."""
    yield Table.of("", _SERVERS, results.deployments)
    for each in results.deployments:
        for name, content in each.server.files.items() if each.server else ():
            yield Figure(f"{name} of {each.name}", (content,))
