"""The load of the latest steps, and how even a load is."""

import numpy as np
import numpy.typing as npt


class LoadTracker:
    """The number of tokens of each expert, summed over the last `window` steps.

    A step replaces the oldest one in a ring, so that it costs the same for any window.
    """

    def __init__(self, num_layers: int, num_experts: int, window: int) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1")
        self._steps = np.zeros((window, num_layers, num_experts), dtype=np.int64)
        self._sum = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._num_added = 0

    @property
    def window(self) -> int:
        """Steps it looks back, at most."""
        return len(self._steps)

    @property
    def num_steps(self) -> int:
        """Steps that `load` sums."""
        return min(self._num_added, self.window)

    def add(self, num_tokens_per_expert: npt.NDArray[np.integer]) -> None:
        """Add a step.

        Args:
            num_tokens_per_expert: [num_layers, num_experts].
        """
        if num_tokens_per_expert.shape != self._sum.shape:
            raise ValueError(
                f"load of shape {num_tokens_per_expert.shape}; tracked is {self._sum.shape}"
            )
        oldest = self._steps[self._num_added % self.window]
        self._sum += num_tokens_per_expert
        self._sum -= oldest
        oldest[:] = num_tokens_per_expert
        self._num_added += 1

    def load(self) -> npt.NDArray[np.int64]:
        """[num_layers, num_experts]; a copy."""
        return self._sum.copy()


Loads = npt.NDArray[np.int64] | npt.NDArray[np.float64]


def max_over_mean(num_tokens: Loads) -> npt.NDArray[np.float64]:
    """Load imbalance along the last axis: the fullest over the mean; 1 is even, 0 is no load.

    Args:
        num_tokens: [..., num_experts or num_ranks].
    """
    mean = num_tokens.mean(axis=-1)
    fullest = num_tokens.max(axis=-1)
    ratio: npt.NDArray[np.float64] = np.divide(
        fullest, mean, out=np.zeros_like(mean), where=mean > 0
    )
    return ratio


def total_max_over_mean(num_tokens: Loads) -> float:
    """Sum over layers of the fullest ranks over the sum of the means; 0 without tokens.

    Args:
        num_tokens: [num_layers, num_ranks].
    """
    mean = float(num_tokens.mean(axis=1).sum())
    return float(num_tokens.max(axis=1).sum()) / mean if mean else 0.0
