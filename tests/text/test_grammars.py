"""Grammars for tokenizers of both kinds: masks let the right texts through, and end outputs."""

import json
import multiprocessing

import numpy as np
import psutil
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from cli.screen import telling
from engine.stub_runner import letters
from expertlane.errors import UserError
from expertlane.spec.files import strict_json
from expertlane.spec.sampling import MOST_LITERAL_CHARACTERS, SamplingParams, Structured
from expertlane.text import grammars
from expertlane.text.grammar_trial import for_library
from expertlane.text.grammars import Grammars
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


def bytes_of(tokenizer, token):
    """The bytes of a token of text; empty for others."""
    return b"" if token in tokenizer.special_token_ids else tokenizer.bytes_of(token)


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


@pytest.mark.parametrize("schema", [SCHEMA, True])
def test_compact_json_has_no_white_space_but_in_texts(tokenizer, schema):
    def next_letters(text, **more):
        structured = Structured(json_schema=schema, **more)
        options = allowed(walk(made(tokenizer), tokenizer, text, structured=structured))
        return {bytes_of(tokenizer, each)[:1] for each in options}

    spaces = {b" ", b"\n", b"\t"}
    for text in ("{", '{"ä b"', '{"ä b":', '{"ä b":47'):
        assert spaces & next_letters(text) == {b" ", b"\n"}
        assert not spaces & next_letters(text, compact=True), text
    assert next_letters('{"ä b":', compact=True) >= {b"5"}


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


def chain(rule, last, form="start: {0}0\n{1}\n{0}{2}: /a/"):
    """Rules of which each is made of the next."""
    rules = "\n".join(f"{rule[0]}{i}{rule[1:]}".replace("#", str(i + 1)) for i in range(last))
    return form.format(rule[0], rules, last)


def optional(number, schema):
    return {"type": "object", "properties": {f"p{i}": schema for i in range(number)}}


def all_of(*schemas):
    return {"allOf": list(schemas)}


TEXT = {"type": "string"}
HALVES = [{"anyOf": [TEXT | {"pattern": f"a{{{i}}}{j}"} for j in range(4)]} for i in range(20)]
COSTLY_LATER = chain("a: a# a#", 60).replace("start: ", 'start: ("x" | "y")~20 ')
TOO_COSTLY = "memory|costly|too many|too big|too large|too complex|items|take|time"
HOSTILE = {  # what takes seconds is in HEAVY
    "a literal or nothing, 1,000 times, and again": {"regex": "(a?){1000}a{1000}"},
    "a factor of 3 to the 20th": {"regex": "(" * 20 + "(a|b|ab)" + "){0,9}" * 20},
    "1,000 optional properties": {"json_schema": optional(1000, TEXT)},
    "as many and no others": {
        "json_schema": optional(1000, TEXT) | {"additionalProperties": False}
    },
    "as many of patterns": {"json_schema": optional(1000, TEXT | {"pattern": "^(a{99}){99}$"})},
    "products of alternatives": {"json_schema": all_of(*HALVES)},
    "a reference in each of two": {
        "json_schema": {
            "$ref": "#/$defs/d0",
            "$defs": {
                f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"type": "array"}] * 2}
                for i in range(400)
            }
            | {"d400": TEXT},
        }
    },
    "a long choice": {"choice": ["x" * 60_000, "y"]},
    "rules that double": {"grammar": chain("a: a# a#", 60)},
    "rules that double or end": {"grammar": chain("a: a# a# | a#", 200)},
    "rules that repeat": {"grammar": 'start: a{1000000}\na: b{1000000}\nb: "x" "y"'},
    "terminals that repeat": {"grammar": 'start: A\nA: B{1000}\nB: C{1000}\nC: D{1000}\nD: "ab"'},
    "a regex in a grammar": {"grammar": "start: /((a{1000}){1000}){1000}/"},
    "a schema in a grammar": {
        "grammar": f"start: %json {strict_json(optional(700, {}), separators=(',', ':'))}"
    },
    "GBNF that repeats": {"grammar": 'root ::= a{1000}\na ::= b{1000}\nb ::= "x"{1000}'},
    "GBNF that doubles": {
        "grammar": chain("a ::= a# a#", 100, "root ::= {0}0\n{1}\n{0}{2} ::= [x]")
    },
}
HEAVY = {
    "a million letters": {"regex": "(a{1000}){1000}"},
    "2 to the 60th": {"regex": "(" * 60 + "a" + "){2}" * 60},
    "intersections": {
        "json_schema": all_of(*(TEXT | {"pattern": f"(a|b)*a(a|b){{{i}}}b"} for i in range(100)))
    },
    "a huge enum": {"json_schema": {"enum": [{"a": i, "b": [i]} for i in range(8000)]}},
}
CHEAP = {  # it only looks hostile
    "letters of all scripts": {"regex": r"\p{L}{1000}"},
    "a choice of a million": {"regex": "(a|b){1000000}"},
    "one of 2 to the 200th states": {"regex": "[ab]*a[ab]{200}"},
    "nested quantifiers": {"regex": "(x+x+)+y"},
    "a long literal": {"regex": "a" * 16_000},
    "20,000 texts": {"json_schema": {"enum": [f"v{i}" for i in range(20_000)]}},
    "recursion in 300 places": {"json_schema": optional(300, {"$ref": "#"})},
    "arrays of arrays": {
        "json_schema": {"maxItems": 9999, "items": {"maxItems": 9999, "items": {"maxItems": 9999}}}
    },
    "any number of readings": {"grammar": 'start: start start | start start start | "a"'},
}


@pytest.fixture(scope="module")
def shared():
    """One object for all hostile grammars: none of them harms the next."""
    core = byte_level()
    return made(Tokenizer(core, [core.token_to_id("</s>")]))


def check_refused(grammars, form, seed):
    (kind,) = form
    params = SamplingParams(structured=Structured(**form))
    with pytest.raises(UserError, match=f"structured: {kind}: .*({TOO_COSTLY})") as refused:
        grammars.begin(params, ())
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    assert grammars.known(params.structured) is None
    ordinary = Structured(regex=f"a{seed}+")
    assert grammars.compile(ordinary) is grammars.known(ordinary)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_costs_too_much_is_refused_and_the_next_is_not(shared, name):
    check_refused(shared, HOSTILE[name], list(HOSTILE).index(name))


@pytest.mark.full
@pytest.mark.parametrize("name", HEAVY)
def test_what_would_take_minutes_or_all_memory_is_refused(shared, name):
    check_refused(shared, HEAVY[name], 100 + list(HEAVY).index(name))


LONG = "x" * (MOST_LITERAL_CHARACTERS + 1)


@pytest.mark.parametrize(
    "schema", [{"const": LONG}, {"enum": [5, LONG]}, {"pattern": LONG}, {"properties": {LONG: {}}}]
)
def test_very_long_texts_of_a_schema(schema):
    with pytest.raises(UserError, match=telling("json_schema 16,385 16,384")):
        Structured(json_schema={"items": schema})
    assert Structured(json_schema={"description": LONG}).json_schema


@pytest.mark.parametrize("name", CHEAP)
def test_what_looks_hostile_and_is_not(shared, name):
    params = SamplingParams(structured=Structured(**CHEAP[name]))
    constraint = shared.begin(params, ())
    for _ in range(20):
        if not constraint.is_ended:
            shared.advance([(constraint, min(allowed(constraint)))]).result()
        assert constraint.error is None


def test_what_gets_too_costly_later_ends_with_an_error(shared):
    """A trial takes a few tokens; the rest is for the limits of a step."""
    constraint = shared.begin(SamplingParams(structured=Structured(grammar=COSTLY_LATER)), ())
    other = shared.begin(SamplingParams(structured=Structured(regex="[ab]{99}")), ())
    taken = 0
    while constraint.error is None:
        shared.advance(
            [(constraint, min(allowed(constraint))), (other, min(allowed(other)))]
        ).result()
        taken += 1
        assert other.error is None
    assert taken == 21
    assert "items" in constraint.error


def test_large_grammars_are_kept_up_to_a_sum(shared, monkeypatch):
    monkeypatch.setattr(grammars, "_KEPT_BYTES", 2**20)
    wide = [
        Structured(json_schema={"enum": [f"{i} {word}" for i in range(10_000)]}) for word in "abc"
    ]
    for structured in wide:
        shared.compile(structured)
    assert shared.known(wide[0]) is None
    held = shared.compile(wide[0])
    assert held.num_bytes > 2**20
    monkeypatch.setattr(grammars, "_IN_USE_BYTES", 2**21)
    with pytest.raises(UserError, match="MiB"):
        shared.compile(wide[1])
    assert shared.compile(Structured(regex="small")).num_bytes < 2**20


def test_after_its_process_was_killed_the_next_grammar_is_tried(shared):
    shared.compile(Structured(regex="before"))
    process = psutil.Process(shared._trial.pid)
    process.kill()
    process.wait()
    shared.compile(Structured(regex="after"))
    assert shared._trial.pid != process.pid


def test_grammars_of_a_forked_process(shared):
    """It has neither threads nor processes of the one that it was forked from."""

    def compile_there():
        core = byte_level()
        there = made(Tokenizer(core, [core.token_to_id("</s>")]))
        assert there.compile(Structured(regex="a")).mask.any()

    process = multiprocessing.get_context("fork").Process(target=compile_there)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert shared.compile(Structured(regex="and here")).mask.any()


def test_a_chain_of_schemas_does_not_exhaust_the_stack(tokenizer):
    """It is what a hostile schema of the largest size could be."""
    last = 2500
    definitions = {
        f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(last)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{last}": {"type": "integer"}}}
    assert made(tokenizer).compile(Structured(json_schema=schema)).mask.any()


def test_another_kind_of_tokenizer():
    with pytest.raises(UserError, match=telling("tokenizer byte-level")):
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
