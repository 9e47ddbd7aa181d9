"""One rank's view of a batch: the tokens that it owns, their pages, and those that yield a token.

Tokens of a data-parallel rank are divided near-equally over its tensor-parallel ranks; between
attention and the next attention each token exists on its owner only. Latent attention divides the
batch once more, by how its sequences attend.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.cost.step.batch_sizes import pairs_and_positions, takes_less_expanded
from expertlane.engine.ops.device import Array, to_device
from expertlane.engine.ops.kv_cache import PagedBatch
from expertlane.schedule.plan import Batch
from expertlane.spec.deployment import DispatchForm
from expertlane.spec.layout import Coordinates, Layout, partition
from expertlane.spec.mixers import LatentAttention

_MOST_POSITIONS = 8192  # expanded together, unless a single sequence has more


@dataclass(frozen=True, eq=False)
class ExpandedSequences:
    """Sequences whose latents are expanded together to keys and values of each head.

    Attributes:
        tokens: [num]; indices of their new tokens in the batch.
        in_cache: their pages in the cache of latents.
        in_buffer: their pages in the buffer of expanded keys and values: blocks of one position,
            first all cached positions, sequence after sequence, then the new tokens.
    """

    tokens: Tensor
    in_cache: PagedBatch
    in_buffer: PagedBatch

    @cached_property
    def num_positions(self) -> int:
        """Positions of all these sequences, the new ones included."""
        batch = self.in_cache.batch
        return int((batch.num_computed_tokens + batch.num_scheduled_tokens).sum())


class LatentParts(NamedTuple):
    """A batch divided by how its sequences attend.

    Attributes:
        is_expanded: [num_seqs].
        expanded: the expanded sequences, in parts of bounded size.
        in_latent: pages of the sequences that attend in the latent.
        rest: [num]; indices of their new tokens in the batch; empty where none is expanded.
    """

    is_expanded: npt.NDArray[np.bool_]
    expanded: list[ExpandedSequences]
    in_latent: PagedBatch
    rest: Tensor


def latent_parts(pages: PagedBatch, latent: LatentAttention, device: torch.device) -> LatentParts:
    """Divide a batch: prompts are expanded where that takes fewer FLOPs."""
    batch, size = pages.batch, pages.block_size
    is_expanded = takes_less_expanded(batch.num_scheduled_tokens, batch.num_computed_tokens, latent)
    lengths = batch.num_scheduled_tokens + batch.num_computed_tokens
    groups: list[list[int]] = []
    num_positions = 0
    for seq in np.flatnonzero(is_expanded).tolist():
        num_positions += int(lengths[seq])
        if not groups or num_positions > _MOST_POSITIONS:
            groups.append([])
            num_positions = int(lengths[seq])
        groups[-1].append(seq)
    ends = np.cumsum(batch.num_scheduled_tokens)

    def tokens_of(seqs: npt.NDArray[np.intp]) -> Tensor:
        new = batch.num_scheduled_tokens[seqs]
        first = ends[seqs] - new
        places = np.repeat(first - (np.cumsum(new) - new), new) + np.arange(new.sum())
        return to_device([places], device)[0]

    expanded = []
    for group in groups:
        seqs = np.array(group)
        chosen = batch.only(seqs)
        in_buffer = replace(chosen, block_tables=_buffer_tables(chosen))
        expanded.append(
            ExpandedSequences(
                tokens_of(seqs),
                PagedBatch(chosen, size, device),
                PagedBatch(in_buffer, 1, device),
            )
        )
    if not expanded:
        return LatentParts(is_expanded, [], pages, torch.empty(0, dtype=torch.int64))
    rest = np.flatnonzero(~is_expanded)
    in_latent = PagedBatch(batch.only(rest), size, device)
    return LatentParts(is_expanded, expanded, in_latent, tokens_of(rest))


def _buffer_tables(batch: Batch) -> npt.NDArray[np.int32]:
    """Block tables [num_seqs, most positions] of the buffer of expanded keys and values."""
    cached, new = batch.num_computed_tokens[:, None], batch.num_scheduled_tokens[:, None]
    first_cached, first_new = np.cumsum(cached)[:, None] - cached, np.cumsum(new)[:, None] - new
    positions = np.arange(int((cached + new).max()))
    of_new = int(cached.sum()) + first_new + positions - cached
    places = np.where(positions < cached, first_cached + positions, of_new)
    return np.where(positions < cached + new, places, -1).astype(np.int32)


class ForwardBatch:
    """A part of a micro-batch as it runs through the layers of a stage.

    Attributes:
        pages: positions, slots and block tables of its tokens.
        rotation: cosines and sines of its tokens' positions, once the first layer has made them.
        is_real: [num_owned]; owned tokens that are no padding; None where none is.

    Args:
        batch: the batch of this data-parallel rank.
        num_tokens: [dp]; tokens of the same part of every data-parallel rank's batch.
        at: this rank's coordinates.
        block_size: positions in a block of the paged cache.
        dispatch_form: the form of dispatch, the same on all ranks of the stage.
        crowds: all tokens go to the same experts, as many of them on the first rank as possible.
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
        crowds: bool = False,
    ) -> None:
        self.dispatch_form = dispatch_form
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
        """Copy the columns to the device at once; nothing on a CPU."""
        if self._device.type != "cpu":
            self._take(to_device(self._columns(), self._device))

    def _columns(self) -> list[Array]:
        """The arrays of the batch that a step on a GPU reads, to be copied there together."""
        return [self._host_token_ids, self._last_of(self._at.tp_rank), *self.pages.columns()]

    def _take(self, columns: Sequence[Tensor]) -> None:
        """Take the arrays of `_columns` that were copied to the device."""
        self._own_token_ids, self._own_last, *of_pages = columns
        self.pages.take(of_pages)

    @property
    def num_owned(self) -> int:
        """Number of tokens that this rank owns."""
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
        """Query-key pairs of one head, and cache positions that at least one new token sees."""
        batch = self.batch
        of_seqs = pairs_and_positions(batch.num_scheduled_tokens, batch.num_computed_tokens, window)
        pairs, positions = (int(each.sum()) for each in of_seqs)
        return pairs, positions

    def latent_parts(self, latent: LatentAttention) -> LatentParts:
        """The sequences that attend in the latent, and those expanded; computed for all layers."""
        if self._latent_parts is None:
            self._latent_parts = latent_parts(self.pages, latent, self._device)
        return self._latent_parts

    @property
    def last_tokens(self) -> Tensor:
        """Indices among the owned tokens of those that yield a next one."""
        if self._own_last is not None:
            return self._own_last
        return torch.from_numpy(self._last_of(self._at.tp_rank))

    def _last_of(self, tp_rank: int) -> npt.NDArray[np.int64]:
        """Indices, in a tensor-parallel rank's slice, of tokens that yield a next one."""
        last = self._last
        if len(self._slices) > 1:
            own = self._slices[tp_rank]
            last = last[(last >= own.start) & (last < own.stop)] - own.start
        return last

    def owned(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """For each tensor-parallel rank, the given rows in its slice, as indices into it.

        Args:
            rows: indices of tokens in the batch, ascending.
        """
        return [
            rows[(rows >= part.start) & (rows < part.stop)] - part.start for part in self._slices
        ]

    @property
    def last_tokens_of_tp_rank(self) -> list[int]:
        """[tp]; tokens in each tensor-parallel rank's slice that yield a next one."""
        return [len(self._last_of(tp_rank)) for tp_rank in range(len(self._slices))]
