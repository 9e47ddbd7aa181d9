"""Records from finished steps, or from the requests of a load: speed, counts, time by cause."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, sqrt
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from expertlane.results.estimate import NORMAL, Estimate, Summary
from expertlane.results.hardware import MachinePeak
from expertlane.results.record import Bottleneck, CriticalPath, StepsRecord
from expertlane.results.serving_record import (
    Interval,
    ServingRecord,
    SLOResult,
)
from expertlane.results.step_record import RankRecord, StepRecord, by_pipeline_stage
from expertlane.results.traffic import traffic_record
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Stage
from expertlane.spec.workload import SLO, LatencyMetric, Statistic

# Below this share of the wall time a rank that waits less than the others is not called slow.
STRAGGLER_SHARE = 0.05

# Stages in which all ranks of a pipeline stage meet.
_MEETINGS = [Stage.DISPATCH, Stage.COMBINE, Stage.COLLECTIVES]
_NOT_WORK = [Stage.IDLE, Stage.SETUP]

CAUSE_OF_STAGE = {
    Stage.EMBED: Cause.HEAD,
    Stage.ATTENTION: Cause.ATTENTION,
    Stage.ROUTER: Cause.ROUTER,
    Stage.DISPATCH: Cause.DISPATCH_COMBINE,
    Stage.EXPERTS: Cause.EXPERTS,
    Stage.COMBINE: Cause.DISPATCH_COMBINE,
    Stage.COLLECTIVES: Cause.TP_COLLECTIVES,
    Stage.HAND_OVER: Cause.HAND_OVER,
    Stage.HEAD: Cause.HEAD,
}


@dataclass(frozen=True, eq=False)
class StageTime:
    """The seconds of every rank over one phase.

    Attributes:
        stage_s: [num_ranks, num_stages]; time in a stage without waiting and bubbles; in a
            communication stage it holds the transfer that nothing hid.
        waiting_s: [num_ranks]; blocked because other ranks came later.
        bubble_s: [num_ranks]; blocked in PP send/recv between pipeline stages, or idle because
            another stage was busy.
        exposed_s: seconds blocked in dispatch and combine, mean over the ranks of a pipeline
            stage, added up over stages and steps: a token passes one stage after the other.
    """

    layout: Layout
    stage_s: npt.NDArray[np.float64]
    waiting_s: npt.NDArray[np.float64]
    bubble_s: npt.NDArray[np.float64]
    exposed_s: float

    def breakdown_s(self, wall_s: float, num_rounds: int) -> dict[str, float]:
        """Seconds a round by cause, mean over ranks; their sum is the wall time of a round.

        What the ranks do not account for is `Cause.ENGINE`; what a pipeline stage has of it above
        another one, as idle time before a phase's first step and after its last, is bubble. A rank
        may still tidy up after the driver has the last token, and account for more than `wall_s`;
        it then has no such rest.
        """
        working_s = self.stage_s.copy()
        working_s[:, _NOT_WORK] = 0.0
        accounted_s = working_s.sum(axis=1) + self.waiting_s + self.bubble_s
        rest_s = np.maximum(wall_s - accounted_s, 0.0)
        layout = self.layout
        of_stage_s = rest_s.reshape(layout.replicas, layout.pp, layout.stage_size).min(axis=2)
        bubble_s = float((of_stage_s - of_stage_s.min(axis=1, keepdims=True)).mean())
        causes = dict.fromkeys(Cause, 0.0)
        for stage, cause in CAUSE_OF_STAGE.items():
            causes[cause] += float(working_s[:, stage].mean())
        causes[Cause.WAITING] = float(self.waiting_s.mean())
        causes[Cause.PIPELINE_BUBBLE] = float(self.bubble_s.mean()) + bubble_s
        causes[Cause.ENGINE] = float(rest_s.mean()) - bubble_s
        return {cause.value: seconds / num_rounds for cause, seconds in causes.items()}


def stage_time(layout: Layout, steps: Sequence[StepRecord]) -> StageTime:
    """Split the time of every rank over the steps of one phase.

    In a stage where ranks meet, a rank's blocked time less the least blocked time among those it
    meets (its tensor-parallel group for the collectives around attention, else all ranks of its
    pipeline stage), in the same wait, is waiting for others: whoever came last was blocked by the
    transfer alone. In virtual time, that is by (step, micro-batch, layer slot, stage). Idle time
    between plans is split the same way: the least of the replica is the driver's, what a pipeline
    stage has above it is bubble (it was done earlier than another stage), what a rank has above its
    stage's least is waiting.
    """
    stage_s = np.zeros((layout.world_size, len(Stage)))
    waiting_s = np.zeros(layout.world_size)
    bubble_s = np.zeros(layout.world_size)
    exposed_s = 0.0
    for step in steps:
        least_idle = min(record.blocked_s[..., Stage.IDLE].sum() for record in step.records)
        for records in by_pipeline_stage(layout, step).values():
            ranks = [record.rank for record in records]
            wall = np.stack([record.wall_s for record in records])
            blocked = np.stack([record.blocked_s for record in records])
            idle = blocked[..., Stage.IDLE].sum(axis=(1, 2))
            bubble_s[ranks] += idle.min() - least_idle
            waiting_s[ranks] += idle - idle.min()
            waiting = np.zeros_like(blocked[..., _MEETINGS])
            for position, stage in enumerate(_MEETINGS):
                for members in _meeting(layout, ranks, stage):
                    of_members = _waiting([records[member] for member in members], stage)
                    waiting[members, ..., position] = of_members
            bubble = blocked[..., Stage.HAND_OVER]
            own = wall.copy()
            own[..., _MEETINGS] -= waiting
            own[..., Stage.HAND_OVER] -= bubble
            stage_s[ranks] += own.sum(axis=(1, 2))
            waiting_s[ranks] += waiting.sum(axis=(1, 2, 3))
            bubble_s[ranks] += bubble.sum(axis=(1, 2))
            exposed = blocked[..., [Stage.DISPATCH, Stage.COMBINE]].sum(axis=(1, 2, 3))
            exposed_s += float(exposed.mean()) / layout.replicas
    return StageTime(layout, stage_s, waiting_s, bubble_s, exposed_s)


def _waiting(records: Sequence[RankRecord], stage: Stage) -> npt.NDArray[np.float64]:
    """[num_records, num_micro_batches, num_slots]; blocked longer than who was least, in a stage.

    Ranks that meet have the same waits in the same order; without a list of them, they are those of
    a slot together.
    """
    blocked = np.stack([record.blocked_s[..., stage] for record in records])
    waiting: npt.NDArray[np.float64] = blocked - blocked.min(axis=0)
    lists = [record.waits for record in records if record.waits is not None]
    of_stage = [each.cell % len(Stage) == stage for each in lists]
    cells = [each.cell[inside] for each, inside in zip(lists, of_stage, strict=True)]
    if len(lists) < len(records) or any(not np.array_equal(cells[0], each) for each in cells):
        return waiting
    each = np.stack([w.blocked_s[inside] for w, inside in zip(lists, of_stage, strict=True)])
    waiting = np.zeros_like(blocked)
    for of_record, longer_s in zip(waiting, each - each.min(axis=0), strict=True):
        np.add.at(of_record.reshape(-1), cells[0] // len(Stage), longer_s)
    return waiting


def _meeting(layout: Layout, ranks: list[int], stage: Stage) -> list[list[int]]:
    """Indices in `ranks` (of one pipeline stage), by groups that meet each other in `stage`."""
    if stage is not Stage.COLLECTIVES:
        return [list(range(len(ranks)))]
    groups = defaultdict(list)
    for place, rank in enumerate(ranks):
        groups[layout.coordinates(rank).dp_rank].append(place)
    return list(groups.values())


def find_bottleneck(layout: Layout, steps: StepsRecord) -> Bottleneck:
    """Name the largest cause of a measured phase, and the straggler if there is one."""
    cause, share = steps.largest
    straggler, excess_s = _straggler(layout, np.array(steps.waiting_s))
    sentence = f"{cause}, {share:.0%} of {steps.phase.value}"
    excess = excess_s / steps.wall_s.value
    if excess <= STRAGGLER_SHARE:
        return Bottleneck(steps.phase, Cause(cause), share, None, sentence)
    sentence += f"; straggler: rank {straggler}, others wait for it {excess:.0%} of the time"
    return Bottleneck(steps.phase, Cause(cause), share, straggler, sentence)


def _straggler(layout: Layout, waiting_s: npt.NDArray[np.float64]) -> tuple[int, float]:
    """The rank that waits least within its pipeline stage, and how much longer the others wait.

    Of several pipeline stages, the one where that difference is largest.
    """
    if layout.stage_size == 1:
        return 0, 0.0
    by_stage = waiting_s.reshape(-1, layout.stage_size)
    least = by_stage.min(axis=1)
    of_others = (by_stage.sum(axis=1) - least) / (layout.stage_size - 1)
    stage = int(np.argmax(of_others - least))
    rank = stage * layout.stage_size + int(by_stage[stage].argmin())
    return rank, float(of_others[stage] - least[stage])


def critical_path(layout: Layout, steps: Sequence[StepRecord]) -> CriticalPath:
    """Chain the steps of one phase through the pipeline.

    The ranks of a pipeline stage are taken to meet after every (micro-batch, layer slot, stage),
    so each of these costs the largest `cpu_s` among them. Summed per micro-batch m and pipeline
    stage s to t[m, s], with time spent waiting for a plan left out, they follow the usual
    recurrence finish[m, s] = max(finish[m - 1, s], finish[m, s - 1]) + t[m, s]. It runs on over
    the steps of a replica in the order of submission; a step begins no sooner than the last
    tokens of its own sequences are ready. Drained steps thus follow one another, and rotating
    micro-batches fill the pipeline.
    """
    total_s, step_s = 0.0, []
    for run in sorted({step.run for step in steps}):
        run_s, of_steps_s = _one_run(layout, [step for step in steps if step.run == run])
        total_s += run_s
        step_s += of_steps_s
    num_tokens = sum(step.num_tokens for step in steps)
    return CriticalPath(
        total_s=total_s,
        tps=num_tokens / total_s if total_s else 0.0,
        step_s=float(np.median(step_s)),
    )


def _one_run(layout: Layout, steps: Sequence[StepRecord]) -> tuple[float, list[float]]:
    """Seconds of a run, and of each step."""
    total_s, step_s = 0.0, []
    for replica in range(layout.replicas):
        free = [0.0] * layout.pp
        ready: dict[int, float] = {}
        of_replica = (step for step in steps if step.replica == replica)
        for step in sorted(of_replica, key=lambda step: step.submitted_s):
            begin = max((ready.get(seq, 0.0) for seq in step.seq_ids), default=0.0)
            for of_micro_batch in _stage_cpu_s(layout, step):
                finish = begin
                for pp_rank, cpu_s in enumerate(of_micro_batch):
                    finish = free[pp_rank] = max(free[pp_rank], finish) + float(cpu_s)
            ready |= dict.fromkeys(step.seq_ids, free[-1])
            step_s.append(free[-1] - begin)
        total_s = max(total_s, free[-1])
    return total_s, step_s


def _stage_cpu_s(layout: Layout, step: StepRecord) -> npt.NDArray[np.float64]:
    """[num_micro_batches, pp]; a step's critical CPU time."""
    times = np.zeros((step.num_micro_batches, layout.pp))
    for pp_rank, records in by_pipeline_stage(layout, step).items():
        largest = np.max([record.cpu_s for record in records], axis=0)
        largest[..., Stage.IDLE] = 0.0
        times[:, pp_rank] = largest.sum(axis=(1, 2))
    return times


_Counts = npt.NDArray[np.int64]
# A measured time, or a modelled one's low, likely and high [3].
TimeT = TypeVar("TimeT", float, npt.NDArray[np.float64])


def phase_record(
    layout: Layout, steps: Sequence[StepRecord], peak: MachinePeak, ranks_per_node: int
) -> StepsRecord:
    """Everything about the measured steps of one phase, of all replicas, in any order.

    Args:
        ranks_per_node: consecutive ranks that share a node.

    Raises:
        ValueError: there are no steps, or one of them carries no rank records.
    """
    speed = latency(steps)
    if not all(step.records for step in steps):
        raise ValueError("a step without rank records: its plan did not ask for them")
    time = stage_time(layout, steps)
    records = [record for step in steps for record in step.records]
    flops = _by_stage([record.flops for record in records])
    weight_bytes = _by_stage([record.weight_bytes for record in records])
    kv_bytes = sum(record.kv_bytes for record in records)
    num_read = sum(weight_bytes.values()) + kv_bytes
    wall_s, num_rounds = speed.wall_s.value, speed.num_rounds or 1
    return replace(
        speed,
        breakdown_s=time.breakdown_s(wall_s, num_rounds),
        exposed_s=time.exposed_s / num_rounds,
        hidden_share=_hidden_share(steps),
        flops_utilisation=sum(flops.values()) / wall_s / peak.gemm_flops_per_s,
        read_utilisation=num_read / wall_s / peak.read_bytes_per_s,
        flops=flops,
        weight_bytes=weight_bytes,
        num_collectives=_by_stage([record.num_collectives for record in records]),
        kv_bytes=kv_bytes,
        active_expert_share=_active_expert_share(steps),
        cpu_s_per_token=sum(record.process_cpu_s for record in records) / speed.num_tokens,
        critical_path=critical_path(layout, steps),
        stage_s={stage.label: tuple(time.stage_s[:, stage].tolist()) for stage in Stage},
        waiting_s=tuple(time.waiting_s.tolist()),
        bubble_s=tuple(time.bubble_s.tolist()),
        traffic=traffic_record(layout, first_run(steps), ranks_per_node),
    )


def first_run(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """Steps of the first repetition, which every deployment has, so that counts compare."""
    first = min((step.run for step in steps), default=0)
    return [step for step in steps if step.run == first]


def speed_of_runs(layout: Layout, steps: Sequence[StepRecord]) -> list[StepsRecord]:
    """Throughput, latency and time by cause, of each run of one phase by itself."""
    found = []
    for run in sorted({step.run for step in steps}):
        of_run = [step for step in steps if step.run == run]
        speed = latency(of_run)
        time = stage_time(layout, of_run)
        causes_s = time.breakdown_s(speed.wall_s.value, speed.num_rounds or 1)
        found.append(replace(speed, breakdown_s=causes_s))
    return found


def _hidden_share(steps: Sequence[StepRecord]) -> float | None:
    of_ranks = [r.transfers_s for step in steps for r in step.records if r.transfers_s is not None]
    in_flight_s, waited_s = np.sum(of_ranks, axis=0) if of_ranks else (0.0, 0.0)
    return float(1 - waited_s / in_flight_s) if in_flight_s else None


def latency(steps: Sequence[StepRecord]) -> StepsRecord:
    """Throughput and latency alone of the steps of one phase, in any order.

    A token's time counts from its sequence's last token, or the start of its spell of steps.

    Raises:
        ValueError: there are no steps, or no sequence took part in any.
    """
    if not any(step.seq_ids for step in steps):
        raise ValueError("no step with a sequence in it")
    wall_s, num_rounds, intervals, tps_of_runs = 0.0, 0, [], []
    for run in sorted({step.run for step in steps}):
        of_run = [step for step in steps if step.run == run]
        run_s = 0.0
        for spell in sorted({step.spell for step in of_run}):
            of_spell = [step for step in of_run if step.spell == spell]
            start_s = min(step.submitted_s for step in of_spell)
            run_s += max(step.finished_s for step in of_spell) - start_s
            tokens_s = _token_times(of_spell, start_s)
            num_rounds += max(map(len, tokens_s), default=1) - 1
            intervals += [np.diff(times) for times in tokens_s]
        wall_s += run_s
        tps_of_runs.append(sum(step.num_tokens for step in of_run) / run_s)
    of_tokens = np.concatenate(intervals)
    of_steps = [step.finished_s - step.submitted_s for step in steps]
    num_tokens = sum(step.num_tokens for step in steps)
    return StepsRecord(
        phase=steps[0].phase,
        num_steps=len(steps),
        num_rounds=num_rounds,
        num_tokens=num_tokens,
        num_seqs=sum(len(step.seq_ids) for step in steps),
        wall_s=Estimate(wall_s),
        tps=Estimate(num_tokens / wall_s),
        tps_of_runs=tuple(tps_of_runs),
        step_s=Summary.of(of_steps),
        token_s=Summary.of(of_tokens.tolist()),
    )


def _token_times(steps: Sequence[StepRecord], start_s: float) -> list[list[float]]:
    """The begin of each sequence, then the time of each of its tokens."""
    times: defaultdict[int, list[float]] = defaultdict(lambda: [start_s])
    for step in sorted(steps, key=lambda step: step.finished_s):
        for seq in step.seq_ids:
            times[seq].append(step.finished_s)
    return list(times.values())


def num_tokens_per_expert(steps: Sequence[StepRecord]) -> tuple[tuple[int, ...], ...]:
    """[num_layers][num_experts]; token-expert pairs of all steps."""
    total = _total([record.num_tokens_per_expert for step in steps for record in step.records])
    return tuple(tuple(map(int, layer)) for layer in total)


def _by_stage(counts: Sequence[_Counts]) -> dict[str, int]:
    """Sums by the stages where anything was counted; [num_stages] each."""
    total = _total(counts)
    return {stage.label: int(total[stage]) for stage in Stage if total[stage]}


def _total(arrays: Sequence[_Counts]) -> _Counts:
    total: _Counts = np.sum(arrays, axis=0)
    return total


def _active_expert_share(steps: Sequence[StepRecord]) -> float:
    shares = []
    for step in steps:
        is_active = _total([record.num_tokens_per_expert for record in step.records]) > 0
        has_experts = is_active.any(axis=1)  # no token skips a layer that has any
        shares.append(is_active[has_experts].mean() if has_experts.any() else 0.0)
    return float(np.mean(shares))


@dataclass(eq=False)
class ServedRequest(Generic[TimeT]):
    """A request and when its tokens came, all on one clock.

    Attributes:
        due_s: arrival time; in a closed loop, when there was room for it.
        token_times_s: times of the steps that gave it a token or more.
        num_cached_tokens: prompt tokens found in the prefix cache; simulated requests only.
    """

    prompt_len: int
    output_len: int
    due_s: TimeT
    token_times_s: list[TimeT] = field(default_factory=list)
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def ttft_s(self) -> TimeT:
        """Time from when it was due to its first token, which its prompt's last step computes.

        Where another pool decodes, it is sent when the request's first step there begins.
        """
        return self.token_times_s[0] - self.due_s

    @property
    def tpot_s(self) -> TimeT | None:
        """Mean time of the tokens after the first; None where there is one alone."""
        if self.output_len == 1:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.output_len - 1)

    @property
    def itl_s(self) -> npt.NDArray[np.float64]:
        """[n] or [n, 3]; times between successive steps that gave it tokens."""
        return np.diff(np.array(self.token_times_s), axis=0)

    @property
    def e2e_s(self) -> TimeT:
        """Time from when it was due to its last token."""
        return self.token_times_s[-1] - self.due_s

    def meets(self, slo: SLO) -> Any:
        """True if its own latency is within the limit, a bool or [3] of them.

        True where it has no such latency: one token has no TPOT.
        """
        own: Any = getattr(self, f"{slo.metric}_s")
        if slo.metric == "itl":
            own = _statistic(own, slo.statistic) if len(own) else None
        return True if own is None else own <= slo.limit_s


def _latencies(served: Sequence[ServedRequest[TimeT]]) -> dict[LatencyMetric, Any]:
    """[n] or [n, 3] each; by request, but for the times between tokens."""
    return {
        "ttft": np.array([each.ttft_s for each in served]),
        "tpot": np.array([each.tpot_s for each in served if each.tpot_s is not None]),
        "itl": np.concatenate([each.itl_s for each in served]),
        "e2e": np.array([each.e2e_s for each in served]),
    }


def intervals(served: Sequence[ServedRequest[npt.NDArray[np.float64]]]) -> dict[str, Interval]:
    """90 % intervals of what a sample tells, at likely times, by `metric.statistic`.

    Of means by the central limit theorem; of percentiles by order statistics, whose places are
    binomial (David and Nagaraja, Order Statistics, section 7.1), about normally distributed.
    """
    found: dict[str, Interval] = {}
    for metric, values in _latencies(served).items():
        if len(values) < 2 or metric == "itl":  # those between tokens come together
            continue
        likely = np.sort(values[:, 1])
        num, mean = len(likely), float(likely.mean())
        away = NORMAL * float(likely.std(ddof=1)) / sqrt(num)
        found[f"{metric}.mean"] = mean - away, mean + away
        for name, percent in PERCENTILES.items():
            share = percent / 100
            away = NORMAL * sqrt(num * share * (1 - share))
            low, high = floor(num * share - away), ceil(num * share + away)
            ends = likely[max(low, 0)], likely[min(high, num - 1)]
            found[f"{metric}.{name}"] = float(ends[0]), float(ends[1])
    return found


PERCENTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99}


def _statistic(values: Any, statistic: Statistic) -> Any:
    """A number from [n] values; from [n, 3], one for each bound."""
    if statistic == "mean":
        return np.mean(values, axis=0)
    return np.percentile(values, PERCENTILES[statistic], axis=0)


def serving_record(
    served: Sequence[ServedRequest[TimeT]], slos: Sequence[SLO] = (), num_failed: int = 0
) -> ServingRecord:
    """Throughput and latency of a load, measured or projected.

    Args:
        num_failed: further requests that failed, none of them good.
    """
    due_s = np.array([each.due_s for each in served])
    last_s = np.array([each.token_times_s[-1] for each in served])
    latencies = _latencies(served)
    wall_s = last_s.max(axis=0) - due_s.min(axis=0)
    seconds = Estimate.of(wall_s)
    num_output = sum(each.output_len for each in served)
    num_prompt = sum(each.prompt_len for each in served)
    record = ServingRecord(
        num_requests=len(served),
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        wall_s=seconds,
        ttft_s=Summary.of(latencies["ttft"]),
        tpot_s=Summary.of(latencies["tpot"]),
        itl_s=Summary.of(latencies["itl"]),
        e2e_s=Summary.of(latencies["e2e"]),
        output_tps=num_output / seconds,
        total_tps=(num_output + num_prompt) / seconds,
        requests_per_s=len(served) / seconds,
    )
    if not slos:
        return record
    num_good = sum(np.all([each.meets(slo) for slo in slos], axis=0) * 1 for each in served)
    results = []
    for slo in slos:
        values = latencies[slo.metric]
        value = Estimate.of(_statistic(values, slo.statistic)) if len(values) else None
        results.append(SLOResult(slo, value))
    return replace(
        record,
        slos=tuple(results),
        goodput=Estimate.of(num_good / wall_s),
        good_share=Estimate.of(num_good / (len(served) + num_failed)),
    )
