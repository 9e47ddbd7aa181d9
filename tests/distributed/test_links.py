"""Whole models over the links of GPUs, between CPUs: staged through a host, and nccl's collectives.

In float32 they give bit for bit what shared memory does, since every sum is made alike.
"""

import numpy as np
import pytest

from distributed.links import LINKS
from distributed.on_ranks import Describe, local_ranks
from distributed.running import deployment, run_deployment
from expertlane.engine.ranks.pool import RankPool
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Traffic
from expertlane.spec.workload import Workload
from parity.test_bfloat16 import BOUND_ALL_EXPERTS

TINY = PRESETS["paper-tiny"]
WORKLOAD = Workload(num_sequences=7, prompt_len=5, output_len=3, seed=7)
NUM_RANKS = 4
CASES = [
    ("tp=4,ep=4", {}),  # seven tokens on four ranks, and one in the end on each but some
    ("pp=2,dp=2,ep=2", {"num_micro_batches": 2}),
    ("dp=4,ep=4", {"overlap": True}),
    ("dp=4,ep=4", {"dispatch": "hierarchical"}),
    ("dp=4,ep=4", {"dispatch": "all_gather"}),
    ("tp=2,dp=2", {"overlap": True}),
]


def pool_with(links, transport, dtype="float32"):
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv(LINKS, links)
        variables.setenv("EXPERTLANE_TRANSPORT", transport)
        return RankPool(local_ranks(NUM_RANKS, 60.0, dtype), 60.0)


def run(pool, layout, options, model=TINY, **others):
    made = deployment(layout, **options)
    return run_deployment(
        *(pool, model, made, WORKLOAD), ranks_per_node=2, return_logits=True, **others
    )


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("links", "transport"), [("staged", "shared_memory"), ("staged", "gloo"), ("native", "gloo")]
)
def test_float32_is_the_same_bit_for_bit(pools, links, transport):
    with pool_with(links, transport) as pool:
        name = pool.call(Describe())[0][-1]
        assert name.startswith(transport)
        assert name.endswith(", staged on the host") == (links == "staged")
        padding = 0
        for layout, options in CASES:
            found, plain = run(pool, layout, options), run(pools.pool(4), layout, options)
            np.testing.assert_array_equal(found.logits, plain.logits)
            for step, same in zip(found.steps, plain.steps, strict=True):
                for ours, theirs in zip(step.outcome.records, same.outcome.records, strict=True):
                    both = ours.sent_bytes.copy(), theirs.sent_bytes
                    if links == "native":
                        padding += both[0][:, Traffic.PADDING].sum()
                        both[0][:, Traffic.PADDING] = 0
                    np.testing.assert_array_equal(*both)
                    np.testing.assert_array_equal(ours.num_collectives, theirs.num_collectives)
        assert (padding > 0) == (links == "native")


def test_bfloat16_added_up_by_the_backend(references):
    """Within the bound of bfloat16 where every expert is chosen, and not bit for bit."""
    model = TINY.with_overrides(num_experts_per_tok=TINY.num_experts)
    reference = references.run(model, WORKLOAD, 0)
    scale = np.abs(reference.logits).max()
    with pool_with("native", "gloo", "bfloat16") as pool:
        for layout in ("tp=4,ep=4", "tp=2,dp=2"):
            found = run(pool, layout, {}, model, forced=reference.tokens)
            error = np.abs(found.logits - reference.logits).max() / scale
            print(f"{layout}: error {error:.4f} of {BOUND_ALL_EXPERTS}")
            assert 1e-4 < error <= BOUND_ALL_EXPERTS
