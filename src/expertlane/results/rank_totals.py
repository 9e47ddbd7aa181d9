"""Totals of a rank since the first request for them; they grow while it serves."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class RankTotals:
    """Totals of one rank, E of whose experts have had tokens.

    Attributes:
        num_steps: steps that it took part in.
        spent_ns: [num_stages]; wall time, waits included.
        waited_ns: [num_stages]; the part of it spent waiting for other ranks.
        experts: [E]; logical experts that it computed in any layer.
        num_tokens: [num_layers, E]; token-expert pairs that it computed; zero where another rank
            of its expert tensor-parallel group reports them.
        sent_bytes: [num_links]; bytes sent to other ranks, weights of moved experts included.
        overlapped_ns: time of transfers within steps and a pipeline stage, from their begin
            until their result was needed.
        exposed_ns: waiting time for the results of these transfers.
        num_pairs_saved: see `RankCounts`.
        copies_ns: processor time of sharing pairs among copies.
    """

    num_steps: int
    spent_ns: npt.NDArray[np.int64]
    waited_ns: npt.NDArray[np.int64]
    experts: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    sent_bytes: npt.NDArray[np.int64]
    overlapped_ns: int
    exposed_ns: int
    num_pairs_saved: int
    copies_ns: int

    def nothing(self) -> "RankTotals":
        """Totals of an idle rank of the same model."""
        none = self.experts[:0], self.num_tokens[:, :0], np.zeros_like(self.sent_bytes)
        times = np.zeros_like(self.spent_ns), np.zeros_like(self.waited_ns)
        return RankTotals(0, *times, *none, 0, 0, 0, 0)

    def __add__(self, other: "RankTotals") -> "RankTotals":
        """The sum of two totals, as of a rank and the one that it replaced."""
        experts = np.union1d(self.experts, other.experts)
        num_tokens = np.zeros((len(self.num_tokens), len(experts)), dtype=np.int64)
        for each in (self, other):
            num_tokens[:, np.searchsorted(experts, each.experts)] += each.num_tokens
        return RankTotals(
            self.num_steps + other.num_steps,
            self.spent_ns + other.spent_ns,
            self.waited_ns + other.waited_ns,
            experts,
            num_tokens,
            self.sent_bytes + other.sent_bytes,
            self.overlapped_ns + other.overlapped_ns,
            self.exposed_ns + other.exposed_ns,
            self.num_pairs_saved + other.num_pairs_saved,
            self.copies_ns + other.copies_ns,
        )
