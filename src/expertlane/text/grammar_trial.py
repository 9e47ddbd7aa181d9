"""Compiling grammars with llguidance, and the process in which each is tried first.

A grammar is untrusted, and the library's limits on work do not bound the cost of every grammar. So
each is first compiled, and fed a few tokens, in a process with limits of time and memory; only one
that passes is compiled for use.
"""

import ctypes
import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from expertlane.errors import UserError
from expertlane.spec.files import parse_json, strict_json
from expertlane.text.limited_process import Limits, Worker, give_back, memory_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher
from collections.abc import Mapping

# Ordinary schemas take less than 50 ms and 10 MB, one of 1,000 properties 0.3 s and 20 MB.
LIMITS = Limits(cpu_s=3.0, memory_bytes=256 * 2**20)
PACKAGES = ("expertlane", "llguidance")
STACK_BYTES = 512 * 2**20  # the library recurses from rule to rule; memory is taken as it is used
_TRIAL_STACK_BYTES = STACK_BYTES // 2  # so what passes fits twice
_WALKS = 2
_STEPS = 4  # tokens consumed in each walk
_WALKS_CPU_S = 0.5  # for all steps together: ordinary ones take less than 10 ms each

# Fuel is work that the library counts.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,  # some 50,000 a millisecond
    "step_lexer_fuel": 200_000,  # some 14,000 a millisecond
    "step_max_items": 10_000,  # some 20,000 a millisecond at first, then the square of them
    "max_lexer_states": 20_000,  # 1 or 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Terminals of a grammar can double from rule to rule, which takes longer than its fuel says.
_LIMITS_OF_GRAMMARS = _LIMITS | {"initial_lexer_fuel": 100_000, "step_lexer_fuel": 50_000}


def compiled(tokenizer: Any, text: str, *, is_free: bool) -> "LLMatcher":
    """A matcher that has consumed no token.

    Args:
        tokenizer: llguidance's.
        text: in the library's own form.
        is_free: it is a client's own grammar, in Lark's syntax or GBNF.

    Raises:
        UserError: the grammar is not valid, or too large.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(**(_LIMITS_OF_GRAMMARS if is_free else _LIMITS))
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits)
    check(matcher)
    return matcher


def check(matcher: "LLMatcher") -> None:
    """Refuse a matcher that cannot go on.

    Raises:
        UserError: why.
    """
    if matcher.is_error():
        raise UserError(first_line(matcher.get_error()))


def first_line(text: str) -> str:
    """The first line of a library's message, cut: it can quote a whole grammar."""
    return (text.strip().splitlines() or ["not valid"])[0][:300]


def started_thread(name: str, stack_bytes: int = 0) -> ThreadPoolExecutor:
    """One thread, which is started now, since the size of stacks is a setting of all threads."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    before = threading.stack_size()
    threading.stack_size(stack_bytes or before)
    try:
        pool.submit(lambda: None).result()
    finally:
        threading.stack_size(before)
    return pool


def main() -> None:
    """Try grammars until the connection is closed."""
    worker = Worker()
    trial = _Trial(**worker.given)
    trial.answer(strict_json({"kind": "regex", "value": "[ab]+"}).encode())  # starts all threads
    worker.limit_memory()
    for request in worker.requests():
        worker.answer(partial(trial.answer, request))


class _Trial:
    """The trial of grammars for one tokenizer.

    Args:
        source: the tokenizer, as its file has it.
        vocab_size: size of the model's vocabulary.
        eos: tokens that end an output.
    """

    def __init__(self, source: str, vocab_size: int, eos: list[int]) -> None:
        from llguidance import LLExecutor, LLTokenizer

        self._tokenizer = LLTokenizer(source, n_vocab=vocab_size, eos_token=eos)
        self._eos = eos
        self._executor = LLExecutor(num_threads=1)
        self._thread = started_thread("trial", _TRIAL_STACK_BYTES)
        self._mask = (ctypes.c_ubyte * (-(-vocab_size // 32) * 4))()

    def answer(self, request: bytes) -> str:
        """JSON with the grammar in the library's own form, and the memory that it takes, in bytes.

        Raises:
            UserError: it cannot be used.
        """
        return self._thread.submit(self._try, **json.loads(request)).result()

    def _try(
        self,
        kind: str,
        value: Any,
        lead: str | None = None,
        is_of_schemas: bool = False,
        compact: bool = False,
    ) -> str:
        give_back()  # so that what this grammar takes is seen
        before = memory_bytes().resident
        try:
            body = _body(kind, value, is_of_schemas, compact)
            text = _in_library_form(body, lead)
        except (ValueError, RecursionError) as error:  # of the library's conversions
            raise UserError(first_line(str(error))) from None
        is_free = kind == "grammar" and not is_of_schemas
        matcher = compiled(self._tokenizer, text, is_free=is_free)
        draw, start_s = random.Random(0), time.process_time()
        for _ in range(_WALKS):
            self._walk(matcher.deep_copy(), draw)
        if time.process_time() - start_s > _WALKS_CPU_S:
            text = f"{_WALKS * _STEPS} tokens take more than {_WALKS_CPU_S:g} s of CPU time"
            raise UserError(text)
        num_bytes = max(0, memory_bytes().resident - before)
        return strict_json({"text": text, "is_free": is_free, "num_bytes": num_bytes})

    def _walk(self, matcher: "LLMatcher", draw: random.Random) -> None:
        """Consume a few allowed tokens, as the engine does."""
        for _ in range(_STEPS):
            if matcher.is_stopped():
                break
            self._executor.unsafe_compute_mask_ptr(
                [(matcher, 0)], ctypes.addressof(self._mask), len(self._mask), 1
            )
            check(matcher)
            allowed = int.from_bytes(self._mask, "little")
            for token in self._eos:
                allowed &= ~(1 << token)
            if not allowed:
                break
            place = draw.randrange(allowed.bit_length())
            token = place + _lowest(allowed >> place)
            self._executor.consume_token_par([(matcher, token)])
            check(matcher)


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _body(kind: str, value: Any, is_of_schemas: bool, compact: bool) -> dict[str, Any]:
    """The library's grammar of an output, without what comes before it."""
    if kind == "json_schema":
        return {"json_schema": for_library(parse_json(value), compact=compact)}
    return {"lark_grammar": _lark(kind, value, is_of_schemas)}


def _in_library_form(body: dict[str, Any], lead: str | None) -> str:
    """The request as the library's JSON: a list of grammars that refer to each other."""
    body = {"name": "body"} | body
    first = [] if lead is None else [{"name": "all", "lark_grammar": lead}]
    return strict_json({"grammars": [*first, body]})


def _lark(kind: str, value: Any, is_of_schemas: bool) -> str:
    from llguidance import grammar_from, regex_to_lark

    if kind == "regex":
        return f"start: /{regex_to_lark(value, '')}/\n"
    if kind == "choice":
        texts = (strict_json(each, ensure_ascii=False) for each in dict.fromkeys(value))
        return f"start: CHOICE\nCHOICE: {' | '.join(texts)}\n"
    text = str(value)
    if "::=" not in text:
        if not is_of_schemas:
            _check_terminals(text)
        return text
    return grammar_from("gbnf", text)


_TERMINAL = re.compile(r"^\s*([A-Z_][A-Z0-9_]*)[^:\n\"/]*:(.*(?:\n\s*\|.*)*)", re.MULTILINE)
_NAME = re.compile(r"\b[A-Z_][A-Z0-9_]*\b")
_MOST_PARTS = 5000


def _check_terminals(text: str) -> None:
    """Refuse terminals that are too large once all terminals that they name are written out.

    Raises:
        ValueError: one does.
    """
    bodies = {match[1]: _NAME.findall(match[2]) for match in _TERMINAL.finditer(text)}

    @cache
    def num_parts(name: str) -> int:
        return 1 + sum(num_parts(part) for part in bodies[name] if part in bodies)

    for name in bodies:
        try:
            is_small = num_parts(name) <= _MOST_PARTS
        except RecursionError:
            is_small = False
        if not is_small:
            text = f"terminal {name} has more than {_MOST_PARTS:,} parts, or contains itself"
            raise ValueError(text)


# Between tokens of JSON a line end and an indentation, or a space: without a bound a model may
# write no more than them.
WHITESPACE = r"\x20|\x0A[\x20\x09]{0,40}"

# The library lets any minute have a leap second, which RFC 3339 does not, nor do most readers.
_NO_LEAP_SECONDS = {"time": "^.{6}[0-5]", "date-time": "^.{17}[0-5]"}
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NO_SCHEMAS = ("enum", "const", "default", "examples")


def for_library(schema: Any, *, compact: bool = False) -> Any:
    """A schema of the same values, except for times that do not exist and endless white space.

    Options of `oneOf` behind references differ by a property that is another constant in each.

    Args:
        compact: allow no white space between tokens of JSON.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        return schema
    spaces = {"whitespace_flexible": False} if compact else {"whitespace_pattern": WHITESPACE}
    return {**_rewritten(schema, schema), "x-guidance": spaces}


def _rewritten(schema: Any, root: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_rewritten(each, root) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NO_SCHEMAS:
            found[key] = value
        elif key in _OF_SCHEMAS and isinstance(value, Mapping):
            found[key] = {name: _rewritten(each, root) for name, each in value.items()}
        else:
            found[key] = _rewritten(value, root)
    if "discriminator" not in schema and (name := _tag(schema.get("oneOf"), root)):
        found["discriminator"] = {"propertyName": name}
    pattern = _NO_LEAP_SECONDS.get(str(schema.get("format")))
    if pattern is None:
        return found
    if "pattern" not in found:
        return found | {"pattern": pattern}
    return found | {"allOf": [*found.get("allOf", ()), {"type": "string", "pattern": pattern}]}


def _tag(options: Any, root: Mapping[str, Any]) -> str | None:
    """A property that is a constant in each option, if there is one.

    The library looks for such ones itself, but follows references only where a discriminator
    names the property. It checks what the discriminator says.
    """
    if not isinstance(options, list) or not options:
        return None
    named: list[set[str]] = []
    for option in options:
        resolved = _resolved(option, root)
        properties = resolved.get("properties") if isinstance(resolved, Mapping) else None
        if not isinstance(properties, Mapping):
            return None
        pairs = properties.items()
        named.append(
            {name for name, each in pairs if isinstance(each, Mapping) and "const" in each}
        )
    return min(set.intersection(*named), default=None)


def _resolved(option: Any, root: Mapping[str, Any]) -> Any:
    """The definition that a reference into the schema names; other values as they are."""
    reference = option.get("$ref") if isinstance(option, Mapping) else None
    if not isinstance(reference, str):
        return option
    kind, _, name = reference.removeprefix("#/").partition("/")
    definitions = root.get(kind) if kind in ("$defs", "definitions") else None
    return definitions.get(name) if isinstance(definitions, Mapping) else option
