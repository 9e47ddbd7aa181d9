"""What a plan takes for granted, each with what changes it."""

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.memory import FREE_SHARE
from expertlane.plan.request import Setting, Traffic
from expertlane.results.plan import PlanAssumption

_FIXED = "not an option"


def plan_assumptions(
    cluster: ModelledCluster, traffic: Traffic, setting: Setting, routing: str
) -> tuple[PlanAssumption, ...]:
    """In the order of their weight.

    Args:
        routing: which experts tokens choose, in words.
    """
    num = traffic.num_sequences
    graph = setting.execution is Execution.GRAPH
    return tuple(
        PlanAssumption(*each)
        for each in (
            (
                "workload",
                f"served without end, {num:,} sequence{'' if num == 1 else 's'} at once where "
                f"they fit: {traffic.prompt_len:,} prompt + {traffic.output_len:,} output tokens",
                "--workload",
            ),
            ("routing", routing, "--routing-trace, --skew"),
            ("types", f"weights in {setting.types}", "--dtype, --kv-dtype"),
            (
                "execution",
                "a step is captured as a CUDA graph" if graph else "launched kernel by kernel",
                "--execution",
            ),
            (
                "kernels",
                "as fused as libraries have them; flat dispatch without an exchange of counts",
                _FIXED,
            ),
            (
                "TPOT",
                "mean; of one pool, others' prefills between decode steps included; of two, the "
                "transfer of keys and values",
                "one pool or two",
            ),
            (
                "TTFT",
                "to the end of a prompt's last step, which computes the first token; its mean wait "
                "in the queue (M/D/1) included",
                _FIXED,
            ),
            (
                "memory",
                f"{FREE_SHARE:.0%} of a device's {cluster.profile.device.memory_bytes / 1e9:.0f} "
                "GB; whole sequences in the cache",
                _FIXED,
            ),
            (
                "profile",
                f"{cluster.profile.name}: {cluster.profile.device.origin}",
                "--cluster",
            ),
            (
                "bounds",
                "all terms low together, all high together: wider than independent errors",
                _FIXED,
            ),
        )
    )
