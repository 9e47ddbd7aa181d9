"""Prompts that reach every expert."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.endpoint.prompts import (
    LENGTHS,
    LONG_LEN,
    Vocabulary,
    _greedy,
    choose_prompts,
    spread_prompts,
)
from expertlane.endpoint.reference import CheckpointReference
from expertlane.endpoint.scored import Scored
from expertlane.errors import UserError
from expertlane.progress import Progress

PLAIN = Vocabulary(97)


@dataclass
class Router:
    """A reference whose layers choose experts by the token alone."""

    num_experts: tuple[int, ...] = (4, 6)
    never: int | None = None
    asked: list = field(default_factory=list)

    def score_in(self, prompts, number_types, progress):
        self.asked.append((len(prompts), tuple(number_types)))
        return {name: [self._one(prompt) for prompt in prompts] for name in number_types}

    def _one(self, prompt):
        tokens = np.array(prompt)
        topk = [np.stack([tokens % n, (tokens + 1) % n], axis=1) for n in self.num_experts]
        if self.never is not None:
            topk[1][topk[1] == self.never] = (self.never + 1) % self.num_experts[1]
        return Scored(tokens, np.zeros(len(prompt) - 1), np.stack(topk))


def test_every_expert_is_reached() -> None:
    router = Router()
    chosen = choose_prompts(router, PLAIN, Progress(), max_len=4096, times=50, num_least=0)
    assert chosen.unreached == []
    assert chosen.num_long == 2
    assert [len(prompt) for prompt in chosen.prompts[-2:]] == [LONG_LEN] * 2
    assert {len(prompt) for prompt in chosen.prompts[:-2]} <= set(LENGTHS)
    assert chosen.counts is not None
    assert chosen.counts.shape == (2, 6)
    assert (chosen.counts[0, 4:] == -1).all()
    # A fresh count says the same.
    (again,) = [router._one(prompt).topk_ids for prompt in chosen.prompts[:1]]
    assert again.max() < 6
    total = sum(
        np.bincount(router._one(prompt).topk_ids[1].ravel(), minlength=6)
        for prompt in chosen.prompts
    )
    np.testing.assert_array_equal(chosen.counts[1], total)
    assert (total >= 50).all()
    assert len(chosen.prompts) < 60  # of 192 candidates
    for one, prompt in zip(chosen.scored["float32"], chosen.prompts, strict=True):
        assert one.token_ids.tolist() == prompt


def test_one_that_no_prompt_reaches_is_told() -> None:
    chosen = choose_prompts(Router(never=3), PLAIN, Progress(), max_len=64, times=5)
    assert chosen.unreached == [(1, 3)]
    assert chosen.num_long == 0
    assert len(chosen.prompts) >= 32


def test_the_checkpoint_is_read_once_for_all_number_types() -> None:
    router = Router()
    types = ("bfloat16", "int8")
    chosen = choose_prompts(router, PLAIN, Progress(), max_len=128, number_types=types)
    assert [types for _, types in router.asked] == [("float32", "bfloat16", "int8")]
    assert {len(of_type) for of_type in chosen.scored.values()} == {len(chosen.prompts)}


def test_a_seed_draws_the_same() -> None:
    one, again, other = (
        choose_prompts(Router(), PLAIN, Progress(), max_len=4096, seed=seed) for seed in (1, 1, 2)
    )
    assert one.prompts == again.prompts != other.prompts


def test_without_a_router() -> None:
    chosen = spread_prompts(PLAIN, max_len=4096)
    assert len(chosen.prompts) == 66
    assert chosen.counts is None
    assert chosen.unreached == []
    assert {len(prompt) for prompt in chosen.prompts} == {*LENGTHS, LONG_LEN}
    assert {len(prompt) for prompt in spread_prompts(PLAIN, max_len=20).prompts} == {8, 16, 20}


def test_tokens_that_are_left_out() -> None:
    chosen = spread_prompts(Vocabulary(5, without=(0, 3)), max_len=4096)
    assert {token for prompt in chosen.prompts for token in prompt} == {1, 2, 4}
    with pytest.raises(UserError, match="no token"):
        spread_prompts(Vocabulary(2, without=(0, 1)), max_len=64)
    with pytest.raises(UserError, match="need 2 tokens"):
        spread_prompts(PLAIN, max_len=1)


@given(st.integers(0, 2**32), st.integers(0, 12), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_cover_reaches_what_all_candidates_reach(seed: int, number: int, times: int) -> None:
    draw = np.random.default_rng(seed)
    counts = draw.poisson(0.7, size=(number, 2, 5)).astype(np.int64)
    lengths = draw.integers(2, 64, size=number)
    taken = _greedy(counts, lengths, times)
    assert len(set(taken)) == len(taken)
    reached = np.minimum(counts[taken].sum(axis=0), times)
    np.testing.assert_array_equal(reached, np.minimum(counts.sum(axis=0), times))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_prompts_of_a_checkpoint(checkpoints, family: str) -> None:
    reference = CheckpointReference(checkpoints.folder(family))
    vocabulary = Vocabulary(reference.vocab_size, without=(0, 1))
    chosen = choose_prompts(
        reference, vocabulary, Progress(), max_len=reference.max_len, times=4, num_candidates=96
    )
    assert chosen.counts is not None
    never = {place for place in chosen.unreached if chosen.counts[place] == 0}
    assert len(never) < chosen.counts.size / 4  # biases drawn at random silence some
    assert not {0, 1} & {token for prompt in chosen.prompts for token in prompt}
