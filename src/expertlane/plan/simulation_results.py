"""From a simulated load to the numbers that results keep."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from expertlane.cost.execution import BOUNDS, LIKELY
from expertlane.cost.operation import Floats
from expertlane.cost.times import Basis
from expertlane.plan.capacity import FREE_SHARE
from expertlane.plan.simulate import Outcome, SimulatedPool
from expertlane.plan.step_facts import shares_of
from expertlane.plan.tally import PhaseTally
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.simulation import (
    Number,
    PhaseSimulation,
    PoolSimulation,
    RankMemoryResult,
    Service,
    Spread,
)
from expertlane.results.traffic import TrafficBytes
from expertlane.spec.names import Link, Phase, ProjectedCause

_P95 = 95


def main_basis(outcome: Outcome) -> str:
    """What most of all steps' time rests on."""
    phases = [tally for pool in outcome.pools for tally in pool.tally.phases.values()]
    return _main(np.sum([tally.basis_s for tally in phases], axis=0))


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


def pools(outcome: Outcome, device_bytes: float) -> tuple[PoolSimulation, ...]:
    """What each pool did."""
    roles = ("both",) if len(outcome.pools) == 1 else ("prefill", "decode")
    return tuple(
        _pool(pool, role, device_bytes) for pool, role in zip(outcome.pools, roles, strict=True)
    )


def expert_load(outcome: Outcome) -> tuple[float, ...]:
    """[num_layers]; the fullest expert over the mean; 0 in a dense layer."""
    tokens = np.sum([pool.tally.num_tokens_per_expert for pool in outcome.pools], axis=0)
    mean = tokens.mean(axis=1)
    most = tokens.max(axis=1) / np.where(mean > 0, mean, 1)
    return tuple(most.tolist())


def _pool(pool: SimulatedPool, role: str, device_bytes: float) -> PoolSimulation:
    memory, phases = pool.memory, pool.tally.phases
    return PoolSimulation(
        role=role,  # type: ignore[arg-type]
        layout=LayoutSizes.of(pool.layout),
        memory=RankMemoryResult(
            weight_bytes=memory.weight_bytes,
            kv_bytes=memory.kv_bytes,
            activation_bytes=memory.activation_bytes,
            allowed_bytes=int(FREE_SHARE * device_bytes),
            device_bytes=int(device_bytes),
            num_resident=pool.num_resident,
        ),
        most_running=pool.tally.most_running,
        num_preemptions=pool.pool.scheduler.num_preemptions,
        prefill=_phase(phases[Phase.PREFILL]) if Phase.PREFILL in phases else None,
        decode=_phase(phases[Phase.DECODE]) if Phase.DECODE in phases else None,
    )


def _phase(tally: PhaseTally) -> PhaseSimulation:
    num, basis = len(tally.step_s), _main(tally.basis_s)
    basis_shares, extrapolated = shares_of(tally.basis_s, tally.extrapolated_s)
    why = tally.why_s / (tally.why_s.sum() or 1.0)
    explained_s = tally.explained_s or 1.0
    step_s = np.array(tally.step_s)
    return PhaseSimulation(
        num_steps=num,
        num_tokens=tally.num_tokens / num,
        num_seqs=tally.num_seqs / num,
        seconds=_number(step_s.sum(axis=0), basis),
        step_s=_spread(step_s, basis),
        shares={str(cause): float(why[place]) for place, cause in enumerate(ProjectedCause)},
        floor_s=tally.floor_s / num,
        flops_utilisation=tally.flops_s / explained_s,
        read_utilisation=tally.read_s / explained_s,
        basis_shares=basis_shares,
        extrapolated_share=extrapolated,
        traffic_bytes={
            link.label: TrafficBytes(*(round(each / num) for each in tally.sent_bytes[link]))
            for link in Link
        },
        rank_pairs=tally.rank_pairs / num,
    )


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
