"""From a simulated load to the numbers that results keep."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import numpy.typing as npt

from expertlane.cost.breakdown import shares_of
from expertlane.cost.laws.execution import BOUNDS, LIKELY, Execution
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.laws.times import Basis
from expertlane.cost.routing import RoutingChoice
from expertlane.cost.step.operation import Floats
from expertlane.memory import FREE_SHARE
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.simulation import (
    Number,
    PhaseSimulation,
    PoolSimulation,
    RankMemoryResult,
    Service,
    SimulatedCluster,
    SimulatedDeployment,
    SimulatedLoad,
    Simulation,
    SoftwareVersions,
    Spread,
)
from expertlane.results.step_record import StepRecord
from expertlane.results.timeline import StepTimeline, timelines_of
from expertlane.results.traffic import TrafficBytes
from expertlane.simulate.assumptions import assumptions
from expertlane.simulate.setup import ServingSetup
from expertlane.simulate.simulator import Outcome, SimulatedPool, Simulator, roles
from expertlane.simulate.totals import PhaseTotals
from expertlane.spec.files import strict_json
from expertlane.spec.names import Link, Phase, ProjectedCause, Traffic
from expertlane.spec.workload import Load

_P95 = 95


def simulation(
    simulator: Simulator,
    outcome: Outcome,
    routing: RoutingChoice,
    seed: int,
    *,
    command: str,
    version: str,
    caution: str | None = None,
) -> Simulation:
    """All of `results.json`.

    Args:
        command: how a user repeats it.
        version: of expertlane.
        caution: what a reader must know of the weights, in a sentence.
    """
    tokens = np.sum([pool.totals.num_tokens_per_expert for pool in outcome.pools], axis=0)
    cluster, setup = simulator.cluster, simulator.setup
    return Simulation(
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=SoftwareVersions(version, platform.python_version(), np.__version__),
        model=json.loads(strict_json(asdict(simulator.model))),  # lists, as they are read back
        cluster=_cluster(cluster, setup),
        deployment=_deployment(setup, simulator.execution, routing),
        workload=_load(simulator.load, seed, outcome),
        assumptions=assumptions(setup, cluster, simulator.execution, routing, caution),
        service=service(outcome),
        pools=_pools(simulator, outcome),
        num_tokens_per_expert=tuple(tuple(map(int, layer)) for layer in tokens),
    )


def _cluster(cluster: ModelledCluster, setup: ServingSetup) -> SimulatedCluster:
    num_used = sum(layout.world_size for layout in setup.layouts)
    return SimulatedCluster(
        name=str(cluster),
        device=cluster.profile.device.name,
        num_devices=cluster.num_devices,
        ranks_per_node=cluster.profile.ranks_per_node,
        num_idle=cluster.num_devices - num_used,
    )


def _deployment(
    setup: ServingSetup, execution: Execution, routing: RoutingChoice
) -> SimulatedDeployment:
    prefill = setup.prefill_layout
    return SimulatedDeployment(
        layout=LayoutSizes.of(setup.layout),
        prefill_layout=None if prefill is None else LayoutSizes.of(prefill),
        options=setup.options,
        dtype=setup.types.weights,
        kv_dtype=setup.types.kv,
        execution=execution.value,
        routing=routing.option,
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        block_size=setup.block_size,
        mtp=setup.multi_token.num_drafts,
        mtp_acceptance=setup.multi_token.acceptance,
    )


def _load(load: Load, seed: int, outcome: Outcome) -> SimulatedLoad:
    return SimulatedLoad(
        batch=load.batch,
        rate=load.rate,
        num_requests=load.num_requests,
        prompt_len=str(load.prompt_len),
        output_len=str(load.output_len),
        seed=seed,
        num_prompt_tokens=sum(each.prompt_len for each in outcome.served),
        num_output_tokens=sum(each.output_len for each in outcome.requests),
    )


def main_basis(outcome: Outcome) -> str:
    """What most of all steps' time rests on."""
    phases = [totals for pool in outcome.pools for totals in pool.totals.phases.values()]
    return _main(np.sum([totals.basis_s for totals in phases], axis=0))


def service(outcome: Outcome) -> Service:
    """What users would feel."""
    basis = main_basis(outcome)
    output_lens = np.array([each.output_len for each in outcome.requests])
    due = np.array([each.due_s for each in outcome.served])  # [num_requests, 3]
    first = np.array([each.token_times_s[0] for each in outcome.served])
    last = np.array([each.token_times_s[-1] for each in outcome.served])
    goes_on = output_lens > 1
    tpot = (last - first)[goes_on] / (output_lens[goes_on, None] - 1)
    wall_s = last.max(axis=0) - due.min(axis=0)
    num_output = int(output_lens.sum())
    num_prompt = sum(each.prompt_len for each in outcome.served)
    return Service(
        ttft_s=_spread(first - due, basis),
        tpot_s=_spread(tpot, basis) if len(tpot) else None,
        e2e_s=_spread(last - due, basis),
        output_tps=_number(num_output / wall_s, basis),
        total_tps=_number((num_output + num_prompt) / wall_s, basis),
        requests_per_s=_number(len(output_lens) / wall_s, basis),
        wall_s=_number(wall_s, basis),
    )


def _pools(simulator: Simulator, outcome: Outcome) -> tuple[PoolSimulation, ...]:
    """What each pool did."""
    device_bytes = simulator.cluster.profile.device.memory_bytes
    of_pools = zip(outcome.pools, roles(outcome), simulator.largest_steps(outcome), strict=True)
    return tuple(_pool(pool, role, device_bytes, largest) for pool, role, largest in of_pools)


def _pool(
    pool: SimulatedPool,
    role: Literal["both", "prefill", "decode"],
    device_bytes: float,
    largest: Mapping[Phase, StepRecord],
) -> PoolSimulation:
    memory = pool.memory
    phases = {
        phase: _phase(totals, largest.get(phase)) for phase, totals in pool.totals.phases.items()
    }
    return PoolSimulation(
        role=role,
        layout=LayoutSizes.of(pool.layout),
        memory=RankMemoryResult(
            weight_bytes=memory.weight_bytes,
            kv_bytes=memory.kv_bytes,
            activation_bytes=memory.activation_bytes,
            allowed_bytes=int(FREE_SHARE * device_bytes),
            device_bytes=int(device_bytes),
            num_resident=pool.num_resident,
        ),
        most_running=pool.totals.most_running,
        num_preemptions=pool.pool.scheduler.num_preemptions,
        prefill=phases.get(Phase.PREFILL),
        decode=phases.get(Phase.DECODE),
    )


def _phase(totals: PhaseTotals, largest: StepRecord | None) -> PhaseSimulation:
    num, basis = len(totals.step_s), _main(totals.basis_s)
    basis_shares, extrapolated = shares_of(totals.basis_s, totals.extrapolated_s)
    why = totals.why_s / (totals.why_s.sum() or 1.0)
    explained_s = totals.explained_s or 1.0
    step_s = np.array(totals.step_s)
    return PhaseSimulation(
        num_steps=num,
        num_tokens=totals.num_tokens / num,
        num_seqs=totals.num_seqs / num,
        seconds=_number(step_s.sum(axis=0), basis),
        step_s=_spread(step_s, basis),
        shares={str(cause): float(why[place]) for place, cause in enumerate(ProjectedCause)},
        floor_s=totals.floor_s / num,
        flops_utilisation=totals.flops_s / explained_s,
        read_utilisation=totals.read_s / explained_s,
        basis_shares=basis_shares,
        extrapolated_share=extrapolated,
        traffic_bytes={
            link.label: TrafficBytes(*(round(each / num) for each in totals.sent_bytes[link]))
            for link in Link
        },
        sent_bytes=_sent_bytes(largest),
        tokens_by_ranks_reached=_reached(largest),
        rank_pairs=totals.rank_pairs / num,
        timeline=_timeline(largest),
    )


def _timeline(step: StepRecord | None) -> StepTimeline | None:
    return None if step is None else timelines_of([step]).get(step.phase)


def _sent_bytes(step: StepRecord | None) -> tuple[tuple[int, ...], ...]:
    """[source][destination]; payload of a step, between the ranks of its replica."""
    records = [] if step is None else sorted(step.records, key=lambda record: record.rank)
    ranks = [record.rank for record in records]
    return tuple(
        tuple(record.sent_bytes[:, Traffic.PAYLOAD].sum(axis=0)[ranks].tolist())
        for record in records
    )


def _reached(step: StepRecord | None) -> tuple[int, ...]:
    if step is None:
        return ()
    tokens = np.sum([record.tokens_by_ranks_reached for record in step.records], axis=0)
    return tuple(np.trim_zeros(tokens, "b").tolist())


def _main(basis_s: Floats) -> str:
    return list(Basis)[int(basis_s.argmax())].label


def _spread(values: npt.NDArray[np.float64], basis: str) -> Spread:
    """Of values [n, 3]."""
    kinds: Sequence[Callable[[Floats], Floats]] = (
        lambda of: of.mean(axis=0),
        lambda of: np.median(of, axis=0),
        lambda of: np.percentile(of, _P95, axis=0),
    )
    return Spread(*(_number(kind(values), basis) for kind in kinds))


def _number(values: Floats, basis: str) -> Number:
    """Of [3]; by the clock's hands, so that a rate's come the other way round."""
    assert len(values) == len(BOUNDS)
    return Number(float(values[LIKELY]), float(values.min()), float(values.max()), basis)
