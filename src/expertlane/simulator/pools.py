"""Requests that arrive on a virtual clock, served by one pool of ranks or by two.

Disaggregated, a pool of its own computes prompts and first tokens; then keys and values travel to
the pool that decodes. Each pool has its own scheduler, driver and ranks; all share one time.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from expertlane.cost.kv_transfer import KVTransfers
from expertlane.cost.laws.execution import BOUNDS
from expertlane.cost.runner import CostRunner
from expertlane.cost.step.operation import Floats
from expertlane.results.metrics import ServedRequest
from expertlane.schedule.drive import DriveLoop
from expertlane.schedule.request import Request
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.workload import TimedRequest


class Stepped(NamedTuple):
    """A request that got a token, and the begin and end of that step: [B] each."""

    request: Request
    begin_s: Floats
    end_s: Floats


class Pool:
    """A scheduler and a runner that serve requests as they arrive."""

    def __init__(self, scheduler: ContinuousScheduler, runner: CostRunner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._inbox: list[tuple[float, int, Floats, Request]] = []  # a heap, by arrival
        self._num_arrivals = 0
        self._loop = DriveLoop(scheduler, runner)

    def deliver(self, request: Request, at_s: Floats) -> None:
        """Deliver a request at a moment [B]; it is added then, or when the step in flight ends."""
        entry = (float(at_s[self.runner.lead]), self._num_arrivals, at_s, request)
        heapq.heappush(self._inbox, entry)
        self._num_arrivals += 1

    @property
    def next_s(self) -> float | None:
        """Time of the next event; None if nothing happens without a delivery."""
        if handles := self._loop.next_handles:
            return min(float(handle.finished_s[self.runner.lead]) for handle in handles)
        return self._inbox[0][0] if self._inbox else None

    @property
    def num_in_flight(self) -> int:
        """Number of steps in flight."""
        return len(self._loop.uncommitted)

    def advance(self) -> list[Stepped]:
        """Advance to the next event; return the requests that got a token."""
        stepped: list[Stepped] = []
        finished = self._loop.commit_next()
        if finished is None:
            self.runner.wait_until(self._inbox[0][2])
        else:
            times = self.runner.bounds[finished.plan.step]
            stepped = [Stepped(request, *times) for request in self.scheduler.stepped]
        self._take_in()
        return stepped

    def submit(self) -> None:
        """Begin all steps that can begin now."""
        self._loop.submit()

    def _take_in(self) -> None:
        while self._inbox and self._inbox[0][0] <= self.runner.now_s[self.runner.lead]:
            _, _, at_s, request = heapq.heappop(self._inbox)
            self.runner.wait_until(at_s)  # by another bound it may come later
            self.scheduler.add(request)


def run_load(
    pool: Pool,
    requests: Iterable[TimedRequest],
    max_unfinished: int | None = None,
    *,
    apart: tuple[Pool, KVTransfers] | None = None,
    on_finished: Callable[[], None] = lambda: None,
    is_done: Callable[[Sequence[ServedRequest[Floats]]], bool] = lambda served: False,
) -> list[ServedRequest[Floats]]:
    """Serve requests to their whole lengths; return them in the order of `requests`.

    In two pools, keys and values of a request travel beside the pools' own work when its prompt is
    done, one request after the other from each data-parallel rank; until the decoding pool has room
    they are taken to have a place to be. A client gets its first token with the others, from the
    pool that decodes: when its first step there begins. A request preempted there computes its
    prompt there.

    Args:
        requests: by due time.
        max_unfinished: a request waits while there are so many; then it is due when added.
        apart: the decode pool, and the KV transfers to it.
        on_finished: called for each request that is done.
        is_done: called after each step with the requests served so far; True ends the load.
    """
    return _Serving(pool, apart, max_unfinished, on_finished, is_done).run(requests)


class _Serving:
    """One run of a load over pools."""

    def __init__(
        self,
        pool: Pool,
        apart: tuple[Pool, KVTransfers] | None,
        max_unfinished: int | None,
        on_finished: Callable[[], None],
        is_done: Callable[[Sequence[ServedRequest[Floats]]], bool],
    ) -> None:
        self._prefill = pool
        self._apart = apart
        self._max_unfinished = max_unfinished
        self._on_finished = on_finished
        self._is_done = is_done
        self._free_s: dict[tuple[int, int], Floats] = {}  # by sender: replica and dp rank
        self._served: list[ServedRequest[Floats]] = []
        self._moved: set[str] = set()  # requests of which no client has a token yet
        self._num_unfinished = 0
        self._last_due_s = 0.0

    def run(self, requests: Iterable[TimedRequest]) -> list[ServedRequest[Floats]]:
        """Deliver all, and let both pools work until nothing is left."""
        waiting = iter(requests)
        pools = [self._prefill, *([] if self._apart is None else self._apart[:1])]
        now_s: Floats = np.zeros(len(BOUNDS))
        while not self._is_done(self._served):
            self._fill(waiting, now_s)
            busy = [(pool.next_s, pool) for pool in pools if pool.next_s is not None]
            if not busy:
                break
            pool = min(busy, key=lambda each: each[0] or 0.0)[1]
            for each in pool.advance():
                now_s = each.end_s
                self._take_token(each, is_first=pool is self._prefill)
            self._fill(waiting, now_s)
            pool.submit()
        return self._served

    def _fill(self, waiting: Iterator[TimedRequest], now_s: Floats) -> None:
        """Deliver requests while there is room; in an open loop, those that are due."""
        most, lead_s = self._max_unfinished, float(now_s[self._prefill.runner.lead])
        while self._last_due_s <= lead_s if most is None else self._num_unfinished < most:
            wanted = next(waiting, None)
            if wanted is None:
                return
            self._last_due_s = wanted.due_s
            self._deliver(wanted, now_s)

    def _deliver(self, wanted: TimedRequest, now_s: Floats) -> None:
        due_s = np.full(len(BOUNDS), wanted.due_s) if self._max_unfinished is None else now_s
        prompt, num_arrived = wanted.prompt_token_ids, wanted.num_arrived
        place = str(len(self._served))
        self._served.append(ServedRequest(len(prompt), wanted.output_len, due_s))
        self._num_unfinished += 1
        pool, max_tokens = self._prefill, wanted.output_len
        if self._apart is not None:
            pool, max_tokens = (self._apart[0], max_tokens) if num_arrived else (pool, 1)
        request = Request(place, prompt, max_tokens=max_tokens, num_arrived_tokens=num_arrived)
        pool.deliver(request, due_s if num_arrived else due_s + pool.runner.terms.arrival_s)

    def _take_token(self, stepped: Stepped, *, is_first: bool) -> None:
        request, begin_s, at_s = stepped
        served = self._served[int(request.request_id)]
        if is_first and request.num_cached_tokens is not None:
            served.num_cached_tokens = request.num_cached_tokens
        if is_first and self._apart is not None and served.output_len > 1:
            served.num_preemptions += request.num_preemptions
            self._move(request, served.output_len - 1, at_s, *self._apart)
            return
        if request.request_id in self._moved:
            self._moved.remove(request.request_id)
            served.token_times_s.append(begin_s)
        served.token_times_s.append(at_s)
        if len(served.token_times_s) == served.output_len:
            served.num_preemptions += request.num_preemptions
            self._num_unfinished -= 1
            self._on_finished()

    def _move(
        self, request: Request, max_tokens: int, at_s: Floats, decode: Pool, transfers: KVTransfers
    ) -> None:
        """Send keys and values to the pool that decodes, and the request with them."""
        prompt_len = len(request.prompt_token_ids)
        sender = request.replica, request.dp_rank
        begin_s = np.maximum(at_s, self._free_s.get(sender, 0.0))
        there_s = self._free_s[sender] = begin_s + transfers.seconds(prompt_len)
        moved = Request(
            request.request_id,
            np.concatenate((request.prompt_token_ids, request.output_token_ids)).astype(np.int64),
            max_tokens=max_tokens,
            num_arrived_tokens=prompt_len,
        )
        self._moved.add(request.request_id)
        decode.deliver(moved, there_s)
