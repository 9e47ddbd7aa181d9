"""Contract 1 against transformers, for any checkpoint.

Prompts of unequal lengths run in one batch; transformers' tokens are fed, so that each step is
compared by itself. Bound: 1e-4 of the largest logit.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from distributed.running import deployment, runner_on
from engine.model.families import Greedy, run_greedy
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.request import Limits
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase
from schedule.handmade import BLOCK_SIZE, paged_batch

BOUND = 1e-4
PROMPT_LENGTHS = (3, 21, 1, 12, 7)
MAX_LEN = 88


@cache
def greedy_runs(folder: Path, num_steps: int) -> list[tuple[list[int], Greedy]]:
    """Prompts, and what transformers makes of them."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(2, 97, size=n).tolist() for n in PROMPT_LENGTHS]
    return [(prompt, run_greedy(folder, prompt, num_steps)) for prompt in prompts]


def batches(dp: int, lengths: list[int], computed: list[int], tokens: list[list[int]]):
    """One batch a data-parallel rank; sequences go round."""
    of_rank = []
    for rank in range(dp):
        mine = range(rank, len(lengths), dp)
        parts = [(i, slot, computed[i], lengths[i]) for slot, i in enumerate(mine)]
        fed = np.array([t for i in mine for t in tokens[i]], dtype=np.int64)
        of_rank.append(paged_batch(parts, fed, num_slots=len(PROMPT_LENGTHS), max_len=MAX_LEN))
    return (tuple(of_rank),)


def check_against_transformers(
    pools: Any,
    folder: Path,
    model: ModelConfig,
    layout: str,
    num_steps: int,
    *,
    plain: Path | None = None,
    **options: Any,
) -> None:
    """Run a checkpoint on ranks; its logits and tokens must be transformers'.

    Args:
        model: as it is to be loaded.
        plain: the checkpoint that transformers runs; None for the same.
        options: of the deployment.
    """
    runs = greedy_runs(plain or folder, num_steps)
    chosen = deployment(layout, **options)
    limits = Limits(model.vocab_size, MAX_LEN, len(runs) * (MAX_LEN // BLOCK_SIZE), BLOCK_SIZE)
    runner = runner_on(
        pools.pool(chosen.layout.world_size),
        model,
        chosen,
        limits,
        checkpoint=folder,
    )
    lengths = [len(prompt) for prompt, _ in runs]
    fed, computed = [prompt for prompt, _ in runs], [0] * len(runs)
    scheduled = lengths
    error, num_compared = 0.0, 0
    for step in range(num_steps):
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
    num_tokens = num_steps * len(runs)
    assert num_compared >= min(0.98 * num_tokens, num_tokens - 1)  # one of few is over 2 %
