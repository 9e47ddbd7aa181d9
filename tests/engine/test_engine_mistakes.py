"""A request that cannot be served is refused in one line, and nothing else notices."""

from dataclasses import replace

import numpy as np
import pytest

from cli.screen import telling, tells
from engine.stub_runner import StubEngine, expected, letters, run
from expertlane.errors import UserError
from expertlane.spec.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=5)
SAMPLED = SamplingParams(seed=3, max_tokens=5)
PROMPT = [7, 4, 11, 11, 14]
OUTPUT = expected(PROMPT, 12)


VALID_REQUEST = (PROMPT, {})
BAD_REQUESTS = {
    "empty": (
        ([], {}),
        "request 'a': the prompt is empty; it must have 1 token or more",
    ),
    "too long for the model": (
        ([1] * 65, {}),
        "request 'a': the prompt has 65 tokens but the model takes 64; valid lengths: 1 to 64",
    ),
    "unknown token": (
        ([1, 26, 2], {}),
        "request 'a': token id 26 is not in the vocabulary; valid ids: 0 to 25",
    ),
    "negative token": (
        ([1, -1], {}),
        "request 'a': token id -1 is not in the vocabulary; valid ids: 0 to 25",
    ),
    "enormous token": (
        ([2**63], {}),
        "request 'a': token id 9223372036854775808 is not in the vocabulary; valid ids: 0 to 25",
    ),
    "fractions": (
        ([1.5], {}),
        "request 'a': the prompt must be one list of whole numbers",
    ),
    "nested": (
        ([[1, 2], [3]], {}),
        "request 'a': the prompt must be one list of whole numbers",
    ),
    "text": (
        ("hello", {}),
        "request 'a': a text needs a tokenizer; give the prompt as token ids",
    ),
    "stop strings": (
        (PROMPT, {"stop": "x"}),
        "request 'a': stop strings need a tokenizer; use stop_token_ids instead",
    ),
    "temperature": (
        (PROMPT, {"temperature": float("nan")}),
        "sampling: temperature is nan; it must be a number, 0 to 1,000,000,000",
    ),
    "top_p": (
        (PROMPT, {"top_p": 0.0}),
        "sampling: top_p is 0.0; it must be a number above 0, at most 1",
    ),
    "max_tokens": (
        (PROMPT, {"max_tokens": -5}),
        "sampling: max_tokens is -5; it must be a whole number, 1 to 2,147,483,647",
    ),
    "duplicate": (
        VALID_REQUEST,
        "request 'a' is there already; an id may be used again when its request has finished",
    ),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_a_bad_request_is_refused_in_one_line_and_changes_nothing(kind):
    (prompt, changes), line = BAD_REQUESTS[kind]
    engine = StubEngine()
    good = [engine.add(str(i), PROMPT[i:], replace(SAMPLED, max_tokens=12)) for i in range(3)]
    if kind == "duplicate":
        good.append(engine.add("a", PROMPT[3:], replace(SAMPLED, max_tokens=12)))
    for _ in range(4):  # before, between and after steps
        state = engine.scheduler.num_waiting, engine.scheduler.num_running, engine.num_blocks_used()
        with pytest.raises(UserError) as caught:
            engine.add("a", prompt, replace(GREEDY, **changes))
        assert str(caught.value) == line
        after = engine.scheduler.num_waiting, engine.scheduler.num_running, engine.num_blocks_used()
        assert after == state
        engine.step()
    chunks = run(engine)
    assert {chunk.request_id for chunk in chunks} == {output.request_id for output in good}
    for i, output in enumerate(good):
        assert output.token_ids == expected(PROMPT[i:], 12)
    # And the id is free: nothing of the refused request is left.
    again = engine.add("a", *VALID_REQUEST[:1], GREEDY)
    run(engine)
    assert again.token_ids == OUTPUT[:5]


def test_a_prompt_that_the_cache_has_no_room_for():
    engine = StubEngine(num_blocks=3, block_size=4)
    with pytest.raises(UserError) as caught:
        engine.add("a", [1] * 13, GREEDY)
    assert tells(str(caught.value), "a 13 tokens 4 blocks 3 1 12")
    assert not engine.has_unfinished


def test_an_empty_text():
    engine = StubEngine(tokenizer=letters())
    with pytest.raises(UserError, match=telling("a prompt empty")):
        engine.add("a", "", GREEDY)
    assert not engine.has_unfinished


def test_an_id_may_be_used_again_when_its_request_has_finished():
    engine = StubEngine()
    engine.add("a", PROMPT, GREEDY)
    run(engine)
    again = engine.add("a", [1, 2], GREEDY)
    run(engine)
    assert again.token_ids == expected([1, 2], 5)


def test_a_prompt_is_copied():
    engine = StubEngine()
    prompt = np.array(PROMPT)
    output = engine.add("a", prompt, GREEDY)
    prompt[:] = 0
    run(engine)
    assert output.token_ids == OUTPUT[:5]
