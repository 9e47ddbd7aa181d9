"""One rank's view of a batch: which tokens it owns, where they stand, which finish a sequence.

Tokens of a data-parallel rank are cut near-equally over its tensor-parallel ranks; between
attention and the next attention each token exists on its owner only.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.ops.kv_cache import PagedBatch
from expertlane.schedule.plan import Batch
from expertlane.spec.deployment import DispatchForm
from expertlane.spec.layout import Coordinates, Layout, partition


class ForwardBatch:
    """A part of a micro-batch as it runs through the layers of a stage.

    Attributes:
        pages: where its tokens stand in the cache.
        rotation: cosines and sines of its tokens' positions, once attention has taken them.

    Args:
        batch: of this data-parallel rank.
        num_tokens: [dp]; of the same part of every data-parallel rank's batch.
        at: this rank's coordinates.
        block_size: positions a block of the paged cache.
        dispatch_form: how its tokens travel to experts; the same on all ranks of the stage.
    """

    def __init__(
        self,
        batch: Batch,
        num_tokens: Sequence[int],
        layout: Layout,
        at: Coordinates,
        device: torch.device,
        block_size: int,
        dispatch_form: DispatchForm = "all_to_all",
    ) -> None:
        self.dispatch_form = dispatch_form
        self.batch = batch
        self.pages = PagedBatch(batch, block_size, device)
        self._device = device
        self._at = at
        self._slices = partition(self.batch.num_tokens, layout.tp)
        self.tokens_of_tp_rank = [len(part) for part in self._slices]
        self.tokens_of_stage_rank = [
            len(part) for of_dp_rank in num_tokens for part in partition(of_dp_rank, layout.tp)
        ]
        self.rotation: tuple[Tensor, Tensor] | None = None
        self._last = (np.cumsum(self.batch.num_scheduled_tokens) - 1)[self.batch.yields_token]

    @property
    def num_owned(self) -> int:
        """Tokens this rank owns."""
        return self.tokens_of_tp_rank[self._at.tp_rank]

    @property
    def owned_token_ids(self) -> Tensor:
        """[num_owned]; the vocabulary ids of the owned tokens."""
        own = self._slices[self._at.tp_rank]
        return torch.from_numpy(self.batch.token_ids[own.start : own.stop]).to(self._device)

    def num_query_key_pairs(self, window: int | None) -> int:
        """Query-key pairs that causal attention takes, of one head.

        Args:
            window: how many latest positions a token sees; None for all.
        """
        before = self.batch.num_computed_tokens
        after = before + self.batch.num_scheduled_tokens
        return int((_pairs_up_to(after, window) - _pairs_up_to(before, window)).sum())

    def num_positions_read(self, window: int | None) -> int:
        """Positions of the cache that some new token sees."""
        scheduled = self.batch.num_scheduled_tokens
        total = self.batch.num_computed_tokens + scheduled
        if window is not None:
            total = np.minimum(total, scheduled + window - 1)
        return int(total.sum())

    def last_tokens(self, tp_rank: int) -> Tensor:
        """Which tokens of a tensor-parallel rank's slice yield a next one; places in the slice."""
        own = self._slices[tp_rank]
        last = self._last
        if len(self._slices) > 1:
            last = last[(last >= own.start) & (last < own.stop)] - own.start
        return torch.from_numpy(last)

    @property
    def last_tokens_of_tp_rank(self) -> list[int]:
        """[tp]; how many tokens that yield a next one are in each tensor-parallel rank's slice."""
        return [len(self.last_tokens(tp_rank)) for tp_rank in range(len(self._slices))]


def _pairs_up_to(length: npt.NDArray[np.int64], window: int | None) -> npt.NDArray[np.int64]:
    """[num_seqs]; pairs of all tokens of sequences of this length: sum of min(i, window)."""
    if window is None:
        return length * (length + 1) // 2
    full: npt.NDArray[np.int64] = np.minimum(length, window)
    return full * (full + 1) // 2 + (length - full) * window
