"""One rank's view of a batch: which tokens it owns, where they stand, which finish a sequence.

Tokens of a data-parallel rank are cut near-equally over its tensor-parallel ranks; between
attention and the next attention each token exists on its owner only.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.model.attention_group import AttentionGroup, attention_groups
from expertlane.model.rotary import RotaryEmbedding, Rotation
from expertlane.ops.cpu import PagedSequences
from expertlane.schedule.plan import Batch
from expertlane.spec.deployment import DispatchForm
from expertlane.spec.layout import Coordinates, Layout, partition


class ForwardBatch:
    """A part of a micro-batch as it runs through the layers of a stage.

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
        self._device = device
        self._at = at
        self._block_size = block_size
        self._slices = partition(self.batch.num_tokens, layout.tp)
        self.tokens_of_tp_rank = [len(part) for part in self._slices]
        self.tokens_of_stage_rank = [
            len(part) for of_dp_rank in num_tokens for part in partition(of_dp_rank, layout.tp)
        ]
        self._rotation: Rotation | None = None
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

    @property
    def yielding_seq_ids(self) -> list[int]:
        """The sequences that get a next token, in the order of the head's rows."""
        seq_ids: list[int] = self.batch.seq_ids[self.batch.yields_token].tolist()
        return seq_ids

    @cached_property
    def positions(self) -> Tensor:
        """[num_tokens]; the position of each token in its sequence."""
        return torch.from_numpy(self._positions).to(self._device)

    def rotation(self, rotary: RotaryEmbedding) -> Rotation:
        """Of the tokens' positions; the same in all layers, so computed once."""
        if self._rotation is None:
            self._rotation = rotary.at(self.positions)
        return self._rotation

    @cached_property
    def slots(self) -> Tensor:
        """[num_tokens]; where the cache keeps each token's keys and values."""
        seqs = np.repeat(np.arange(self.batch.num_seqs), self.batch.num_scheduled_tokens)
        blocks = self.batch.block_tables[seqs, self._positions // self._block_size]
        slots = blocks.astype(np.int64) * self._block_size + self._positions % self._block_size
        return torch.from_numpy(slots).to(self._device)

    @cached_property
    def begun_blocks(self) -> Tensor:
        """Blocks that the batch begins and does not fill.

        What another sequence left there is masked, but where it was NaN, masked is not enough.
        """
        batch, size = self.batch, self._block_size
        ends = batch.num_computed_tokens + batch.num_scheduled_tokens
        last = ends // size
        is_begun = (ends % size > 0) & (batch.num_computed_tokens <= last * size)
        seqs = np.flatnonzero(is_begun)
        blocks = batch.block_tables[seqs, last[seqs]].astype(np.int64)
        return torch.from_numpy(blocks).to(self._device)

    @cached_property
    def _positions(self) -> npt.NDArray[np.int64]:
        scheduled = self.batch.num_scheduled_tokens
        if self.batch.num_tokens == self.batch.num_seqs:
            return self.batch.num_computed_tokens
        before = self.batch.num_computed_tokens - (np.cumsum(scheduled) - scheduled)
        positions: npt.NDArray[np.int64] = np.repeat(before, scheduled)
        return positions + np.arange(self.batch.num_tokens)

    @cached_property
    def attention_groups(self) -> list[AttentionGroup]:
        """The batch's sequences, put together where attention can take them as one."""
        return attention_groups(self.batch, self._block_size, self._device)

    @cached_property
    def paged_sequences(self) -> PagedSequences:
        """The batch's sequences, as our own kernels take them."""
        batch = self.batch
        ends = np.cumsum(batch.num_scheduled_tokens)
        columns = (
            batch.block_tables.astype(np.int64),
            ends - batch.num_scheduled_tokens,
            batch.num_scheduled_tokens,
            batch.num_computed_tokens + batch.num_scheduled_tokens,
        )
        return PagedSequences(*(torch.from_numpy(np.ascontiguousarray(c)) for c in columns))

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
