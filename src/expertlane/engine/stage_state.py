"""What outlives a step of a rank's stage, and what outlives the stage."""

from dataclasses import dataclass, field

from expertlane.engine.migration import PlacementsBefore
from expertlane.model.sampler import Sampler, SamplerStep
from expertlane.model.weights import HeldWeights
from expertlane.ops.kv_cache import KVCache


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
