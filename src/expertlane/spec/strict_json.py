"""The one way to write JSON: what every reader takes, without NaN and Infinity."""

import json
from typing import Any


def strict_json(value: Any, **layout: Any) -> str:
    """The text of a value.

    Args:
        layout: as `json.dumps` has it: indent, separators and the like.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON has no word for.
    """
    return json.dumps(value, allow_nan=False, **layout)
