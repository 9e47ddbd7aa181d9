"""The answer and the report of `expertlane drill`: what a fault did to a server under load."""

from collections.abc import Iterator, Sequence

from expertlane.report.charts.over_time import Strip, over_time_chart
from expertlane.report.document import (
    Answer,
    Chart,
    Column,
    Section,
    Table,
    Words,
    number,
    text,
)
from expertlane.report.numbers import (
    bytes_si,
    counted,
    duration,
    figures,
    percent,
    shortened,
    whole,
)
from expertlane.report.setup import cautions
from expertlane.results.drill_record import LOST, OUTCOMES, DrillRecord, OutcomeRecord
from expertlane.results.record import DeploymentRecord
from expertlane.results.results import Results

_EXAMPLE, _NAME, _FAULT, _LEFT = 44, 36, 120, 3
_MOST_FAILED = 4  # criteria that are told in the headline
_HEALTH = {"200": "--green", "another status": "--orange", "no answer": "--brick"}
_MS = 1e3


def _parts(results: Results) -> tuple[DeploymentRecord, DrillRecord]:
    record = results.deployments[0]
    assert record.drill is not None, "checked when it was read"
    return record, record.drill


def drill_answer(results: Results) -> Answer:
    """The verdict on the server, outcomes of requests, and the time until all was well again."""
    record, drill = _parts(results)
    software = record.server.software if record.server is not None else ""
    layout = f", {record.layout}" if record.layout is not None else ""
    setting = [
        f"{shortened(str(results.question['model']), _NAME)} at {results.question['url']}"
        + (f" ({software}{layout})" if software else layout),
        shortened(drill.fault, _FAULT),
        _load(results),
    ]
    parts: list[Words] = [_outcomes(drill), _facts(drill)]
    parts += [*drill.cautions, *cautions(results)]
    return Answer(" | ".join(setting), headline(drill), tuple(parts))


def _load(results: Results) -> str:
    question, lengths = results.question, results.question["workload"]
    how = f"batch {question['batch']}" if question.get("batch") else f"{question['rate']} req/s"
    return f"{how}, {lengths['prompt_len']} in / {lengths['output_len']} out"


def headline(drill: DrillRecord) -> str:
    """Passed or failed, by what, and how long it took."""
    if not drill.is_failed:
        num = drill.num_of(*OUTCOMES)
        change = (
            "each with the tokens of an undisturbed run"
            if not drill.num_of("changed", "tie")
            else "with no more changes of tokens than an undisturbed run's"
        )
        return (
            f"PASSED: no request was lost: {counted(num, 'request')} ended after the fault, "
            f"{change}. {_again(drill)}"
        )
    shown = "; ".join(drill.why_failed[:_MOST_FAILED])
    more = len(drill.why_failed) - _MOST_FAILED
    shown += f"; and {more} more" if more > 0 else ""
    return f"FAILED: {shown}. {_again(drill)}"


def _again(drill: DrillRecord) -> str:
    """Since when the rate is full again."""
    if drill.full_rate_s == 0.0:
        return "The rate never fell."
    if drill.full_rate_s is not None:
        return f"Full rate again after {duration(drill.full_rate_s)}."
    if drill.last_token_s is None:
        return f"No token came in the {duration(drill.observed_s)} after it."
    return f"Never at full rate again in the {duration(drill.observed_s)} after it."


def _outcomes(drill: DrillRecord) -> Table:
    names = {
        name: said + (f", no token for {drill.hang_s:g} s" if name == "hung" else "")
        for name, said in OUTCOMES.items()
    }
    columns: list[Column[OutcomeRecord]] = [
        text("requests that ended after the fault", lambda each: names[each.name]),
        number("sent before", lambda each: each.num_under_way, whole),
        number("sent after", lambda each: each.num_later, whole),
        number("time to first", _first_s, duration),
    ]
    always = [*LOST, "repeated", "dropped", "changed", "as before"]
    known = {each.name: each for each in drill.outcomes}
    rows = [
        known.get(name, OutcomeRecord(name)) for name in OUTCOMES if name in always or name in known
    ]
    return Table.of("", columns, rows)


def _first_s(outcome: OutcomeRecord) -> float | None:
    return None if outcome.name == "as before" else outcome.first_s


def _facts(drill: DrillRecord) -> Table:
    return Table.facts([*_times(drill), *_said_by_health(drill), *_compared(drill), *_kept(drill)])


def _times(drill: DrillRecord) -> Iterator[tuple[str, str]]:
    lost = [each for each in drill.outcomes if each.name in LOST]
    if lost:
        first = min(lost, key=lambda each: each.first_s or 0.0)
        words = shortened(first.example, _EXAMPLE * 2)
        yield "first lost", f"{duration(first.first_s or 0.0)} after the fault: {words}"
    wrong = next((each for each in drill.outcomes if each.example and each.name not in LOST), None)
    if wrong is not None:
        yield "first changed", f"{duration(wrong.first_s or 0.0)} after: {wrong.example}"
    yield "longest pause", f"{duration(drill.pause_s)} without a token of a request"
    rates = f"{figures(drill.tps_before)} tokens/s before; full is {figures(drill.full_tps)}"
    yield "rate", f"{_again(drill).removesuffix('.')} ({rates})"
    if drill.exit_code is not None:
        how = f"exit code {drill.exit_code}"
        said = f": {shortened(drill.printed, _EXAMPLE)}" if drill.printed else ""
        yield "command", f"{how} after {duration(drill.fault_s)}{said}"


def _said_by_health(drill: DrillRecord) -> Iterator[tuple[str, str]]:
    health = drill.health
    if not health.is_known:
        yield "/health", "none"
        return
    wrong = []
    if health.well_but_silent_s > 0:
        wrong.append(f"200 for {duration(health.well_but_silent_s)} while no request got a token")
    if health.ill_but_well_s > 0:
        wrong.append(f"not 200 for {duration(health.ill_but_well_s)} while all was well")
    after = [status for at, status in zip(health.asked_s, health.statuses, strict=True) if at >= 0]
    told = ", ".join(f"{each or 'no answer'}" for each in dict.fromkeys(after))
    allowed = f" ({duration(drill.health_s)} are allowed)"
    said = f"said {told}; "
    yield "/health", said + (f"{'; '.join(wrong)}{allowed}" if wrong else "true all the time")


def _compared(drill: DrillRecord) -> Iterator[tuple[str, str]]:
    changes = drill.changes
    share = (
        f"{changes.num_undisturbed_changed} of {changes.num_undisturbed} changed (90 % interval up "
        f"to {percent(changes.undisturbed_high)}), {changes.num_undisturbed_ties} by ties"
    )
    yield "undisturbed", f"by {changes.compared}: of the answers before the fault {share}"


def _kept(drill: DrillRecord) -> Iterator[tuple[str, str]]:
    if not drill.is_local:
        yield "left behind", "not known: its processes are not on this machine"
        return
    if not drill.left:
        yield "left behind", "nothing: no process, port or shared memory"
        return
    files = [each for each in drill.left if each.kind == "shared memory"]
    others = [each for each in drill.left if each not in files]
    told = [f"{each.kind} {each.what}" for each in others[:_LEFT]]
    if len(others) > _LEFT:
        told.append(f"{len(others) - _LEFT} more")
    if files:
        size = bytes_si(sum(each.num_bytes for each in files))
        told.append(f"{counted(len(files), 'file')} in /dev/shm ({size})")
    yield "left behind", "; ".join(told)


def drill_sections(results: Results) -> tuple[Section, ...]:
    """The verdict, the time line, all outcomes, and what was left behind."""
    record, drill = _parts(results)
    said = (headline(drill), *drill.why_failed[_MOST_FAILED:], *drill.cautions)
    examples: list[Column[OutcomeRecord]] = [
        text("requests", lambda each: OUTCOMES[each.name]),
        text("the first of them", lambda each: each.example or None),
    ]
    left = [
        (each.kind, each.what + (f" ({bytes_si(each.num_bytes)})" if each.num_bytes else ""))
        for each in drill.left
    ]
    return (
        Section("Over time", _charts(drill), "first", "answer"),
        Section("", (*said, _outcomes(drill), _facts(drill)), chapter="answer"),
        Section(
            "What was wrong",
            (Table.of("", examples, [each for each in drill.outcomes if each.example]),)
            if any(each.example for each in drill.outcomes)
            else (),
            chapter="answer",
        ),
        Section("Left behind", (Table.facts(left),) if left else (), chapter="answer"),
        Section("Before the fault", (_before(record),), chapter="answer"),
    )


def _before(record: DeploymentRecord) -> Table:
    serving = record.serving[0]
    rows = [("requests", whole(serving.num_requests or 0))]
    rows += [("output tokens/s", figures(serving.output_tps))]
    for name in ("ttft", "tpot", "itl", "e2e"):
        found = getattr(serving, f"{name}_s")
        if found is not None and found.median is not None and found.p95 is not None:
            said = f"{figures(_MS * found.median.value)} ms median, "
            rows.append((name.upper(), f"{said}{figures(_MS * found.p95.value)} ms p95"))
    return Table.facts(rows)


def _charts(drill: DrillRecord) -> tuple[Chart, ...]:
    line, moment = drill.timeline, drill.fault
    looks = _HEALTH if drill.health.is_known else {}
    note = f"Dotted: the full rate, {figures(drill.full_tps)} tokens/s."
    if looks:
        note += " The strip at the bottom: what /health said."
    rate = over_time_chart(
        _again(drill).removesuffix("."),
        "tokens/s",
        [*zip(line.begins_s, line.tps, strict=True)],
        line.bin_s,
        colour_name="--sky",
        moment=moment,
        level=drill.full_tps,
        strips=_strips(drill),
        looks=looks,
        note=note,
    )
    scale, unit = (1.0, "s") if max(line.pause_s, default=0.0) >= 1 else (_MS, "ms")
    latency = over_time_chart(
        f"The longest wait for a token is {duration(drill.pause_s)}",
        f"longest wait, {unit}",
        [(at, scale * each) for at, each in zip(line.begins_s, line.pause_s, strict=True)],
        line.bin_s,
        colour_name="--purple",
        moment=moment,
        note="Of all requests: the longest wait for a next token until then.",
    )
    return rate, latency


def _strips(drill: DrillRecord) -> list[Strip]:
    """Answers of `/health`, from one to the next."""
    health = drill.health
    if not health.is_known:
        return []
    ends = [*health.asked_s[1:], drill.observed_s]
    found: list[Strip] = []
    for begin_s, end_s, status in zip(health.asked_s, ends, health.statuses, strict=True):
        label = "200" if status == 200 else "another status" if status else "no answer"
        if found and found[-1].label == label:
            found[-1] = Strip(found[-1].begin_s, end_s, label)
        else:
            found.append(Strip(begin_s, end_s, label))
    return _within(found, drill.timeline.begins_s)


def _within(strips: Sequence[Strip], begins_s: Sequence[float]) -> list[Strip]:
    since_s = begins_s[0] if begins_s else 0.0
    return [
        Strip(max(each.begin_s, since_s), each.end_s, each.label)
        for each in strips
        if each.end_s > since_s
    ]
