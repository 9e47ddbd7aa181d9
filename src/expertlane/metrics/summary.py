"""All metrics of one deployment, from its finished steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.metrics.bottleneck import Bottleneck, find_bottleneck
from expertlane.metrics.critical_path import CriticalPath, critical_path
from expertlane.metrics.latency import Latency, latency
from expertlane.metrics.stage_time import StageTime, stage_time
from expertlane.metrics.traffic import TrafficMetrics, summarise_traffic
from expertlane.results.step_record import MachinePeak, StepRecord
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Phase


@dataclass(frozen=True)
class Utilisation:
    """Achieved rates over the machine's measured peak.

    Attributes:
        flops: FLOP/s over peak FLOP/s.
        read_bytes: bytes of weights, keys and values read a second over the peak.
    """

    flops: float
    read_bytes: float


@dataclass(frozen=True, eq=False)
class PhaseMetrics:
    """One phase of one deployment; counters are sums over ranks and steps.

    Attributes:
        time: seconds of every rank.
        breakdown_s: seconds a round (every sequence one token on) by cause, mean over ranks;
            the sum is the wall time of a round, so shares of it add up to 1.
        cpu_s_per_token: CPU time of all threads of all ranks over tokens.
        num_tokens_per_expert: [num_layers, num_experts].
        active_expert_share: of the experts of a layer, those with a token in a step; mean over
            the layers that have experts, and steps.
        traffic: what was sent to whom, and how far tokens spread.
        flops, weight_bytes, num_collectives: [num_stages].
        kv_bytes: keys and values read.
    """

    phase: Phase
    latency: Latency
    time: StageTime
    breakdown_s: dict[Cause, float]
    cpu_s_per_token: float
    critical_path: CriticalPath
    num_tokens_per_expert: npt.NDArray[np.int64]
    active_expert_share: float
    traffic: TrafficMetrics
    flops: npt.NDArray[np.int64]
    weight_bytes: npt.NDArray[np.int64]
    kv_bytes: int
    num_collectives: npt.NDArray[np.int64]
    utilisation: Utilisation


@dataclass(frozen=True, eq=False)
class DeploymentMetrics:
    """Both phases of one deployment.

    Attributes:
        decode: None where the workload asks for one token a sequence, which prefill gives.
        num_tokens_per_expert: [num_layers, num_experts]; both phases together.
        bottleneck: of decoding, or of prefill where nothing is decoded.
    """

    prefill: PhaseMetrics
    decode: PhaseMetrics | None
    num_tokens_per_expert: npt.NDArray[np.int64]
    bottleneck: Bottleneck


def summarise(
    layout: Layout,
    prefill: Sequence[StepRecord],
    decode: Sequence[StepRecord],
    peak: MachinePeak,
    ranks_per_node: int,
) -> DeploymentMetrics:
    """Everything about one run of one deployment.

    Args:
        prefill, decode: the steps of each phase, of all replicas, in any order; `decode` may
            be empty.
        ranks_per_node: consecutive ranks that share a node.

    Raises:
        ValueError: there is no prefill step, or a step carries no rank records.
    """
    before = summarise_phase(layout, prefill, peak, ranks_per_node)
    after = summarise_phase(layout, decode, peak, ranks_per_node) if decode else None
    num_tokens = before.num_tokens_per_expert
    if after is not None:
        num_tokens = num_tokens + after.num_tokens_per_expert
    main = after or before
    return DeploymentMetrics(
        prefill=before,
        decode=after,
        num_tokens_per_expert=num_tokens,
        bottleneck=find_bottleneck(
            layout, main.phase, main.breakdown_s, main.time.waiting_s, main.latency.wall_s
        ),
    )


def summarise_phase(
    layout: Layout, steps: Sequence[StepRecord], peak: MachinePeak, ranks_per_node: int
) -> PhaseMetrics:
    """Everything about one phase.

    Raises:
        ValueError: there are no steps, or one of them carries no rank records.
    """
    speed = latency(steps)
    if not all(step.records for step in steps):
        raise ValueError("a step without rank records: its plan did not ask for them")
    time = stage_time(layout, steps)
    records = [record for step in steps for record in step.records]
    flops = _total([record.flops for record in records])
    weight_bytes = _total([record.weight_bytes for record in records])
    kv_bytes = sum(record.kv_bytes for record in records)
    return PhaseMetrics(
        phase=steps[0].phase,
        latency=speed,
        time=time,
        breakdown_s=time.breakdown_s(speed.wall_s, speed.num_rounds),
        cpu_s_per_token=sum(record.process_cpu_s for record in records) / speed.num_tokens,
        critical_path=critical_path(layout, steps),
        num_tokens_per_expert=_total([record.num_tokens_per_expert for record in records]),
        active_expert_share=_active_expert_share(steps),
        traffic=summarise_traffic(layout, steps, ranks_per_node),
        flops=flops,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        num_collectives=_total([record.num_collectives for record in records]),
        utilisation=Utilisation(
            flops=int(flops.sum()) / speed.wall_s / peak.gemm_flops_per_s,
            read_bytes=(int(weight_bytes.sum()) + kv_bytes) / speed.wall_s / peak.read_bytes_per_s,
        ),
    )


def _total(arrays: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    total: npt.NDArray[np.int64] = np.sum(arrays, axis=0)
    return total


def _active_expert_share(steps: Sequence[StepRecord]) -> float:
    shares = []
    for step in steps:
        is_active = _total([record.num_tokens_per_expert for record in step.records]) > 0
        has_experts = is_active.any(axis=1)  # no token skips a layer that has any
        shares.append(is_active[has_experts].mean() if has_experts.any() else 0.0)
    return float(np.mean(shares))
