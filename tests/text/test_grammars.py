"""Grammars for tokenizers of both kinds: masks let the right texts through, and end outputs."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from cli.screen import telling
from engine.stub_runner import letters
from expertlane.errors import UserError
from expertlane.spec.sampling import SamplingParams
from expertlane.spec.structured import Structured
from expertlane.text.grammars import Grammars
from expertlane.text.json_schemas import for_library
from expertlane.text.tokenizer import Tokenizer

SPARE = 40  # tokens that the model has and the tokenizer lacks


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {each: i for i, each in enumerate([*alphabet, "ab", "Ġa"])}
    core = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("Ġ", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["</s>", "<x>"])
    return core


def sentencepiece():
    """As Llama 2 and Mistral have it: metaspaces, and bytes for what is no token."""
    vocab = {"<unk>": 0, "<x>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for text in ["▁", *'{}":,abc12', "▁a", "ab", "▁ab"]:
        vocab[text] = len(vocab)
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    core = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens(["<unk>", "<x>", "</s>"])
    return core


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def tokenizer(request):
    core = request.param()
    return Tokenizer(core, [core.token_to_id("</s>")])


def made(tokenizer, eos=None):
    eos = tokenizer.eos_token_ids if eos is None else eos
    return Grammars(tokenizer, tokenizer.vocab_size + SPARE, eos)


def allowed(constraint):
    return set(np.flatnonzero(np.unpackbits(constraint.mask, bitorder="little")).tolist())


def walk(grammars, tokenizer, text, **params):
    """The tokens of a text, each the longest that is let through; the constraint after them."""
    given = SamplingParams(**params)
    constraint = grammars.begin(given, given.stop_token_ids)
    rest = text.encode()
    while rest:
        options = {bytes_of(tokenizer, each): each for each in allowed(constraint)}
        size = max(len(each) for each in options if each and rest.startswith(each))
        token, rest = options[rest[:size]], rest[size:]
        grammars.advance([(constraint, token)]).result()
        assert constraint.error is None
    return constraint


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [each for each in range(256) if each not in _PRINTABLE]
_BYTES = {chr(each): each for each in _PRINTABLE}  # of GPT-2's letters for them
_BYTES |= {chr(256 + place): each for place, each in enumerate(_OTHERS)}


def bytes_of(tokenizer, token):
    """Of a token of text; empty for others."""
    name = tokenizer.name(token)
    if name is None or token in tokenizer.special_token_ids:
        return b""
    if tokenizer.byte_tokens:
        return tokenizer.byte_tokens.get(token) or name.replace("▁", " ").encode()
    return bytes(_BYTES[each] for each in name)


SCHEMA = {
    "type": "object",
    "properties": {"ä b": {"type": "integer", "minimum": 5, "maximum": 60}},
    "required": ["ä b"],
    "additionalProperties": False,
}
PETS = {  # as pydantic writes a union with a discriminator, and pydantic-ai leaves it
    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
    "$defs": {
        name: {
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "kind": {"const": name, "type": "string"}},
            "required": ["a", "kind"],
            "additionalProperties": False,
        }
        for name in ("Cat", "Dog")
    },
}
FORMS = [
    ({"json_schema": SCHEMA}, '{"ä b": 47}', True),
    ({"json_schema": PETS}, '{"a": true, "kind": "Dog"}', True),
    ({"regex": "a+ü?"}, "aaü", True),
    ({"regex": "a+"}, "aa", False),
    ({"choice": ["no", "nope ü"]}, "nope ü", True),
    ({"grammar": 'start: "(" start ")" | "a"'}, "((a))", True),
    ({"grammar": 'root ::= "a" root | "b"'}, "aab", True),
    ({"regex": "a", "lead": "</t>"}, "any</t>\n\na", True),
    ({"regex": "a", "lead": "</t>", "may_lead": "<t>", "prefix": "!"}, "!a", True),
    ({"regex": "a", "lead": "</t>", "may_lead": "<t>", "prefix": "!"}, "<t></t>!a", True),
]


@pytest.mark.parametrize(("form", "text", "is_ended"), FORMS)
def test_a_text_that_fits(tokenizer, form, text, is_ended):
    grammars = made(tokenizer)
    constraint = walk(grammars, tokenizer, text, structured=Structured(**form))
    assert constraint.is_ended is is_ended
    if not is_ended:
        assert tokenizer.eos_token_ids <= allowed(constraint)


def test_what_does_not_fit_is_not_let_through(tokenizer):
    constraint = walk(made(tokenizer), tokenizer, "", structured=Structured(regex="ab"))
    names = {tokenizer.decode([each]) for each in allowed(constraint)}
    assert names <= {"a", "ab"}
    assert "ab" in names
    (x,) = {each for each in tokenizer.special_token_ids if tokenizer.name(each) == "<x>"}
    grammars = made(tokenizer)
    grammars.advance([(constraint, x)]).result()
    assert constraint.error


def test_ends_are_held_while_others_can_follow(tokenizer):
    grammars, structured = made(tokenizer), Structured(regex="a{1,3}")
    (eos,) = tokenizer.eos_token_ids
    assert eos in allowed(walk(grammars, tokenizer, "a", structured=structured))
    held = walk(grammars, tokenizer, "a", structured=structured, min_tokens=2)
    assert eos not in allowed(held)
    assert eos in allowed(walk(grammars, tokenizer, "aa", structured=structured, min_tokens=2))
    ignored = walk(grammars, tokenizer, "aa", structured=structured, ignore_eos=True)
    assert eos not in allowed(ignored)
    assert walk(grammars, tokenizer, "aaa", structured=structured, ignore_eos=True).is_ended


def test_a_tokenizer_without_an_end(tokenizer):
    constraint = walk(made(tokenizer, ()), tokenizer, "a", structured=Structured(regex="ab?"))
    assert max(allowed(constraint)) < tokenizer.vocab_size
    assert walk(made(tokenizer, ()), tokenizer, "ab", structured=Structured(regex="ab?")).is_ended


def test_grammars_are_compiled_once_while_they_are_kept(tokenizer):
    grammars = made(tokenizer)
    first = grammars.compile(Structured(regex="a"))
    assert grammars.known(Structured(regex="b")) is None
    assert grammars.compile(Structured(regex="a")) is first


DOUBLING = "\n".join(["start: A0", *(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)), 'A60: "a"'])


@pytest.mark.parametrize(
    "form",
    [
        {"json_schema": {"type": "unheard of"}},
        {"json_schema": {"not": {}}},
        {"json_schema": {"$ref": "#"}},
        {"json_schema": PETS | {"oneOf": PETS["oneOf"][:1] * 2}},
        {"json_schema": False},
        {"json_schema": {"type": "string", "format": "of mine"}},
        {"regex": "("},
        {"regex": "(" * 5000},
        {"grammar": "start: nobody"},
        {"grammar": "start: " + "(" * 5000},
        {"grammar": "root ::= ("},
        {"grammar": "nothing"},
        {"grammar": DOUBLING},
        {"grammar": DOUBLING.replace(" A", "| A")},
    ],
)
def test_what_cannot_be_compiled(tokenizer, form):
    (kind,) = form
    with pytest.raises(UserError, match=f"structured: {kind}: .") as refused:
        made(tokenizer).begin(SamplingParams(structured=Structured(**form)), ())
    assert "\n" not in str(refused.value)


def test_a_chain_of_schemas_does_not_exhaust_the_stack(tokenizer):
    """It is what a hostile schema of the largest size could be."""
    last = 2500
    definitions = {
        f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(last)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{last}": {"type": "integer"}}}
    assert made(tokenizer).compile(Structured(json_schema=schema)).mask.any()


def test_another_kind_of_tokenizer():
    with pytest.raises(UserError, match=telling("tokenizer bytes")):
        Grammars(letters(), 26, [0]).compile(Structured(regex="a"))


def test_no_leap_seconds():
    time = {"type": "string", "format": "time"}
    given = {
        "properties": {"format": time, "const": time | {"pattern": "Z$"}},
        "enum": [{"format": "time"}],
    }
    found = for_library(given)
    assert found["properties"]["format"]["pattern"] == "^.{6}[0-5]"
    assert found["properties"]["const"]["allOf"][0]["pattern"] == "^.{6}[0-5]"
    assert found["enum"] == given["enum"]
    assert json.loads(json.dumps(found)) == found
