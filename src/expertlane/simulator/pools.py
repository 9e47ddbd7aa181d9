"""Requests that arrive on a virtual clock, served by one pool of ranks or by two.

Disaggregated, a pool of its own computes prompts and first tokens; then keys and values travel to
the pool that decodes. Each pool has its own scheduler, driver and ranks; all share one time.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from expertlane.cost.breakdown import BreakdownTable, basis_seconds, floor_s
from expertlane.cost.laws.profile import BOUNDS, LIKELY
from expertlane.cost.memory import KVTransfers
from expertlane.cost.pricing import Pricing
from expertlane.cost.runner import CostRunner, PricedStep
from expertlane.cost.step.operation import Floats, Ints
from expertlane.cost.step.program import StepProgram, expert_loads, sent_bytes
from expertlane.results.metrics import ServedRequest
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.request import Request
from expertlane.schedule.scheduler import ContinuousScheduler, DriveLoop
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase, ProjectedCause
from expertlane.spec.workload import TimedRequest

_WINDOW = 16  # steps explained in a row
_MOST_SAMPLED = 256  # steps of a phase, one of which is drawn
_MOST_EXPLAINED = 64  # steps of a phase, about; explaining takes as long as pricing


@dataclass(frozen=True, eq=False)
class StepFacts:
    """Facts of a priced step, or of several added up, beside its time.

    Attributes:
        floor_s: see `cost.breakdown.floor_s`.
        basis_s: [num_bases]; likely seconds of operations and transfers, mean over ranks.
        extrapolated_s: part of them that lies outside the sizes that laws were fitted to.
        sent_bytes: [num_links, num_kinds_of_traffic]; bytes to other ranks.
        num_tokens_per_expert, rank_pairs: see `cost.step.program.expert_loads`.
    """

    floor_s: float
    basis_s: Floats
    extrapolated_s: float
    sent_bytes: Ints
    num_tokens_per_expert: Ints
    rank_pairs: float

    @classmethod
    def of(cls, step: PricedStep, pricing: Pricing, model: ModelConfig) -> "StepFacts":
        """The facts of a step's program with its times."""
        return cls(
            floor_s([step.program], pricing.profile.device, pricing.types),
            *basis_seconds([step.work]),
            sent_bytes(step.program),
            *expert_loads(step.program, model.num_hidden_layers, model.num_experts),
        )

    def __add__(self, other: "StepFacts") -> "StepFacts":
        """The facts of both together."""
        names = [each.name for each in fields(self)]
        return StepFacts(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(eq=False)
class PhaseTotals:
    """Steps of one phase; sums unless it says otherwise.

    Attributes:
        facts: of all steps together.
        sample: some steps with their likely seconds, evenly over all.
        step_s: [3] each step: low, likely, high.
        num_tokens, num_seqs: computed, drafts among them, and sequences that took part.
        why_s: by cause, of the steps that were explained; [num_causes].
        explained_s, flops_s, read_s: of those, their time, and that times utilisation.
    """

    facts: StepFacts
    sample: list[tuple[float, StepPlan]] = field(default_factory=list)
    step_s: list[Floats] = field(default_factory=list)
    num_tokens: int = 0
    num_seqs: int = 0
    why_s: Floats = field(default_factory=lambda: np.zeros(len(ProjectedCause)))
    explained_s: float = 0.0
    flops_s: float = 0.0
    read_s: float = 0.0
    _stride: int = 1

    def add(self, plan: StepPlan, seconds: Floats, num_drafts: int) -> None:
        """Add a step, whose facts are in `facts`."""
        batches = plan.batches
        num_tokens = sum(batch.num_tokens for batch in batches)
        if num_drafts:
            is_decode = [
                batch.yields_token & (batch.num_scheduled_tokens == 1) for batch in batches
            ]
            num_tokens += num_drafts * sum(int(each.sum()) for each in is_decode)
        self._keep(plan, float(seconds[LIKELY]))
        self.step_s.append(seconds)
        self.num_tokens += num_tokens
        self.num_seqs += sum(batch.num_seqs for batch in batches)

    def _keep(self, plan: StepPlan, likely_s: float) -> None:
        """Sample steps evenly: of ever more steps, an ever smaller share."""
        if len(self.step_s) % self._stride == 0:
            self.sample.append((likely_s, plan))
        if len(self.sample) > _MOST_SAMPLED:
            self.sample = self.sample[::2]
            self._stride *= 2

    @property
    def median(self) -> StepPlan:
        """The sampled step that takes about the median time of all."""
        median_s = float(np.median([seconds[LIKELY] for seconds in self.step_s]))
        return min(self.sample, key=lambda each: abs(each[0] - median_s))[1]

    def explain(self, table: BreakdownTable) -> None:
        """Add the breakdown of consecutive steps."""
        why = table.result()
        self.why_s = self.why_s + why.seconds * np.array(list(why.shares.values()))
        self.explained_s += why.seconds
        self.flops_s += why.seconds * why.flops_utilisation
        self.read_s += why.seconds * why.bytes_utilisation


class PoolTotals:
    """Adds up the steps of one pool.

    Time is broken down on the first replica, and of very many steps for some.

    Attributes:
        phases: totals of each phase with any steps.
        most_running: the most sequences that held blocks at once.

    Args:
        num_running: returns the sequences that hold blocks now.
        num_drafts: draft tokens in every decode.
    """

    def __init__(
        self,
        model: ModelConfig,
        pricing: Pricing,
        num_running: Callable[[], int],
        num_drafts: int = 0,
    ) -> None:
        self.phases: dict[Phase, PhaseTotals] = {}
        self.most_running = 0
        self._model = model
        self._pricing = pricing
        self._num_running = num_running
        self._num_drafts = num_drafts
        self._facts: WeakKeyDictionary[StepProgram, StepFacts] = WeakKeyDictionary()
        self._empty = BreakdownTable(pricing.profile.device, pricing.types)
        self._table: BreakdownTable | None = None
        self._explained: Phase | None = None

    def observe(self, step: PricedStep) -> None:
        """Add a step to the totals."""
        facts = self._facts.get(step.program)
        if facts is None:
            facts = self._facts[step.program] = StepFacts.of(step, self._pricing, self._model)
        phase = _phase(step.plan)
        totals = self.phases.get(phase)
        if totals is None:
            totals = self.phases[phase] = PhaseTotals(facts)
        else:
            totals.facts += facts
        totals.add(step.plan, _seconds(step), self._num_drafts)
        self.most_running = max(self.most_running, self._num_running())
        if step.plan.replica == 0:
            self._explain(step, phase, totals)

    def close(self) -> None:
        """Finish the totals: no step follows."""
        if self._table is not None and self._explained is not None:
            self.phases[self._explained].explain(self._table)
        self._table = None

    def _explain(self, step: PricedStep, phase: Phase, totals: PhaseTotals) -> None:
        number = len(totals.step_s) - 1
        window = number // _WINDOW
        stride = 1 + number // _MOST_EXPLAINED
        is_watched = window % stride == 0
        if self._explained is not phase or not is_watched or not step.follows:
            self.close()  # what no request was there for is no part of a step
        self._explained = phase
        if not is_watched:
            return
        if self._table is None:
            self._table = self._empty.cleared()
        self._table.add(step.times)


def _phase(plan: StepPlan) -> Phase:
    """Prefill if the plan computes any prompt; sequences that came with their cache have none."""
    batches = plan.batches
    is_decode = all((batch.num_scheduled_tokens == 1).all() for batch in batches)
    return Phase.DECODE if is_decode else Phase.PREFILL


def _seconds(step: PricedStep) -> Floats:
    """[3]; seconds from when the first rank turned to it until the last one was done."""
    begin_s = step.times.spans[0][0].begin.min(axis=1)
    seconds: Floats = step.times.end_s - step.times.origin_s - begin_s
    return seconds


class TokenStep(NamedTuple):
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

    def advance(self) -> list[TokenStep]:
        """Advance to the next event; return the requests that got a token."""
        stepped: list[TokenStep] = []
        finished = self._loop.commit_next()
        if finished is None:
            self.runner.wait_until(self._inbox[0][2])
        else:
            times = self.runner.bounds[finished.plan.step]
            stepped = [TokenStep(request, *times) for request in self.scheduler.stepped]
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
    serving, waiting = _Serving(pool, apart, max_unfinished, on_finished), iter(requests)
    pools = [pool, *([] if apart is None else apart[:1])]
    now_s: Floats = np.zeros(len(BOUNDS))
    while not is_done(serving.served):
        serving.fill(waiting, now_s)
        busy = [(each.next_s, each) for each in pools if each.next_s is not None]
        if not busy:
            break
        first = min(busy, key=lambda each: each[0] or 0.0)[1]
        for stepped in first.advance():
            now_s = stepped.end_s
            serving.take_token(stepped, is_first=first is pool)
        serving.fill(waiting, now_s)
        first.submit()
    return serving.served


@dataclass(eq=False)
class _Serving:
    """Requests of a load on their way through the pools; the fields are those of `run_load`.

    Attributes:
        served: requests delivered so far.
    """

    _prefill: Pool
    _apart: tuple[Pool, KVTransfers] | None
    _max_unfinished: int | None
    _on_finished: Callable[[], None]
    served: list[ServedRequest[Floats]] = field(default_factory=list)
    _free_s: dict[tuple[int, int], Floats] = field(default_factory=dict)  # by replica and dp rank
    _moved: set[str] = field(default_factory=set)  # requests of which no client has a token yet
    _num_unfinished: int = 0
    _last_due_s: float = 0.0
    _admitted_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)))  # the last request

    def fill(self, waiting: Iterator[TimedRequest], now_s: Floats) -> None:
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
        place = str(len(self.served))
        self.served.append(ServedRequest(len(prompt), wanted.output_len, due_s))
        self._num_unfinished += 1
        pool, max_tokens = self._prefill, wanted.output_len
        if self._apart is not None:
            pool, max_tokens = (self._apart[0], max_tokens) if num_arrived else (pool, 1)
        request = Request(place, prompt, max_tokens=max_tokens, num_arrived_tokens=num_arrived)
        if not num_arrived:
            terms = pool.runner.terms
            self._admitted_s = np.maximum(self._admitted_s, due_s) + terms.admission_s
            due_s = self._admitted_s + terms.arrival_s
        pool.deliver(request, due_s)

    def take_token(self, stepped: TokenStep, *, is_first: bool) -> None:
        """Give a request the token of a step; after its prompt it may move to the other pool."""
        request, begin_s, at_s = stepped
        served = self.served[int(request.request_id)]
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
