"""JSON schemas as llguidance is given them."""

from collections.abc import Mapping
from typing import Any

# Between tokens of JSON a line end and an indentation, or a space: without a bound a model may
# write no more than them.
WHITESPACE = r"\x20|\x0A[\x20\x09]{0,40}"

# The library lets any minute have a leap second, which RFC 3339 does not, nor do most readers.
_NO_LEAP_SECONDS = {"time": "^.{6}[0-5]", "date-time": "^.{17}[0-5]"}
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NO_SCHEMAS = ("enum", "const", "default", "examples")


def for_library(schema: Any) -> Any:
    """A schema of the same values, but for times that are none and endless white space."""
    if not isinstance(schema, Mapping):
        return schema
    return {**_strict_times(schema), "x-guidance": {"whitespace_pattern": WHITESPACE}}


def _strict_times(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict_times(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NO_SCHEMAS:
            found[key] = value
        elif key in _OF_SCHEMAS and isinstance(value, Mapping):
            found[key] = {name: _strict_times(each) for name, each in value.items()}
        else:
            found[key] = _strict_times(value)
    pattern = _NO_LEAP_SECONDS.get(str(schema.get("format")))
    if pattern is None:
        return found
    if "pattern" not in found:
        return found | {"pattern": pattern}
    return found | {"allOf": [*found.get("allOf", ()), {"type": "string", "pattern": pattern}]}
