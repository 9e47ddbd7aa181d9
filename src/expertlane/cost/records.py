"""What results say of a cluster that was modelled, and of the conditions of a projection."""

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.frameworks import judged
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.number_types import NumberTypes
from expertlane.results.hardware import Cluster
from expertlane.results.record import Conditions


def conditions_of(top_k: int, execution: Execution, routing: str, types: NumberTypes) -> Conditions:
    """The conditions as records have them."""
    return Conditions(top_k, execution.value, routing, types.weights, types.kv)


def cluster_record(
    cluster: ModelledCluster,
    types: NumberTypes,
    *,
    has_two_pools: bool = False,
    has_drafts: bool = False,
) -> Cluster:
    """The cluster as results have it."""
    device = cluster.profile.device
    return Cluster(
        name=str(cluster),
        device=device.name,
        num_devices=cluster.num_devices,
        ranks_per_node=cluster.profile.ranks_per_node,
        memory_bytes=device.memory_bytes,
        memory_bytes_per_s=device.memory_bytes_per_s,
        flops_per_s=device.flops_per_s[types.weights],
        framework=cluster.profile.framework,
        judged=judged(
            cluster.profile,
            types.weights,
            has_two_pools=has_two_pools,
            has_drafts=has_drafts,
        ),
    )
