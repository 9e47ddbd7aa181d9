"""What outlives a step of a rank's stage, and what outlives the stage."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from expertlane.engine.model.sampler import Sampler, SamplerStep
from expertlane.engine.model.weights import HeldWeights
from expertlane.engine.ops.kv_cache import KVCache
from expertlane.engine.stage.migration import PlacementsBefore


@dataclass(eq=False)
class Changes:
    """What a step has changed, beside the cache, and how to undo it.

    Attributes:
        sampled: by the sampler; None but on the last stage.
        placements: what its placements replaced; None where it has brought none.
        chosen: its tokens, by sequence id.
    """

    step: int
    sampled: SamplerStep | None
    placements: PlacementsBefore | None
    chosen: dict[int, int] = field(default_factory=dict)


class UncommittedChanges:
    """What the latest steps have changed, the oldest first, to be committed or undone.

    Args:
        committed: tokens of the last committed step, by sequence id.
    """

    def __init__(self, sampler: Sampler, committed: dict[int, int]) -> None:
        self._sampler, self._committed = sampler, committed
        self._steps: deque[Changes] = deque()

    @property
    def tokens(self) -> dict[int, int]:
        """What the last step has chosen, by sequence id."""
        return self._steps[-1].chosen if self._steps else self._committed

    def begin(
        self, step: int, sampled: SamplerStep | None, placements: PlacementsBefore | None
    ) -> Changes:
        """Add a step; arguments as of `Changes`."""
        changes = Changes(step, sampled, placements)
        self._steps.append(changes)
        return changes

    def commit_all_but(self, num_latest: int) -> None:
        """Keep for good what the steps before the latest ones have changed."""
        while len(self._steps) > num_latest:
            changes = self._steps.popleft()
            self._committed = changes.chosen
            if changes.sampled is not None:
                self._sampler.commit(changes.sampled)

    def undo(self, steps: Sequence[int]) -> Iterator[PlacementsBefore]:
        """Undo these of the latest steps, and commit those before them.

        Yields:
            What is to be brought back by the caller, in this order.
        """
        while self._steps and self._steps[-1].step in steps:
            changes = self._steps.pop()
            if changes.sampled is not None:
                self._sampler.undo(changes.sampled)
            if changes.placements is not None:
                yield changes.placements
        self.commit_all_but(0)


@dataclass(eq=False)
class Left:
    """What a stage passes on to its successor in another layout on the same rank.

    Attributes:
        caches: None where keys and values are of no use to it; then the sampler is neither.
    """

    weights: HeldWeights
    caches: list[KVCache] | None
    sampler: Sampler
    tokens: dict[int, int]
