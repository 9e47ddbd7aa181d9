"""Requests that arrive on a virtual clock, served by one pool of ranks or by two.

Disaggregated, a pool of its own computes prompts and first tokens; then keys and values travel to
the pool that decodes. Each pool has its own scheduler, driver and ranks; all share one time.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from expertlane.cost.kv_transfer import KVTransfers
from expertlane.cost.laws.execution import BOUNDS
from expertlane.cost.runner import CostRunner
from expertlane.cost.step.operation import Floats
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import ServingRecord
from expertlane.schedule.drive import DriveLoop
from expertlane.schedule.request import Request
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.workload import TimedRequest


@dataclass(eq=False)
class Served:
    """A request and when its tokens came; all times [B].

    Attributes:
        due_s: when it arrived; in a closed loop, when there was room for it.
        token_times_s: one entry a token.
        moved_s: when its keys and values began to travel to another pool, and were there.
    """

    prompt_len: int
    due_s: Floats
    token_times_s: list[Floats] = field(default_factory=list)
    num_preemptions: int = 0
    moved_s: tuple[Floats, Floats] | None = None

    @property
    def ttft_s(self) -> Floats:
        """From when it was due to its first token, which its prompt's last step computes.

        Where another pool decodes, keys and values travel afterwards: that delays the second token.
        """
        return self.token_times_s[0] - self.due_s

    @property
    def tpot_s(self) -> Floats | None:
        """Mean time of the tokens after the first; None where there is one alone."""
        if len(self.token_times_s) == 1:
            return None
        first, last = self.token_times_s[0], self.token_times_s[-1]
        tpot_s: Floats = (last - first) / (len(self.token_times_s) - 1)
        return tpot_s


class Pool:
    """A scheduler and a runner that serve what arrives."""

    def __init__(self, scheduler: ContinuousScheduler, runner: CostRunner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._inbox: list[tuple[float, int, Floats, Request]] = []  # a heap, by arrival
        self._num_arrivals = 0
        self._loop = DriveLoop(scheduler, runner)

    def deliver(self, request: Request, at_s: Floats) -> None:
        """A request arrives at a moment [B]; it is added then, or when the step then ends."""
        entry = (float(at_s[self.runner.lead]), self._num_arrivals, at_s, request)
        heapq.heappush(self._inbox, entry)
        self._num_arrivals += 1

    @property
    def next_s(self) -> float | None:
        """When something happens next; None if nothing will without a delivery."""
        if handles := self._loop.next_handles:
            return min(float(handle.finished_s[self.runner.lead]) for handle in handles)
        return self._inbox[0][0] if self._inbox else None

    def advance(self) -> list[tuple[Request, Floats]]:
        """Let the next thing happen: requests that got a token then, and when, [B]."""
        stepped: list[tuple[Request, Floats]] = []
        finished = self._loop.commit_next()
        if finished is None:
            self.runner.wait_until(self._inbox[0][2])
        else:
            _, finished_s = self.runner.bounds[finished.plan.step]
            stepped = [(request, finished_s) for request in self.scheduler.stepped]
        self._take_in()
        return stepped

    def submit(self) -> None:
        """Begin whatever steps can begin now."""
        self._loop.submit()

    def _take_in(self) -> None:
        while self._inbox and self._inbox[0][0] <= self.runner.now_s[self.runner.lead]:
            _, _, at_s, request = heapq.heappop(self._inbox)
            self.runner.wait_until(at_s)  # by another bound it may come later
            self.scheduler.add(request)


def serve(
    pool: Pool,
    requests: Iterable[TimedRequest],
    max_unfinished: int | None = None,
    *,
    on_finished: Callable[[], None] = lambda: None,
) -> list[Served]:
    """Serve requests to their whole lengths; gives them in the order of `requests`.

    Args:
        requests: by due time.
        max_unfinished: a request waits while there are so many; then it is due when added.
        on_finished: called for each request that is done.
    """
    return _Serving(pool, pool, None, max_unfinished, on_finished).run(requests)


def serve_apart(
    prefill: Pool,
    decode: Pool,
    transfers: KVTransfers,
    requests: Iterable[TimedRequest],
    max_unfinished: int | None = None,
    *,
    on_finished: Callable[[], None] = lambda: None,
) -> list[Served]:
    """Serve requests with prompts in one pool and further tokens in another.

    Keys and values of a request travel beside the pools' own work when its prompt is done, one
    request after the other from each data-parallel rank; until the decoding pool has room they are
    taken to have a place to be. A request preempted there computes its prompt there.
    """
    return _Serving(prefill, decode, transfers, max_unfinished, on_finished).run(requests)


class _Serving:
    """One run of a load over pools."""

    def __init__(
        self,
        prefill: Pool,
        decode: Pool,
        transfers: KVTransfers | None,
        max_unfinished: int | None,
        on_finished: Callable[[], None],
    ) -> None:
        self._prefill = prefill
        self._decode = decode
        self._transfers = transfers
        self._max_unfinished = max_unfinished
        self._on_finished = on_finished
        self._free_s: dict[tuple[int, int], Floats] = {}  # by sender: replica and dp rank
        self._served: dict[str, Served] = {}
        self._wanted: dict[str, TimedRequest] = {}
        self._num_unfinished = 0

    def run(self, requests: Iterable[TimedRequest]) -> list[Served]:
        """Deliver all, and let both pools work until nothing is left."""
        waiting = list(requests)[::-1]
        pools = list(dict.fromkeys((self._prefill, self._decode)))
        now_s: Floats = np.zeros(len(BOUNDS))
        while True:
            while waiting and not self._is_full():
                self._deliver(waiting.pop(), now_s)
            busy = [(pool.next_s, pool) for pool in pools if pool.next_s is not None]
            if not busy:
                return list(self._served.values())
            pool = min(busy, key=lambda each: each[0] or 0.0)[1]
            for request, at_s in pool.advance():
                now_s = at_s
                self._take_token(request, at_s, is_first=pool is self._prefill)
            while waiting and not self._is_full():
                self._deliver(waiting.pop(), now_s)
            pool.submit()

    def _is_full(self) -> bool:
        return self._max_unfinished is not None and self._num_unfinished >= self._max_unfinished

    def _deliver(self, wanted: TimedRequest, now_s: Floats) -> None:
        due_s = np.full(len(BOUNDS), wanted.due_s) if self._max_unfinished is None else now_s
        request_id = str(len(self._served))
        self._served[request_id] = Served(len(wanted.prompt_token_ids), due_s)
        self._wanted[request_id] = wanted
        self._num_unfinished += 1
        max_tokens = wanted.output_len if self._transfers is None else 1
        request = Request(request_id, wanted.prompt_token_ids, max_tokens=max_tokens)
        self._prefill.deliver(request, due_s)

    def _take_token(self, request: Request, at_s: Floats, *, is_first: bool) -> None:
        served, wanted = self._served[request.request_id], self._wanted[request.request_id]
        served.token_times_s.append(at_s)
        if len(served.token_times_s) == wanted.output_len:
            served.num_preemptions += request.num_preemptions
            self._num_unfinished -= 1
            self._on_finished()
        elif is_first and self._transfers is not None:
            served.num_preemptions += request.num_preemptions
            self._move(request, wanted, at_s)

    def _move(self, request: Request, wanted: TimedRequest, at_s: Floats) -> None:
        """Send keys and values to the pool that decodes, and the request with them."""
        assert self._transfers is not None
        prompt_len = len(request.prompt_token_ids)
        sender = request.replica, request.dp_rank
        begin_s = np.maximum(at_s, self._free_s.get(sender, 0.0))
        there_s = self._free_s[sender] = begin_s + self._transfers.seconds(prompt_len)
        self._served[request.request_id].moved_s = begin_s, there_s
        moved = Request(
            request.request_id,
            np.concatenate((request.prompt_token_ids, request.output_token_ids)).astype(np.int64),
            max_tokens=wanted.output_len - 1,
            num_arrived_tokens=prompt_len,
        )
        self._decode.deliver(moved, there_s)


def serving_record(
    served: Sequence[Served], output_lens: Sequence[int] | None = None
) -> ServingRecord:
    """What users of a load would feel.

    Args:
        output_lens: tokens of each request; if not given, as many as there are times.
    """
    if output_lens is None:
        output_lens = [len(each.token_times_s) for each in served]
    lens = np.array(output_lens)
    due = np.array([each.due_s for each in served])  # [num_requests, 3]
    first = np.array([each.token_times_s[0] for each in served])
    last = np.array([each.token_times_s[-1] for each in served])
    goes_on = lens > 1
    tpot = (last - first)[goes_on] / (lens[goes_on, None] - 1)
    wall_s = Estimate.between(last.max(axis=0) - due.min(axis=0))
    num_output, num_prompt = int(lens.sum()), sum(each.prompt_len for each in served)
    return ServingRecord(
        num_requests=len(served),
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        wall_s=wall_s,
        ttft_s=Summary.between(first - due),
        tpot_s=Summary.between(tpot),
        e2e_s=Summary.between(last - due),
        output_tps=num_output / wall_s,
        total_tps=(num_output + num_prompt) / wall_s,
        requests_per_s=len(served) / wall_s,
    )
