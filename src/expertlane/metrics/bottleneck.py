"""What a phase spends most of its time on, and which rank the others wait for."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Phase

# Below this share of the wall time a rank that waits less than the others is not called slow.
STRAGGLER_SHARE = 0.05


@dataclass(frozen=True)
class Bottleneck:
    """The largest part of a phase.

    Attributes:
        share: of the wall time, mean over ranks.
        straggler: the rank that the others wait for, or None.
        sentence: the same for a reader.
    """

    phase: Phase
    cause: Cause
    share: float
    straggler: int | None
    sentence: str


def find_bottleneck(
    layout: Layout,
    phase: Phase,
    breakdown_s: dict[Cause, float],
    waiting_s: npt.NDArray[np.float64],
    wall_s: float,
) -> Bottleneck:
    """Name the largest cause, and the straggler if there is one.

    Args:
        breakdown_s: by cause; its sum is all of the time.
        waiting_s: [num_ranks]; over the whole phase.
        wall_s: of the whole phase.
    """
    cause = max(breakdown_s, key=lambda cause: breakdown_s[cause])
    share = breakdown_s[cause] / sum(breakdown_s.values())
    straggler, excess_s = _straggler(layout, waiting_s)
    sentence = f"{cause.value}, {share:.0%} of {phase.value}"
    if excess_s <= STRAGGLER_SHARE * wall_s:
        return Bottleneck(phase, cause, share, None, sentence)
    sentence += (
        f"; straggler: rank {straggler}, for which others wait {excess_s / wall_s:.0%} of the time"
    )
    return Bottleneck(phase, cause, share, straggler, sentence)


def _straggler(layout: Layout, waiting_s: npt.NDArray[np.float64]) -> tuple[int, float]:
    """The rank that waits least within its pipeline stage, and how much longer the others wait.

    Of several pipeline stages, the one where that difference is largest.
    """
    if layout.stage_size == 1:
        return 0, 0.0
    by_stage = waiting_s.reshape(-1, layout.stage_size)
    least = by_stage.min(axis=1)
    of_others = (by_stage.sum(axis=1) - least) / (layout.stage_size - 1)
    stage = int(np.argmax(of_others - least))
    rank = stage * layout.stage_size + int(by_stage[stage].argmin())
    return rank, float(of_others[stage] - least[stage])
