"""How a long command says how far it is, without knowing where that is shown."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Told of one task after the other: `task`, some `advance`, `done`. This one tells nobody."""

    def task(self, description: str, total: int) -> None:
        """Begin a task of `total` parts."""

    def advance(self, amount: int = 1) -> None:
        """One more part of the task is finished."""

    def done(self) -> None:
        """The task is finished."""


def each_of(items: Sequence[T], progress: Progress, description: str) -> Iterator[T]:
    """The items, one task; a part of it is finished when the next one is asked for."""
    progress.task(description, len(items))
    for item in items:
        yield item
        progress.advance()
    progress.done()
