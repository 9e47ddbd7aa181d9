"""A message's fields, whole or as deltas, from the parts of an answer's text."""

from collections.abc import Callable
from typing import Any

from expertlane.server.marks import MarkedText


class ChatParts:
    """The fields of a message, from the text of one choice.

    Args:
        id_of: 32 hexadecimal digits for the number of a call.

    Attributes:
        num_calls: of tools, so far.
    """

    def __init__(self, text: MarkedText, id_of: Callable[[int], str]) -> None:
        self._text, self._id_of = text, id_of
        self.num_calls = 0

    def feed(self, text: str, *, is_last: bool = False) -> dict[str, Any]:
        """What is new of each field: `content`, `reasoning_content`, `tool_calls`."""
        found: dict[str, Any] = {}
        for part in self._text.feed(text, is_last=is_last):
            if part.kind == "name":
                found.setdefault("tool_calls", []).append(self._call(part.text))
            elif part.kind == "arguments":
                self._add_arguments(found.setdefault("tool_calls", []), part.text)
            elif part.kind == "reasoning":
                found["reasoning_content"] = found.get("reasoning_content", "") + part.text
            else:
                found["content"] = found.get("content", "") + part.text
        return found

    def _call(self, name: str) -> dict[str, Any]:
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            # Kimi's template tells from the id which call a result is of.
            "id": f"functions.{name}:{self.num_calls - 1}"
            if self._text.numbers_calls
            else f"call_{self._id_of(self.num_calls)[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }

    def _add_arguments(self, calls: list[dict[str, Any]], text: str) -> None:
        """To the last call, which may have begun in an earlier delta."""
        index = self.num_calls - 1
        if not calls or calls[-1]["index"] != index:
            calls.append({"index": index, "function": {"arguments": ""}})
        calls[-1]["function"]["arguments"] += text
