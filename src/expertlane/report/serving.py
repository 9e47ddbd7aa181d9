"""Throughput and latency under load, of an engine or a simulation, and the bottleneck."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from expertlane.report.document import Answer, Column, Section, Table, Words, number, text
from expertlane.report.loads import (
    NAME_COLUMNS,
    LoadPoint,
    Note,
    answer,
    best_of,
    headline,
    is_on_cpus,
    per_device,
    places,
    served,
    whose,
)
from expertlane.report.numbers import (
    bytes_si,
    counted,
    figures,
    likely,
    low_high,
    low_high_ms,
    milliseconds,
    percent,
    shortened,
    times,
    whole,
    with_bounds,
)
from expertlane.report.setup import cautions, how_judged
from expertlane.report.speed import FACTS, HOW_TO_READ_FACTS, IN_ALL, causes, over_floor
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import (
    DeploymentRecord,
    PoolRecord,
    StepsRecord,
)
from expertlane.results.results import Results
from expertlane.results.serving_record import ServingRecord, SLOResult
from expertlane.spec.names import Phase

_NARROW = 0.05  # share of the time; less is not worth a sentence
_NUM_CAUSES = 2  # causes of a phase in the answer
_FEW = 20  # requests
_UNSURE = 0.2  # extrapolated share of the time, from which on a sentence says so


def _named(results: Results) -> tuple[Column[LoadPoint], ...]:
    """Columns that tell loads apart."""
    return (
        text(whose(results), lambda each: each.name, "measured"),
        text("load", lambda each: each.load),
    )


def throughput(results: Results) -> Table:
    """Requests and tokens a second under each load."""
    found = served(results)
    one_layout = len(results.deployments) == 1
    columns: tuple[Column[LoadPoint], ...] = (
        *_named(results),
        number("requests", lambda each: each.serving.num_requests, whole),
        number("output", lambda each: each.serving.output_tps, figures),
        number("low–high", lambda each: each.serving.output_tps, low_high, "projected"),
        number("output per device", per_device, figures, "projected"),
        number("total", lambda each: each.serving.total_tps, figures),
        number("prefill", lambda each: each.serving.prefill_tps, figures, "measured"),
        number("requests/s", lambda each: each.serving.requests_per_s, figures),
    )
    return Table.of("", columns[one_layout:], found, results.deployments[0].source)


class _Objective(NamedTuple):
    of: LoadPoint
    result: SLOResult


def objectives(results: Results) -> Iterator[Words]:
    """Every objective under each load, and goodput."""
    found = [each for each in served(results) if each.serving.slos]
    if not found:
        return
    rows = [_Objective(each, result) for each in found for result in each.serving.slos]
    columns: tuple[Column[_Objective], ...] = (
        *(each.of(lambda row: row.of) for each in _named(results)),
        text("objective", lambda row: row.result.slo),
        number("ms", lambda row: row.result.value, milliseconds),
        number("low–high", lambda row: row.result.value, low_high_ms, "projected"),
        text("", lambda row: "met" if row.result.is_met else "missed"),
    )
    goodput: tuple[Column[LoadPoint], ...] = (
        *_named(results),
        number("goodput, requests/s", lambda each: each.serving.goodput, figures),
        number("low–high", lambda each: each.serving.goodput, low_high, "projected"),
        number("of requests", lambda each: likely(each.serving.good_share or 0), percent),
    )
    source = results.deployments[0].source
    yield Table.of("Objectives", columns, rows, source)
    yield Table.of("Goodput", goodput, found, source)
    yield (
        "A request is good if its own latencies are within all limits; of ITL its own statistic, "
        "over its tokens."
    )


def cost(results: Results) -> Iterator[Words]:
    """Dollars for a million tokens under each load."""
    price = results.question.get("price")
    if price is None:
        return
    columns: tuple[Column[LoadPoint], ...] = (
        *_named(results),
        number("output tokens", lambda each: each.serving.usd_per_million_output, figures),
        number("low–high", lambda each: each.serving.usd_per_million_output, low_high, "projected"),
        number("all tokens", lambda each: each.serving.usd_per_million_total, figures),
    )
    of = "for the machine" if is_on_cpus(results) else "for each of a deployment's devices"
    of = "for the server" if results.deployments[0].layout is None else of
    yield Table.of("Dollars per million", columns, served(results), results.deployments[0].source)
    yield f"At ${price:g} an hour {of}."


_SUMMARY: tuple[Column[Summary], ...] = (
    number("mean", lambda each: each.mean, milliseconds),
    number("median", lambda each: each.median, milliseconds),
    number("low–high", lambda each: each.median, low_high_ms, "projected"),
    number("p95", lambda each: each.p95, milliseconds),
    number("low–high", lambda each: each.p95, low_high_ms, "projected"),
    number("p99", lambda each: each.p99, milliseconds, "measured"),
)


class _Latency(NamedTuple):
    of: LoadPoint | None  # named in its first row alone
    name: str
    seconds: Summary | None


def latency(results: Results) -> Table:
    """TTFT, TPOT, ITL and E2E of every load."""
    rows = [
        _Latency(each if name == "TTFT" else None, name, seconds)
        for each in served(results)
        for name, seconds in (
            ("TTFT", each.serving.ttft_s),
            ("TPOT", each.serving.tpot_s),
            ("ITL", each.serving.itl_s),
            ("E2E", each.serving.e2e_s),
        )
        if seconds or name != "ITL"
    ]
    of_load: Column[_Latency] = text("load", lambda row: row.of.load if row.of else "")
    is_alone = results.kind == "simulation" and len(served(results)) == 1
    columns: tuple[Column[_Latency], ...] = (
        text(whose(results), lambda row: row.of.name if row.of else "", "measured"),
        *(() if is_alone else (of_load,)),
        text("", lambda row: row.name),
        *(each.of(lambda row: row.seconds) for each in _SUMMARY),
    )
    return Table.of("", columns, rows, results.deployments[0].source)


def bench(results: Results) -> tuple[Section, ...]:
    """Sections of loads on an engine."""
    return (
        Section("Verdict", (headline(results), *_scaling(results)), "top", "answer"),
        Section("", tuple(cautions(results)), "top", "sure"),
        *by_load(results),
    )


def by_load(results: Results) -> tuple[Section, ...]:
    """Measured throughput, latency, objectives and cost of each load."""
    return (
        Section("Throughput, tokens/s (measured)", (throughput(results),), "top", "loads"),
        Section("Latency, ms (measured)", (latency(results),), chapter="loads"),
        Section("Objectives and goodput (measured)", tuple(objectives(results)), "top", "loads"),
        Section("Cost (measured)", tuple(cost(results)), chapter="loads"),
    )


def bench_answer(results: Results) -> Answer:
    """The best load, what a larger one brings, and every load's numbers."""
    machine, best = results.measured_on, best_of(served(results))
    where = counted(machine.num_ranks, "rank")
    if is_on_cpus(results):
        where += f" on {counted(machine.num_cores, 'core')}"
    num = best.serving.num_requests or 0
    slowest = ", so that p95 is about the slowest" if num < _FEW else ""
    notes = [
        ("Confidence", f"one run of {counted(num, 'request')} per load, not repeated{slowest}")
    ]
    return answer(
        results,
        f"{shortened(results.question['model'], NAME_COLUMNS)} | {where}",
        " ".join(_scaling(results)),
        (),
        [*notes, *_noted(cautions(results))],
    )


def _scaling(results: Results) -> Iterator[str]:
    """Gain of the largest batch over the one before, in the best layout."""
    loads = [each for each in best_of(served(results)).record.serving if each.batch is not None]
    if len(loads) < 2:
        return
    before, last = sorted(loads, key=lambda each: each.batch or 0)[-2:]
    factor = last.output_tps.value / before.output_tps.value
    wait = "TPOT", before.tpot_s, last.tpot_s
    if before.tpot_s is None or last.tpot_s is None:
        wait = "TTFT", before.ttft_s, last.ttft_s
    name, *of_loads = wait
    first, second = (each.median.value if each and each.median else 0.0 for each in of_loads)
    if not first:
        return
    yield (
        f"From batch {before.batch:,} to {last.batch:,} throughput rises {times(factor)}, {name} "
        f"{times(second / first)}."
    )


# Simulation: one deployment.


def phases_of(record: DeploymentRecord) -> list[tuple[str, StepsRecord]]:
    """Steps by phase, from the pool for that phase."""
    other = {Phase.PREFILL: "decode", Phase.DECODE: "prefill"}
    return [(str(each.phase), each) for each in record.steps if each.pool != other[each.phase]]


def simulation(results: Results) -> tuple[Section, ...]:
    """Throughput and latency of all loads, and what limits the best one."""
    record = results.deployments[0]
    phases, pools = phases_of(record), record.pools
    asked = results.question["workload"]
    of = "" if len(record.serving) == 1 else f" at {best_of(served(results)).load}"
    return (
        Section("What limits it", tuple(limits(results)), "top", "answer"),
        Section("", tuple(_doubts(results)), "top", "sure"),
        Section(
            "Throughput and latency (projected)",
            (
                f"Prompts of {asked['prompt_len']} and outputs of {asked['output_len']} tokens. "
                "Output, total: tokens/s. Latency is in ms.",
                throughput(results),
                latency(results),
                *objectives(results),
                *cost(results),
            ),
            "top",
            "loads",
        ),
        Section(
            f"Where the time goes{of}",
            (
                *causes("", phases),
                Table.across("Steps", (*_COUNTS, IN_ALL, *FACTS), phases),
                "Mean over ranks and steps; steps that contain a prompt count as prefill. Reads: "
                "operations bound by memory bandwidth. Waiting: until the last rank of a group "
                f"arrives; exposed: what that rank itself waits. {HOW_TO_READ_FACTS}",
            ),
            chapter="why",
        ),
        Section(
            f"Memory per rank (the fullest){of}",
            (
                Table.across("", MEMORY, [(_pool_name(record, pool), pool) for pool in pools]),
                "Sequences: in the whole pool. The KV cache is no larger than this load can use.",
            ),
            chapter="setup",
        ),
    )


def simulation_answer(results: Results, setting: str) -> Answer:
    """The best load, what limits it, and every load's numbers.

    Args:
        setting: the deployment and its cluster, in words.
    """
    record = results.deployments[0]
    phases = phases_of(record)
    total_s = sum(step.wall_s.value for _, step in phases)
    name, step = max(phases, key=lambda named: named[1].wall_s.value)
    cause, share = step.largest
    limited = f"is limited by {cause} ({percent(share)})."
    why = f"{name.capitalize()} {limited}"
    if len({each.pool for _, each in phases}) == 1:  # pools run side by side
        taken = percent(step.wall_s.value / total_s)
        why = f"{name.capitalize()} takes {taken} of the steps' time; it {limited}"
    columns: tuple[Column[tuple[str, StepsRecord]], ...] = (
        text("step", lambda named: named[0]),
        number("ms", lambda named: named[1].round_s, milliseconds),
        number("low–high", lambda named: named[1].round_s, low_high_ms),
        number("floor", lambda named: named[1].floor_s, milliseconds),
        number("× floor", lambda named: over_floor(named[1]), times),
        text("largest causes", lambda named: _largest_causes(named[1])),
    )
    at = best_of(served(results)).load
    table = Table.of(f"Where the time goes at {at}, mean of a step", columns, phases)
    notes = [
        *_noted(_held_back(results, record)),
        *_queues(record.serving),
        *_sampling(record.best_load),
        ("Accuracy", _firmness(results, total_s)),
        *_noted(cautions(results)),
    ]
    return answer(results, setting, why, (table,), notes)


def _largest_causes(step: StepsRecord) -> str:
    largest = sorted(step.shares.items(), key=lambda item: -item[1])[:_NUM_CAUSES]
    return ", ".join(f"{cause} {percent(share)}" for cause, share in largest if share > _NARROW)


def _firmness(results: Results, total_s: float) -> str:
    """Error of such projections, and the evidence behind the times."""
    phases = phases_of(results.deployments[0])

    def share(part: Callable[[StepsRecord], float]) -> float:
        return sum(part(each) * each.wall_s.value for _, each in phases) / total_s

    bound = share(lambda step: step.basis_shares.get("bound", 0.0))
    beyond = share(lambda step: step.extrapolated_share or 0.0)
    return (
        f"{how_judged(results)} {percent(1 - bound)} of the time rests on measurements, the rest "
        f"on datasheets; {percent(beyond)} lies outside measured sizes"
        + (": use the range, not the value" if beyond > _UNSURE else "")
    )


_TOLD = (("TTFT mean", "ttft.mean"), ("p95", "ttft.p95"))


def _queues(loads: Iterable[ServingRecord]) -> Iterator[Note]:
    """The rates at which more arrive than are served, the lowest in full."""
    found = {
        each.rate: each.requests_per_s
        for each in loads
        if each.rate is not None and each.sample and not each.ttft_s and each.requests_per_s
    }
    rates = [(rate, found[rate]) for rate in sorted(found)]
    if rates:
        (arrive, served), *others = rates
        also = f"; so it does at {', '.join(f'{rate:g}' for rate, _ in others)}" if others else ""
        yield (
            "Load",
            f"{arrive:g} requests/s arrive, {figures(served)} are served: the queue grows without "
            f"end{also}",
        )


def _sampling(serving: ServingRecord) -> Iterator[Note]:
    """Uncertainty of the sample: how far a longer one of the same load might differ."""
    sample = serving.sample
    if sample is None:
        return
    parts = []
    if "output_tps" in sample.intervals:
        low, high = sample.intervals["output_tps"]
        parts.append(f"tokens/s ±{percent((high - low) / 2 / serving.output_tps.value)}")
    for name, key in _TOLD:
        if key in sample.intervals:
            ends = dict.fromkeys(milliseconds(each) for each in sample.intervals[key])
            parts.append(f"{name} {'–'.join(ends)} ms")
    num = counted(serving.num_requests or 0, "first token")
    yield "Sample", f"{num} in the steady state; 90 % intervals: {', '.join(parts)}"


def _noted(sentences: Iterable[str]) -> list[Note]:
    return [("Note", each.removesuffix(".")) for each in sentences]


_COUNTS: tuple[Column[StepsRecord], ...] = (
    number("steps", lambda step: step.num_steps, whole),
    number("tokens per step", lambda step: step.num_tokens / step.num_steps, figures),
    number("sequences per step", lambda step: step.num_seqs / step.num_steps, figures),
)
MEMORY: tuple[Column[PoolRecord], ...] = (
    number("weights", lambda pool: pool.weight_bytes, bytes_si),
    number("KV cache", lambda pool: pool.kv_bytes, bytes_si),
    number("activations of the largest step", lambda pool: pool.activation_bytes, bytes_si),
    number("KV per full-length sequence", lambda pool: pool.sequence_bytes, bytes_si),
    number("memory limit", lambda pool: pool.allowed_bytes, bytes_si),
    number("full-length sequences that fit", lambda pool: pool.num_resident, whole),
    number("peak concurrency", lambda pool: pool.most_running, whole),
    number("preemptions", lambda pool: pool.num_preemptions, whole),
)


def _pool_name(record: DeploymentRecord, pool: PoolRecord) -> str:
    if pool.role == "both":
        return ""
    return f"{pool.role} ({record.prefill_layout if pool.role == 'prefill' else record.layout})"


def limits(results: Results) -> Iterator[str]:
    """The bottlenecks, with the size of each; the largest first."""
    record = results.deployments[0]
    phases = phases_of(record)
    total_s = sum(step.wall_s.value for _, step in phases)
    busiest = max(phases, key=lambda named: named[1].wall_s.value)
    for name, step in sorted(phases, key=lambda named: named is not busiest):
        cause, share = step.largest
        without = milliseconds(step.round_s.value * (1 - share))
        yield (
            f"{name.capitalize()} is limited by {cause}: {percent(share)} of the time. A step "
            f"takes {ms_with_bounds(step.round_s)} ms on average, {times(over_floor(step) or 0)} "
            f"its floor of {milliseconds(step.floor_s or 0)} ms"
            + (f"; without {cause} it would take {without} ms." if share > _NARROW else ".")
        )
    if len(phases) > 1:
        name, step = busiest
        yield f"{percent(step.wall_s.value / total_s)} of the steps' time is {name}."
    yield from _held_back(results, record)


def _doubts(results: Results) -> Iterator[str]:
    """Cautions on the numbers, and the share that lies outside measured sizes."""
    yield from cautions(results)
    phases = phases_of(results.deployments[0])
    total_s = sum(step.wall_s.value for _, step in phases)
    unsure = sum((step.extrapolated_share or 0) * step.wall_s.value for _, step in phases) / total_s
    if unsure > _UNSURE:
        yield (
            f"{percent(unsure)} of the time lies outside the sizes that were measured: use the "
            "bounds, not the values."
        )


def ms_with_bounds(estimate: Estimate) -> str:
    """`6.40 (3.20–12.8)` milliseconds, from seconds."""
    return with_bounds(estimate * 1e3)


_NEARLY = 0.95  # of the possible sequences: fewer in a decode pool show that prefill feeds it less


def _held_back(results: Results, record: DeploymentRecord) -> Iterator[str]:
    wanted, layout = record.best_load.batch, record.known_layout
    slots = layout.dp * layout.replicas * results.question["serving"]["max_num_seqs"]
    for pool in record.pools:
        running, num_fitting = pool.most_running or 0, pool.num_resident or 0
        if pool.role == "prefill" or wanted is None or running >= wanted:
            continue
        is_fed_less = pool.role == "decode" and running < _NEARLY * min(wanted, slots, num_fitting)
        if is_fed_less or num_fitting < min(wanted, slots) or slots < wanted:
            lacking = "--max-num-seqs" if slots <= num_fitting else "memory"
            if is_fed_less:
                lacking = "prefill"
            said = places(record.best_load, wanted, f", limited by {lacking}")
            yield (
                f"{said[0].upper()}{said[1:]}."
                if said
                else f"Concurrency reached {running:,} of {wanted:,}, limited by {lacking}."
            )
    num_idle = results.projected_for.num_devices - record.num_ranks
    if num_idle:
        yield f"{counted(num_idle, 'device')} of the cluster stay idle."
