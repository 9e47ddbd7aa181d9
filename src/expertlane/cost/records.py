"""Records of the modelled cluster and of the conditions of a projection."""

from dataclasses import replace
from typing import Any

from expertlane.cost.laws.execution import ARRIVAL_S, Execution
from expertlane.cost.laws.frameworks import frameworks, judged, nearest
from expertlane.cost.laws.profile import ModelledCluster, Profile
from expertlane.cost.number_types import NumberTypes
from expertlane.results.hardware import Cluster, KnownError, below_above
from expertlane.results.record import Conditions, DeploymentRecord
from expertlane.results.results import Assumption, EngineBest, Results
from expertlane.spec.model import ModelConfig


def conditions_of(top_k: int, execution: Execution, routing: str, types: NumberTypes) -> Conditions:
    """Experts per token, execution, routing and number types of a projection."""
    return Conditions(top_k, execution.value, routing, types.weights, types.kv)


def cluster_record(
    model: ModelConfig,
    cluster: ModelledCluster,
    types: NumberTypes,
    *,
    has_two_pools: bool = False,
    has_drafts: bool = False,
    num_ranks: int = 1,
) -> Cluster:
    """The cluster as results have it.

    Args:
        num_ranks: ranks of a replica of the recommended deployment, or of the largest.
    """
    profile, device = cluster.profile, cluster.profile.device
    kind: dict[str, Any] = {
        "model": model,
        "has_two_pools": has_two_pools,
        "has_drafts": has_drafts,
        "num_ranks": num_ranks,
    }
    return Cluster(
        name=str(cluster),
        device=device.name,
        num_devices=cluster.num_devices,
        ranks_per_node=profile.ranks_per_node,
        memory_bytes=device.memory_bytes,
        memory_bytes_per_s=device.memory_bytes_per_s,
        flops_per_s=device.flops_per_s[types.weights],
        framework=profile.framework,
        judged=judged(profile, types.weights, **kind),
        nearest=nearest(profile, types.weights, **kind),
    )


def with_known_errors(results: Results, model: ModelConfig, profile: Profile) -> Results:
    """Results whose throughput and latency have the error of the nearest measured kind as bounds.

    Bounds are no narrower than that, and no wider where the same kind of serving was measured.
    Ratios stay: what two deployments share of such an error cancels in them.
    """

    def bounded(record: DeploymentRecord) -> DeploymentRecord:
        if record.source != "projected" or record.conditions is None:
            return record
        pools = filter(None, (record.layout, record.prefill_layout))
        known = nearest(
            profile,
            record.conditions.dtype,
            model=model,
            has_two_pools=record.prefill_layout is not None,
            has_drafts=record.num_drafts > 0,
            num_ranks=max(each.replica_size for each in pools),
        )
        if known is None:
            return record
        serving = tuple(each.bounded_by(known) for each in record.serving)
        return replace(record, serving=serving)

    def of_engine(best: EngineBest) -> EngineBest:
        aggregated = None if best.aggregated is None else bounded(best.aggregated)
        return replace(best, aggregated=aggregated, pools=tuple(map(bounded, best.pools)))

    known = results.projected_for.nearest
    if profile.framework:
        results = replace(results, assumptions=(*results.assumptions, _corrections(profile)))
    if known is None:
        return results
    plans = [replace(each, engines=tuple(map(of_engine, each.engines))) for each in results.plans]
    return replace(
        results,
        deployments=tuple(map(bounded, results.deployments)),
        plans=tuple(plans),
        assumptions=(*results.assumptions, _least_bounds(known)),
    )


def _corrections(profile: Profile) -> Assumption:
    title, arrival = frameworks()[profile.framework].title, profile.terms.get(ARRIVAL_S)
    said = f"{title}: no corrections, for want of measurements"
    if arrival is not None:
        _, _, points = arrival.origin.partition(": ")
        said = (
            f"{title}: step times × {profile.step_factor:.2f}, arrival delay "
            f"{1e3 * arrival.value:.0f} ms (fitted to {points})"
        )
    return Assumption("framework", said, change="--framework")


def _least_bounds(known: KnownError) -> Assumption:
    said = (
        f"TPOT {below_above(known.tpot)}, tokens/s {below_above(known.output)}, "
        f"TTFT {below_above(known.ttft)}: 5th to 95th percentile of measured over projected: "
        f"{known.what}; ratios of deployments share such errors and keep their own bounds"
    )
    if known.is_own_kind:
        return Assumption("bounds", f"{said}; with larger replicas bounds are at least as wide")
    return Assumption("least bounds", f"at least {said}")
