"""What all parts of the schema share."""

from typing import Any, ClassVar


class Strict:
    """Read back only what was written: no unknown key, no value of another type."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
