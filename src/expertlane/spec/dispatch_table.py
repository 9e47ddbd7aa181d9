"""How a step runs, dispatch form and overlap, by how many tokens a rank has."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from expertlane.errors import SpecError
from expertlane.spec.deployment import DispatchForm


@dataclass(frozen=True)
class DispatchMode:
    """One way to run a step.

    Attributes:
        overlap: in two halves, one of which computes while the other's tokens travel.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    form: DispatchForm
    overlap: bool = False

    def __str__(self) -> str:
        return self.form.replace("_", "-") + (" with overlap" if self.overlap else "")


@dataclass(frozen=True)
class DispatchRow:
    """One number of tokens.

    Attributes:
        num_tokens: of the rank that owns most of a stage's, in the whole of a micro-batch.
        step_s: [num_modes]; the time of a step with so many.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    num_tokens: int
    step_s: tuple[float, ...]


@dataclass(frozen=True)
class DispatchTable:
    """Measured once, then only looked up: every rank decides alike.

    Attributes:
        modes: what was timed; of equally fast ones the first is taken.
        rows: ascending in tokens, one at least.

    Raises:
        SpecError: no row, or one that does not have a time for each mode.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    modes: tuple[DispatchMode, ...]
    rows: tuple[DispatchRow, ...]

    def __post_init__(self) -> None:
        lengths = {len(row.step_s) for row in self.rows}
        if not self.modes or lengths != {len(self.modes)}:
            raise SpecError(
                f"a dispatch table of {len(self.modes)} modes has rows of "
                f"{', '.join(map(str, sorted(lengths))) or 'no'} times"
            )

    @classmethod
    def fixed(cls, form: DispatchForm, overlap: bool = False) -> "DispatchTable":
        """Always the same."""
        return cls((DispatchMode(form, overlap),), (DispatchRow(1, (0.0,)),))

    def choose(self, num_tokens: int, can_split: bool = True) -> DispatchMode:
        """The fastest mode, of times interpolated between rows; past the last, as there.

        Args:
            can_split: whether there is anything to halve; if not, modes with overlap count only
                where there are no others.
        """
        spans = self._spans if can_split else self._unsplit_spans
        index = bisect_left(spans, num_tokens, key=lambda span: span[0])
        return spans[min(index, len(spans) - 1)][1]

    @property
    def forms(self) -> tuple[DispatchForm, ...]:
        """All that may be chosen."""
        spans = [*self._spans, *self._unsplit_spans]
        return tuple(dict.fromkeys(mode.form for _, mode in spans))

    def __str__(self) -> str:
        """What is picked up to how many tokens: `all-gather up to 16, then all-to-all`."""
        *before, (_, last) = self._spans
        parts = [f"{mode} up to {num_tokens}" for num_tokens, mode in before]
        return ", ".join([*parts, f"then {last}" if parts else str(last)])

    @cached_property
    def _spans(self) -> list[tuple[int, DispatchMode]]:
        return self._spans_of(range(len(self.modes)))

    @cached_property
    def _unsplit_spans(self) -> list[tuple[int, DispatchMode]]:
        plain = [place for place, mode in enumerate(self.modes) if not mode.overlap]
        return self._spans_of(plain) if plain else self._spans

    def _spans_of(self, places: Sequence[int]) -> list[tuple[int, DispatchMode]]:
        """The largest number of tokens of each span in which one of some modes is fastest."""
        sizes = [row.num_tokens for row in self.rows]
        num_tokens = np.arange(1, sizes[-1] + 1)
        step_s = [
            np.interp(num_tokens, sizes, [row.step_s[place] for row in self.rows])
            for place in places
        ]
        fastest = np.argmin(step_s, axis=0)
        ends = [*np.flatnonzero(np.diff(fastest)).tolist(), len(fastest) - 1]
        return [(int(num_tokens[end]), self.modes[places[fastest[end]]]) for end in ends]
