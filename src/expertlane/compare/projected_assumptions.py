"""What a projection takes for granted, and which option changes it."""

from collections.abc import Sequence

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.number_types import NumberTypes
from expertlane.memory import FREE_SHARE
from expertlane.plan.project import StepSize
from expertlane.results.assumption import Assumption
from expertlane.spec.experiment import Experiment
from expertlane.spec.names import Link


def projected_assumptions(
    experiment: Experiment,
    cluster: ModelledCluster,
    types: NumberTypes,
    skew: float,
    executions: Sequence[Execution],
    prefill: StepSize,
) -> tuple[Assumption, ...]:
    """One row for each; `why` names the option that changes it, or says that none does."""
    rows = [
        *_of_cluster(cluster),
        Assumption(
            "execution",
            " and ".join(executions),
            "both are shown; the main tables have the first: graph launches a step's kernels at "
            "once, eager each by itself"
            if len(executions) > 1
            else "a CPU's calls and its work take turns",
        ),
        Assumption(
            "kernels",
            "as fused as those of GPU libraries; an estimate",
            "no option; the engine's own are more and smaller (cost/step/kernel_sets.py)",
        ),
        Assumption(
            "flat dispatch",
            "sends no counts before rows",
            "no option; kernels with buffers of a static size need none and can be captured",
        ),
        Assumption(
            "routing",
            f"balanced: uniform; skewed: popularity falls with rank to the power of -{skew:g}",
            "--skew; experts are drawn for each token, so balanced loads scatter as well",
        ),
        Assumption(
            "decode step",
            f"all {experiment.workload.num_sequences:,} sequences, one token each, all at the "
            "same context",
            "the experiment's num_sequences; TPS × TPOT is then their number",
        ),
        Assumption(
            "prefill step",
            f"{prefill.num_seqs * prefill.num_new:,} tokens over the system: {prefill.num_seqs} "
            f"prompts × {prefill.num_new}, {prefill.num_cached:,} positions before each",
            "no option; as large as a measured comparison's, half way through a prompt",
        ),
        Assumption(
            "memory",
            f"{FREE_SHARE:.0%} of a device's may be taken",
            "no option; the rest is the framework's",
        ),
        *_of_types(types),
        *_of_sizes(experiment),
    ]
    if any(each.options.rebalance_steps for each in experiment.deployments):
        rows.append(Assumption("rebalancing", "none", "no option; experts stay where they begin"))
    return tuple(rows)


def _of_cluster(cluster: ModelledCluster) -> list[Assumption]:
    profile, device = cluster.profile, cluster.profile.device
    bases = {each.basis for each in profile.surfaces.values()}
    bases |= {each.basis for each in profile.terms.values()}
    near, far = (
        f"{profile.links[link].bytes_per_s / 1e9:g} GB/s" if link in profile.links else "no figure"
        for link in (Link.INTRA_NODE, Link.INTER_NODE)
    )
    return [
        Assumption(
            "cluster",
            f"{cluster}: {device.name}, {cluster.profile.ranks_per_node} a node; "
            f"{near} inside a node, {far} between nodes, a device and direction",
            "--cluster",
        ),
        Assumption(
            "profile",
            f"{profile.name}: {', '.join(each.label for each in sorted(bases))}",
            "--cluster; measured: on the machine itself; fitted: to published measurements; "
            "bound: a datasheet's limit or an assumption, with wide bounds",
        ),
    ]


def _of_types(types: NumberTypes) -> list[Assumption]:
    rows = [Assumption("number type", str(types), "--dtype")]
    if types.weights == "float16":
        rows.append(
            Assumption(
                "float16",
                "takes as long as bfloat16",
                "--dtype bfloat16; published tables have no float16, so it counts as bound and "
                "is 15% wider",
            )
        )
    return rows


def _of_sizes(experiment: Experiment) -> list[Assumption]:
    model = experiment.model
    return [
        Assumption(
            "sizes never measured",
            f"experts {model.moe_intermediate_size:,} wide, heads of {model.head_dim}",
            "the profile's laws go on from the nearest sizes that were fitted, with wider bounds "
            "for every doubling beyond; the share of time that lies outside is in the tables",
        )
    ]
