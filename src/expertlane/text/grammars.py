"""Grammars of outputs for one tokenizer, compiled by llguidance; and masks, beside the steps."""

import re
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from expertlane.errors import UserError
from expertlane.spec.files import parse_json, strict_json
from expertlane.spec.sampling import SamplingParams
from expertlane.spec.structured import Structured
from expertlane.text.json_schemas import for_library
from expertlane.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

Mask = npt.NDArray[np.uint8]

# A grammar is untrusted. These bound what it may cost: fuel is work that the library counts.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,  # some 50,000 a millisecond
    "step_lexer_fuel": 200_000,  # some 14,000 a millisecond
    "step_max_items": 50_000,  # some 20,000 a millisecond
    "max_lexer_states": 20_000,  # 1 or 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Terminals of a grammar can double from rule to rule, which takes longer than its fuel says.
_LIMITS_OF_GRAMMARS = _LIMITS | {"initial_lexer_fuel": 100_000, "step_lexer_fuel": 50_000}
_STACK_BYTES = 512 * 2**20  # the library recurses from rule to rule; memory is taken as it is used
_KEPT = 32  # compiled grammars
_END_TOKEN = "<|expertlane end|>"  # of tokenizers that have no end of sequence; never chosen


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar.

    Attributes:
        start: a matcher that has taken no token; to be copied.
        mask: of the first token.
    """

    start: "LLMatcher"
    mask: Mask


class Constraint:
    """How far one request has come in its grammar.

    Attributes:
        mask: of the token to come.
        is_ended: whether the output is complete, and nothing can follow.
        error: why no mask can be given; None where one can.
        num_held: tokens to come of which none may end the output.
    """

    def __init__(self, grammar: Grammar, params: SamplingParams, ends: Iterable[int]) -> None:
        self.matcher = grammar.start.deep_copy()
        self.mask = grammar.mask
        self.is_ended = False
        self.error: str | None = None
        self._ends = sorted(ends)
        self.num_held = 2**62 if params.ignore_eos else params.min_tokens
        self._hold()

    def take(self, mask: Mask) -> None:
        """Take in the mask of the token after the one that the matcher has consumed."""
        self.num_held -= 1
        if self.matcher.is_error():
            self.error = _first_line(self.matcher.get_error())
        elif self.matcher.is_stopped() or not mask.any():
            self.is_ended = True
        else:
            self.mask = mask
            self._hold()

    def _hold(self) -> None:
        """Let no token end the output yet, as long as others can follow."""
        if self.num_held > 0 and self._ends:
            held = self.mask.copy()
            _clear(held, self._ends)
            if held.any():
                self.mask = held


class Grammars:
    """Compiles grammars, and computes masks; safe to use from several threads.

    Args:
        vocab_size: of the model.
        eos_token_ids: tokens that end an output.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._source = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = [each for each in sorted(eos_token_ids) if tokenizer.has_token(each)]
        self._never: list[int] = []
        self._tokenizer: Any = None
        self._executor: LLExecutor | None = None
        self._compiler = _thread("grammars", _STACK_BYTES)
        self._masker = _thread("masks")
        self._known: WeakValueDictionary[Structured, Grammar] = WeakValueDictionary()
        self._kept = lru_cache(_KEPT)(self._compile)

    def compile_soon(self, structured: Structured) -> "Future[Grammar]":
        """Compile in a thread; the future raises as `compile` does."""
        return self._compiler.submit(self._kept, structured)

    def known(self, structured: Structured) -> Grammar | None:
        """A grammar that is in use, or was one of the last."""
        return self._known.get(structured)

    def compile(self, structured: Structured) -> Grammar:
        """A grammar; at once if it is known.

        Raises:
            UserError: it is not valid, allows no output, or is too large or too costly; or the
                tokenizer cannot be used.
        """
        return self.known(structured) or self.compile_soon(structured).result()

    def begin(self, params: SamplingParams, stop_token_ids: Iterable[int]) -> Constraint:
        """The constraint of a request whose `structured` is given.

        Raises:
            UserError: as `compile`.
        """
        assert params.structured is not None, "it is asked for"
        try:
            grammar = self.compile(params.structured)
        except UserError as error:
            raise UserError(f"structured: {params.structured.kind}: {error}") from None
        return Constraint(grammar, params, {*stop_token_ids, *self._eos_token_ids})

    def skip(self, constraint: Constraint, token_ids: Sequence[int]) -> None:
        """Take in one token or more that an earlier process chose."""
        *before, last = token_ids
        constraint.matcher.consume_tokens(before)
        constraint.num_held -= len(before)
        self.advance([(constraint, last)]).result()

    def advance(self, tokens: Sequence[tuple[Constraint, int]]) -> "Future[None]":
        """Take in a token of each and compute the masks of the next, in a thread."""
        return self._masker.submit(self._advance, list(tokens))

    def _advance(self, tokens: list[tuple[Constraint, int]]) -> None:
        from llguidance import LLExecutor

        if self._executor is None:
            self._executor = LLExecutor(num_threads=2)
        took = self._executor.consume_token_par([(c.matcher, token) for c, token in tokens])
        going = [
            (constraint, number)
            for number, ((constraint, _), is_taken) in enumerate(zip(tokens, took, strict=True))
            if is_taken and not constraint.matcher.is_stopped()
        ]
        masks = self._empty_masks(len(tokens))
        if going:
            self._executor.unsafe_compute_mask_ptr(
                [(constraint.matcher, number) for constraint, number in going],
                masks.ctypes.data,
                masks.shape[1],
                len(tokens),
            )
        for (constraint, _), mask in zip(tokens, masks, strict=True):
            _clear(mask, self._never)
            constraint.take(mask)

    def _empty_masks(self, num_rows: int) -> Mask:
        """[num_rows, bytes], in whole words."""
        return np.zeros((num_rows, -(-self._vocab_size // 32) * 4), dtype=np.uint8)

    def _compile(self, structured: Structured) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        try:
            text = self._as_llguidance(structured)
        except (ValueError, RecursionError) as error:  # of the library's conversions
            raise UserError(_first_line(str(error))) from None
        is_free = structured.grammar is not None and not structured.is_of_schemas
        limits = LLParserLimits(**(_LIMITS_OF_GRAMMARS if is_free else _LIMITS))
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        mask = self._empty_masks(1)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.size)
        if matcher.is_error():
            raise UserError(_first_line(matcher.get_error()))
        _clear(mask[0], self._never)
        if matcher.is_stopped() or not mask.any():
            raise UserError("it allows no output of 1 token or more")
        grammar = self._known[structured] = Grammar(matcher, mask[0])
        return grammar

    def _make_tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        source, eos = self._source.to_json(), self._eos_token_ids
        if not eos:
            end = self._source.vocab_size
            self._never = eos = [end]
            self._vocab_size = max(self._vocab_size, end + 1)
            source = _with_token(source, _END_TOKEN, end)
        try:
            return LLTokenizer(source, n_vocab=self._vocab_size, eos_token=eos)
        except ValueError as error:
            raise UserError(
                "structured output needs a tokenizer of bytes or SentencePiece; this one is "
                f"neither: {_first_line(str(error))}"
            ) from None

    def _as_llguidance(self, structured: Structured) -> str:
        """In the library's own form: a JSON object of grammars that refer to each other."""
        body: dict[str, Any] = {"name": "body"}
        if structured.json_schema is not None:
            body["json_schema"] = for_library(parse_json(structured.json_schema))
        else:
            body["lark_grammar"] = _lark(structured)
        if structured.lead is None and not structured.prefix:
            return strict_json({"grammars": [body]})
        first = {"name": "all", "lark_grammar": self._lead(structured)}
        return strict_json({"grammars": [first, body]})

    def _lead(self, structured: Structured) -> str:
        """Some text up to a mark, or none, then the body."""
        if structured.lead is None:
            return f"%llguidance {{}}\nstart: {lark_text(structured.prefix, self._source)} @body\n"
        element, rules = lead_rules(structured.lead, structured.may_lead, self._source)
        prefix = lark_text(structured.prefix, self._source)
        return f"%llguidance {{}}\nstart: {element} {prefix} @body\n{rules}\n"


def lark_text(text: str, tokenizer: Tokenizer) -> str:
    """A text in Lark's syntax; control tokens whose names it holds are those tokens."""
    parts = []
    for part, token_id in tokenizer.split_special(text):
        parts.append(
            strict_json(part, ensure_ascii=False) if token_id is None else f"<[{token_id}]>"
        )
    return " ".join(parts)


def lead_rules(lead: str, may_lead: str | None, tokenizer: Tokenizer) -> tuple[str, str]:
    """The element of a text before an output, in Lark's syntax, and the rules it needs.

    Args:
        lead, may_lead: as in `Structured`.
    """
    end = lark_text(lead, tokenizer)
    element = "lead" if may_lead is None else f"({lark_text(may_lead, tokenizer)} lead)?"
    rule = rf"lead: /(.|\n)*/ {end}" if end.startswith("<[") else rf"lead[suffix={end}]: /(.|\n)*/"
    return f"{element} LINES", f"{rule}\nLINES: /\\n{{0,2}}/"


def _lark(structured: Structured) -> str:
    from llguidance import grammar_from, regex_to_lark

    if structured.regex is not None:
        return f"start: /{regex_to_lark(structured.regex, '')}/\n"
    if structured.choice is not None:
        texts = (strict_json(each, ensure_ascii=False) for each in dict.fromkeys(structured.choice))
        return f"start: CHOICE\nCHOICE: {' | '.join(texts)}\n"
    text = structured.grammar or ""
    if "::=" not in text:
        if not structured.is_of_schemas:
            _check_terminals(text)
        return text
    return grammar_from("gbnf", text)


_TERMINAL = re.compile(r"^\s*([A-Z_][A-Z0-9_]*)[^:\n\"/]*:(.*(?:\n\s*\|.*)*)", re.MULTILINE)
_NAME = re.compile(r"\b[A-Z_][A-Z0-9_]*\b")
_MOST_PARTS = 5000


def _check_terminals(text: str) -> None:
    """Refuse terminals that grow beyond bounds: each is one expression, its parts written out.

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
            raise ValueError(f"terminal {name} is of too many parts, or of itself")


def _clear(mask: Mask, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        if token_id >> 3 < len(mask):
            mask[token_id >> 3] &= 0xFF ^ (1 << (token_id & 7))


def _with_token(source: str, name: str, token_id: int) -> str:
    tokenizer = parse_json(source, lenient=True)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": token_id, "content": name, "special": True} | flags
    tokenizer["added_tokens"] = [*tokenizer.get("added_tokens", ()), token]
    return strict_json(tokenizer)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["not valid"])[0][:300]


def _thread(name: str, stack_bytes: int = 0) -> ThreadPoolExecutor:
    """One thread, which is started now, since the size of stacks is a setting of all threads."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    before = threading.stack_size()
    threading.stack_size(stack_bytes or before)
    try:
        pool.submit(lambda: None).result()
    finally:
        threading.stack_size(before)
    return pool
