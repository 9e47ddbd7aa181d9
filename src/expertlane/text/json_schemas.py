"""JSON schemas, rewritten for llguidance."""

from collections.abc import Mapping
from typing import Any

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
