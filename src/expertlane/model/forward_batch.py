"""One rank's view of a batch: which tokens it owns, where they stand, which finish a sequence.

Tokens of a data-parallel rank are cut near-equally over its tensor-parallel ranks; between
attention and the next attention each token exists on its owner only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from expertlane.schedule.plan import Batch
from expertlane.spec.layout import Coordinates, Layout
from expertlane.spec.partition import partition


@dataclass(frozen=True)
class AttentionRun:
    """Consecutive sequences with equal lengths whose cache slots are consecutive too.

    Attributes:
        first_token: where the run begins among the batch's tokens.
    """

    first_token: int
    first_slot: int
    num_seqs: int
    num_scheduled: int
    num_computed: int

    def follows(self, slot: int, lengths: tuple[int, int]) -> bool:
        """Whether a sequence (num_scheduled, num_computed) in `slot` continues the run."""
        return slot == self.first_slot + self.num_seqs and lengths == (
            self.num_scheduled,
            self.num_computed,
        )

    def num_query_key_pairs(self, window: int | None) -> int:
        """Query-key pairs that causal attention takes, of one head.

        Args:
            window: how many latest positions a token sees; None for all.
        """
        ends = np.arange(self.num_computed + 1, self.num_computed + self.num_scheduled + 1)
        seen = ends if window is None else np.minimum(ends, window)
        return self.num_seqs * int(seen.sum())

    def num_positions_read(self, window: int | None) -> int:
        """Positions of the cache that some new token sees, of all the run's sequences."""
        total = self.num_computed + self.num_scheduled
        if window is not None:
            total = min(total, self.num_scheduled + window - 1)
        return self.num_seqs * total


class ForwardBatch:
    """A part of a micro-batch as it runs through the layers of a stage.

    Args:
        batches: [dp]; the same part of every data-parallel rank's batch.
        at: this rank's coordinates.
    """

    def __init__(
        self, batches: Sequence[Batch], layout: Layout, at: Coordinates, device: torch.device
    ) -> None:
        self.batch = batches[at.dp_rank]
        self._device = device
        self._at = at
        self._slices = partition(self.batch.num_tokens, layout.tp)
        self.tokens_of_stage_rank = [
            len(part) for batch in batches for part in partition(batch.num_tokens, layout.tp)
        ]

    @property
    def tokens_of_tp_rank(self) -> list[int]:
        """[tp]; how many of the batch's tokens each tensor-parallel rank owns."""
        return [len(part) for part in self._slices]

    @property
    def num_owned(self) -> int:
        """Tokens this rank owns."""
        return len(self._slices[self._at.tp_rank])

    @property
    def owned_token_ids(self) -> Tensor:
        """[num_owned]; the vocabulary ids of the owned tokens."""
        own = self._slices[self._at.tp_rank]
        return torch.from_numpy(self.batch.token_ids[own.start : own.stop]).to(self._device)

    @cached_property
    def positions(self) -> Tensor:
        """[num_tokens]; the position of each token in its sequence."""
        scheduled = self.batch.num_scheduled_tokens
        starts = np.cumsum(scheduled) - scheduled
        within = np.arange(self.batch.num_tokens) - np.repeat(starts, scheduled)
        positions = within + np.repeat(self.batch.num_computed_tokens, scheduled)
        return torch.from_numpy(positions).to(self._device)

    @cached_property
    def attention_runs(self) -> list[AttentionRun]:
        """The batch's sequences, put together where attention can take them as one."""
        batch = self.batch
        runs: list[AttentionRun] = []
        first_token = 0
        for slot, scheduled, computed in zip(
            batch.slots.tolist(),
            batch.num_scheduled_tokens.tolist(),
            batch.num_computed_tokens.tolist(),
            strict=True,
        ):
            last = runs[-1] if runs else None
            lengths = (scheduled, computed)
            if last and last.follows(slot, lengths):
                runs[-1] = replace(last, num_seqs=last.num_seqs + 1)
            else:
                runs.append(AttentionRun(first_token, slot, 1, *lengths))
            first_token += scheduled
        return runs

    def last_tokens(self, tp_rank: int) -> Tensor:
        """Which tokens of a tensor-parallel rank's slice end a sequence; places in the slice."""
        own = self._slices[tp_rank]
        last = np.cumsum(self.batch.num_scheduled_tokens) - 1
        return torch.from_numpy(last[(last >= own.start) & (last < own.stop)] - own.start)

    @property
    def last_tokens_of_tp_rank(self) -> list[int]:
        """[tp]; how many sequences end in each tensor-parallel rank's slice."""
        return [len(self.last_tokens(tp_rank)) for tp_rank in range(len(self._slices))]
