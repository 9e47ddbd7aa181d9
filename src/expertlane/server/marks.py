"""Reasoning and tool calls found in a model's text as it arrives, by its family's marks."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from expertlane.errors import UserError
from expertlane.server.call_forms import (
    CALL_FORMS,
    HARMONY_ANSWER,
    HARMONY_MARKS,
    THOUGHT_FORMS,
    CallForm,
    ThoughtForm,
    call_form_of,
    thought_form_of,
)
from expertlane.spec.files import parse_json, strict_json
from expertlane.text.tokenizer import Tokenizer

_NONE = "none"
_PYTHON_TAG = "<|python_tag|>"  # Llama may write it before a call
_BETWEEN_OBJECTS = " \t\r\n[],;"
_MOST_NAME = 256  # characters of a name and what may be beside it
_NUMBERED = re.compile(r"^(?:functions\.)?(.*?)(?::\d+)?$", re.DOTALL)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


Kind = Literal["content", "reasoning", "name", "arguments"]


@dataclass(frozen=True)
class Marks:
    """The forms in which a model writes reasoning and calls; None for one it does not mark."""

    thoughts: ThoughtForm | None = None
    calls: CallForm | None = None

    @classmethod
    def of_template(
        cls, source: str, *, calls: str | None = None, thoughts: str | None = None
    ) -> Self:
        """The forms found in a chat template, or those named: keys of the forms, or `none`.

        Raises:
            UserError: no form has such a name.
        """
        call_name = call_form_of(source) if calls is None else calls
        thought_name = thought_form_of(source) if thoughts is None else thoughts
        return cls(
            _form(THOUGHT_FORMS, thought_name, "--reasoning-parser"),
            _form(CALL_FORMS, call_name, "--tool-call-parser"),
        )

    @property
    def is_harmony(self) -> bool:
        """Whether the model writes OpenAI's harmony format, with all text in channels."""
        return THOUGHT_FORMS["harmony"] is self.thoughts or CALL_FORMS["harmony"] is self.calls

    @property
    def answer_begin(self) -> str:
        """The marks before an answer's content; empty but for harmony."""
        return HARMONY_ANSWER if self.is_harmony else ""

    def shown_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Control tokens among the marks, which detokenized text must keep to be parsed."""
        texts: list[str] = [*HARMONY_MARKS] if self.is_harmony else []
        if self.thoughts is not None:
            texts += [self.thoughts.begin, self.thoughts.end]
        if (form := self.calls) is not None:
            texts += [form.section, form.begin, form.name_end, form.end, form.section_end]
            texts += [form.key_begin, form.key_end, form.value_end]
            texts += [_PYTHON_TAG] if not form.opener else []
        found = (each for text in texts for _, each in tokenizer.split_special(text))
        return tuple(sorted({each for each in found if each is not None}))


def _form(forms: Mapping[str, Any], name: str | None, option: str) -> Any:
    if name is None or name == _NONE:
        return None
    if name not in forms:
        valid = ", ".join([*forms, _NONE])
        raise UserError(f"{option} is {name!r}; valid: {valid}")
    return forms[name]


@dataclass(slots=True)
class Part:
    """A part of an answer; a call comes as its name, then its arguments piece by piece."""

    kind: Kind
    text: str


class MarkedText:
    """Parser of an answer into reasoning, content and calls, as its text arrives.

    Args:
        prompt: its end tells whether the answer begins inside reasoning.
        takes_calls: whether tools were offered; else marks of calls are text.
        schemas: by tool name, the schema of its parameters.
    """

    def __init__(
        self,
        marks: Marks,
        prompt: str,
        *,
        takes_calls: bool,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._form = marks.calls if takes_calls else None
        self._thoughts = marks.thoughts
        self._schemas = schemas or {}
        self._held = ""
        self._raw = ""  # text held while it may be a call
        self._had_calls = False
        self._is_bare = True  # nothing but space was given
        self._drops_space = False  # after a call
        self._object = CallObject()
        self._named = JsonValue()
        self._xml = XmlArguments(None)
        self._kind: Kind = "content"
        self._state: Callable[[bool], Iterator[Part]] = self._in_content
        if marks.is_harmony:
            self._state = self._in_header
        elif self._thoughts is not None:
            begins = prompt.rstrip().endswith(self._thoughts.begin)
            self._state = self._in_thoughts if begins else self._in_start

    @property
    def kind(self) -> Kind | None:
        """The kind of the text to come; None while it is not known."""
        if self._state in (self._in_start, self._in_header):
            return None
        return "reasoning" if self._state == self._in_thoughts else self._kind

    @property
    def numbers_calls(self) -> bool:
        """Whether the model numbers its calls."""
        return self._form is not None and self._form.numbers

    def feed(self, text: str, *, is_last: bool = False) -> list[Part]:
        """The parts that are certain after some more text."""
        self._held += text
        return list(self._parts(is_last))

    def _parts(self, is_last: bool) -> Iterator[Part]:
        while True:
            before = self._state, self._held
            yield from self._state(is_last)
            if before == (self._state, self._held):
                return

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken

    def _until(self, marks: Iterable[str], is_last: bool) -> tuple[str, str]:
        """The text before the first of some marks, and that mark; what may begin one is held."""
        places = [(self._held.find(mark), -len(mark), mark) for mark in marks]
        found = [each for each in places if each[0] >= 0]
        if found:
            place, _, mark = min(found)
            text = self._take(place)
            self._take(len(mark))
            return text, mark
        held = 0 if is_last else max((_overlap(self._held, mark) for mark in marks), default=0)
        return self._take(len(self._held) - held), ""

    def _in_start(self, is_last: bool) -> Iterator[Part]:
        """At the start, which may be the mark of reasoning."""
        assert self._thoughts is not None, "else it begins with content"
        text, mark = self._held.lstrip(), self._thoughts.begin
        if text.startswith(mark):
            self._held, self._state = text.removeprefix(mark), self._in_thoughts
        elif is_last or not mark.startswith(text):
            self._state = self._in_content
        yield from ()

    def _in_thoughts(self, is_last: bool) -> Iterator[Part]:
        assert self._thoughts is not None, "it is inside"
        text, mark = self._until([self._thoughts.end], is_last)
        if text:
            yield Part("reasoning", text)
        if mark:
            self._state = self._in_content

    def _in_content(self, is_last: bool) -> Iterator[Part]:
        form = self._form
        if form is None:
            openers: Sequence[str] = ()
        elif form.opener:
            openers = form.openers
        else:
            openers = (_PYTHON_TAG,)
            if self._is_bare and self._held.lstrip().startswith("{"):
                self._state, self._raw = self._in_objects, ""
                return
        closers = form.closers if form is not None and self._had_calls else ()
        text, mark = self._until([*openers, *closers], is_last)
        if self._drops_space:
            text = text.lstrip()
            self._drops_space = not text
        if text:
            self._is_bare = self._is_bare and not text.strip()
            yield Part("content", text)
        if mark in openers and form is not None:
            self._raw = mark
            self._state = self._in_objects if form.body == "json" else self._in_name

    # A call that begins with its name.

    def _in_name(self, is_last: bool) -> Iterator[Part]:
        form = self._form
        assert form is not None, "it takes calls"
        begin, end = _after(form.begin, form.openers), form.name_end.strip() or form.name_end
        if form.section and self._raw == form.opener:  # the first call is still to begin
            begin = form.begin
        text = self._held.lstrip()
        for mark in begin.split():
            if text.startswith(mark):
                text = text.removeprefix(mark).lstrip()
            elif mark.startswith(text) and not is_last:
                return
        place = _first_of(text, [end, *form.closers] if end != "\n" else [end, *form.closers, "<"])
        name = text[:place].strip().strip('"')
        is_name = 0 < len(name) <= _MOST_NAME and "\n" not in name and "{" not in name
        if is_name and place >= 0:
            found = _NUMBERED.match(name) if form.numbers else None
            name = name if found is None else found[1]
            rest = text[place:]
            self._held = rest.removeprefix(end)
            self._raw, self._had_calls, self._drops_space = "", True, True
            yield Part("name", name)
            if form.body == "xml":
                self._xml = XmlArguments(self._schemas.get(name))
                self._state = self._in_keys
            else:
                self._named = JsonValue()
                self._state = self._in_named
        elif is_last or place >= 0 or len(text) > _MOST_NAME:
            yield from self._give_up()

    def _give_up(self) -> Iterator[Part]:
        """Treat the text held for a call as content."""
        if self._raw:
            yield Part("content", self._raw)
        self._raw, self._is_bare, self._state = "", False, self._in_content

    def _in_named(self, is_last: bool) -> Iterator[Part]:
        text = self._held.lstrip() if not self._named.is_begun else self._held
        if not text:
            self._held = ""
            return
        if not self._named.is_begun and text[0] != "{":
            self._held = text
            yield Part("arguments", "{}")
            self._state = self._in_content
            return
        given, self._held = self._named.feed(text)
        if given:
            yield Part("arguments", given)
        if self._named.is_ended:
            self._state = self._in_fence

    def _in_fence(self, is_last: bool) -> Iterator[Part]:
        """Skip a code fence, which some models write around arguments."""
        text = self._held.lstrip()
        if text.startswith("```"):
            self._held = text.removeprefix("```")
        elif text or is_last:
            self._held = text
        if text and not "```".startswith(text):
            self._state = self._in_content
        yield from ()

    # A call, or several, that are JSON objects.

    def _in_objects(self, is_last: bool) -> Iterator[Part]:
        rest = self._held.lstrip(_BETWEEN_OBJECTS)
        if rest.startswith("{"):
            self._raw += self._take(len(self._held) - len(rest))
            self._object = CallObject()
            self._state = self._in_object
        elif rest or is_last:
            if self._raw:
                yield from self._give_up()
            else:
                self._held, self._state = rest, self._in_content

    def _in_object(self, is_last: bool) -> Iterator[Part]:
        is_known = self._object.name is not None
        text = self._take(len(self._held))
        given, self._held = self._object.feed(text)
        name = self._object.name
        if name is None:
            self._raw += text[: len(text) - len(self._held)]
            if self._object.is_ended or is_last:
                yield from self._give_up()
            return
        if not is_known:
            self._raw, self._had_calls, self._drops_space = "", True, True
            yield Part("name", name)
        if given:
            yield Part("arguments", given)
        if self._object.is_ended:
            if not self._object.has_arguments:
                yield Part("arguments", "{}")
            self._state = self._in_objects

    # Keys and values between marks.

    def _in_keys(self, is_last: bool) -> Iterator[Part]:
        form = self._form
        assert form is not None, "it takes calls"
        ends = [each for each in form.closers if each != form.section_end.strip()]
        _, mark = self._until([form.key_begin, *ends], is_last)
        if mark == form.key_begin:
            self._state = self._in_key
        elif mark:
            yield Part("arguments", self._xml.end())
            self._state = self._in_content

    def _in_key(self, is_last: bool) -> Iterator[Part]:
        form = self._form
        assert form is not None, "it takes calls"
        marks = form.key_end.split()
        text = self._held
        key, found, rest = text.partition(marks[0])
        for mark in marks[1:]:
            rest = rest.lstrip()
            found = mark if rest.startswith(mark) else ""
            rest = rest.removeprefix(mark)
        if not found or (form.key_end.endswith("\n") and not rest and not is_last):
            return
        self._held = rest.removeprefix("\n") if form.key_end.endswith("\n") else rest
        yield Part("arguments", self._xml.begin(key.strip().strip('"')))
        self._state = self._in_value

    def _in_value(self, is_last: bool) -> Iterator[Part]:
        form = self._form
        assert form is not None, "it takes calls"
        mark = form.value_end.strip()
        marks = [f"\n{mark}", mark] if form.value_end.startswith("\n") else [mark]
        text, found = self._until(marks, False)
        given = self._xml.feed(text, is_last=bool(found))
        if given:
            yield Part("arguments", given)
        if found:
            self._state = self._in_keys

    # Channels.

    def _in_header(self, is_last: bool) -> Iterator[Part]:
        before, found, rest = self._held.partition("<|message|>")
        if not found:
            if is_last and before and "<|" not in before:
                self._held = ""
                yield Part("content", before)
            return
        self._held = rest
        channel, recipient = _CHANNEL.search(before), _RECIPIENT.search(before)
        self._kind = "content"
        if recipient is not None and self._form is not None:
            self._kind = "arguments"
            yield Part("name", recipient[1])
        elif channel is not None and channel[1] == "analysis":
            self._kind = "reasoning"
        self._state = self._in_message

    def _in_message(self, is_last: bool) -> Iterator[Part]:
        ends = ["<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>"]
        text, mark = self._until(ends, is_last)
        if text:
            yield Part(self._kind, text)
        if mark:
            self._held = mark + self._held if mark == "<|channel|>" else self._held
            self._state = self._in_header


def _after(begin: str, openers: Iterable[str]) -> str:
    """The rest of a call's beginning, after the opener that it starts with."""
    for opener in openers:
        if begin.startswith(opener):
            return begin.removeprefix(opener)
    return begin


def _first_of(text: str, marks: Iterable[str]) -> int:
    """The index of the first of some marks in a text; -1 without any."""
    places = [place for mark in marks if (place := text.find(mark)) >= 0]
    return min(places, default=-1)


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that may begin a mark."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)


class JsonValue:
    """Scanner for the end of a JSON object or list, as its text arrives.

    Attributes:
        is_begun, is_ended: whether some of it has arrived, and whether all has.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = self.is_begun = self.is_ended = False
        self._escaped = False

    def feed(self, text: str) -> tuple[str, str]:
        """The part of a text that belongs to the value, and the rest."""
        for number, character in enumerate(text, 1):
            self.take(character)
            if self.is_ended:
                return text[:number], text[number:]
        return text, ""

    def take(self, character: str) -> None:
        """Take one more character in."""
        self.is_begun = True
        if self._escaped:
            self._escaped = False
        elif self.in_string:
            self._escaped = character == "\\"
            self.in_string = character != '"'
        elif character == '"':
            self.in_string = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
            self.is_ended = self.depth <= 0


class CallObject:
    """Parser of `{"name": …, "arguments": …}`; gives the arguments once the name is known.

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
        value.take(character)
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
    """Arguments as JSON, written from keys and values that arrive one by one.

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
