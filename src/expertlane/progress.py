"""How a long command says how far it is, without knowing where that is shown."""

from typing import Protocol


class Progress(Protocol):
    """Told of one task after the other: `task`, some `advance`, `done`."""

    def task(self, description: str, total: int) -> None:
        """Begin a task of `total` parts."""
        ...

    def advance(self, amount: int = 1) -> None:
        """One more part of the task is finished."""
        ...

    def done(self) -> None:
        """The task is finished."""
        ...


class Silent:
    """Progress that nobody watches."""

    def task(self, description: str, total: int) -> None:
        """Say nothing."""

    def advance(self, amount: int = 1) -> None:
        """Say nothing."""

    def done(self) -> None:
        """Say nothing."""
