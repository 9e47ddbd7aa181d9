"""Grammars of answers with tools: calls in the model's own marks, arguments by their schemas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expertlane.errors import UserError
from expertlane.server.call_forms import HARMONY_ANSWER, CallForm
from expertlane.server.errors import bad_field
from expertlane.server.fields import Function, NamedTool
from expertlane.server.marks import Marks, is_text
from expertlane.server.requests import ChatRequest
from expertlane.spec.files import parse_json, strict_json
from expertlane.spec.sampling import Structured
from expertlane.text.grammar_trial import for_library
from expertlane.text.grammars import lark_text, lead_rules
from expertlane.text.tokenizer import Tokenizer

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_OBJECT = {"type": "object"}
_NOT_OF_TEXTS = ("pattern", "format", "minLength")


@dataclass(frozen=True)
class CallRules:
    """The calls and the text that an answer may hold.

    Attributes:
        functions: the functions that may be called.
        needs_call: whether the answer must be a call; else it may be text, and calls after it.
        holds_all: whether all arguments must fit their schemas; else those of strict tools must.
        most_one: whether there may be one call only.
        content: the JSON that an answer without calls must be; None for any text.
    """

    form: CallForm
    functions: Sequence[Function]
    needs_call: bool
    holds_all: bool
    most_one: bool
    content: Structured | None = None

    def structured(
        self, tokenizer: Tokenizer, *, lead: str | None, may_lead: str | None
    ) -> Structured:
        """The grammar of the answer.

        Args:
            lead, may_lead: end and beginning of reasoning before the answer; see `Structured`.

        Raises:
            UserError: the tools' parameters are too large, or of limits that cannot be kept.
        """
        parameters = [each.parameters for each in self.functions if each.parameters]
        if parameters:  # their bounds are those of one schema
            Structured(json_schema={"anyOf": parameters})
        writer = _Writer(self, tokenizer)
        answer = writer.answer()
        element, rules = "", ""
        if lead is not None:
            element, rules = lead_rules(lead, may_lead, tokenizer)
        lines = ["%llguidance {}", f"start: {element} {answer}", rules, *writer.rules]
        return Structured(grammar="\n".join(filter(None, lines)) + "\n", is_of_schemas=True)


def structured_chat(
    request: ChatRequest, marks: Marks, prompt: str, tokenizer: Tokenizer | None
) -> tuple[Structured | None, str]:
    """The structure of a chat's answer, and the field that asks for it.

    Args:
        prompt: the rendered chat.

    Raises:
        ApiError: fields do not go together.
    """
    structured, field = request.structured()
    functions, choice = request.callable_functions, request.tool_choice
    needs_call = choice == "required" or isinstance(choice, NamedTool)
    most_one = request.parallel_tool_calls is False
    is_strict = any(each.strict for each in functions)
    if tokenizer is None:
        return structured, field
    lead, may_lead = _lead(marks, prompt)
    if not functions or marks.calls is None:
        if structured is not None:
            structured = replace(
                structured, lead=lead, may_lead=may_lead, prefix=marks.answer_begin
            )
        return structured, field
    if structured is not None and structured.kind != "json_schema":
        text = f"{field} with tools is not supported; valid with tools: JSON, or a schema of it"
        raise bad_field(field, text, "unsupported_parameter")
    if not (structured or needs_call or most_one or is_strict):
        return None, ""
    rules = CallRules(
        marks.calls,
        functions,
        needs_call=needs_call,
        holds_all=needs_call,
        most_one=most_one or isinstance(choice, NamedTool),
        content=structured,
    )
    try:
        return rules.structured(tokenizer, lead=lead, may_lead=may_lead), field or "tools"
    except UserError as error:
        raise bad_field("tools", f"tools: {error}") from None


def _lead(marks: Marks, prompt: str) -> tuple[str | None, str | None]:
    """`lead` and `may_lead` of `Structured`, for the reasoning before an answer."""
    form, end = marks.thoughts, prompt.rstrip()
    if form is None or end.endswith(form.end):
        return None, None
    return form.end, None if end.endswith(form.begin) else form.begin


class _Writer:
    """The rules of calls, in Lark's syntax."""

    def __init__(self, asked: CallRules, tokenizer: Tokenizer) -> None:
        self._asked, self._form, self._tokenizer = asked, asked.form, tokenizer
        self.rules: list[str] = []

    def _text(self, text: str) -> str:
        return lark_text(text, self._tokenizer) if text else ""

    def _rule(self, name: str, *elements: str) -> str:
        self.rules.append(f"{name}: {' '.join(filter(None, elements))}")
        return name

    def answer(self) -> str:
        """The grammar element of the whole answer."""
        asked, form = self._asked, self._form
        calls = self._calls(form.section + form.begin)
        if asked.needs_call:
            return calls
        if asked.content is not None:
            before = self._text(HARMONY_ANSWER) if form.body == "harmony" else ""
            schema = parse_json(asked.content.json_schema)
            content = self._rule("content", before, _json(schema, compact=asked.content.compact))
            return f"({calls} | {content})"
        if form.body == "harmony":
            content = self._rule("content", self._text(HARMONY_ANSWER), r"/(.|\n)*/")
            return f"({calls} | {content})"
        if not form.opener:
            content = self._rule("content", r"/([^{\s](.|\n)*)?/")
            return f"({calls} | {content})"
        return self._text_and_calls()

    def _text_and_calls(self) -> str:
        """Element of any text, in which a call follows the mark of one."""
        form = self._form
        opener = self._text(form.opener)
        self.rules.append(r"TEXT: /(.|\n)*/")
        if opener.startswith("<["):
            head = self._rule("head", "TEXT", opener)
        else:
            head = "head"
            self.rules.append(f"head[lazy]: TEXT {opener}")
        rest = self._calls((form.section + form.begin).removeprefix(form.opener), "rest")
        return f"({head} {rest} | TEXT)"

    def _calls(self, first: str, name: str = "calls") -> str:
        """Rule of one call or several, of which the first has its own beginning."""
        form, asked = self._form, self._asked
        body = self._call()
        more = ""
        if not (asked.most_one or form.cannot_repeat):
            more = f"({self._text(form.between + form.begin)} {body})*"
        return self._rule(name, self._text(first), body, more, self._text(form.section_end))

    def _call(self) -> str:
        """Rule of a call after its beginning; written once."""
        if not any(rule.startswith("call: ") for rule in self.rules):
            numbered = enumerate(self._asked.functions)
            options = [self._of_function(number, each) for number, each in numbered]
            self._rule("call", " | ".join(options))
        return "call"

    def _of_function(self, number: int, function: Function) -> str:
        form, name = self._form, f"call_{number}"
        schema: Mapping[str, Any] = _ANY_OBJECT
        if self._asked.holds_all or function.strict:
            schema = _NO_PARAMETERS if function.parameters is None else function.parameters
        if function.strict and form.body == "xml":
            _check_texts(function)
        end = self._text(form.end)
        if form.body == "json":
            head = f'{{"name": {strict_json(function.name)}, "{form.arguments_key}": '
            return self._rule(name, self._text(head), _json(schema), self._text("}" + form.end))
        own = self._text(function.name)
        if form.numbers:
            own += ' ":" /[0-9]{1,3}/'
        head = f"{own} {self._text(form.name_end)}"
        if form.body == "xml":
            return self._rule(name, head, self._keys(name, schema), end)
        return self._rule(name, head, _json(schema), end)

    def _keys(self, name: str, schema: Mapping[str, Any]) -> str:
        """Elements of an object's properties, in their order."""
        form, found = self._form, []
        required = schema.get("required") or ()
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        for number, (key, of_value) in enumerate((schema.get("properties") or {}).items()):
            head = self._text(form.key_begin + key + form.key_end)
            if is_text(of_value):
                value = self._value(f"{name}_{number}", of_value)
            else:
                value = f"{_json({**of_value, **definitions})} {self._text(form.value_end)}"
            one = self._rule(f"{name}_key_{number}", head, value)
            found.append(one if key in required else f"{one}?")
        return " ".join(found)

    def _value(self, name: str, schema: Any) -> str:
        """Element of a value that is plain text, and of the mark that ends it."""
        options = schema.get("enum") if isinstance(schema, Mapping) else None
        if options:
            texts = " | ".join(self._text(str(each)) or '""' for each in options)
            return f"({texts}) {self._text(self._form.value_end)}"
        most = schema.get("maxLength", "") if isinstance(schema, Mapping) else ""
        self.rules.append(
            rf"{name}[suffix={strict_json(self._form.value_end)}]: /(.|\n){{0,{most}}}/"
        )
        return name


def _check_texts(function: Function) -> None:
    """Refuse limits of a strict tool that cannot be kept for texts between marks.

    Raises:
        UserError: a text of a strict tool has one of these limits.
    """
    properties = (function.parameters or {}).get("properties") or {}
    for key, schema in properties.items():
        if is_text(schema) and isinstance(schema, Mapping):
            for limit in _NOT_OF_TEXTS:
                if limit in schema:
                    raise UserError(
                        f"{function.name} is strict, and {key} has {limit}: strings in this "
                        "model's calls cannot be constrained by it"
                    )


def _json(schema: Mapping[str, Any], *, compact: bool = False) -> str:
    return f"%json {strict_json(for_library(schema, compact=compact), ensure_ascii=False)}"
