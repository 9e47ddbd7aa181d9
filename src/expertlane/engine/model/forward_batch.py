"""One rank's view of a batch: which tokens it owns, where they stand, which finish a sequence.

Tokens of a data-parallel rank are cut near-equally over its tensor-parallel ranks; between
attention and the next attention each token exists on its owner only.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.cost.step.attention_sizes import pairs_and_positions
from expertlane.engine.model.latent_batch import LatentParts, latent_parts
from expertlane.engine.ops.kv_cache import PagedBatch
from expertlane.engine.ops.transfer import Array, to_device
from expertlane.schedule.plan import Batch
from expertlane.spec.dispatch import DispatchForm
from expertlane.spec.layout import Coordinates, Layout, partition
from expertlane.spec.model import LatentAttention


class ForwardBatch:
    """A part of a micro-batch as it runs through the layers of a stage.

    Attributes:
        pages: where its tokens stand in the cache.
        rotation: cosines and sines of its tokens' positions, once attention has taken them.
        is_real: [num_owned]; of owned tokens, those that are no padding; None where all are.

    Args:
        batch: of this data-parallel rank.
        num_tokens: [dp]; of the same part of every data-parallel rank's batch.
        at: this rank's coordinates.
        block_size: positions a block of the paged cache.
        dispatch_form, balances_copies: how its tokens travel to experts; the same on all ranks of
            the stage.
        crowds: its tokens all go to the same experts, as many of them of the first rank as can be.
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
        *,
        balances_copies: bool = False,
        crowds: bool = False,
    ) -> None:
        self.dispatch_form, self.balances_copies = dispatch_form, balances_copies
        self.crowds = crowds
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
        self._latent_parts: LatentParts | None = None
        self._last = (np.cumsum(self.batch.num_scheduled_tokens) - 1)[self.batch.yields_token]
        self._own_token_ids: Tensor | None = None  # on a GPU, and the next too
        self._own_last: Tensor | None = None
        self.is_real: Tensor | None = None
        self._place()

    def _place(self) -> None:
        """Bring it to the device at once, where that is none of the host's."""
        if self._device.type != "cpu":
            self._take(to_device(self._columns(), self._device))

    def _columns(self) -> list[Array]:
        """What a step of this rank reads of the batch, to be brought to a GPU together."""
        return [self._host_token_ids, self._last_of(self._at.tp_rank), *self.pages.columns()]

    def _take(self, columns: Sequence[Tensor]) -> None:
        """Have `_columns` on the device."""
        self._own_token_ids, self._own_last, *of_pages = columns
        self.pages.take(of_pages)

    @property
    def num_owned(self) -> int:
        """Tokens this rank owns."""
        return self.tokens_of_tp_rank[self._at.tp_rank]

    @property
    def owned_token_ids(self) -> Tensor:
        """[num_owned]; the vocabulary ids of the owned tokens."""
        if self._own_token_ids is not None:
            return self._own_token_ids
        return torch.from_numpy(self._host_token_ids)

    @property
    def _host_token_ids(self) -> npt.NDArray[np.int64]:
        own = self._slices[self._at.tp_rank]
        return self.batch.token_ids[own.start : own.stop]

    def pairs_and_positions(self, window: int | None) -> tuple[int, int]:
        """Query-key pairs of one head, and positions of the cache that some new token sees."""
        batch = self.batch
        of_seqs = pairs_and_positions(batch.num_scheduled_tokens, batch.num_computed_tokens, window)
        pairs, positions = (int(each.sum()) for each in of_seqs)
        return pairs, positions

    def latent_parts(self, latent: LatentAttention) -> LatentParts:
        """Which sequences attend in the latent; the same in all layers."""
        if self._latent_parts is None:
            self._latent_parts = latent_parts(self.pages, latent, self._device)
        return self._latent_parts

    @property
    def last_tokens(self) -> Tensor:
        """Which of the owned tokens yield a next one; places among them."""
        if self._own_last is not None:
            return self._own_last
        return torch.from_numpy(self._last_of(self._at.tp_rank))

    def _last_of(self, tp_rank: int) -> npt.NDArray[np.int64]:
        """The same in a tensor-parallel rank's slice."""
        last = self._last
        if len(self._slices) > 1:
            own = self._slices[tp_rank]
            last = last[(last >= own.start) & (last < own.stop)] - own.start
        return last

    def owned(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """[tp]; of ascending tokens of the batch, those in each rank's slice; places in it."""
        return [
            rows[(rows >= part.start) & (rows < part.stop)] - part.start for part in self._slices
        ]

    @property
    def last_tokens_of_tp_rank(self) -> list[int]:
        """[tp]; how many tokens that yield a next one are in each tensor-parallel rank's slice."""
        return [len(self._last_of(tp_rank)) for tp_rank in range(len(self._slices))]
