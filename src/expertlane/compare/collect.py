"""From metrics to the results on disk."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.balance.placement_file import Placements, placements_of
from expertlane.balance.tracker import max_over_mean
from expertlane.compare.assumptions import assumptions
from expertlane.compare.collect_traffic import traffic_bytes, traffic_result
from expertlane.engine.commands import HeldBytes
from expertlane.metrics import DeploymentMetrics, PhaseMetrics, hidden_communication
from expertlane.metrics.bottleneck import Bottleneck
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.rebalance import RebalanceResult
from expertlane.results.schema import (
    BottleneckResult,
    CriticalPathResult,
    DecodeResult,
    DeploymentResult,
    ExpertLoad,
    HiddenCommunication,
    Machine,
    PrefillResult,
    Quantiles,
    RankResult,
    Results,
    ScalingPoint,
    UtilisationResult,
    Versions,
)
from expertlane.results.timeline import StepTimeline
from expertlane.schedule.limits import Limits
from expertlane.spec.deployment import Deployment, DispatchTable
from expertlane.spec.experiment import Experiment
from expertlane.spec.files import strict_json
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase, Stage
from expertlane.spec.workload import Workload


def deployment_result(
    deployment: Deployment,
    model: ModelConfig,
    workload: Workload,
    metrics: DeploymentMetrics,
    held: Sequence[HeldBytes],
    tokens: npt.NDArray[np.int64],
    is_baseline: bool,
    ranks_per_node: int,
    timelines: Mapping[Phase, StepTimeline],
    rebalances: tuple[RebalanceResult, ...] = (),
    dispatch_table: DispatchTable | None = None,
) -> DeploymentResult:
    """The measured row of one deployment.

    Args:
        held: [num_ranks]; what each rank has allocated.
        tokens: [num_sequences, output_len]; all generated tokens.
        ranks_per_node: consecutive ranks that share a node.
        timelines: one step of each phase.
        rebalances: of its last run.
        dispatch_table: of its first run, where `dispatch` or `overlap` is `auto`.

    Raises:
        ValueError: `tokens` is not of the workload's shape, or `held` not of the layout's.
    """
    layout = deployment.layout
    if tokens.shape != (workload.num_sequences, workload.output_len):
        raise ValueError(f"tokens of shape {tokens.shape} for {workload}")
    if len(held) != layout.world_size:
        raise ValueError(f"memory of {len(held)} ranks for layout {layout}")
    placements = placements_of(model, layout, deployment.options)
    phases = [phase for phase in (metrics.prefill, metrics.decode) if phase is not None]
    return DeploymentResult(
        name=deployment.name,
        layout=LayoutSizes.of(layout),
        options=deployment.options,
        source="measured",
        is_baseline=is_baseline,
        prefill=_prefill(metrics.prefill),
        decode=None if metrics.decode is None else _decode(metrics.decode),
        breakdown_s={phase.phase: phase.breakdown_s for phase in phases},
        bottleneck=_bottleneck(metrics.bottleneck),
        expert_load=_expert_load(metrics.num_tokens_per_expert),
        traffic_bytes={
            phase.phase: traffic_bytes(phase.traffic.sent_bytes.sum(axis=0), ranks_per_node)
            for phase in phases
        },
        traffic={phase.phase: traffic_result(phase.traffic, ranks_per_node) for phase in phases},
        rebalances=rebalances,
        dispatch_table=dispatch_table,
        per_rank=tuple(
            _rank(rank, layout, model, phases, held[rank], placements)
            for rank in range(layout.world_size)
        ),
        timelines=dict(timelines),
        tokens_sha256=hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(),
    )


def _prefill(phase: PhaseMetrics) -> PrefillResult:
    return PrefillResult(**_phase(phase), ttft_s=_token_latency(phase))


def _decode(phase: PhaseMetrics) -> DecodeResult:
    return DecodeResult(**_phase(phase), tpot_s=_token_latency(phase))


def _expert_load(num_tokens: npt.NDArray[np.int64]) -> ExpertLoad:
    """From token-expert pairs [num_layers, num_experts]."""
    return ExpertLoad(
        num_tokens_per_expert=tuple(tuple(map(int, layer)) for layer in num_tokens),
        max_over_mean=tuple(map(float, max_over_mean(num_tokens))),
    )


def _bottleneck(found: Bottleneck) -> BottleneckResult:
    return BottleneckResult(
        phase=found.phase,
        cause=found.cause,
        share=found.share,
        straggler=found.straggler,
        sentence=found.sentence,
    )


def build_results(
    experiment: Experiment,
    *,
    command: str,
    machine: Machine,
    versions: Versions,
    deployments: Sequence[DeploymentResult],
    limits: Mapping[str, Limits],
    scaling: Sequence[DeploymentResult] = (),
    foreign_cpu_share: float = 0.0,
) -> Results:
    """All that `results.json` holds.

    Args:
        deployments, scaling: in the experiment's order.
        limits: what each deployment, by its name, was scheduled with.
        foreign_cpu_share: of the launcher's host, what other processes used meanwhile.
    """
    return Results(
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
        machine=machine,
        experiment=json.loads(strict_json(asdict(experiment))),  # lists, as they are read back
        assumptions=assumptions(experiment, machine, limits),
        deployments=tuple(deployments),
        hidden_communication=hidden_by_overlap(deployments),
        scaling=scaling_points(scaling, deployments),
        foreign_cpu_share=foreign_cpu_share,
    )


def hidden_by_overlap(deployments: Sequence[DeploymentResult]) -> tuple[HiddenCommunication, ...]:
    """One entry for each two deployments that decode and differ in overlap alone."""
    pairs = (
        (off, on)
        for off in deployments
        for on in deployments
        if off.layout == on.layout
        and on.options.overlap is True
        and off.options == replace(on.options, overlap=False)
    )
    return tuple(
        HiddenCommunication(
            off=off.name,
            on=on.name,
            step_off_s=off.decode.round_s,
            step_on_s=on.decode.round_s,
            exposed_s=off.decode.exposed_s,
            hidden=hidden_communication(
                off.decode.round_s, on.decode.round_s, off.decode.exposed_s
            ),
        )
        for off, on in pairs
        if off.decode and on.decode
    )


def scaling_points(
    scaling: Sequence[DeploymentResult], deployments: Sequence[DeploymentResult]
) -> tuple[ScalingPoint, ...]:
    """Decode throughput over expert-parallel sizes, by size.

    Deployments of the same family (layouts that differ from `scaling`'s in `dp` and `ep` alone,
    same options) join at sizes that `scaling` lacks.
    """
    if not scaling:
        return ()
    points = {result.layout.ep_size: result for result in scaling}
    families = {_family(result) for result in scaling}
    for result in deployments:
        if _family(result) in families:
            points.setdefault(result.layout.ep_size, result)
    rows = [
        (result, result.decode.tps, result.decode.critical_path.tps)
        for _, result in sorted(points.items())
        if result.decode
    ]
    if not rows:
        return ()
    first, first_tps, first_critical_tps = rows[0]
    return tuple(
        ScalingPoint(
            name=result.name,
            ep_size=result.layout.ep_size,
            num_ranks=result.num_ranks,
            tps=tps,
            tps_per_rank=tps / result.num_ranks,
            relative_tps_per_rank=(tps / result.num_ranks) / (first_tps / first.num_ranks),
            critical_path_tps_per_rank=critical_tps / result.num_ranks,
            relative_critical_path_tps_per_rank=(critical_tps / result.num_ranks)
            / (first_critical_tps / first.num_ranks),
        )
        for result, tps, critical_tps in rows
    )


def _family(result: DeploymentResult) -> tuple[object, ...]:
    layout = result.layout.layout
    return layout.replicas, layout.pp, layout.tp, layout.etp, result.options


def _token_latency(phase: PhaseMetrics) -> Quantiles:
    return Quantiles(phase.latency.token_median_s, phase.latency.token_p95_s)


def _phase(phase: PhaseMetrics) -> dict[str, Any]:
    """The fields of `PhaseResult`."""
    speed, critical = phase.latency, phase.critical_path
    return {
        "num_steps": speed.num_steps,
        "num_rounds": speed.num_rounds,
        "num_tokens": speed.num_tokens,
        "wall_s": speed.wall_s,
        "tps": speed.tps,
        "tps_of_runs": speed.tps_of_runs,
        "step_s": speed.step_median_s,
        "exposed_s": phase.time.exposed_s / speed.num_rounds,
        "active_expert_share": phase.active_expert_share,
        "cpu_s_per_token": phase.cpu_s_per_token,
        "critical_path": CriticalPathResult(critical.total_s, critical.tps, critical.step_median_s),
        "flops": _by_stage(phase.flops),
        "weight_bytes": _by_stage(phase.weight_bytes),
        "kv_bytes": phase.kv_bytes,
        "num_collectives": _by_stage(phase.num_collectives),
        "utilisation": UtilisationResult(phase.utilisation.flops, phase.utilisation.read_bytes),
    }


def _by_stage(counts: npt.NDArray[np.int64]) -> dict[str, int]:
    """The stages where anything was counted."""
    return {stage.label: int(counts[stage]) for stage in Stage if counts[stage]}


def _rank(
    rank: int,
    layout: Layout,
    model: ModelConfig,
    phases: Sequence[PhaseMetrics],
    held: HeldBytes,
    placements: Placements,
) -> RankResult:
    at = layout.coordinates(rank)
    own_layers = layout.layers_of_stage(model.num_hidden_layers, at.pp_rank)
    return RankResult(
        rank=rank,
        num_experts_per_layer=tuple(
            len(placed.experts_of_rank[at.ep_rank]) if placed and layer in own_layers else 0
            for layer, placed in enumerate(placements)
        ),
        weight_bytes=held.weight_bytes,
        kv_bytes=held.kv_bytes,
        stage_s={
            phase.phase: {stage.label: float(phase.time.stage_s[rank, stage]) for stage in Stage}
            for phase in phases
        },
        waiting_s={phase.phase: float(phase.time.waiting_s[rank]) for phase in phases},
        bubble_s={phase.phase: float(phase.time.bubble_s[rank]) for phase in phases},
    )
