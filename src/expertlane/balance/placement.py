"""Which physical experts an expert-parallel rank holds."""

from dataclasses import dataclass

from expertlane.spec.partition import partition


@dataclass(frozen=True)
class Placement:
    """The experts of one layer, by expert-parallel rank.

    Attributes:
        experts_of_rank: [ep] ranges of logical experts; `ep` need not divide their number.
    """

    experts_of_rank: tuple[range, ...]

    @classmethod
    def linear(cls, num_experts: int, ep: int) -> "Placement":
        """Consecutive experts on each rank, near-equal in number."""
        return cls(tuple(partition(num_experts, ep)))

    def rank_of_expert(self) -> list[int]:
        """[num_experts]; the expert-parallel rank that holds each expert."""
        return [rank for rank, experts in enumerate(self.experts_of_rank) for _ in experts]
