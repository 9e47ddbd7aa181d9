"""Throughput and latency of requests under a load: part of a deployment's record."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

from expertlane.results.engine_record import EngineRecord
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.hardware import KnownError
from expertlane.spec.ranges import Strict
from expertlane.spec.workload import SLO

KEPT = 1.001  # times a limit: values of steady states are equal to that


@dataclass(frozen=True)
class SLOResult(Strict):
    """An objective, and the value reached.

    Attributes:
        value: value of its statistic; None where no request has such a latency, and where it counts
            the wait in a queue that would grow without end.
    """

    slo: SLO
    value: Estimate | None

    @property
    def is_endless(self) -> bool:
        """True if a queue grows without end: else every request has such a latency."""
        return self.value is None and self.slo.counts_wait

    @property
    def is_met(self) -> bool:
        """True if the likely value is within the limit, to 0.1 %."""
        return self.excess <= KEPT

    @property
    def excess(self) -> float:
        """The value over its limit; 0 where no request has one, infinite where a queue grows."""
        if self.value is None:
            return inf if self.is_endless else 0.0
        return self.value.value / self.slo.limit_s


@dataclass(frozen=True)
class FailureRecord(Strict):
    """Requests that failed in one way.

    Attributes:
        name: `HTTP 429`, `timeout`, `stream ended early`…
        message: error text of the first of them.
    """

    name: str
    num_requests: int
    message: str = ""


@dataclass(frozen=True)
class RequestsRecord(Strict):
    """The requests that a server answered, in the order in which they were due; [num_requests].

    Attributes:
        rounds: repetition of each, from 1.
        numbers: index of each in the load.
        due_s: due time since the round's first request.
        late_s: time from when it was due to when it was sent.
        prompt_lens, output_lens: tokens by the server's counts.
        num_events: events that brought tokens.
    """

    rounds: tuple[int, ...] = field(repr=False)
    numbers: tuple[int, ...] = field(repr=False)
    due_s: tuple[float, ...] = field(repr=False)
    late_s: tuple[float, ...] = field(repr=False)
    ttft_s: tuple[float, ...] = field(repr=False)
    e2e_s: tuple[float, ...] = field(repr=False)
    prompt_lens: tuple[int, ...] = field(repr=False)
    output_lens: tuple[int, ...] = field(repr=False)
    num_events: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class ClientRecord(Strict):
    """A client's own numbers of a load that it put on a server.

    Attributes:
        num_rounds: repetitions, whose requests are taken together.
        num_failed: requests without a whole answer; they count in no latency, and are never good.
        num_unsent: requests that were not sent or not waited for, as the load was ended.
        why_ended: why the load ended early; empty where it did not.
        num_events: events that brought tokens; fewer than tokens where one brings several.
        num_uncounted: answers whose tokens the server did not count: each event counts as one.
        late_s: time from when requests were due to when they were sent.
        cpu_s: CPU time of the client.
        cpu_share: share of one core that it used.
        asked_prompt_len, asked_output_len: mean lengths that were asked for.
    """

    num_rounds: int
    num_failed: int
    num_unsent: int
    failures: tuple[FailureRecord, ...]
    why_ended: str
    num_events: int
    num_uncounted: int
    late_s: Summary | None
    cpu_s: float
    cpu_share: float
    asked_prompt_len: float
    asked_output_len: float
    requests: RequestsRecord


Interval = tuple[float, float]


@dataclass(frozen=True)
class SampleRecord(Strict):
    """A sample of a load in its steady state, on which the record is based.

    Attributes:
        num_decoding, num_waiting: requests after and before their first token, on average.
        offered: requests a second that arrive; more than are served where a queue would grow
            without end. None in a closed loop.
        intervals: 90 % intervals that a sample of this length leaves of likely values: of
            `output_tps`, and by `metric.statistic` as objectives have it, in seconds.
    """

    num_decoding: float
    num_waiting: float
    offered: float | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class ServingRecord(Strict):
    """Throughput and latency under one load.

    Attributes:
        batch: concurrency, requests kept unfinished; None in an open loop.
        rate: requests that arrive a second; None in a closed loop, and where they arrive as
            recorded in a file.
        num_running: planned: sequences that run at once, over the whole system. Simulated: those of
            a closed load that has more.
        place_wait_s: what a request of a closed load waits for one of `num_running` places, on
            average, as all places are taken; by Little's law. Planned TTFT is from when it has one,
            simulated TTFT includes it. None where there is a place for each.
        wall_s: from the first request's due time to the last token.
        output_tps, total_tps: output tokens a second, and prompt and output tokens.
        prefill_tps: prompt tokens a second while nothing is decoded. Measured: over the time until
            every request has its first token, decodes in between included; None unless all
            requests were there at once.
        ttft_s: from a request's due time to its first token; None where a queue would grow without
            end.
        tpot_s: mean time of a token after the first, of each request; None where none has two.
        num_cached_tokens: prompt tokens that were not computed, as the prefix cache had them.
        itl_s: all times between successive tokens of a request.
        e2e_s: from a request's due time to its last token.
        transfer_s: time of a prompt's KV transfer.
        basis: evidence for most of it: measured, fitted or bound; None where it was measured here.
        slos: the objectives that were asked for.
        goodput: requests a second that are themselves within the limits of all `slos`; None
            without any.
        good_share: share of such requests.
        client: the client's numbers, where a server was measured from outside.
        engine: what that server's own metrics tell; None where it has none.
        sample: the sample of a steady state; None where all requests were served to the last.
        usd_per_million_output, usd_per_million_total: dollars for a million output tokens, or
            prompt and output tokens, by the price of devices; None without one.
    """

    output_tps: Estimate
    batch: int | None = None
    rate: float | None = None
    num_running: int | None = None
    place_wait_s: Estimate | None = None
    num_requests: int | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_preemptions: int | None = None
    num_cached_tokens: int | None = None
    wall_s: Estimate | None = None
    total_tps: Estimate | None = None
    prefill_tps: Estimate | None = None
    requests_per_s: Estimate | None = None
    ttft_s: Summary | None = None
    tpot_s: Summary | None = None
    itl_s: Summary | None = None
    e2e_s: Summary | None = None
    transfer_s: Estimate | None = None
    basis: str | None = None
    slos: tuple[SLOResult, ...] = ()
    goodput: Estimate | None = None
    good_share: Estimate | None = None
    usd_per_million_output: Estimate | None = None
    usd_per_million_total: Estimate | None = None
    client: ClientRecord | None = None
    engine: EngineRecord | None = None
    sample: SampleRecord | None = None

    @property
    def keeps_slos(self) -> bool:
        """True if all objectives are met."""
        return all(each.is_met for each in self.slos)

    def bounded_by(self, known: KnownError) -> "ServingRecord":
        """The record with bounds of at least the known error of such projections.

        Exactly that error where the same kind of serving was measured.
        """
        alone = known.is_own_kind
        output = (self.output_tps, self.total_tps, self.requests_per_s, self.goodput)
        output_tps, total_tps, requests_per_s, goodput = (
            each and each.bounded_by(known.output, alone=alone) for each in output
        )
        assert output_tps is not None, "every record has it"
        if self.rate is not None and self.sample is not None and self.ttft_s is not None:
            # What is served at a rate is what arrives.
            output_tps, total_tps = self.output_tps, self.total_tps
            requests_per_s, goodput = self.requests_per_s, self.goodput
        later = known.tpot
        ttft = None if self.ttft_s is None else self.ttft_s.mean
        e2e = None if self.e2e_s is None else self.e2e_s.mean
        if ttft is not None and e2e is not None:
            first = min(ttft.value / e2e.value, 1.0)
            later = (
                first * known.ttft[0] + (1 - first) * known.tpot[0],
                first * known.ttft[1] + (1 - first) * known.tpot[1],
            )
        factors = {"ttft": known.ttft, "tpot": known.tpot, "itl": known.tpot, "e2e": later}

        def of(metric: str, summary: Summary | None) -> Summary | None:
            return summary and summary.bounded_by(factors[metric], alone=alone)

        return replace(
            self,
            output_tps=output_tps,
            total_tps=total_tps,
            requests_per_s=requests_per_s,
            goodput=goodput,
            ttft_s=of("ttft", self.ttft_s),
            tpot_s=of("tpot", self.tpot_s),
            itl_s=of("itl", self.itl_s),
            e2e_s=of("e2e", self.e2e_s),
            slos=tuple(
                replace(
                    each,
                    value=each.value
                    and each.value.bounded_by(factors[each.slo.metric], alone=alone),
                )
                for each in self.slos
            ),
        )


def is_served(record: ServingRecord | None) -> bool:
    """True if no queue grows without end and all objectives are met; true for None."""
    return record is None or (record.ttft_s is not None and record.keeps_slos)


def with_places(
    record: ServingRecord, num_running: int, num_asked: int, requests_per_s: Estimate
) -> ServingRecord:
    """The record of a closed load with more concurrent requests than run, with their wait.

    By Little's law a request stays `num_asked / requests_per_s` seconds in all, and runs for
    `num_running / requests_per_s` of them; it waits for the rest.
    """
    wait_s = None if num_running >= num_asked else (num_asked - num_running) / requests_per_s
    return replace(record, num_running=num_running, place_wait_s=wait_s)


def best_load(serving: Sequence[ServingRecord]) -> ServingRecord:
    """The load with most output that meets all objectives; if none does, with most goodput.

    Of loads without any goodput, the one that exceeds its limits by the smallest factor.
    """

    def worth(each: ServingRecord) -> tuple[bool, float, float]:
        if each.keeps_slos or each.goodput is None:
            return True, each.output_tps.value, 0.0
        return False, each.goodput.value, -max(slo.excess for slo in each.slos)

    return max(serving, key=worth)
