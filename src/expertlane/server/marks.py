"""Reasoning and calls of tools in a model's text, by the marks that its chat template knows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self
from uuid import uuid4

import msgspec

_THINK, _THOUGHT = "<think>", "</think>"
_CALL, _CALLED = "<tool_call>", "</tool_call>"
_CALL_FORM = re.compile(r"""["']arguments["']""")

Kind = Literal["content", "reasoning", "call"]


@dataclass(frozen=True)
class Marks:
    """What a template tells its model to write.

    Attributes:
        has_reasoning: `<think>…</think>` before the answer.
        has_calls: `<tool_call>{"name": …, "arguments": …}</tool_call>`.
    """

    has_reasoning: bool = False
    has_calls: bool = False

    @classmethod
    def of_template(cls, source: str) -> Self:
        """Those that a template's source holds."""
        has_calls = _CALL in source and _CALL_FORM.search(source) is not None
        return cls(_THOUGHT in source, has_calls)


@dataclass(slots=True)
class Part:
    """A part of an answer; of a call its text, `{"name": …, "arguments": …}`."""

    kind: Kind
    text: str


class MarkedText:
    """Takes an answer apart as its text comes.

    Args:
        prompt: its end tells whether the answer begins inside reasoning.
        takes_calls: whether tools were offered; else marks of calls are text.
    """

    def __init__(self, marks: Marks, prompt: str, *, takes_calls: bool) -> None:
        self._takes_calls = takes_calls and marks.has_calls
        self._held = ""
        self._is_start = marks.has_reasoning
        self._kind: Kind = "content"
        if marks.has_reasoning and prompt.rstrip().endswith(_THINK):
            self._kind, self._is_start = "reasoning", False

    @property
    def kind(self) -> Kind | None:
        """Of the text to come; None while that is not known."""
        return None if self._is_start else self._kind

    def feed(self, text: str, *, is_last: bool = False) -> list[Part]:
        """The parts that are certain after some more text."""
        self._held += text
        return list(self._parts(is_last))

    def _parts(self, is_last: bool) -> Iterator[Part]:
        if self._is_start and not self._leave_start(is_last):
            return
        while (mark := self._next_mark()) is not None:
            before, found, after = self._held.partition(mark)
            if not found:
                break
            if before:
                yield Part(self._kind, before)
            self._kind = "call" if mark == _CALL else "content"
            self._held = after
        if is_last:
            text = _CALL + self._held if self._kind == "call" else self._held
            kind: Kind = "content" if self._kind == "call" else self._kind
            num_certain = len(self._held)
        else:
            num_certain = (
                0 if self._kind == "call" else len(self._held) - _overlap(self._held, mark)
            )
            text, kind = self._held[:num_certain], self._kind
        self._held = self._held[num_certain:]
        if text:
            yield Part(kind, text)

    def _leave_start(self, is_last: bool) -> bool:
        """Whether it is known if the answer begins with reasoning."""
        text = self._held.lstrip()
        if text.startswith(_THINK):
            self._kind, self._held = "reasoning", text.removeprefix(_THINK)
        elif _THINK.startswith(text) and not is_last:
            return False
        self._is_start = False
        return True

    def _next_mark(self) -> str | None:
        """What ends the present part; None where nothing does."""
        if self._kind == "content":
            return _CALL if self._takes_calls else None
        return _THOUGHT if self._kind == "reasoning" else _CALLED


def _overlap(text: str, mark: str | None) -> int:
    """Characters at the end of a text that may begin a mark."""
    if mark is None:
        return 0
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)


class ChatParts:
    """The fields of a message, from the text of one choice.

    Attributes:
        num_calls: of tools, so far.
    """

    def __init__(self, text: MarkedText) -> None:
        self._text = text
        self.num_calls = 0

    def feed(self, text: str, *, is_last: bool = False) -> dict[str, Any]:
        """What is new of each field: `content`, `reasoning_content`, `tool_calls`."""
        found: dict[str, Any] = {}
        for part in self._text.feed(text, is_last=is_last):
            call = self._call(part.text) if part.kind == "call" else None
            if call is not None:
                found.setdefault("tool_calls", []).append(call)
            elif part.kind == "reasoning":
                found["reasoning_content"] = found.get("reasoning_content", "") + part.text
            elif not self.num_calls or part.text.strip():  # line ends part calls
                shown = f"{_CALL}{part.text}{_CALLED}" if part.kind == "call" else part.text
                found["content"] = found.get("content", "") + shown
        return found

    def _call(self, text: str) -> dict[str, Any] | None:
        """A call of a tool; None if the text is none."""
        try:
            given = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            return None
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            return None
        arguments = given.get("arguments", given.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = msgspec.json.encode(arguments).decode()
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            "id": f"call_{uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": given["name"], "arguments": arguments},
        }
