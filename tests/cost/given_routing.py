"""A source of routing that repeats what ranks chose."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from expertlane.cost.step.operation import Ints


class GivenRouting:
    """What the ranks of a replica chose in a step, as their records have it.

    Args:
        of_rank: by rank of the replica, by layer of the rank's stage, [T, K].
    """

    def __init__(self, of_rank: Sequence[Mapping[int, npt.NDArray[np.integer]]]) -> None:
        self._of_rank = of_rank

    def sample_of(self, layer: int) -> Hashable:
        """All layers differ."""
        return layer

    def topk_ids(self, layer: int, first: int, before: Ints, owned: Ints) -> Ints:
        """As the protocol says, `first` apart."""
        of_ranks = [ids[layer] for ids in self._of_rank if layer in ids]
        slices = zip(of_ranks, before.tolist(), owned.tolist(), strict=True)
        parts = [ids[begin : begin + num] for ids, begin, num in slices]
        return np.concatenate(parts).astype(np.int64)
