"""What one token-expert pair more costs a rank, from what ranks of one step and stage took."""

import numpy as np
import numpy.typing as npt


class PairCost:
    """The slope of seconds over pairs, by least squares over the ranks of a step and stage.

    The mean, seconds of all over pairs of all, would promise too much: part of what a rank takes it
    takes for its experts' weights, whatever their tokens.
    """

    def __init__(self) -> None:
        self._products = self._squares = 0.0

    def add(self, num_pairs: npt.NDArray[np.integer], seconds: npt.NDArray[np.floating]) -> None:
        """Take in a pipeline stage's ranks of a step.

        Args:
            num_pairs, seconds: [num_ranks]; of each rank's experts, all layers together.
        """
        more = num_pairs - num_pairs.mean()
        self._products += float(more @ seconds)
        self._squares += float(more @ more)

    @property
    def pair_s(self) -> float:
        """Seconds for each pair more; 0 where ranks never differed, or it took no longer."""
        return max(0.0, self._products / self._squares) if self._squares else 0.0
