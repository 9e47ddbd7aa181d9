"""Readers of tool calls as their text arrives: the name, then the arguments piece by piece."""

from collections.abc import Mapping
from typing import Any

from expertlane.errors import UserError
from expertlane.spec.files import parse_json, strict_json

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class JsonValue:
    """Finds the end of a JSON object or list as its text arrives."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.is_ended = False
        self._escaped = False

    def feed(self, character: str) -> None:
        """Take one more character in."""
        if self.in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self.in_string = False
        elif character == '"':
            self.in_string = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
            self.is_ended = self.depth <= 0


class NamedArguments:
    """Reads the arguments of a call, a JSON object, after its name.

    Attributes:
        is_begun, is_ended: whether some of the object has arrived, and whether all has.
    """

    def __init__(self) -> None:
        self._value = JsonValue()
        self.is_begun = self.is_ended = False

    def feed(self, text: str) -> tuple[str, str]:
        """The part of a text that belongs to the arguments, and the rest."""
        self.is_begun = True
        for number, character in enumerate(text, 1):
            self._value.feed(character)
            if self._value.is_ended:
                self.is_ended = True
                return text[:number], text[number:]
        return text, ""


class CallObject:
    """Reads `{"name": …, "arguments": …}`; gives the arguments once the name is known.

    Attributes:
        name: None before it is known.
        is_ended: whether the object is complete.
        has_arguments: whether any have come.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.has_arguments = False
        self._value = JsonValue()
        self._key: str | None = None  # the key of the value to come
        self._part = ""  # text so far of a key, or of a value
        self._space = ""  # after a value, or within it
        self._waiting = ""  # arguments before the name

    @property
    def is_ended(self) -> bool:
        """Whether the object has ended."""
        return self._value.is_ended

    def feed(self, text: str) -> tuple[str, str]:
        """The new text of the arguments, and the text after the object."""
        pieces: list[str] = []
        for number, character in enumerate(text, 1):
            self._take(character, pieces)
            if self.is_ended:
                return self._given(pieces), text[number:]
        return self._given(pieces), ""

    def _given(self, pieces: list[str]) -> str:
        self._waiting += "".join(pieces)
        if self.name is None:
            return ""
        given, self._waiting = self._waiting, ""
        self.has_arguments = self.has_arguments or bool(given)
        return given

    def _take(self, character: str, pieces: list[str]) -> None:
        value = self._value
        was_inside, was_string = value.depth, value.in_string
        value.feed(character)
        if was_inside == 0:
            return
        is_mark = was_inside == 1 and not was_string
        if is_mark and character == ":" and self._key is None:
            self._key, self._part = _decoded(self._part), ""
        elif is_mark and character in ",}":
            self._end_value(pieces)
        else:
            self._add(character, pieces)

    def _add(self, character: str, pieces: list[str]) -> None:
        if character in _SPACE and not self._value.in_string:
            self._space += character if self._part else ""
            return
        text, self._space = self._space + character, ""
        self._part += text
        if self._key in _ARGUMENTS and not self._part.startswith('"'):
            pieces.append(text)

    def _end_value(self, pieces: list[str]) -> None:
        if self._key == "name" and self._part.startswith('"'):
            self.name = _decoded(self._part)
        elif self._key in _ARGUMENTS and self._part.startswith('"'):  # JSON as a text
            pieces.append(_decoded(self._part) or "")
        self._key, self._part, self._space = None, "", ""


def _decoded(text: str) -> str | None:
    try:
        value = parse_json(text)
    except (UserError, ValueError):
        return None
    return value if isinstance(value, str) else None


class XmlArguments:
    """Writes arguments as JSON, from keys and values that arrive one by one.

    Args:
        schema: schema of the tool's parameters; tells which values are texts.
    """

    def __init__(self, schema: Mapping[str, Any] | None) -> None:
        given = (schema or {}).get("properties")
        self._properties: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        self._num_keys = 0
        self._is_text = False
        self._held = ""

    def begin(self, key: str) -> str:
        """The JSON of the next key, up to its value."""
        self._is_text = is_text(self._properties.get(key))
        self._held = ""
        self._num_keys += 1
        before = "{" if self._num_keys == 1 else ", "
        return f"{before}{strict_json(key, ensure_ascii=False)}: " + ('"' if self._is_text else "")

    def feed(self, text: str, *, is_last: bool = False) -> str:
        """The JSON of a part of the key's value; one that is no text is given once complete."""
        if self._is_text:
            return strict_json(text, ensure_ascii=False)[1:-1] + ('"' if is_last else "")
        self._held += text
        if not is_last:
            return ""
        try:
            parse_json(self._held)
        except (UserError, ValueError):
            return strict_json(self._held, ensure_ascii=False)
        return self._held.strip()

    def end(self) -> str:
        """The closing brace; `{}` without keys."""
        return "}" if self._num_keys else "{}"


def is_text(schema: Any) -> bool:
    """Whether a schema's values are texts, which XML forms hold without quotes."""
    if not isinstance(schema, Mapping):
        return True
    kind = schema.get("type")
    if kind is None and isinstance(schema.get("enum"), list):
        return all(isinstance(each, str) for each in schema["enum"])
    return kind == "string"
