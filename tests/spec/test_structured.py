"""What an output must be: one of four, of a bounded size, and JSON where it is a schema."""

import pytest

from expertlane.errors import UserError
from expertlane.spec.sampling import SamplingParams
from expertlane.spec.structured import MOST_CHOICES, MOST_DEPTH, Structured


def nested(depth):
    schema = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_a_schema_is_kept_as_text():
    assert Structured(json_schema={"type": "string"}) == Structured(json_schema='{"type":"string"}')
    assert Structured(json_schema=False).json_schema == "false"
    assert Structured(json_schema=nested(MOST_DEPTH)).kind == "json_schema"
    assert Structured(choice=["a", "b"]).choice == ("a", "b")
    assert SamplingParams(temperature=0, structured=Structured(regex="a")).needs_logits


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "0 of json_schema, regex, grammar, choice are given"),
        ({"regex": "a", "choice": ["b"]}, "2 of"),
        ({"regex": ""}, "regex is ''; it must be a text"),
        ({"regex": 5}, "regex is 5"),
        ({"regex": "a" * 20_000}, "regex has 20,000 characters; at most 16,384"),
        ({"grammar": "\ud800"}, "grammar holds half a surrogate pair"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"json_schema": [1]}, "must be an object or a boolean"),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema is no JSON"),
        ({"json_schema": {"enum": [b"x"]}}, "json_schema is no JSON"),
        ({"json_schema": nested(MOST_DEPTH + 1)}, "nested more than 64 deep"),
        ({"json_schema": nested(100_000)}, "nested more than 64 deep"),
        ({"json_schema": "[" * 100_000}, "json_schema is no JSON"),
        ({"json_schema": {"const": "x" * 300_000}}, "at most 262,144"),
        (
            {"json_schema": {"properties": {str(i): {} for i in range(1001)}}},
            "has 1,001 pro",
        ),
        ({"grammar": "a" * 9000}, "grammar has 9,000 characters; at most 8,192"),
        ({"choice": []}, "it must be a list of texts"),
        ({"choice": "ab"}, "it must be a list of texts"),
        ({"choice": ["a"] * (MOST_CHOICES + 1)}, "at most 4,096"),
    ],
)
def test_what_is_not_valid(given, text):
    with pytest.raises(UserError, match=text):
        Structured(**given)


def test_params_take_nothing_else():
    with pytest.raises(UserError, match="structured is 'a'; it must be Structured"):
        SamplingParams(structured="a")
