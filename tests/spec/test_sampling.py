import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from cli.screen import telling
from expertlane.errors import UserError
from expertlane.spec.sampling import SamplingParams

NAN, INF = float("nan"), float("inf")


def test_defaults_draw_from_the_model_s_own_distribution():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert params.seed is None
    assert not params.is_greedy
    assert params.needs_logits


@pytest.mark.parametrize(
    ("asked", "needs_logits"),
    [
        ({}, False),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 3, "stop": "x"}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"logprobs": 0}, True),
        ({"temperature": 0.1}, True),
    ],
)
def test_plain_greedy_needs_no_logits(asked, needs_logits):
    params = SamplingParams(**({"temperature": 0} | asked))
    assert params.needs_logits is needs_logits
    assert params.is_greedy is ("temperature" not in asked)


def test_a_number_of_many_digits_is_not_written_out():
    with pytest.raises(UserError, match=telling("seed 9,001 digits")):
        SamplingParams(seed=10**9000)


@pytest.mark.parametrize(
    ("name", "values", "valid"),
    [
        ("ignore_eos", [None, 1, "yes"], "true false"),
        ("stop", [None, 5, b"x"], "list empty"),
        ("stop_token_ids", [None, 5, "5"], "list whole"),
        ("logit_bias", [None, 5, "x", [5], [(1, 2, 3)]], "pairs token id number"),
        ("min_tokens", [257], "max_tokens 256"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_one_line(name, values, valid):
    for value in values:
        with pytest.raises(UserError, match=telling(f"{name} {value!r} {valid}")):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "values", "line"),
    [
        ("stop", "", "string empty"),
        ("stop", ["end", ""], "string empty"),
        ("stop", ["end", 3], "3 string empty"),
        ("stop_token_ids", [1, True], "True 0 2,147,483,647"),
        ("stop_token_ids", [1, 2.0], "2.0 0 2,147,483,647"),
        ("stop_token_ids", [-1], "-1 0 2,147,483,647"),
        ("stop_token_ids", np.array([1.5]), "1.5 0 2,147,483,647"),
    ],
)
def test_a_bad_value_in_a_list_is_named(name, values, line):
    with pytest.raises(UserError, match=telling(f"{name} {line}")):
        SamplingParams(**{name: values})


def test_values_are_kept_in_one_form():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_p=Fraction(1, 2),
        top_k=np.int64(3),
        stop="end",
        stop_token_ids=np.array([7, 9]),
    )
    same = SamplingParams(temperature=0.5, top_p=0.5, top_k=3, stop=["end"], stop_token_ids=[7, 9])
    assert params == same
    assert hash(params) == hash(same)
    for name in ("temperature", "top_p", "top_k"):
        assert type(getattr(params, name)) is type(getattr(same, name))
    assert (params.stop, params.stop_token_ids) == (("end",), (7, 9))
    assert dataclasses.replace(params, temperature=0).is_greedy


def test_a_bias_is_a_mapping_or_pairs():
    assert SamplingParams(logit_bias={5: 1, 7: -2.5}).logit_bias == ((5, 1.0), (7, -2.5))
    assert SamplingParams(logit_bias=[(5, 1)]) == SamplingParams(logit_bias={5: 1})


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        ({-1: 1}, "token logit_bias -1 0 2,147,483,647"),
        ({1: 101}, "number logit_bias 101 -100 100"),
        ({1: NAN}, "number logit_bias nan -100 100"),
    ],
)
def test_a_bad_bias_is_named(bias, words):
    with pytest.raises(UserError, match=telling(words)):
        SamplingParams(logit_bias=bias)


@pytest.mark.parametrize(
    ("params", "needs"),
    [
        ({"min_tokens": 3}, True),
        ({"min_tokens": 3, "ignore_eos": True}, False),
        ({"min_tokens": 3, "ignore_eos": True, "stop_token_ids": [5]}, True),
        ({"logit_bias": {5: 1}}, True),
    ],
)
def test_what_changes_logits_needs_them(params, needs):
    assert SamplingParams(temperature=0, **params).needs_logits == needs
