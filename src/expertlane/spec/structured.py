"""Constraints on outputs: JSON of a schema, a match of a regex or a grammar, one of some texts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from expertlane.errors import UserError
from expertlane.spec.files import parse_json, strict_json
from expertlane.spec.ranges import shown, take_flag

KIB = 1024
MOST_SCHEMA_CHARACTERS = 256 * KIB
MOST_CHOICE_CHARACTERS = 64 * KIB
MOST_GRAMMAR_CHARACTERS = 8 * KIB  # compiling can take the cube of it
MOST_REGEX_CHARACTERS = 16 * KIB
MOST_LITERAL_CHARACTERS = 16 * KIB  # each mask takes a time in proportion to a text's length
MOST_CHOICES = 4096
MOST_DEPTH = 64  # of lists and objects in a schema
MOST_PROPERTIES = 1000  # in a schema; compiling takes the square of them


@dataclass(frozen=True)
class Structured:
    """A constraint on an output; exactly one of the first four fields is given.

    Attributes:
        json_schema: schema of a JSON value, as an object, a boolean or JSON text; kept as text.
        regex: expression that the whole output matches, in the syntax of Rust's `regex` crate.
        grammar: in llguidance's Lark syntax, or in GBNF (`root ::= …`).
        choice: texts, of which the output is one.
        lead: text that comes before it, such as reasoning, of any kind up to this end; None where
            there is none.
        may_lead: the beginning of such a text, where the output may have one or not; None where it
            has one anyway.
        prefix: text that stands before the constrained part.
        is_of_schemas: the grammar is this program's own, made of schemas, and may be as large.
        compact: JSON of the schema has no white space but within texts.

    Raises:
        UserError: none or several are given, or one is too large or of a wrong type; or `compact`
            without a schema.
    """

    json_schema: Any = None
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | None = None
    lead: str | None = None
    may_lead: str | None = None
    prefix: str = ""
    is_of_schemas: bool = False
    compact: bool = False

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(KINDS)
            raise UserError(f"structured: {len(given)} of {names} are given; give one")
        (kind,) = given
        take_flag("is_of_schemas", self.is_of_schemas)
        if take_flag("compact", self.compact) and kind != "json_schema":
            raise UserError(f"structured: compact is for json_schema; {kind} is given")
        for name in ("lead", "may_lead", "prefix"):
            text = getattr(self, name)
            if not isinstance(text, str) and (text is not None or name == "prefix"):
                raise UserError(f"{name} is {shown(text)}; it must be a text")
        value = getattr(self, kind)
        if kind == "json_schema":
            object.__setattr__(self, kind, _schema_text(value))
        elif kind == "choice":
            object.__setattr__(self, kind, _choices(value))
        else:
            most = MOST_REGEX_CHARACTERS if kind == "regex" else MOST_GRAMMAR_CHARACTERS
            most = MOST_SCHEMA_CHARACTERS if self.is_of_schemas else most
            if not isinstance(value, str) or not value:
                raise UserError(f"{kind} is {shown(value)}; it must be a text, not empty")
            _check_size(kind, value, most)

    @property
    def kind(self) -> str:
        """The name of the constraint that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)


_NOTES = ("title", "description", "$comment")
KINDS = ("json_schema", "regex", "grammar", "choice")


def _check_size(kind: str, text: str, most: int) -> None:
    if len(text) > most:
        raise UserError(f"{kind} has {len(text):,} characters; at most {most:,} are taken")
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise UserError(f"{kind} holds half a surrogate pair; give valid Unicode")


def _schema_text(value: Any) -> str:
    if isinstance(value, str):
        _check_size("json_schema", value, MOST_SCHEMA_CHARACTERS)
        try:
            value = parse_json(value)
        except (UserError, ValueError) as error:
            raise UserError(f"json_schema is no JSON: {error}") from None
    if not isinstance(value, Mapping | bool):
        raise UserError(f"json_schema is {shown(value)}; it must be an object or a boolean")
    num_properties = 0
    for depth, each in _inner(value):
        if depth > MOST_DEPTH:
            raise UserError(f"json_schema is nested more than {MOST_DEPTH} deep")
        properties = each.get("properties") if isinstance(each, Mapping) else None
        num_properties += len(properties) if isinstance(properties, Mapping) else 0
        longest = max(map(len, _literals(each)), default=0)
        if longest > MOST_LITERAL_CHARACTERS:
            raise UserError(
                f"json_schema holds a text of {longest:,} characters; at most "
                f"{MOST_LITERAL_CHARACTERS:,} are taken"
            )
    if num_properties > MOST_PROPERTIES:
        raise UserError(
            f"json_schema has {num_properties:,} properties; at most {MOST_PROPERTIES:,} are taken"
        )
    try:
        text = strict_json(value, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UserError(f"json_schema is no JSON: {error}") from None
    _check_size("json_schema", text, MOST_SCHEMA_CHARACTERS)
    return text


def _inner(value: Any) -> Iterator[tuple[int, Any]]:
    """Each list and object with its depth, from the outside."""
    found = [(value, 1)]
    while found:
        each, depth = found.pop()
        inner: Iterable[Any] = ()
        if isinstance(each, Mapping):
            inner = each.values()
        elif isinstance(each, list | tuple):
            inner = each
        else:
            continue
        yield depth, each
        found += [(part, depth + 1) for part in inner]


def _literals(value: Any) -> Iterator[str]:
    """Texts right in a list or an object that outputs may have to hold."""
    if isinstance(value, Mapping):
        yield from (key for key in value if isinstance(key, str))
        value = [each for key, each in value.items() if key not in _NOTES]
    yield from (each for each in value if isinstance(each, str))


def _choices(value: Any) -> tuple[str, ...]:
    texts = tuple(value) if isinstance(value, list | tuple) else ()
    if not texts or not all(isinstance(each, str) for each in texts):
        raise UserError(f"choice is {shown(value)}; it must be a list of texts, not empty")
    if len(texts) > MOST_CHOICES:
        raise UserError(f"choice holds {len(texts):,} texts; at most {MOST_CHOICES:,} are taken")
    _check_size("choice", "".join(texts), MOST_CHOICE_CHARACTERS)
    return texts
