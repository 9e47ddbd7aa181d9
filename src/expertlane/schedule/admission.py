"""Requests that hold no blocks, and which of them go into a step."""

import heapq
from collections.abc import Sequence
from itertools import chain

from expertlane.schedule.batch_draft import BatchDraft
from expertlane.schedule.request import Limits, Request, RequestState
from expertlane.schedule.running import RunningTable


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
