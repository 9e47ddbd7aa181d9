"""Grammars of outputs, compiled by llguidance for one tokenizer, and masks of allowed tokens."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from expertlane.errors import UserError
from expertlane.spec.files import parse_json, strict_json
from expertlane.spec.sampling import SamplingParams, Structured
from expertlane.text.grammar_trial import (
    LIMITS,
    PACKAGES,
    STACK_BYTES,
    check,
    compiled,
    first_line,
    started_thread,
)
from expertlane.text.limited_process import LimitedProcess
from expertlane.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

Mask = npt.NDArray[np.uint8]

_KEPT = 32  # compiled grammars
_KEPT_BYTES = 512 * 2**20  # bytes of all kept grammars together
_IN_USE_BYTES = 2 * 2**30  # of grammars in use or kept; beyond that, only small ones are compiled
_SMALL_BYTES = 2**20
_END_TOKEN = "<|expertlane end|>"  # of tokenizers that have no end of sequence; never chosen


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar.

    Attributes:
        start: a matcher that has consumed no token; to be copied.
        mask: mask of the first token, one bit per token id.
        num_bytes: memory that it takes, estimated.
    """

    start: "LLMatcher"
    mask: Mask
    num_bytes: int


class Constraint:
    """The state of one request in its grammar.

    Attributes:
        mask: mask of the next token.
        is_ended: whether the output is complete, and nothing can follow.
        error: why no mask can be given; None where one can.
        num_held: number of next tokens that may not end the output.
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
        """Set the mask of the token after the one that the matcher has consumed."""
        self.num_held -= 1
        if self.matcher.is_error():
            self.error = first_line(self.matcher.get_error())
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
    """Compiler of grammars, and their masks; safe to use from several threads.

    Args:
        vocab_size: size of the model's vocabulary.
        eos_token_ids: tokens that end an output.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._source = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = [each for each in sorted(eos_token_ids) if tokenizer.has_token(each)]
        self._never: list[int] = []
        self._tokenizer: Any = None
        self._executor: LLExecutor | None = None
        self._trial: LimitedProcess | None = None
        self._compiler = started_thread("grammars", STACK_BYTES)
        self._masker = started_thread("masks")
        self._known: WeakValueDictionary[Structured, Grammar] = WeakValueDictionary()
        self._kept: dict[Structured, Grammar] = {}  # the last ones; of the compiler's thread

    def compile_soon(self, structured: Structured) -> "Future[Grammar]":
        """Compile in a thread; the future raises as `compile` does."""
        return self._compiler.submit(self._found_or_compiled, structured)

    def known(self, structured: Structured) -> Grammar | None:
        """A grammar that is in use or was used lately; None if it must be compiled."""
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
        """Consume one or more tokens that an earlier process chose."""
        *before, last = token_ids
        constraint.matcher.consume_tokens(before)
        constraint.num_held -= len(before)
        self.advance([(constraint, last)]).result()

    def advance(self, tokens: Sequence[tuple[Constraint, int]]) -> "Future[None]":
        """Consume a token of each constraint and compute the masks of the next, in a thread."""
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

    def _found_or_compiled(self, structured: Structured) -> Grammar:
        grammar = self._known.get(structured)
        if grammar is None:
            grammar = self._known[structured] = self._compile(structured)
        self._kept.pop(structured, None)
        self._kept[structured] = grammar
        while len(self._kept) > _KEPT or _sum_bytes(self._kept.values()) > _KEPT_BYTES:
            del self._kept[next(iter(self._kept))]
        return grammar

    def _compile(self, structured: Structured) -> Grammar:
        """Compile a grammar that passes a trial."""
        if self._tokenizer is None or self._trial is None:
            self._tokenizer, self._trial = self._make_tokenizer()
        tried = parse_json(self._trial.ask(self._asked(structured)))
        num_bytes = tried["num_bytes"]
        if num_bytes > _SMALL_BYTES:
            in_use = _sum_bytes(list(self._known.values()))
            if in_use + num_bytes > _IN_USE_BYTES:
                raise UserError(
                    f"it takes {num_bytes // 2**20:,} MiB, and other grammars {in_use // 2**20:,}; "
                    f"together at most {_IN_USE_BYTES // 2**20:,} are taken; try again later"
                )
        matcher = compiled(self._tokenizer, tried["text"], is_free=tried["is_free"])
        mask = self._empty_masks(1)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.size)
        check(matcher)
        _clear(mask[0], self._never)
        if matcher.is_stopped() or not mask.any():
            raise UserError("it allows no output of 1 token or more")
        return Grammar(matcher, mask[0], num_bytes)

    def _make_tokenizer(self) -> tuple[Any, LimitedProcess]:
        """The library's tokenizer, and a process for trials with the same one."""
        from llguidance import LLTokenizer

        source, eos = self._source.to_json(), self._eos_token_ids
        if not eos:
            end = self._source.vocab_size
            self._never = eos = [end]
            self._vocab_size = max(self._vocab_size, end + 1)
            source = _with_token(source, _END_TOKEN, end)
        given = {"source": source, "vocab_size": self._vocab_size, "eos": eos}
        trial = LimitedProcess("grammar_trial", PACKAGES, LIMITS, given)
        trial.start()
        try:
            tokenizer = LLTokenizer(source, n_vocab=self._vocab_size, eos_token=eos)
        except ValueError as error:
            raise UserError(
                "structured output needs a byte-level or SentencePiece tokenizer; this one is "
                f"neither: {first_line(str(error))}"
            ) from None
        return tokenizer, trial

    def _asked(self, structured: Structured) -> dict[str, Any]:
        """The request of a trial."""
        kind = structured.kind
        asked = {"kind": kind, "value": getattr(structured, kind)}
        asked |= {"is_of_schemas": structured.is_of_schemas, "compact": structured.compact}
        if structured.lead is not None or structured.prefix:
            asked["lead"] = self._lead(structured)
        return asked

    def _lead(self, structured: Structured) -> str:
        """The grammar of what comes before the body: `lead` and `prefix`."""
        if structured.lead is None:
            return f"%llguidance {{}}\nstart: {lark_text(structured.prefix, self._source)} @body\n"
        element, rules = lead_rules(structured.lead, structured.may_lead, self._source)
        prefix = lark_text(structured.prefix, self._source)
        return f"%llguidance {{}}\nstart: {element} {prefix} @body\n{rules}\n"


def lark_text(text: str, tokenizer: Tokenizer) -> str:
    """A text in Lark's syntax; names of special tokens in it become those tokens."""
    parts = []
    for part, token_id in tokenizer.split_special(text):
        parts.append(
            strict_json(part, ensure_ascii=False) if token_id is None else f"<[{token_id}]>"
        )
    return " ".join(parts)


def lead_rules(lead: str, may_lead: str | None, tokenizer: Tokenizer) -> tuple[str, str]:
    """The element of a text before an output, in Lark's syntax, and the rules it needs.

    Args:
        lead, may_lead: see `Structured`.
    """
    end = lark_text(lead, tokenizer)
    element = "lead" if may_lead is None else f"({lark_text(may_lead, tokenizer)} lead)?"
    rule = rf"lead: /(.|\n)*/ {end}" if end.startswith("<[") else rf"lead[suffix={end}]: /(.|\n)*/"
    return f"{element} LINES", f"{rule}\nLINES: /\\n{{0,2}}/"


def _sum_bytes(grammars: Iterable[Grammar]) -> int:
    return sum(grammar.num_bytes for grammar in grammars)


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
