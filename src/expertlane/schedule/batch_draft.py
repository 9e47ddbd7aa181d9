"""The batch of one data-parallel rank while a step is planned."""

import numpy as np
import numpy.typing as npt

from expertlane.schedule.plan import Batch
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.running import Rows, RunningTable
from expertlane.spec.sampling import SamplingState


class BatchDraft:
    """Collects decodes, then chunks of prompts, up to the token budget.

    Attributes:
        budget: new tokens that still fit.
        admitted: by sequence id, sampling state of the requests that begin with this step.
    """

    def __init__(self, table: RunningTable, limits: Limits) -> None:
        self.table = table
        self.budget = limits.max_num_batched_tokens
        self.admitted: dict[int, SamplingState] = {}
        self._decodes: Rows = np.empty(0, dtype=np.intp)
        self._prefills: list[int] = []
        self._chunks: list[int] = []

    @property
    def num_prefills(self) -> int:
        """Sequences of which a chunk of the prompt is in the batch."""
        return len(self._prefills)

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return len(self._decodes) + len(self._prefills)

    def add_decodes(self, num_groups: int, *, holds_masked: bool = False) -> list[Request]:
        """Take running requests in decoding.

        Args:
            num_groups: steps that the decodes are spread over, near-equally.
            holds_masked: leave out requests with masks.

        Returns:
            Requests preempted, since the decodes needed their blocks.
        """
        table = self.table
        if not table.num_running:
            return []
        decodes, _ = table.ready(holds_masked=holds_masked)
        # Before the choice: those that wait for a block must not take the places of others.
        decodes, preempted = table.extend(decodes)
        limit = min(self.budget, -(-table.num_running // num_groups))
        if len(decodes) > limit:
            by_step = np.argsort(table.last_step[decodes], kind="stable")
            decodes = np.sort(decodes[by_step[:limit]])
        self._decodes = decodes
        self.budget -= len(decodes)
        return preempted

    def add_prefills(self) -> None:
        """Take chunks of running requests' prompts, in their order."""
        table = self.table
        if table.num_pending == table.num_running:  # each lacks one token
            return
        _, prefills = table.ready()
        for row in sorted(prefills.tolist(), key=lambda row: table.request(row).order):
            if self.budget:
                self._add_chunk(row)

    def admit(self, request: Request, cached: list[int]) -> None:
        """Take a waiting request; `cached` are the blocks it shares."""
        self._add_chunk(self.table.admit(request, cached))
        if (state := request.sampling_state()) is not None:
            self.admitted[request.seq_id] = state

    def _add_chunk(self, row: int) -> None:
        table = self.table
        chunk = min(self.budget, int(table.num_tokens[row] - table.num_computed[row]))
        self._prefills.append(row)
        self._chunks.append(chunk)
        self.budget -= chunk

    def build(self) -> tuple[Rows, Batch]:
        """The table's rows in the batch, and the batch as the runner gets it."""
        table, rows = self.table, self._decodes
        num_scheduled = np.ones(len(rows), dtype=np.int64)
        token_ids = table.last_token[rows]
        if self._prefills:
            chunks = [
                table.request(row).tokens(start := int(table.num_computed[row]), start + chunk)
                for row, chunk in zip(self._prefills, self._chunks, strict=True)
            ]
            token_ids = np.concatenate((token_ids, *chunks))
            rows = np.concatenate((rows, self._prefills))
            num_scheduled = np.concatenate((num_scheduled, self._chunks))
        num_computed = table.num_computed[rows]
        width = int(table.num_blocks[rows].max(initial=0))
        batch = Batch(
            seq_ids=table.seq_ids[rows],
            num_scheduled_tokens=num_scheduled,
            num_computed_tokens=num_computed,
            token_ids=token_ids,
            block_tables=table.block_tables[rows, :width],
            yields_token=num_computed + num_scheduled == table.num_tokens[rows],
        )
        return rows, batch

    def masks(self, rows: Rows, batch: Batch) -> dict[int, npt.NDArray[np.uint8]]:
        """Masks of the sequences that yield a token, by sequence id (`plan.StepPlan.masks`)."""
        table = self.table
        found: dict[int, npt.NDArray[np.uint8]] = {}
        if not table.is_masked.any():
            return found
        for row in rows[batch.yields_token & table.is_masked[rows]].tolist():
            request = table.request(row)
            assert request.mask is not None, "it waits for its mask"
            found[request.seq_id] = request.mask
        return found
