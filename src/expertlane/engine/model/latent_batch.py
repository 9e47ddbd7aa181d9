"""A batch divided for latent attention: sequences that attend in the latent, and expanded ones."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.cost.step.batch_sizes import takes_less_expanded
from expertlane.engine.ops.kv_cache import PagedBatch
from expertlane.engine.ops.transfer import to_device
from expertlane.schedule.plan import Batch
from expertlane.spec.model import LatentAttention

_MOST_POSITIONS = 8192  # expanded together, unless a single sequence has more


@dataclass(frozen=True, eq=False)
class Expanded:
    """Sequences whose latents are expanded together to keys and values of each head.

    Attributes:
        tokens: [num]; indices of their new tokens in the batch.
        in_cache: their pages in the cache of latents.
        in_room: their pages in the buffer of expanded keys and values: blocks of one position,
            first all cached positions, sequence after sequence, then the new tokens.
    """

    tokens: Tensor
    in_cache: PagedBatch
    in_room: PagedBatch

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
    expanded: list[Expanded]
    in_latent: PagedBatch
    rest: Tensor


def latent_parts(pages: PagedBatch, latent: LatentAttention, device: torch.device) -> LatentParts:
    """Divide a batch: prompts are expanded where that takes fewer FLOPs."""
    batch, size = pages.batch, pages.block_size
    is_expanded = takes_less_expanded(batch.num_scheduled_tokens, batch.num_computed_tokens, latent)
    lengths = batch.num_scheduled_tokens + batch.num_computed_tokens
    rooms: list[list[int]] = []
    num_positions = 0
    for seq in np.flatnonzero(is_expanded).tolist():
        num_positions += int(lengths[seq])
        if not rooms or num_positions > _MOST_POSITIONS:
            rooms.append([])
            num_positions = int(lengths[seq])
        rooms[-1].append(seq)
    ends = np.cumsum(batch.num_scheduled_tokens)

    def tokens_of(seqs: npt.NDArray[np.intp]) -> Tensor:
        new = batch.num_scheduled_tokens[seqs]
        first = ends[seqs] - new
        places = np.repeat(first - (np.cumsum(new) - new), new) + np.arange(new.sum())
        return to_device([places], device)[0]

    expanded = []
    for room in rooms:
        seqs = np.array(room)
        chosen = batch.only(seqs)
        in_room = replace(chosen, block_tables=_room_tables(chosen))
        expanded.append(
            Expanded(
                tokens_of(seqs),
                PagedBatch(chosen, size, device),
                PagedBatch(in_room, 1, device),
            )
        )
    if not expanded:
        return LatentParts(is_expanded, [], pages, torch.empty(0, dtype=torch.int64))
    rest = np.flatnonzero(~is_expanded)
    in_latent = PagedBatch(batch.only(rest), size, device)
    return LatentParts(is_expanded, expanded, in_latent, tokens_of(rest))


def _room_tables(batch: Batch) -> npt.NDArray[np.int32]:
    """Block tables [num_seqs, most positions] of the buffer of expanded keys and values."""
    cached, new = batch.num_computed_tokens[:, None], batch.num_scheduled_tokens[:, None]
    first_cached, first_new = np.cumsum(cached)[:, None] - cached, np.cumsum(new)[:, None] - new
    positions = np.arange(int((cached + new).max()))
    of_new = int(cached.sum()) + first_new + positions - cached
    places = np.where(positions < cached, first_cached + positions, of_new)
    return np.where(positions < cached + new, places, -1).astype(np.int32)
