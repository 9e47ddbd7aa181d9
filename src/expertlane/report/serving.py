"""Throughput and latency of requests: measured on an engine, and of a simulation."""

from collections.abc import Iterator
from typing import NamedTuple

from expertlane.report.document import Column, Section, Table, number, text
from expertlane.report.numbers import (
    bytes_si,
    counted,
    figures,
    low_high,
    low_high_ms,
    milliseconds,
    percent,
    times,
    whole,
)
from expertlane.report.setup import cautions
from expertlane.report.time_spent import FACTS, HOW_TO_READ_FACTS, IN_ALL, causes, over_floor
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import DeploymentRecord, PoolRecord, ServingRecord, StepsRecord
from expertlane.results.results import Results
from expertlane.spec.names import Phase

_NARROW = 0.05  # of the time; less is not worth a sentence
_UNSURE = 0.2  # of the time that is extrapolated, from where on a sentence says so


class Served(NamedTuple):
    """A deployment under one load."""

    record: DeploymentRecord
    serving: ServingRecord

    @property
    def load(self) -> str:
        """`batch 8` or `2.5 req/s`."""
        batch = self.serving.batch
        return f"{self.serving.rate:g} req/s" if batch is None else f"batch {batch:,}"


def served(results: Results) -> list[Served]:
    """Every load on every deployment."""
    return [Served(record, each) for record in results.deployments for each in record.serving]


def fastest(results: Results) -> str:
    """What gave most output, in a sentence."""
    best = max(served(results), key=lambda each: each.serving.output_tps.value)
    mean = best.serving.tpot_s.mean if best.serving.tpot_s else None
    tpot = "" if mean is None else f", TPOT {milliseconds(mean)} ms on average"
    return (
        f"Most output: {figures(best.serving.output_tps)} tokens/s with {best.record.layout} at "
        f"{best.load}{tpot}."
    )


def throughput(results: Results) -> Table:
    """Requests and tokens a second, as measured."""
    columns: tuple[Column[Served], ...] = (
        text("layout", lambda each: each.record.layout),
        text("load", lambda each: each.load),
        number("requests", lambda each: each.serving.num_requests, whole),
        number("output", lambda each: each.serving.output_tps, figures),
        number("total", lambda each: each.serving.total_tps, figures),
        number("prefill", lambda each: each.serving.prefill_tps, figures),
        number("requests/s", lambda each: each.serving.requests_per_s, figures),
    )
    return Table.of("", columns, served(results))


def rates(record: DeploymentRecord) -> Table:
    """Requests and tokens a second of one load, each with its bounds."""
    serving = record.serving[0]
    rows = {
        "output tokens/s": serving.output_tps,
        "output tokens/s per device": serving.output_tps / record.num_ranks,
        "total tokens/s": serving.total_tps,
        "requests/s": serving.requests_per_s,
    }
    columns: tuple[Column[str], ...] = (
        text("", str),
        number("likely", rows.get, figures),
        number("low–high", rows.get, low_high),
    )
    return Table.of("", columns, rows)


_SUMMARY: tuple[Column[Summary], ...] = (
    number("mean", lambda each: each.mean, milliseconds),
    number("median", lambda each: each.median, milliseconds),
    number("low–high", lambda each: each.median, low_high_ms, "projected"),
    number("p95", lambda each: each.p95, milliseconds),
    number("low–high", lambda each: each.p95, low_high_ms, "projected"),
    number("p99", lambda each: each.p99, milliseconds, "measured"),
)


class _Latency(NamedTuple):
    of: Served | None  # named in its first row alone
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
    columns: tuple[Column[_Latency], ...] = (
        text("layout", lambda row: row.of.record.layout if row.of else "", "measured"),
        text("load", lambda row: row.of.load if row.of else "", "measured"),
        text("", lambda row: row.name),
        *(each.of(lambda row: row.seconds) for each in _SUMMARY),
    )
    return Table.of("", columns, rows, results.deployments[0].source)


def bench(results: Results) -> tuple[Section, ...]:
    """What a load on an engine gave."""
    return (
        Section("Verdict", (fastest(results), *cautions(results)), "top"),
        Section("Throughput, tokens/s (measured)", (throughput(results),), "top"),
        Section("Latency, ms (measured)", (latency(results),)),
    )


# Simulation: one deployment.


def phases_of(record: DeploymentRecord) -> list[tuple[str, StepsRecord]]:
    """The steps of each phase in the pool that is for it, by the phase's name."""
    other = {Phase.PREFILL: "decode", Phase.DECODE: "prefill"}
    return [(str(each.phase), each) for each in record.steps if each.pool != other[each.phase]]


def simulation(results: Results) -> tuple[Section, ...]:
    """Throughput and latency, and what limits them."""
    record = results.deployments[0]
    phases, pools = phases_of(record), record.pools
    load = results.question["workload"]
    requests = counted(record.serving[0].num_requests or 0, "request")
    return (
        Section("What limits it", tuple(limits(results)), "top"),
        Section(
            "Throughput and latency (projected)",
            (
                f"{served(results)[0].load}: {requests}, prompts of {load['prompt_len']} and "
                f"outputs of {load['output_len']} tokens. Latency is in ms.",
                rates(record),
                latency(results),
            ),
            "top",
        ),
        Section(
            "Where the time goes",
            (
                *causes("", phases),
                Table.across("Steps", (*_COUNTS, IN_ALL, *FACTS), phases),
                "Mean over ranks and steps; steps that contain a prompt count as prefill. Reads: "
                "operations bound by memory bandwidth. Waiting: until the last rank of a group "
                f"arrives; exposed: what that rank itself waits. {HOW_TO_READ_FACTS}",
            ),
        ),
        Section(
            "Memory per rank (the fullest)",
            (
                Table.across("", MEMORY, [(_pool_name(record, pool), pool) for pool in pools]),
                "Sequences: in the whole pool. The KV cache is no larger than this load can use.",
            ),
        ),
    )


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


def feels(results: Results) -> str:
    """Throughput, latency, and what limits them, in a sentence."""
    record = results.deployments[0]
    serving, phases = record.serving[0], phases_of(record)
    medians = "".join(
        f"{name} {milliseconds(seconds.median)} ms, "
        for name, seconds in (("TPOT", serving.tpot_s), ("TTFT", serving.ttft_s))
        if seconds and seconds.median
    )
    name, step = max(phases, key=lambda named: named[1].wall_s.value)
    cause, share = step.largest
    return (
        f"{figures(serving.output_tps)} output tokens/s, {medians.removesuffix(', ')} (medians); "
        f"most of the time is {name}, limited by {cause} ({percent(share)} of it)."
    )


def limits(results: Results) -> Iterator[str]:
    """What holds the deployment back, and by how much; the main thing first."""
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
    yield from cautions(results)
    unsure = sum((step.extrapolated_share or 0) * step.wall_s.value for _, step in phases) / total_s
    if unsure > _UNSURE:
        yield (
            f"{percent(unsure)} of the time lies outside the sizes that were measured: use the "
            "bounds, not the values."
        )


def ms_with_bounds(estimate: Estimate) -> str:
    """`6.40 (3.20–12.8)`, of seconds."""
    return f"{milliseconds(estimate)} ({low_high_ms(estimate)})"


def _held_back(results: Results, record: DeploymentRecord) -> Iterator[str]:
    wanted, layout = record.serving[0].batch, record.layout
    slots = layout.dp * layout.replicas * results.question["serving"]["max_num_seqs"]
    for pool in record.pools:
        running, room = pool.most_running or 0, pool.num_resident or 0
        if (
            pool.role != "prefill"
            and wanted is not None
            and running < wanted
            and (room < min(wanted, slots) or slots < wanted)
        ):
            lacking = "--max-num-seqs" if slots <= room else "memory"
            yield (f"Concurrency reached {running:,} of {wanted:,}, limited by {lacking}.")
    num_idle = results.projected_for.num_devices - record.num_ranks
    if num_idle:
        yield f"{counted(num_idle, 'device')} of the cluster stay idle."
