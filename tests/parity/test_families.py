"""Contract 1 against transformers, for a checkpoint of every family.

Prompts of unequal lengths run in one batch; transformers' tokens are fed, so that each step is
compared by itself. Bound: 1e-4 of the largest logit.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from distributed.running import deployment
from expertlane.engine.model_runner import ModelRunner
from expertlane.model.checkpoint import Checkpoint
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload
from model.families import FAMILIES, Greedy, run_greedy

BOUND = 1e-4
NUM_STEPS = 64
PROMPT_LENGTHS = (3, 21, 1, 12, 7)
LAYOUTS = ("tp=1", "dp=4,ep=4", "tp=2,ep=2", "pp=2,dp=2,ep=2", "tp=4")


@cache
def greedy_runs(folder: Path) -> list[tuple[list[int], Greedy]]:
    """Prompts, and what transformers makes of them."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(2, 97, size=n).tolist() for n in PROMPT_LENGTHS]
    return [(prompt, run_greedy(folder, prompt, NUM_STEPS)) for prompt in prompts]


def batches(dp: int, lengths: list[int], computed: list[int], tokens: list[list[int]]):
    """One batch a data-parallel rank; sequences go round."""
    of_rank = []
    for rank in range(dp):
        mine = range(rank, len(lengths), dp)
        of_rank.append(
            Batch(
                seq_ids=np.array(mine, dtype=np.int64),
                slots=np.arange(len(mine)),
                num_scheduled_tokens=np.array([lengths[i] for i in mine], dtype=np.int64),
                num_computed_tokens=np.array([computed[i] for i in mine], dtype=np.int64),
                token_ids=np.array([t for i in mine for t in tokens[i]], dtype=np.int64),
            )
        )
    return (tuple(of_rank),)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_logits_and_tokens(pools, checkpoints, family: str, layout: str) -> None:
    folder = checkpoints.folder(family)
    runs = greedy_runs(folder)
    chosen = deployment(layout)
    room = Workload(len(runs) * chosen.layout.dp, max(PROMPT_LENGTHS) + NUM_STEPS, 1)
    runner = ModelRunner(
        pools.pool(chosen.layout.world_size),
        Checkpoint(folder).model,
        chosen,
        room,
        seed=0,
        ranks_per_node=8,
        checkpoint=folder,
    )
    lengths = [len(prompt) for prompt, _ in runs]
    fed, computed = [prompt for prompt, _ in runs], [0] * len(runs)
    scheduled = lengths
    error, num_compared = 0.0, 0
    for step in range(NUM_STEPS):
        phase = Phase.DECODE if step else Phase.PREFILL
        plan = StepPlan(
            step, 0, phase, batches(chosen.layout.dp, scheduled, computed, fed), return_logits=True
        )
        outcome = runner.collect(runner.submit(plan))
        for seq, (_, greedy) in enumerate(runs):
            expected = greedy.logits[step].numpy()
            scale = np.abs(expected).max()
            error = max(error, float(np.abs(outcome.logits[seq] - expected).max() / scale))
            second, first = np.sort(expected)[-2:]
            if first - second > BOUND * scale:
                num_compared += 1
                assert outcome.token_ids[seq] == greedy.token_ids[step], (seq, step)
        computed = [done + new for done, new in zip(computed, scheduled, strict=True)]
        scheduled = [1] * len(runs)
        fed = [[greedy.token_ids[step]] for _, greedy in runs]
    assert error <= BOUND
    assert num_compared >= 0.98 * NUM_STEPS * len(runs)
