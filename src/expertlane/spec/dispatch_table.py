"""Which dispatch form a step takes, by how many tokens a rank has."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, ClassVar

from expertlane.spec.deployment import DispatchForm


@dataclass(frozen=True)
class DispatchRow:
    """One number of tokens.

    Attributes:
        num_tokens: of the rank that owns most of a stage's.
        step_s: by form, the time of a step with so many.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    num_tokens: int
    step_s: dict[DispatchForm, float]

    @property
    def fastest(self) -> DispatchForm:
        """The form that took least time."""
        return min(self.step_s, key=self.step_s.__getitem__)


@dataclass(frozen=True)
class DispatchTable:
    """Measured once, then only looked up: every rank decides alike.

    Attributes:
        rows: ascending in tokens, one at least.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    rows: tuple[DispatchRow, ...]

    @classmethod
    def fixed(cls, form: DispatchForm) -> "DispatchTable":
        """Always the same form."""
        return cls((DispatchRow(1, {form: 0.0}),))

    def choose(self, num_tokens: int) -> DispatchForm:
        """The fastest form of the first row with so many tokens, or of the last."""
        sizes = [row.num_tokens for row in self.rows]
        return self.rows[min(bisect_left(sizes, num_tokens), len(sizes) - 1)].fastest

    @property
    def forms(self) -> tuple[DispatchForm, ...]:
        """All that may be chosen."""
        return tuple({row.fastest: None for row in self.rows})

    def __str__(self) -> str:
        """What is picked up to how many tokens: `all-gather up to 16, then all-to-all`."""
        parts: list[str] = []
        for row, following in zip(self.rows, (*self.rows[1:], None), strict=True):
            name = row.fastest.replace("_", "-")
            if following is None:
                parts.append(f"then {name}" if parts else name)
            elif following.fastest != row.fastest:
                parts.append(f"{name} up to {row.num_tokens}")
        return ", ".join(parts)
