"""How evenly tokens fall on experts."""

import numpy as np
import numpy.typing as npt


def max_over_mean(
    num_tokens: npt.NDArray[np.int64] | npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
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
