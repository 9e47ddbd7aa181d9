"""Prompts that reach every expert."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.client.server import Vocabulary
from expertlane.endpoint.prompts import (
    LENGTHS,
    LONG_LEN,
    _greedy,
    choose_prompts,
    count_choices,
    draw_prompts,
)
from expertlane.endpoint.reference import CheckpointReference
from expertlane.endpoint.scored import PromptScores
from expertlane.errors import UserError
from expertlane.progress import Progress

PLAIN = Vocabulary(range(97))


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
        return PromptScores(tokens, np.zeros(len(prompt) - 1), np.stack(topk))


def test_every_expert_is_reached() -> None:
    router, drawn = Router(), draw_prompts(PLAIN, max_len=4096)
    chosen = choose_prompts(router, drawn, Progress(), times=50, num_least=0)
    assert [len(prompt) for prompt in chosen.prompts[-2:]] == [LONG_LEN] * 2
    short = chosen.prompts[:-2]
    assert {len(prompt) for prompt in short} <= set(LENGTHS)
    assert len(short) < 60  # of 192 candidates
    total = np.zeros(6, dtype=int)
    for prompt in short:
        for token in prompt[:-1]:  # after the last one comes nothing that is compared
            total[[token % 6, (token + 1) % 6]] += 1
    assert (total >= 50).all()
    counts = count_choices(chosen.scored["float32"][:-2], router.num_experts)
    np.testing.assert_array_equal(counts[1], total)
    assert (counts[0, :4] >= 50).all()
    assert (counts[0, 4:] == 0).all()
    for one, prompt in zip(chosen.scored["float32"], chosen.prompts, strict=True):
        assert one.token_ids.tolist() == prompt


def test_one_that_no_prompt_reaches_is_told() -> None:
    router, drawn = Router(never=3), draw_prompts(PLAIN, max_len=64)
    chosen = choose_prompts(router, drawn, Progress(), times=5)
    counts = count_choices(chosen.scored["float32"], router.num_experts)
    assert np.argwhere(counts == 0).tolist() == [[0, 4], [0, 5], [1, 3]]  # layer 0 has four
    assert len(chosen.prompts) >= 32


def test_what_is_asked_already_counts() -> None:
    """With prompts that reach all, no candidate is needed; they come first."""
    drawn = draw_prompts(PLAIN, max_len=64)
    given = draw_prompts(PLAIN, max_len=64, seed=7, num_short=40).short
    chosen = choose_prompts(Router(), drawn, Progress(), given=given, times=5, num_least=0)
    assert chosen.prompts == given
    few = choose_prompts(Router(), drawn, Progress(), given=given[:1], times=5, num_least=12)
    assert few.prompts[0] == given[0]
    assert len(few.prompts) == 12


def test_the_checkpoint_is_read_once_for_all_number_types() -> None:
    router, drawn = Router(), draw_prompts(PLAIN, max_len=128)
    types = ("bfloat16", "int8")
    chosen = choose_prompts(router, drawn, Progress(), number_types=types)
    assert [types for _, types in router.asked] == [("float32", "bfloat16", "int8")]
    assert {len(of_type) for of_type in chosen.scored.values()} == {len(chosen.prompts)}


def test_a_seed_draws_the_same() -> None:
    one, again, other = (draw_prompts(PLAIN, max_len=4096, seed=seed) for seed in (1, 1, 2))
    assert one.short == again.short != other.short
    assert one.long == again.long != other.long
    first, second = (choose_prompts(Router(), one, Progress()) for _ in range(2))
    assert first.prompts == second.prompts


def test_lengths() -> None:
    drawn = draw_prompts(PLAIN, max_len=4096, num_short=64)
    assert {len(prompt) for prompt in drawn.short} == set(LENGTHS)
    assert [len(prompt) for prompt in drawn.long] == [LONG_LEN] * 2
    shorter = draw_prompts(PLAIN, max_len=20)
    assert {len(prompt) for prompt in shorter.short} == {8, 16, 20}
    assert not shorter.long


def test_tokens_that_are_left_out() -> None:
    drawn = draw_prompts(Vocabulary([1, 2, 4]), max_len=4096)
    assert {token for prompt in [*drawn.short, *drawn.long] for token in prompt} == {1, 2, 4}
    with pytest.raises(UserError, match="no token"):
        draw_prompts(Vocabulary([]), max_len=64)
    with pytest.raises(UserError, match="need 2 tokens"):
        draw_prompts(PLAIN, max_len=1)


@given(st.integers(0, 2**32), st.integers(0, 12), st.integers(1, 9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_cover_reaches_what_all_candidates_reach(
    seed: int, number: int, times: int, has_given: bool
) -> None:
    draw = np.random.default_rng(seed)
    counts = draw.poisson(0.7, size=(number, 2, 5)).astype(np.int64)
    lengths = draw.integers(2, 64, size=number)
    given = draw.poisson(2.0, size=(2, 5)) * has_given
    taken = _greedy(counts, lengths, times, given)
    assert len(set(taken)) == len(taken)
    reached = np.minimum(given + counts[taken].sum(axis=0), times)
    np.testing.assert_array_equal(reached, np.minimum(given + counts.sum(axis=0), times))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_prompts_of_a_checkpoint(checkpoints, family: str) -> None:
    reference = CheckpointReference(checkpoints.folder(family))
    vocabulary = Vocabulary(range(2, reference.vocab_size))
    drawn = draw_prompts(vocabulary, max_len=reference.max_len, num_short=96)
    chosen = choose_prompts(reference, drawn, Progress(), times=4)
    counts = count_choices(chosen.scored["float32"], reference.num_experts)
    assert counts.shape == (len(reference.moe_layers), 8)
    assert (counts == 0).mean() < 1 / 4  # biases drawn at random silence some
    assert not {0, 1} & {token for prompt in chosen.prompts for token in prompt}
