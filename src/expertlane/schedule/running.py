"""The running requests of one data-parallel rank, and the paged blocks they hold.

Requests stand in columns, so that a step costs few loops.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from expertlane.schedule.blocks import BlockManager
from expertlane.schedule.plan import UNKNOWN, Batch, StepOutcome
from expertlane.schedule.request import FinishReason, Limits, Request, RequestState

Rows = npt.NDArray[np.intp]

_NO_BLOCK = -1


class RunningTable:
    """A row for every running request; rows are reused.

    Attributes:
        requests: by row; None where a row is unused.
        num_queried: tokens that the prefix cache was asked for, by requests that began here.
        num_pending: tokens of all rows that are not computed yet: one for each request in
            decoding, the rest of the prompt for the others.
        num_tokens, num_computed: [num_rows]; prompt and output tokens, and how many of them are
            computed, once all steps in flight are finished; 0 where a row is unused.
        last_token: [num_rows]; the newest token; `UNKNOWN` while the step that gives it is in
            flight.
        block_tables: [num_rows, width], padded with -1; `width` grows as needed.
        in_flight: [num_rows]; how many steps that are not finished it takes part in.
        last_step: [num_rows]; the step it took part in last.
        is_masked: [num_rows]; whether its tokens wait for masks (`Request.mask`).

    Where sequences have states, one is kept after the last full block that a step of a prompt
    computed, and after the last block that was cached without a state when the request began: the
    next request with this prefix continues from there.
    """

    def __init__(self, limits: Limits, *, lookahead: bool = False) -> None:
        # Each running request has a last block that is nobody else's last.
        num_rows = min(limits.max_num_seqs, limits.num_blocks)
        self.blocks = BlockManager(limits.num_blocks, limits.block_size, limits.state_blocks)
        self._num_known = np.zeros(num_rows, dtype=np.int64)  # blocks, beside those shared
        self.requests: list[Request | None] = [None] * num_rows
        self.num_pending = self.num_queried = 0
        self.seq_ids = np.zeros(num_rows, dtype=np.int64)
        self.num_tokens = np.zeros(num_rows, dtype=np.int64)
        self.num_computed = np.zeros(num_rows, dtype=np.int64)
        self.last_token = np.zeros(num_rows, dtype=np.int64)
        self.num_blocks = np.zeros(num_rows, dtype=np.int64)
        self.block_tables = np.full((num_rows, 8), _NO_BLOCK, dtype=np.int32)
        self.in_flight = np.zeros(num_rows, dtype=np.int64)
        self.last_step = np.zeros(num_rows, dtype=np.int64)
        self.is_masked = np.zeros(num_rows, dtype=np.bool_)
        self._waits = np.zeros(num_rows, dtype=np.bool_)  # for the mask of its next token
        self._decodes_masked = np.zeros(num_rows, dtype=np.bool_)  # in a step in flight
        self._limits = limits
        self._lookahead = lookahead
        self._is_used = np.zeros(num_rows, dtype=np.bool_)
        self._is_cancelled = np.zeros(num_rows, dtype=np.bool_)
        self._num_cancelled = 0
        self._nan_rows: set[int] = set()  # rows whose blocks may hold NaN
        self._max_num_tokens = np.zeros(num_rows, dtype=np.int64)
        self._unused = list(range(num_rows - 1, -1, -1))

    @property
    def num_running(self) -> int:
        """Rows in use."""
        return len(self.requests) - len(self._unused)

    @property
    def num_free(self) -> int:
        """Free blocks whose room no running request's state takes."""
        return self.blocks.num_free

    def has_room(self) -> bool:
        """True if a row and a block are free, which one more request takes."""
        return bool(self._unused) and self.num_running < self.num_free

    def empty(self) -> "RunningTable":
        """An empty table and cache that goes on with the counts of this one."""
        table = RunningTable(self._limits, lookahead=self._lookahead)
        table.num_queried, table.blocks.num_hits = self.num_queried, self.blocks.num_hits
        return table

    def move_to(self, replica: int, dp_rank: int) -> None:
        """Tell all requests where the ranks that compute them are in another layout."""
        for request in filter(None, self.requests):
            request.replica, request.dp_rank = replica, dp_rank

    def request(self, row: int) -> Request:
        """The request in a row that is in use."""
        request = self.requests[row]
        assert request is not None
        return request

    def blocks_of(self, row: int) -> list[int]:
        """The blocks a request holds, in order."""
        held: list[int] = self.block_tables[row, : self.num_blocks[row]].tolist()
        return held

    @property
    def decodes_masked(self) -> bool:
        """True if a step in flight decodes a masked row."""
        return bool(self._decodes_masked.any())

    def ready(self, *, holds_masked: bool = False) -> tuple[Rows, Rows]:
        """Rows that may take part in a step: those that lack one token, and those that lack more.

        The first are in decoding (or one token short of it), the others in their prompts. With
        `lookahead` a row may while it is in flight, unless it is known to end with that step.
        One that waits for its mask may not.

        Args:
            holds_masked: leave out masked rows that lack one token.
        """
        num_missing = self.num_tokens - self.num_computed
        is_busy = self.in_flight > 0
        if self._lookahead:
            is_busy &= (self.num_tokens >= self._max_num_tokens) | self._is_cancelled
        num_missing[is_busy | self._waits] = 0
        if holds_masked:
            num_missing[self.is_masked & (num_missing == 1)] = 0
        return np.flatnonzero(num_missing == 1), np.flatnonzero(num_missing > 1)

    def find_cached(self, request: Request) -> list[int]:
        """Blocks here that a request can share; its last token is always left to compute."""
        if not (self._limits.prefix_caching and request.may_share) or request.scores_prompt:
            return []
        return self.blocks.find(self._shareable(request))

    def _shareable(self, request: Request) -> Iterable[bytes]:
        """Digests of the blocks that a request can share."""
        size = self._limits.block_size
        num_full = (request.num_tokens - 1) // size
        return (request.digest(index, size) for index in range(num_full))

    def has_blocks_for(self, request: Request, cached: Sequence[int]) -> bool:
        """True if state and tokens so far fit, with one more block for each running request.

        That reserve lets all go on for `block_size` steps at least: a request admitted into the
        very last blocks would soon be preempted, and its prompt computed twice.
        """
        num_blocks = self._limits.blocks_for(request.num_tokens)
        needed = self.blocks.num_needed(num_blocks, cached)
        return needed + self._limits.state_blocks + self.num_running <= self.num_free

    def admit(self, request: Request, cached: Sequence[int]) -> int:
        """Give a request a row, and blocks for all its tokens, the `cached` ones first."""
        num_tokens = request.num_tokens
        num_known = 0
        if self._limits.state_blocks and self._limits.prefix_caching:
            num_known = len(self.blocks.find_known(self._shareable(request)))
        blocks = self.blocks.allocate(self._limits.blocks_for(num_tokens), cached)
        self.blocks.hold_state()
        self.num_queried += num_tokens
        row = self._unused.pop()
        self._widen(len(blocks))
        self.requests[row] = request
        self._is_used[row] = True
        self._num_known[row] = num_known
        self.seq_ids[row] = request.seq_id
        self.num_tokens[row] = num_tokens
        num_arrived = min(request.num_arrived_tokens, num_tokens - 1)
        self.num_computed[row] = max(len(cached) * self._limits.block_size, num_arrived)
        self.last_token[row] = request.tokens(num_tokens - 1, num_tokens)[0]
        self.num_blocks[row] = len(blocks)
        self.block_tables[row, : len(blocks)] = blocks
        self._max_num_tokens[row] = self._limits.max_num_tokens(request)
        self.last_step[row] = -1
        self.is_masked[row] = request.is_masked
        self.num_pending += num_tokens - int(self.num_computed[row])
        if self._limits.prefix_caching:
            self._share(row, len(cached), num_arrived // self._limits.block_size)
        request.state, request.row = RequestState.RUNNING, row
        request.has_cached = bool(cached)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = len(cached) * self._limits.block_size
        return row

    def release(self, row: int) -> Request:
        """Free a row and its blocks."""
        request = self.request(row)
        self.blocks.free(self.blocks_of(row))
        self.blocks.free_state()
        self.num_pending -= int(self.num_tokens[row] - self.num_computed[row])
        self.requests[row] = None
        self.num_tokens[row] = self.num_computed[row] = self.num_blocks[row] = 0
        self.block_tables[row] = _NO_BLOCK
        self._is_used[row] = self._is_cancelled[row] = False
        self.is_masked[row] = self._waits[row] = self._decodes_masked[row] = False
        self._nan_rows.discard(row)
        self._unused.append(row)
        request.row = -1
        return request

    def allow(self, row: int) -> None:
        """Let a masked row take part in steps: its request has the mask of its next token."""
        self._waits[row] = False

    def cancel(self, row: int) -> None:
        """Release a row, or do so when its steps are finished."""
        if not self.in_flight[row]:
            self.release(row)
        elif not self._is_cancelled[row]:
            self._is_cancelled[row] = True
            self._num_cancelled += 1

    def extend(self, rows: Rows) -> tuple[Rows, list[Request]]:
        """Get every row in decoding the block of its next position.

        Where none is free, the request that goes last of all running is preempted. While that one
        is in flight, or is itself the one that asks, the one that asks keeps its blocks and waits:
        no request that goes before it is held up by that.

        Returns:
            The rows that have their block, and the requests preempted.
        """
        has_none = self.num_computed[rows] == self.num_blocks[rows] * self.blocks.block_size
        asking: list[int] = rows[has_none].tolist()
        if len(asking) <= self.num_free:
            self._append_blocks(asking)
            return rows, []
        preempted: list[Request] = []
        left_out: set[int] = set()
        for row in sorted(asking, key=self._order):
            while self.num_free < 1 and row not in left_out:
                last = max(np.flatnonzero(self._is_used).tolist(), key=self._order)
                left_out.add(last)
                if last == row or self.in_flight[last]:
                    left_out.add(row)
                else:
                    preempted.append(self.release(last))
            if row not in left_out:
                self._append_blocks([row])
        return rows[~np.isin(rows, list(left_out))], preempted

    def _order(self, row: int) -> tuple[int, int]:
        return self.request(row).order

    def _append_blocks(self, rows: list[int]) -> None:
        """Give each row one more block."""
        if rows:
            index = self.num_blocks[rows]
            self._widen(int(index.max()) + 1)
            self.block_tables[rows, index] = [self.blocks.append() for _ in rows]
            self.num_blocks[rows] = index + 1

    def _widen(self, num_blocks: int) -> None:
        width = self.block_tables.shape[1]
        if num_blocks > width:
            more = max(num_blocks, 2 * width) - width
            self.block_tables = np.pad(
                self.block_tables, ((0, 0), (0, more)), constant_values=_NO_BLOCK
            )

    def begin_step(self, rows: Rows, step: int, batch: Batch) -> None:
        """Take rows into a step, and count as if it were finished."""
        self.in_flight[rows] += 1
        self.last_step[rows] = step
        self.num_computed[rows] += batch.num_scheduled_tokens
        yielding = rows[batch.yields_token]
        self.num_tokens[yielding] += 1
        self.last_token[yielding] = UNKNOWN
        if self.is_masked.any():
            self._waits[yielding] = self.is_masked[yielding]
            decodes = rows[batch.yields_token & (batch.num_scheduled_tokens == 1)]
            self._decodes_masked[decodes] = self.is_masked[decodes]
        self.num_pending += len(yielding) - batch.num_tokens

    def commit(
        self, rows: Rows, batch: Batch, outcome: StepOutcome
    ) -> tuple[list[Request], list[Request]]:
        """Take in a finished step; release the rows that are done.

        Returns:
            The requests that got a token, and those that got none (see `_cancel_not_finite`).
        """
        self.in_flight[rows] -= 1
        self._decodes_masked[rows] = False
        without_token: list[Request] = []
        if outcome.not_finite:
            not_finite = np.isin(self.seq_ids[rows], outcome.not_finite)
            without_token = self._cancel_not_finite(rows[not_finite])
        if self._limits.prefix_caching:
            self._register(rows, batch)
        yields_token = batch.yields_token
        if self._num_cancelled:
            is_cancelled = self._is_cancelled[rows]
            for row in rows[is_cancelled & (self.in_flight[rows] == 0)].tolist():
                self.release(row)
                self._num_cancelled -= 1
            rows, yields_token = rows[~is_cancelled], yields_token[~is_cancelled]
        return self._append_tokens(rows[yields_token], outcome.token_ids), without_token

    def _cancel_not_finite(self, rows: Rows) -> list[Request]:
        """Cancel rows whose logits were not finite, and stop sharing their blocks.

        NaN spreads through shared blocks: a masked position has weight 0 in attention's sum, and
        0 · NaN is NaN. So a request on blocks of others need not be the cause.

        Returns:
            Their requests, but for those that had ended before.
        """
        self._nan_rows.update(rows.tolist())
        going_on = rows[~self._is_cancelled[rows]]
        for row in going_on.tolist():
            self.blocks.forget(self.blocks_of(row))
        self._is_cancelled[going_on] = True  # `commit` releases those that are in no other step
        self._num_cancelled += len(going_on)
        return [self.request(row) for row in going_on.tolist()]

    def _register(self, rows: Rows, batch: Batch) -> None:
        """Let the blocks that have become full be shared; earlier, they might yet be unwritten."""
        size, before = self._limits.block_size, batch.num_computed_tokens
        first, stop = before // size, (before + batch.num_scheduled_tokens) // size
        full = np.flatnonzero(stop > first)
        for row, begin, end in zip(
            rows[full].tolist(), first[full].tolist(), stop[full].tolist(), strict=True
        ):
            if row not in self._nan_rows:
                self._share(row, begin, end)
                if self._limits.state_blocks and self.request(row).is_prompt_block(end - 1, size):
                    self._keep_states(row, begin, end)

    def _keep_states(self, row: int, begin: int, end: int) -> None:
        """Keep the states of a prompt's step that filled the blocks `begin` to `end`."""
        request, known = self.request(row), int(self._num_known[row])
        for stop in dict.fromkeys((known, end) if begin < known <= end else (end,)):
            self.blocks.keep_state(request.digest(stop - 1, self._limits.block_size))

    def _share(self, row: int, begin: int, end: int) -> None:
        """Let the blocks `begin` to `end` of a row's sequence be shared."""
        request, size = self.request(row), self._limits.block_size
        blocks: list[int] = self.block_tables[row, begin:end].tolist()
        for index, block in enumerate(blocks, start=begin):
            self.blocks.register(block, request.digest(index, size))

    def _append_tokens(self, rows: Rows, token_ids: dict[int, int]) -> list[Request]:
        tokens = list(map(token_ids.__getitem__, self.seq_ids[rows].tolist()))
        in_flight = self.in_flight[rows]  # each of those steps has yet to yield a token
        self.last_token[rows] = np.where(in_flight > 0, UNKNOWN, tokens)
        is_full = self.num_tokens[rows] - in_flight >= self._max_num_tokens[rows]
        requests = list(map(self.request, rows.tolist()))
        for request, token in zip(requests, tokens, strict=True):
            request.output_token_ids.append(token)
            if request.is_masked:
                request.mask = None
            if token in request.stop_token_ids:
                request.finish(FinishReason.STOP)
                self.cancel(request.row)
        for place in np.flatnonzero(is_full).tolist():
            request = requests[place]
            if request.finish_reason is None:
                request.finish(FinishReason.LENGTH)
                self.cancel(request.row)
        return requests
