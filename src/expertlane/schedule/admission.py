"""The batch of a data-parallel rank in a step, and the admission of waiting requests to it."""

import heapq
from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from expertlane.schedule.plan import Batch
from expertlane.schedule.request import Limits, Request, RequestState
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


class WaitingRequests:
    """Requests in the order in which they are admitted.

    **Who goes first.** Requests are admitted strictly in their `order`: first come, first served
    within a priority. A level of priority is worth `aging_steps`: a request is overtaken only by
    those that arrive less than `aging_steps` × (its priority - theirs) steps after it, so none
    starves, and it is served once those and the ones before it are done.

    **Admission.** All tokens that a request has so far must fit in free blocks, with a reserve
    (`RunningTable.has_blocks_for`). Of the ranks with room it goes to the one that then has the
    fewest tokens left to compute, counting those it finds in the rank's prefix cache as computed;
    of equal ones to that with the most free blocks. With several replicas, one takes a request
    only while it holds fewer blocks than its share of all that are held and asked for; so the
    least loaded always may.

    Attributes:
        num: requests that wait.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.num = 0
        self._num_blocks = 0  # blocks that all of them ask for
        self._heap: list[tuple[tuple[int, int], Request]] = []  # may hold cancelled ones

    def add(self, request: Request) -> None:
        """Let a request wait, in its order."""
        heapq.heappush(self._heap, (request.order, request))
        self.num += 1
        self._num_blocks += self._limits.blocks_for(request.num_tokens)

    def forget(self, request: Request) -> None:
        """Stop counting a request that has ended or is admitted."""
        self.num -= 1
        self._num_blocks -= self._limits.blocks_for(request.num_tokens)

    def admit(
        self,
        replica: int,
        drafts: Sequence[BatchDraft],
        tables: Sequence[Sequence[RunningTable]],
        *,
        num_groups: int,
        num_steps: int,
    ) -> None:
        """Add requests to a step, in order, until one finds no room.

        Args:
            drafts: [dp]; the step.
            tables: [replicas][dp].
            num_groups: groups of requests that take turns.
            num_steps: steps planned before this one.
        """
        if not self._heap or self._waits_for_others(tables, num_steps):
            return
        most = self._max_num_admitted(tables[replica], num_groups)
        places = _Places(drafts) if not self._limits.prefix_caching else None
        num_prefills = sum(draft.num_prefills for draft in drafts)
        held = _num_held(tables)
        while self._heap:
            request = self._heap[0][1]
            if request.state is RequestState.FINISHED:
                heapq.heappop(self._heap)
                continue
            if request.is_masked and request.mask is None:  # it was preempted; soon
                return
            if num_prefills >= most or self._is_loaded(replica, held):
                return
            place = _place(request, drafts) if places is None else places.take(request)
            if place is None:
                return
            heapq.heappop(self._heap)
            self.forget(request)
            request.replica = replica
            request.dp_rank, cached = place
            blocks = drafts[request.dp_rank].table.blocks
            held[replica] -= blocks.num_used
            drafts[request.dp_rank].admit(request, cached)
            held[replica] += blocks.num_used
            num_prefills += 1
            if places is not None:
                places.put_back(request.dp_rank)

    def _waits_for_others(self, tables: Sequence[Sequence[RunningTable]], num_steps: int) -> bool:
        """True while prompts are held back until there is one for every data-parallel rank."""
        most = self._limits.prompt_wait_steps
        if not most or self.num >= sum(map(len, tables)):
            return False
        first = self._heap[0][1]
        is_running = any(table.num_running for table in chain.from_iterable(tables))
        return is_running and num_steps - first.order[0] < most

    def _max_num_admitted(self, tables: Sequence[RunningTable], num_groups: int) -> int:
        """The most prompts in one step; with several groups, no step takes more than its part."""
        num_seqs = sum(table.num_running for table in tables) + self.num
        num_rows = sum(len(table.requests) for table in tables)
        return -(-min(num_seqs, num_rows) // num_groups)

    def _is_loaded(self, replica: int, held: Sequence[int]) -> bool:
        """True if the replica already holds its share of blocks, so another takes the next request.

        Args:
            held: blocks held by each replica.
        """
        is_alone = len(held) == 1
        return not is_alone and held[replica] * len(held) >= sum(held) + self._num_blocks


def _num_held(tables: Sequence[Sequence[RunningTable]]) -> list[int]:
    """[replicas]; blocks that requests hold; not counted where there is one replica."""
    if len(tables) == 1:
        return [0]
    return [sum(table.blocks.num_used for table in of_replica) for of_replica in tables]


class _Places:
    """Data-parallel ranks by how much they have to do, where no request shares blocks."""

    def __init__(self, drafts: Sequence[BatchDraft]) -> None:
        self._drafts = drafts
        self._heap: list[tuple[int, int, int]] = []
        for dp_rank in range(len(drafts)):
            self.put_back(dp_rank)

    def put_back(self, dp_rank: int) -> None:
        """Let a rank take a further request, if it can."""
        draft = self._drafts[dp_rank]
        table = draft.table
        if draft.budget and table.has_room():
            key = table.num_pending, -table.blocks.num_free, dp_rank
            heapq.heappush(self._heap, key)

    def take(self, request: Request) -> tuple[int, list[int]] | None:
        """The rank for a request, with no shared blocks; it takes no other until it is put back."""
        passed = []
        found = None
        while self._heap and found is None:
            key = heapq.heappop(self._heap)
            if self._drafts[key[-1]].table.has_blocks_for(request, ()):
                found = key[-1], list[int]()
            else:
                passed.append(key)
        for key in passed:
            heapq.heappush(self._heap, key)
        return found


def _place(request: Request, drafts: Sequence[BatchDraft]) -> tuple[int, list[int]] | None:
    """The data-parallel rank for a request and the blocks it shares there; None without room."""
    places = []
    for dp_rank, draft in enumerate(drafts):
        table = draft.table
        if not (draft.budget and table.has_room()):
            continue
        cached = table.find_cached(request)
        if table.has_blocks_for(request, cached):
            num_cached = max(len(cached) * table.blocks.block_size, request.num_arrived_tokens)
            num_pending = table.num_pending - num_cached
            places.append((num_pending, -table.blocks.num_free, dp_rank, cached))
    return min(places)[2:] if places else None
