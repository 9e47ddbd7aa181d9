"""What an output must be: one of four, of a bounded size, and JSON where it is a schema."""

import pytest

from cli.screen import telling
from expertlane.errors import UserError
from expertlane.spec.sampling import MOST_CHOICE_TEXTS, MOST_DEPTH, SamplingParams, Structured


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
        ({}, "0 json_schema choice"),
        ({"regex": "a", "choice": ["b"]}, "2 of"),
        ({"regex": ""}, "regex text"),
        ({"regex": 5}, "regex 5"),
        ({"regex": "a" * 20_000}, "regex 20,000 16,384"),
        ({"grammar": "\ud800"}, "grammar surrogate"),
        ({"json_schema": "{"}, "json_schema JSON"),
        ({"json_schema": [1]}, "object boolean"),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema JSON"),
        ({"json_schema": {"enum": [b"x"]}}, "json_schema JSON"),
        ({"json_schema": nested(MOST_DEPTH + 1)}, "nested 64"),
        ({"json_schema": nested(100_000)}, "nested 64"),
        ({"json_schema": "[" * 100_000}, "json_schema JSON"),
        ({"json_schema": {"const": "x" * 300_000}}, "300,000 16,384"),
        ({"json_schema": {"enum": ["x" * 16_000 + str(n) for n in range(20)]}}, "262,144"),
        ({"json_schema": {"properties": {str(i): {} for i in range(1001)}}}, "1,001"),
        ({"grammar": "a" * 9000}, "grammar 9,000 8,192"),
        ({"regex": "a", "compact": True}, "compact json_schema regex"),
        ({"json_schema": {}, "compact": 1}, "compact 1 true false"),
        ({"choice": []}, "list texts"),
        ({"choice": "ab"}, "list texts"),
        ({"choice": ["a"] * (MOST_CHOICE_TEXTS + 1)}, "4,096"),
    ],
)
def test_what_is_not_valid(given, text):
    with pytest.raises(UserError, match=telling(text)):
        Structured(**given)


def test_params_take_nothing_else():
    with pytest.raises(UserError, match=telling("structured a Structured")):
        SamplingParams(structured="a")
