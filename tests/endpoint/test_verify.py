"""Verdicts on toy servers: right ones, and wrong ones of every kind."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from endpoint.toy import EXPERTS, Toy, ToyReference, noisy, toy_server
from expertlane.client.connection import Url
from expertlane.client.run import Target
from expertlane.client.server import Vocabulary
from expertlane.endpoint.scored import PromptScores, Reference
from expertlane.endpoint.verdict import (
    ConditionScores,
    judge,
    rounds_as_float32,
    usual_rounding,
)
from expertlane.endpoint.verify import VerifyOptions, verify
from expertlane.errors import ExpertlaneError, UserError
from expertlane.progress import Progress
from expertlane.results.verified_record import LayerExperts, VerifiedRecord

ASKED = VerifyOptions(num_prompts=8, seed=4)
WRONG = Toy(scales=((1, 2, 3.0),))


def verified(
    toy: Toy, reference: Reference | None = None, asked: VerifyOptions = ASKED, **how: Any
) -> VerifiedRecord:
    with toy_server(toy, **how) as server:
        target = Target(Url.parse(server.url))
        return verify(target, reference or ToyReference(), "toy", asked, None, Progress())


def off(found: VerifiedRecord) -> list[str]:
    return [each.name for each in found.conditions if each.alarms]


@pytest.mark.parametrize(
    ("toy", "dtype", "source"),
    [(noisy(), "bfloat16", "checkpoint"), (Toy(), "float32", "seen")],
    ids=["bfloat16", "float32"],
)
def test_a_right_server_is_the_same(toy, dtype, source):
    found = verified(toy)
    assert (found.verdict, found.dtype, found.dtype_source) == ("same", dtype, source)
    assert len(found.conditions) == 10
    assert not off(found)
    assert found.method == "prompt_logprobs"
    assert found.least_seen is not None
    assert found.least_seen < 0.2


@pytest.mark.parametrize("noise", [0.0, 2.0**-8], ids=["float32", "bfloat16"])
def test_a_wrong_expert_is_named(noise):
    found = verified(Toy(scales=((1, 2, 3.0),), noise=noise, seed=9))
    assert found.verdict == "differs"
    assert [(each.layer, each.expert) for each in found.experts][:1] == [(1, 2)]
    assert "expert" in found.why[0]
    assert found.worst


@pytest.mark.parametrize(
    ("methods", "method"),
    [
        (("echo", "generated"), "echo"),
        (("native",), "input_token_logprobs"),
        (("generated",), "generated tokens"),
        (("prompt_logprobs",), "prompt_logprobs"),
    ],
)
def test_every_way_to_tell_log_probabilities(methods, method):
    right = verified(noisy(), methods=methods)
    assert (right.verdict, right.method) == ("same", method)
    told = [each for each in right.skipped if "scores of given tokens" in each]
    assert bool(told) == (method == "generated tokens")
    assert all("prompt_logprobs: HTTP 400 unknown field" in each for each in told)
    wrong = verified(noisy(WRONG), methods=methods)
    assert wrong.verdict == "differs"


def test_a_server_that_tells_no_log_probabilities_is_refused():
    with pytest.raises(UserError, match="tells no log-probabilities"):
        verified(Toy(), methods=())


def test_a_reference_that_scores_nothing_is_refused_at_once():
    tokens = Vocabulary(range(96))
    with toy_server(noisy()) as one, toy_server(noisy(), methods=("generated",)) as other:
        targets = [Target(Url.parse(each.url)) for each in (one, other)]
        with pytest.raises(UserError, match="can be no reference"):
            verify(*targets, "other", ASKED, tokens, Progress())
        assert len(one.asked) < 10


def test_a_server_of_fewer_tokens_gets_one_line():
    with pytest.raises(
        UserError, match=r"token 9\d is unknown. Is the reference of this model"
    ) as e:
        verified(noisy(), vocab_size=90)
    assert "\n" not in str(e.value)


def test_a_server_that_generates_tokens_which_the_reference_lacks_gets_one_line():
    with pytest.raises(UserError, match=r"generated token \d+, and the reference has 40 tokens"):
        verified(noisy(), ToyReference(vocab_size=40))


@pytest.mark.parametrize(
    ("writes_nan", "words"),
    [(False, r"null, or nothing, .*of 2\d of \d+ tokens"), (True, "NaN or Infinity")],
)
def test_tokens_without_a_log_probability_are_a_failure(writes_nan, words):
    """What is computed as NaN comes as null, and is no token that was found right."""
    with pytest.raises(ExpertlaneError, match=rf"{words}.*\(asked: alone\)") as error:
        verified(noisy(), unknown=3, writes_nan=writes_nan)
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize(("writes_nan", "words"), [(False, "null, or nothing"), (True, "NaN")])
def test_they_are_one_from_the_first_answer_on(writes_nan, words):
    """What it generates is not judged in their place."""
    with pytest.raises(ExpertlaneError, match=words) as error:
        verified(noisy(), unknown=2, unknown_beyond=0, writes_nan=writes_nan)
    assert not isinstance(error.value, UserError)


def test_what_is_wrong_under_load_alone():
    found = verified(noisy(), loaded=noisy(WRONG))
    assert found.verdict == "differs"
    assert "alone" not in off(found)
    assert {"16 at once", "32 at once"} <= set(off(found))
    assert "again, alone" not in off(found)
    assert any("under load only" in each for each in found.why)


def test_what_is_wrong_with_a_warm_cache_alone():
    # Scored prompts are computed anew in such servers; generated ones use the cache.
    with toy_server(noisy()) as server:
        right = server._which
        server._warm = noisy(WRONG)
        continued: set[tuple[int, ...]] = set()

        def which(ids: list[int], most: int) -> Toy:
            key = tuple(ids)
            server._prompts = continued if key in continued else set()
            continued.add(key)
            return right(ids, most) if server._is_generating else noisy()

        answer = server._answer

        def answered(toy: Toy, asked: dict, ids: list[int], length: int) -> bytes:
            is_scored = "prompt_logprobs" in asked
            return answer(noisy() if is_scored else toy, asked, ids, length)

        server._is_generating = True
        server._which, server._answer = which, answered
        target = Target(Url.parse(server.url))
        found = verify(target, ToyReference(), "toy", ASKED, None, Progress())
    assert found.verdict == "differs"
    assert "alone" not in off(found)
    assert "generated, cold cache" not in off(found)
    assert "generated, warm cache" in off(found)
    assert any("prefix cache" in each for each in found.why)


def test_what_is_wrong_where_prompts_begin_alike():
    """The first time that anything is in the cache, in the very first condition."""
    with toy_server(noisy()) as server:
        begun: dict[tuple[int, ...], set[tuple[int, ...]]] = {}

        def which(ids: list[int], most: int) -> Toy:
            if len(ids) != 80:
                return noisy()
            alike = begun.setdefault(tuple(ids[:64]), set())
            alike.add(tuple(ids))
            return noisy(WRONG) if len(alike) > 1 else noisy()

        server._which = which
        target = Target(Url.parse(server.url))
        found = verify(target, ToyReference(), "toy", ASKED, None, Progress())
    assert found.verdict == "differs"
    assert "generated, shared prefix" in off(found)
    assert "generated, cold cache" not in off(found)
    assert any("prefix cache" in each for each in found.why)


@pytest.mark.full  # thousands of tokens
def test_what_is_wrong_in_long_contexts_alone():
    found = verified(noisy(Toy(wrong_from=600)), ToyReference(max_len=4_096), max_len=4_096)
    assert found.verdict == "differs"
    assert found.position is not None
    assert 512 <= found.position <= 640


@dataclass(frozen=True)
class RoundedWeights(ToyReference):
    """In int8 its weights are others, and always the same ones."""

    dtype: str = "float32"

    def score_in(self, prompts, number_types, progress):
        toys = {"float32": Toy(), "int8": Toy(head=1.03)}
        return {name: [toys[name].score(each) for each in prompts] for name in number_types}


def test_a_server_of_rounded_weights_is_nearer_to_itself():
    """An error of one condition that is far below what rounding of weights does."""
    asked, small = replace(ASKED, dtype="int8"), Toy(head=0.965)
    right = verified(Toy(head=0.97), RoundedWeights(), asked)
    assert (right.verdict, right.dtype) == ("same", "int8")
    wrong = verified(Toy(head=0.97), RoundedWeights(), asked, loaded=small, limit=20)
    assert wrong.verdict == "differs"
    assert set(off(wrong)) == {"32 at once", "generated, 32 at once"}


@pytest.mark.parametrize(("moved", "is_float32"), [(0.0, True), (0.4, True), (0.6, False)])
def test_load_that_moves_most_tokens_is_not_that_of_float32(moved, is_float32):
    draw = np.random.default_rng(3)
    alone = {place: -draw.exponential(2.0, 200) for place in range(4)}
    again = ConditionScores("again, alone", alone)
    loaded = {
        place: own + np.where(draw.random(200) < moved, 1e-2, 1e-6) for place, own in alone.items()
    }
    observed = [ConditionScores("alone", alone), again, ConditionScores("16 at once", loaded)]
    assert rounds_as_float32(observed) == is_float32
    assert not rounds_as_float32([observed[0], again])  # nothing is known of other orders


def test_answers_that_change_from_request_to_request():
    found = verified(noisy(), flaky=noisy(WRONG))
    assert found.verdict == "differs"
    assert any("asked again" in each for each in found.why)


def test_another_model_is_called_that():
    found = verified(noisy(Toy(head=-1.0)))
    assert found.verdict == "differs"
    assert "another model" in found.why[0]
    assert not any("another model" in each for each in verified(noisy(WRONG)).why)


@pytest.mark.parametrize("most", [0, 1, 4])
def test_few_likely_tokens_are_enough(most):
    found = verified(noisy(), most_top=most)
    assert found.verdict == "same"
    assert any("generated" in each.name for each in found.conditions) == (most > 0)


def test_a_second_server_as_the_reference():
    tokens = Vocabulary(range(96))
    for toy, verdict in ((noisy(), "same"), (noisy(WRONG), "differs")):
        with toy_server(Toy(noise=2.0**-8)) as one, toy_server(toy) as other:
            targets = [Target(Url.parse(each.url)) for each in (other, one)]
            found = verify(*targets, "other", ASKED, tokens, Progress())
        assert found.verdict == verdict
        assert not found.experts


def test_a_flip_in_one_prompt_of_a_second_server_does_not_make_it_sensitive():
    """The tests that it passes leave the farthest prompt out; so do those with planted errors."""
    draw = np.random.default_rng(5)
    exact = [PromptScores(np.arange(200), -draw.exponential(2.0, 199)) for _ in range(24)]
    told = {
        place: each.logprobs + draw.normal(0, 0.5 if place == 7 else 0.01, 199)
        for place, each in enumerate(exact)
    }
    found = judge([ConditionScores("alone", told)], usual_rounding(exact, "bfloat16"), "bfloat16")
    assert found.verdict == "same"
    assert found.least_seen is not None
    assert found.least_seen > 5e-3


def test_nothing_is_told_where_rounding_hides_everything():
    found = verified(noisy(noise=0.5), ToyReference(noise=0.5), ASKED)
    assert found.verdict == "can't tell"
    assert "hides" in found.why[0]


def test_a_server_that_dies_gets_one_line():
    with pytest.raises(ExpertlaneError, match="no answer"):
        verified(Toy(), dies_after=30)


def test_a_budget_leaves_conditions_out_and_says_so():
    found = verified(noisy(), asked=VerifyOptions(num_prompts=8, seed=4, budget_s=0.01))
    assert found.verdict == "same"
    assert [each.name for each in found.conditions] == [
        "alone",
        "generated, cold cache",
        "generated, shared prefix",
    ]
    assert len(found.skipped) > 4


@dataclass(frozen=True)
class CountedReference(ToyReference):
    """Notes what it is asked for, and never chooses one expert of a layer."""

    never: tuple[int, int] = (1, 5)
    asked: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)

    def score_in(self, prompts, number_types, progress):
        self.asked.append((len(prompts), tuple(number_types)))
        found = super().score_in(prompts, number_types, progress)
        layer, expert = self.never
        return {name: [_without(each, layer, expert) for each in of] for name, of in found.items()}


def _without(scored: PromptScores, layer: int, expert: int) -> PromptScores:
    assert scored.topk_ids is not None
    chosen = scored.topk_ids.copy()
    chosen[layer][chosen[layer] == expert] = (expert + 1) % EXPERTS
    return replace(scored, topk_ids=chosen)


def test_experts_that_no_prompt_chose_are_told_and_the_checkpoint_is_read_once():
    reference = CountedReference()
    found = verified(noisy(), reference)
    assert found.verdict == "same"
    assert found.coverage is not None
    assert found.coverage.unreached == (LayerExperts(1, (5,)),)
    assert (found.coverage.num_layers, found.coverage.num_experts) == (3, 24)
    assert found.coverage.moe_layers == (1, 2, 3)
    ((num, types),) = reference.asked
    assert types == ("float32", "bfloat16")
    assert num > found.conditions[0].num_prompts


def test_of_a_server_that_only_generates_the_reference_is_asked_once():
    reference = CountedReference(never=(0, 0))
    found = verified(noisy(), reference, methods=("generated",))
    ((num, _),) = reference.asked
    assert num == found.conditions[0].num_prompts
    assert found.coverage is not None
    assert found.coverage.unreached[0] == LayerExperts(0, (0,))
