"""What is measured: operations and transfers of given sizes."""

from dataclasses import dataclass

from expertlane.cost.step.operation import SIZES, Kind, TransferKind


@dataclass(frozen=True)
class Point:
    """An operation whose time is measured.

    Attributes:
        dtype: of weights.
        sizes: those of its kind, in the order of `SIZES`.
    """

    kind: Kind
    dtype: str
    sizes: tuple[int, ...]

    @property
    def by_name(self) -> dict[str, int]:
        """Its sizes by name."""
        return dict(zip(SIZES[self.kind], self.sizes, strict=True))


@dataclass(frozen=True)
class TransferPoint:
    """One collective of the first `num_ranks` ranks, or a send from the first to the second.

    Attributes:
        num_bytes: what a rank sends to each other one, in rows of `row_bytes`.
    """

    kind: TransferKind
    num_ranks: int
    num_bytes: int
    row_bytes: int = 64
