"""The one way to write JSON, without NaN and Infinity, so that every reader accepts it."""

import json
from typing import Any


def strict_json(value: Any, **layout: Any) -> str:
    """A value as JSON text.

    Args:
        layout: options of `json.dumps`, such as `indent` and `separators`.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON cannot express.
    """
    return json.dumps(value, allow_nan=False, **layout)
