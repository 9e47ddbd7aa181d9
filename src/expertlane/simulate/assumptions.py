"""What a simulation takes for granted, by name, and which option changes it."""

from expertlane.cost.laws.execution import DRIVER_S, OVERHEAD_S, Execution
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.routing import RoutingChoice
from expertlane.memory import FREE_SHARE
from expertlane.results.simulation import SimulationAssumption
from expertlane.simulate.setup import ServingSetup, are_apart

_HOW = {
    Execution.GRAPH: "a micro-batch's kernels are launched at once, as captured graphs",
    Execution.EAGER: "the host launches every kernel, ahead of the device",
    Execution.SERIAL: "a CPU's calls and its work take turns; the profile has no other way",
}


def assumptions(
    setup: ServingSetup,
    cluster: ModelledCluster,
    execution: Execution,
    routing: RoutingChoice,
    caution: str | None = None,
) -> tuple[SimulationAssumption, ...]:
    """In the order in which a reader would ask.

    Args:
        caution: what there is to be known of the weights, in a sentence.
    """
    beside = caution or "hidden states are bfloat16 beside float8"
    rows = [
        ("weights", setup.types.weights, "--dtype", beside),
        ("keys and values", setup.types.kv, "--kv-dtype", "as hidden states, if not said"),
        ("execution", execution.value, "--execution", _HOW[execution]),
        ("routing", routing.option, "--routing-trace, --skew", routing.words),
        (
            "step",
            f"{setup.max_num_batched_tokens} tokens, {setup.max_num_seqs} sequences",
            "--max-num-batched-tokens, --max-num-seqs",
            "of a data-parallel rank at most; prompts go in chunks beside decodes",
        ),
        (
            "memory",
            f"{FREE_SHARE:.0%} of a device",
            "",
            "the rest is for the framework; a sequence is admitted when its blocks are free",
        ),
        (
            "ranks",
            f"{cluster.profile.ranks_per_node} a node, in order",
            "--cluster",
            "tensor-parallel ranks are innermost, so that they share a node",
        ),
        ("prompts", "nothing in common", "", "no prefix is found in the cache"),
        ("outputs", "of full length", "--output-len", "no end of sequence comes before"),
        (
            "between steps",
            f"{1e3 * cluster.profile.terms[DRIVER_S].value:.3g} ms",
            "--cluster",
            "scheduling and sending a plan; not hidden behind the step before",
        ),
    ]
    if OVERHEAD_S not in cluster.profile.terms:
        rows.append(
            ("kernels", "of GPU libraries", "", "fused as there, not one for each tensor operation")
        )
    rows += _pools(setup, cluster) + _multi_token(setup)
    return tuple(SimulationAssumption(*row) for row in rows)


def _pools(setup: ServingSetup, cluster: ModelledCluster) -> list[tuple[str, str, str, str]]:
    if setup.prefill_layout is None:
        return []
    where = "on other nodes" if are_apart(cluster, setup) else "on the same node"
    return [
        (
            "two pools",
            f"{setup.prefill_layout} prefills, {setup.layout} decodes",
            "--prefill-layout",
            "each with its own scheduler, and as if it began on a node's first device",
        ),
        (
            "key/value transfer",
            where,
            "--prefill-layout",
            "after the prompt and its first token (TTFT ends there, TPOT has the transfer), one "
            "request after the other, beside both pools' own work",
        ),
    ]


def _multi_token(setup: ServingSetup) -> list[tuple[str, str, str, str]]:
    drafts = setup.multi_token
    if not drafts.num_drafts:
        return []
    return [
        (
            "multi-token prediction",
            f"{drafts.num_drafts} drafts, {drafts.acceptance:g} right: "
            f"{drafts.tokens_per_step:.3g} tokens a step",
            "--mtp, --mtp-acceptance",
            f"a decode takes {1 + drafts.num_drafts} tokens through the model, then "
            f"{drafts.num_drafts} passes of one more layer and the head; every step of every "
            "sequence yields the average; the scheduler's cache is cut to fill up as early",
        )
    ]
