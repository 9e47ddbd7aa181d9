"""Data-parallel ranks without requests: what they compute, and what it costs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost.projected import MODEL, PROFILE, program_of, term
from expertlane.cost.laws.profile import LIKELY, Execution, Terms
from expertlane.cost.step.batch_sizes import PartSizes, Scenarios
from expertlane.cost.step.operation import OpKind
from expertlane.cost.step.step_list import ENGINE, GPU_LIBRARIES
from expertlane.spec.layout import Layout


@given(
    num_seqs=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    tp=st.integers(1, 4),
    num_drafts=st.integers(0, 3),
)
def test_every_rank_has_a_token(num_seqs, tp, num_drafts):
    part = PartSizes.even(len(num_seqs), tp, num_seqs, 1, 7, num_drafts)
    filled = part.with_dummies()
    seqs_of_rank = np.bincount(filled.dp_rank, minlength=len(num_seqs)).tolist()
    assert seqs_of_rank == [max(num, 1) for num in num_seqs]
    assert (np.diff(filled.dp_rank) >= 0).all()
    tokens = filled.tokens.reshape(-1, tp)[:, 0]
    assert tokens.tolist() == [(1 + num_drafts) * max(num, 1) for num in num_seqs]
    busy = np.array(num_seqs) > 0
    for name in ("tokens", "owned", "num_yielding", "owned_yielding"):
        before, after = (getattr(each, name).reshape(-1, tp)[busy] for each in (part, filled))
        np.testing.assert_array_equal(before, after, name)
    positions = filled.attention(None).decode_positions.reshape(-1, tp)[:, 0]
    alone = [num * (8 + num_drafts) if num else 1 + num_drafts for num in num_seqs]
    assert positions.tolist() == alone


def pairs(kernels, num_seqs):
    """Token-expert pairs of all ranks, in the first layer."""
    num = len(num_seqs)
    part = PartSizes.even(num, 1, num_seqs, 1, 10)
    program = program_of(Layout(dp=num, ep=num), part, kernels=kernels)
    (steps,) = [section.steps for section in program.stages[0][0].parts[0] if section.layer == 0]
    return sum(int(step.sizes["pairs"].sum()) for step in steps if step.kind is OpKind.EXPERTS)


def test_dummy_batches_go_to_experts_as_others_do():
    top_k = MODEL.num_experts_per_tok
    assert pairs(GPU_LIBRARIES, [2, 0, 0, 1]) == 5 * top_k
    assert pairs(ENGINE, [2, 0, 0, 1]) == 3 * top_k
    for kernels in (ENGINE, GPU_LIBRARIES):
        assert pairs(kernels, [2, 1, 1, 1]) == 5 * top_k


def test_one_rank_that_stands_for_all_knows_of_idle_ones():
    num = np.array([1, 1, 3])
    part = Scenarios(1, num, np.ones_like(num), 9 * num, np.array([3, 8, 24]), dp=8)
    assert part.stage_tokens.tolist() == [3 + 5, 8, 24]
    drafted = replace(part, num_new=3 * np.ones_like(num), num_drafts=2)
    assert drafted.stage_tokens.tolist() == [3 * (3 + 5), 24, 72]


@pytest.mark.parametrize(("dp", "doublings"), [(1, 0), (2, 1), (8, 3), (32, 5)])
def test_schedulers_of_data_parallel_ranks_agree_before_a_step(dp, doublings):
    profile = replace(PROFILE, terms={**PROFILE.terms, "dp_sync_s": term(1e-4)})
    terms = Terms.of(profile, Execution.GRAPH)
    alone, together = terms.step_s(Layout(tp=dp)), terms.step_s(Layout(dp=dp, ep=dp))
    assert (together - alone)[LIKELY] == pytest.approx(doublings * 1e-4)
    low, _, high = together - alone
    assert (low, high) == pytest.approx((doublings * 0.5e-4, doublings * 2e-4))


def test_where_one_driver_plans_for_all_nothing_is_to_agree_on():
    profile = replace(PROFILE, terms={**PROFILE.terms, "overhead_s": term(1e-6)})
    terms = Terms.of(profile, Execution.GRAPH)
    assert terms.step_s(Layout(dp=8)).tolist() == terms.step_s(Layout(tp=8)).tolist()
