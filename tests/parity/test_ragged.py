"""Contract 1 for batches that a scheduler may never make, from hand-made step plans."""

import numpy as np
import pytest

from distributed.running import deployment, runner_on
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.request import Limits
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Phase
from parity.contract import check_contract
from schedule.handmade import BLOCK_SIZE, paged_batch

TINY = PRESETS["paper-tiny"]
LAYOUTS = ["tp=1", "tp=4,ep=4", "dp=2,tp=2,ep=2", "pp=2,dp=2,tp=2,ep=4", "pp=4,tp=2"]
NUM_SLOTS, MAX_LEN = 5, 12  # of each data-parallel rank

# Sequence id: all its tokens in the end, fed chunk by chunk whatever the model would choose.
RANDOM = np.random.default_rng(0)
TOKENS = {seq: RANDOM.integers(0, TINY.vocab_size, MAX_LEN) for seq in range(10)}


def batch(*parts):
    """Parts are (seq_id, slot, num_computed, num_scheduled)."""
    token_ids = [TOKENS[seq][start : start + num] for seq, _, start, num in parts]
    return paged_batch(
        parts,
        np.concatenate([np.empty(0, dtype=np.int64), *token_ids]),
        num_slots=NUM_SLOTS,
        max_len=MAX_LEN,
    )


def run_steps(pools, references, layout, steps, overlap=False):
    """Execute steps of [micro-batch][dp rank] batches; hold every last token's logits up.

    Gives how many tokens were held against the reference.

    `dp` batches are given; a layout with fewer data-parallel ranks takes the first ones only.
    """
    chosen = deployment(layout, overlap=overlap)
    dp = chosen.layout.dp
    limits = Limits(TINY.vocab_size, MAX_LEN, NUM_SLOTS * MAX_LEN // BLOCK_SIZE, BLOCK_SIZE)
    runner = runner_on(pools.pool(chosen.layout.world_size), TINY, chosen, limits)
    reference = references.model(TINY, 0)
    num_checked = 0
    for number, micro_batches in enumerate(steps):
        taken = tuple(tuple(batches[:dp]) for batches in micro_batches)
        plan = StepPlan(number, 0, Phase.PREFILL, taken, return_logits=True)
        outcome = runner.collect(runner.submit(plan))
        parts = [
            (int(seq), int(computed + scheduled))
            for batches in taken
            for each in batches
            for seq, computed, scheduled in zip(
                each.seq_ids, each.num_computed_tokens, each.num_scheduled_tokens, strict=True
            )
        ]
        assert set(outcome.token_ids) == {seq for seq, _ in parts}
        for seq, length in parts:
            check_contract(
                reference.generate(TOKENS[seq][None, :length], 1),
                outcome.logits[seq][None, None],
                np.array([[outcome.token_ids[seq]]]),
            )
            num_checked += 1
    return num_checked


EMPTY = batch()


def of_dp(layout, counts):
    """Of the counts for one and for two data-parallel ranks, the layout's."""
    return counts[Layout.parse(layout).dp - 1]


@pytest.mark.smoke(4)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_of_several_lengths(pools, references, layout, overlap):
    first = batch((0, 0, 0, 1), (1, 1, 0, 7), (2, 2, 0, 7), (3, 3, 0, 2))
    second = batch((4, 0, 0, 12))
    checked = run_steps(pools, references, layout, [[[first, second]]], overlap)
    assert checked == of_dp(layout, (4, 5))


@pytest.mark.smoke(4)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_in_chunks_beside_decoding_ones(pools, references, layout, overlap):
    steps = [
        [[batch((0, 0, 0, 4), (1, 1, 0, 3)), batch((5, 0, 0, 2))]],
        # 0 goes on by a chunk, 1 decodes, 2 begins; on the other rank 5 decodes.
        [[batch((0, 0, 4, 5), (1, 1, 3, 1), (2, 2, 0, 2)), batch((5, 0, 2, 1))]],
        [[batch((0, 0, 9, 1), (1, 1, 4, 1), (2, 2, 2, 3)), EMPTY]],
        [[EMPTY, batch((5, 0, 3, 1), (6, 1, 0, 5))]],
    ]
    checked = run_steps(pools, references, layout, steps, overlap)
    assert checked == of_dp(layout, (8, 12))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_in_any_order_and_used_again(pools, references, layout):
    steps = [
        [[batch((0, 4, 0, 3), (1, 0, 0, 3), (2, 2, 0, 3)), batch((5, 1, 0, 3))]],
        [[batch((2, 2, 3, 1), (0, 4, 3, 1), (1, 0, 3, 1)), batch((5, 1, 3, 1))]],
        # 1 is done: 3 takes its slot, with a shorter prompt than what lies there.
        [[batch((3, 0, 0, 2), (2, 2, 4, 1), (0, 4, 4, 1)), EMPTY]],
        [[batch((3, 0, 2, 1)), batch((5, 1, 4, 2))]],
    ]
    checked = run_steps(pools, references, layout, steps)
    assert checked == of_dp(layout, (10, 13))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_of_several_shapes(pools, references, layout):
    steps = [
        [
            [batch((0, 0, 0, 5), (1, 1, 0, 1)), EMPTY],
            [EMPTY, batch((5, 0, 0, 3))],
            [batch((2, 2, 0, 1)), batch((6, 1, 0, 9), (7, 2, 0, 1))],
        ],
        [
            [batch((2, 2, 1, 4)), batch((7, 2, 1, 1))],
            [batch((1, 1, 1, 1)), EMPTY],
        ],
    ]
    checked = run_steps(pools, references, layout, steps, overlap=True)
    assert checked == of_dp(layout, (5, 9))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_without_any_token(pools, references, layout):
    steps = [
        [[EMPTY, EMPTY]],
        [[batch((0, 0, 0, 2)), EMPTY]],
        [[EMPTY, EMPTY], [EMPTY, EMPTY]],
        [[batch((0, 0, 2, 1)), EMPTY]],
    ]
    checked = run_steps(pools, references, layout, steps, overlap=True)
    assert checked == of_dp(layout, (2, 2))
