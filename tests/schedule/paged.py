"""A runner without ranks whose paged cache holds token ids, and the rules a scheduler must keep."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from expertlane.schedule.plan import UNKNOWN, Batch, StepOutcome, StepPlan
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler

UNWRITTEN = -1


def model(tokens: Sequence[int], vocab_size: int) -> int:
    """The next token: depends on every token before it."""
    state = 1
    for token in tokens:
        state = (31 * state + token + 7) % 1_000_003
    return state % vocab_size


def continuation(prompt: Sequence[int], num_tokens: int, vocab_size: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(model(tokens, vocab_size))
    return tokens[len(prompt) :]


class PagedRunner:
    """Feeds `model` from a cache of token ids; a step runs when it is collected, not before.

    Whatever it reads must be what the sequence has at that position, so it notices a block that
    changed hands too early, was shared wrongly, or was not computed again after a preemption.
    """

    def __init__(
        self,
        scheduler: ContinuousScheduler,
        limits: Limits,
        choose: Callable[[Sequence[int]], int] = lambda handles: handles[0],
        *,
        lookahead: bool = False,
    ) -> None:
        self._lookahead = lookahead
        self.plans: list[StepPlan] = []
        self.in_flight: dict[int, StepPlan] = {}
        self.most_in_flight = Counter[int]()
        self._prompts: dict[int, list[int]] = {}
        self._outputs: dict[int, list[int]] = {}
        self._scheduler = scheduler
        self._limits = limits
        self._choose = choose
        shape = (limits.num_blocks, limits.block_size)
        self._caches = [[np.full(shape, UNWRITTEN) for _ in row] for row in scheduler.tables]

    def add(self, request: Request) -> Request:
        self._scheduler.add(request)
        self._prompts[request.seq_id] = request.prompt_token_ids.tolist()
        self._outputs[request.seq_id] = []
        return request

    def submit(self, plan: StepPlan) -> int:
        busy = chain.from_iterable(seqs_of(other) for other in self.in_flight.values())
        seqs = seqs_of(plan)
        assert seqs, "a step without a sequence"
        assert len(set(seqs)) == len(seqs)
        if not self._lookahead:
            assert not set(busy) & set(seqs), "a sequence is in two steps at once"
        self._check_batches(plan)
        self._check_written(plan)
        self.plans.append(plan)
        self.in_flight[plan.step] = plan
        num = sum(other.replica == plan.replica for other in self.in_flight.values())
        self.most_in_flight[plan.replica] = max(num, self.most_in_flight[plan.replica])
        return plan.step

    def first_done(self, handles: Sequence[int]) -> int:
        assert set(handles) <= set(self.in_flight)
        return self._choose(handles)

    def collect(self, handle: int) -> StepOutcome:
        plan = self.in_flight.pop(handle)
        token_ids: dict[int, int] = {}
        for micro_batch in plan.micro_batches:
            for dp_rank, batch in enumerate(micro_batch):
                self._run(batch, self._caches[plan.replica][dp_rank], token_ids)
        return StepOutcome(token_ids, {}, (), submitted_s=0.0, finished_s=0.0)

    def _run(self, batch: Batch, cache: np.ndarray, token_ids: dict[int, int]) -> None:
        # The last sequence first: none may count on what an earlier one of its step writes.
        for seq, start, fed, table, yields in reversed(list(sequences(batch))):
            known = self._prompts[seq] + self._outputs[seq]
            stop = start + len(fed)
            if self._lookahead and fed == [UNKNOWN]:  # ranks know what they chose in the last step
                fed = known[start:]
            blocks = np.repeat(table, self._limits.block_size)
            places = (blocks[:stop], np.arange(stop) % self._limits.block_size)
            assert cache[places][:start].tolist() == known[:start], f"sequence {seq} read others'"
            assert fed == known[start:stop]
            assert yields == (stop == len(known))
            cache[places[0][start:], places[1][start:]] = fed
            if yields:
                token = model(cache[places].tolist(), self._limits.vocab_size)
                self._outputs[seq].append(token)
                token_ids[seq] = token

    def _check_batches(self, plan: StepPlan) -> None:
        for micro_batch in plan.micro_batches:
            assert len(micro_batch) == len(self._caches[0])
            assert any(batch.num_seqs for batch in micro_batch)
        for batches in zip(*plan.micro_batches, strict=True):  # of one data-parallel rank
            assert sum(batch.num_tokens for batch in batches) <= self._limits.max_num_batched_tokens
            for batch in batches:
                n = batch.num_seqs
                assert (batch.num_scheduled_tokens >= 1).all()
                assert batch.num_scheduled_tokens.sum() == batch.num_tokens
                assert len(batch.block_tables) == len(batch.yields_token) == n
                assert len(batch.seq_ids) == len(batch.num_computed_tokens) == n
                assert batch.block_tables.dtype == np.int32
                assert batch.yields_token.dtype == np.bool_
                assert batch.token_ids.dtype == batch.num_scheduled_tokens.dtype == np.int64

    def _check_written(self, plan: StepPlan) -> None:
        """No step in flight reads or writes a block that this one writes."""
        size = self._limits.block_size
        for micro_batch in plan.micro_batches:
            for dp_rank, batch in enumerate(micro_batch):
                in_flight = [
                    (seq, block)
                    for other in self.in_flight.values()
                    if other.replica == plan.replica
                    for batches in other.micro_batches
                    for seq, _, _, table, _ in sequences(batches[dp_rank])
                    for block in table.tolist()
                ]
                manager = self._scheduler.tables[plan.replica][dp_rank].blocks
                for own, start, fed, table, _ in sequences(batch):
                    # With lookahead, its own earlier step is finished before this one begins.
                    others = {
                        block for seq, block in in_flight if not (self._lookahead and seq == own)
                    }
                    written = table[start // size : (start + len(fed) - 1) // size + 1].tolist()
                    assert not others & set(written)
                    assert all(manager.ref_count(block) == 1 for block in written)


def sequences(batch: Batch):
    """(sequence id, number computed, new tokens, block table, whether it yields) of each."""
    ends = np.cumsum(batch.num_scheduled_tokens)
    for i, seq in enumerate(batch.seq_ids.tolist()):
        fed = batch.token_ids[ends[i] - batch.num_scheduled_tokens[i] : ends[i]].tolist()
        start = int(batch.num_computed_tokens[i])
        yield seq, start, fed, batch.block_tables[i], bool(batch.yields_token[i])


def seqs_of(plan: StepPlan) -> list[int]:
    return [
        seq for batches in plan.micro_batches for batch in batches for seq in batch.seq_ids.tolist()
    ]


def check_tables(scheduler: ContinuousScheduler, limits: Limits) -> None:
    """Every block is counted exactly as often as it is held; the columns agree with requests."""
    for table in chain.from_iterable(scheduler.tables):
        rows = [row for row, request in enumerate(table.requests) if request is not None]
        assert table.num_running == len(rows) <= limits.max_num_seqs
        held = Counter[int]()
        for row in rows:
            blocks = table.blocks_of(row)
            assert len(set(blocks)) == len(blocks)
            assert (table.block_tables[row, len(blocks) :] == -1).all()
            assert len(blocks) * limits.block_size >= table.num_computed[row]
            held.update(blocks)
        counts = [table.blocks.ref_count(block) for block in range(limits.num_blocks)]
        assert counts == [held[block] for block in range(limits.num_blocks)]
        assert table.blocks.num_used == len(held)
        assert table.num_pending == (table.num_tokens - table.num_computed).sum()
        unused = [row for row, request in enumerate(table.requests) if request is None]
        assert (table.block_tables[unused] == -1).all()
        assert not table.in_flight[unused].any()


def check_empty(scheduler: ContinuousScheduler) -> None:
    """Nothing is left: no request, no block held."""
    assert not scheduler.has_unfinished
    assert scheduler.num_running == scheduler.num_waiting == 0
    for table in chain.from_iterable(scheduler.tables):
        assert table.blocks.num_used == 0
        assert table.blocks.num_free == table.blocks.num_blocks
        assert table.num_pending == 0
