"""Continuous batching: one scheduler for a layout, and the loop from it to a runner.

The loop is the same for real ranks and for a cost model.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain
from operator import or_
from typing import Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from expertlane.errors import ModelError, UserError
from expertlane.results.step_record import StepRecord
from expertlane.schedule.admission import BatchDraft, WaitingRequests
from expertlane.schedule.plan import (
    Batch,
    HandleT,
    Runner,
    StepOutcome,
    StepPlan,
    micro_batches,
    without_caches,
)
from expertlane.schedule.request import FinishReason, Limits, Request, RequestState, not_finite
from expertlane.schedule.running import Rows, RunningTable
from expertlane.spec.deployment import Options
from expertlane.spec.layout import DpRank, Layout
from expertlane.spec.names import Phase


class _Flight(NamedTuple):
    """A step in flight: its rows of each table that takes part, and the batch of each."""

    replica: int
    phase: Phase
    of_tables: list[tuple[RunningTable, Rows, Batch]]


class StepsInFlight:
    """Steps in flight: the rows and batch of each table, and their number by replica.

    Attributes:
        num: [replicas].
    """

    def __init__(self, num_replicas: int) -> None:
        self.num = [0] * num_replicas
        self._flights: dict[int, _Flight] = {}  # by step

    def __bool__(self) -> bool:
        return bool(self._flights)

    def begin(self, plan: StepPlan, of_tables: Iterable[tuple[RunningTable, Rows, Batch]]) -> None:
        """Add a step that is submitted, on those of the tables whose batch holds anything."""
        taking_part = [each for each in of_tables if each[2].num_seqs]
        for table, rows, batch in taking_part:
            table.begin_step(rows, plan.step, batch)
        self._flights[plan.step] = _Flight(plan.replica, plan.phase, taking_part)
        self.num[plan.replica] += 1

    def end(self, plan: StepPlan) -> list[tuple[RunningTable, Rows, Batch]]:
        """Take out a finished step; gives what it computed."""
        self.num[plan.replica] -= 1
        return self._flights.pop(plan.step).of_tables

    def has_phase(self, replica: int, phase: Phase) -> bool:
        """True if a replica has a step of a phase in flight."""
        flights = self._flights.values()
        return any(each.replica == replica and each.phase is phase for each in flights)

    def lose(self, kept: Iterable[StepPlan], lost: Iterable[RunningTable]) -> None:
        """Keep only some steps, without their rows of tables that are lost."""
        gone = set(map(id, lost))
        flights, self._flights = self._flights, {}
        self.num = [0] * len(self.num)
        for plan in kept:
            flight = flights[plan.step]
            left = [each for each in flight.of_tables if id(each[0]) not in gone]
            self._flights[plan.step] = flight._replace(of_tables=left)
            self.num[plan.replica] += 1

    def move(self, num_replicas: int, new_replicas: Mapping[int, int]) -> None:
        """Give replicas other numbers.

        Args:
            new_replicas: by the number so far, of each that has steps in flight.
        """
        self.num = [0] * num_replicas
        for step, flight in self._flights.items():
            replica = new_replicas[flight.replica]
            self._flights[step] = flight._replace(replica=replica)
            self.num[replica] += 1


class ContinuousScheduler:
    """Puts steps together as requests come and go.

    Only a commit gives requests their tokens, ends them and frees their blocks. It waits for
    nothing, so nothing that happens to ranks can leave it half done.

    A step computes, on every data-parallel rank, one token of each request in decoding, then
    chunks of the running prompts, then of waiting ones (`WaitingRequests` has their order), up to
    `max_num_batched_tokens`.

    **Preemption.** When a decode finds no free block, the request that goes last of the rank's
    running ones loses its blocks and waits again; prompt and output so far are then its prompt.

    **Lookahead.** A step is planned while the one before it runs, so that ranks need not wait for
    the scheduler: a token that is not known yet is -1 in the plan, and the ranks put in what they
    chose themselves. A request that turns out to have ended computes one token in vain. Layouts
    with several pipeline stages go without: the first one does not learn of the last one's tokens.

    **Masks.** A request whose tokens are masked takes part in a step once `allow` has given it the
    mask of its next token, which needs the token before; others go on. With lookahead, decodes of
    such requests are in every second step at most while others run, all in the same ones.

    **Steps in flight.** Drained: one a replica, cut into up to `num_micro_batches`. Rotating: up
    to `pp` a replica over disjoint requests, each with 1/`num_micro_batches` of the decodes; those
    that waited longest go first, so the groups even out as requests come and go.

    Args:
        flags: fields of every `StepPlan`: `return_logits`, `record` and those that begin so.

    Attributes:
        tables: [replicas][dp]; running requests and blocks.
        stepped: the requests that got a token in the step committed last.
        failed: requests that the step committed last ended in an error.
        num_preemptions, num_recovered: since the start, requests that lost their blocks to others,
            and with a rank.
    """

    def __init__(
        self,
        layout: Layout,
        options: Options,
        limits: Limits,
        *,
        lookahead: bool = False,
        **flags: bool,
    ) -> None:
        self._options, self._wants_lookahead = options, lookahead
        self._lay_out(layout)
        self.tables = [
            [RunningTable(limits, lookahead=self._lookahead) for _ in range(layout.dp)]
            for _ in range(layout.replicas)
        ]
        self.stepped: list[Request] = []
        self.failed: list[Request] = []
        self.num_preemptions = self.num_recovered = 0
        self._limits = limits
        self._flags = flags
        self._in_flight = StepsInFlight(layout.replicas)
        self._released: list[list[int]] = [[] for _ in range(layout.replicas)]
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingRequests(limits)
        self._restarting: list[Request] = []  # once they are in no step any more
        self._num_steps = 0
        self._num_added = 0

    def _lay_out(self, layout: Layout) -> None:
        options, lookahead = self._options, self._wants_lookahead and layout.pp == 1
        self._lookahead = lookahead
        is_rotating = options.micro_batch_schedule == "rotating"
        self._num_groups = options.num_micro_batches if is_rotating else 1
        self._num_micro_batches = 1 if is_rotating else options.num_micro_batches
        self._max_in_flight = layout.pp if is_rotating else 1 + lookahead

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary."""
        return self._limits.vocab_size

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks."""
        return self._waiting.num

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that were not computed, as the prefix cache had them; since the start."""
        blocks = [table.blocks for table in chain.from_iterable(self.tables)]
        return sum(each.num_hits * each.block_size for each in blocks)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return sum(table.num_running for table in chain.from_iterable(self.tables))

    @property
    def has_unfinished(self) -> bool:
        """True if any request is waiting or running, or any step in flight."""
        return bool(self._requests or self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UserError: a request with this id is unfinished, or it can never be served
                (`Limits.check`); nothing is queued.
        """
        if request.request_id in self._requests:
            raise UserError(
                f"request {request.request_id!r} is there already; "
                "an id may be used again when its request has finished"
            )
        self._limits.check(request)
        request.prompt_token_ids = request.prompt_token_ids.astype(np.int64)
        request.seq_id = self._num_added
        level = self._num_steps + self._limits.aging_steps * int(request.priority)
        request.order = (level, request.seq_id)
        self._num_added += 1
        self._requests[request.request_id] = request
        self._waiting.add(request)

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> bool:
        """End a request now; a token it gets from a step in flight is dropped.

        Its blocks are freed at once, or when that step is committed: ranks still write to them.

        Returns:
            False if no unfinished request has this id; it may just have finished.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request.state is RequestState.WAITING:
            self._waiting.forget(request)  # its entry in the heap is dropped when it comes up
        else:
            self.tables[request.replica][request.dp_rank].cancel(request.row)
            self._release(request)
        request.finish(reason)
        return True

    def allow(self, request: Request, mask: npt.NDArray[np.uint8]) -> None:
        """Give a request that is not finished the mask of its next token."""
        request.mask = mask
        if request.state is RequestState.RUNNING:
            self.tables[request.replica][request.dp_rank].allow(request.row)

    def next_plan(self) -> StepPlan | None:
        """The next step, or None while no more may be in flight or there is nothing to do."""
        for replica, num_in_flight in enumerate(self._in_flight.num):
            if num_in_flight < self._max_in_flight:
                plan = self._plan(replica)
                if plan is not None:
                    return plan
        return None

    def commit(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Take in the tokens of a finished step.

        A request whose logits were not finite ends in an error; one that shares blocks of others
        is first computed again without them.
        """
        self.stepped, self.failed = [], []
        for table, rows, batch in self._in_flight.end(plan):
            stepped, without_token = table.commit(rows, batch, outcome)
            self.stepped += stepped
            for request in without_token:
                if request.has_cached:
                    request.may_share = False
                    self._restarting.append(request)
                else:
                    request.fail(plan.step)
                    self.failed.append(request)
        if self._restarting:
            self._restart()
        for request in chain(self.stepped, self.failed):
            if request.finish_reason is not None:
                del self._requests[request.request_id]
                self._release(request)

    def lose(
        self, caches: Collection[tuple[int, int]], plans: Sequence[StepPlan]
    ) -> tuple[list[StepPlan], int]:
        """Let requests begin again whose keys and values are gone, as if they were preempted.

        Their part of the steps in flight is taken out of these. A step that has nobody else is
        given up; what it was to release, the next one of its replica does.

        Args:
            caches: (replica, data-parallel rank) of each lost cache.
            plans: plans of all steps in flight, in their order.

        Returns:
            The plans that are left, and how many requests begin again.
        """
        lost: list[RunningTable] = []
        for replica, dp_rank in set(caches):
            table = self.tables[replica][dp_rank]
            self.tables[replica][dp_rank] = table.empty()
            lost.append(table)
        kept, to_release = without_caches(plans, caches)
        self._in_flight.lose(kept, lost)
        for replica, released in to_release.items():
            self._released[replica][:0] = released
        num_before = self.num_recovered
        for request in filter(None, chain.from_iterable(table.requests for table in lost)):
            request.row = -1
            if request.finish_reason is None and request not in self._restarting:
                request.num_recovered += 1
                self.num_recovered += 1
                self._requeue(request)
        self._restart()
        return kept, self.num_recovered - num_before

    def reshape(
        self,
        layout: Layout,
        kept: Mapping[DpRank, DpRank],
        plans: Sequence[StepPlan] = (),
    ) -> tuple[list[StepPlan], int]:
        """Go on in another layout.

        Requests whose keys and values are not kept begin again, as if they were preempted.

        Args:
            kept: by (replica, data-parallel rank) of the new layout, its place in this one.
                What was one replica is one then.
            plans: of all steps in flight, in their order; none has a sequence of another rank.

        Returns:
            The plans in the new layout, and how many requests begin again.
        """
        old = self.tables
        replicas, dp_ranks = range(layout.replicas), range(layout.dp)
        self._lay_out(layout)
        self.tables = [
            [
                old[kept[replica, dp_rank][0]][kept[replica, dp_rank][1]]
                if (replica, dp_rank) in kept
                else RunningTable(self._limits, lookahead=self._lookahead)
                for dp_rank in dp_ranks
            ]
            for replica in replicas
        ]
        num_again = self._give_up_tables(old)
        for at in kept:
            self.tables[at[0]][at[1]].move_to(*at)
        from_replica = {before: replica for (replica, _), (before, _) in kept.items()}
        released = {new: self._released[before] for before, new in from_replica.items()}
        self._released = [released.get(replica, []) for replica in replicas]
        moved = []
        for plan in plans:
            replica = from_replica[plan.replica]
            places = [kept.get((replica, dp_rank), (0, None))[1] for dp_rank in dp_ranks]
            moved.append(plan.moved(replica, places))
        self._in_flight.move(layout.replicas, from_replica)
        return moved, num_again

    def _give_up_tables(self, old: list[list[RunningTable]]) -> int:
        """Let requests of tables no longer in use begin again; return their number."""
        kept = set(map(id, chain.from_iterable(self.tables)))
        first = self.tables[0][0]
        num_again = 0
        for table in chain.from_iterable(old):
            if id(table) in kept:
                continue
            first.num_queried += table.num_queried  # no count falls
            first.blocks.num_hits += table.blocks.num_hits
            for request in filter(None, table.requests):
                assert not table.in_flight[request.row], "it was lost, or no step is in flight"
                request.row = -1
                if request.finish_reason is None:
                    num_again += 1
                    self._requeue(request)
        return num_again

    def _restart(self) -> None:
        released = [request for request in self._restarting if request.row < 0]
        self._restarting = [request for request in self._restarting if request.row >= 0]
        for request in released:
            if request.finish_reason is None:  # else it was cancelled meanwhile
                request.num_preemptions += 1
                self._requeue(request)

    def _plan(self, replica: int) -> StepPlan | None:
        drafts = [BatchDraft(table, self._limits) for table in self.tables[replica]]
        if self._limits.phases_apart:
            self._fill_with_one_phase(replica, drafts)
        else:
            self._add_decodes(replica, drafts)
            self._add_prompts(replica, drafts)
        if not any(draft.num_seqs for draft in drafts):
            return None
        is_prefill = any(draft.num_prefills for draft in drafts)
        built = [draft.build() for draft in drafts]
        plan = StepPlan(
            step=self._num_steps,
            replica=replica,
            phase=Phase.PREFILL if is_prefill else Phase.DECODE,
            micro_batches=micro_batches([batch for _, batch in built], self._num_micro_batches),
            admitted=reduce(or_, (draft.admitted for draft in drafts)),
            masks=reduce(or_, (d.masks(*b) for d, b in zip(drafts, built, strict=True))),
            released=tuple(self._released[replica]),
            num_uncommitted=self._in_flight.num[replica],
            **self._flags,
        )
        self._released[replica].clear()
        self._in_flight.begin(
            plan, [(draft.table, *each) for draft, each in zip(drafts, built, strict=True)]
        )
        self._num_steps += 1
        return plan

    def _fill_with_one_phase(self, replica: int, drafts: list[BatchDraft]) -> None:
        """Add prompts while there are any to compute, else decodes once all prompts are done."""
        self._add_prompts(replica, drafts)
        if any(draft.num_prefills for draft in drafts):
            return
        if not self._in_flight.has_phase(replica, Phase.PREFILL):
            self._add_decodes(replica, drafts)

    def _add_decodes(self, replica: int, drafts: list[BatchDraft]) -> None:
        # Two groups in turns would take two steps for what one can do.
        tables = self.tables[replica]
        holds_masked = self._lookahead and any(table.decodes_masked for table in tables)
        for draft in drafts:
            for request in draft.add_decodes(self._num_groups, holds_masked=holds_masked):
                request.num_preemptions += 1
                self.num_preemptions += 1
                self._requeue(request)

    def _requeue(self, request: Request) -> None:
        """Let a request that lost its blocks wait again."""
        request.state = RequestState.WAITING
        request.num_arrived_tokens = 0
        self._release(request)
        self._waiting.add(request)

    def _add_prompts(self, replica: int, drafts: list[BatchDraft]) -> None:
        for draft in drafts:
            draft.add_prefills()
        self._waiting.admit(
            *(replica, drafts, self.tables),
            num_groups=self._num_groups,
            num_steps=self._num_steps,
        )

    def _release(self, request: Request) -> None:
        """Have ranks drop a request's sampling state, with the next step of its replica."""
        if request.sampling is not None:
            self._released[request.replica].append(request.seq_id)


class FinishedStep(NamedTuple):
    """A plan and its outcome."""

    plan: StepPlan
    outcome: StepOutcome

    def record(self, run: int = 0, spell: int = 0) -> StepRecord:
        """The record that metrics read."""
        plan, outcome = self
        return StepRecord(
            phase=plan.phase,
            replica=plan.replica,
            num_micro_batches=len(plan.micro_batches),
            seq_ids=tuple(seq for batch in plan.batches for seq in batch.yielding_seq_ids),
            num_tokens=sum(batch.num_tokens for batch in plan.batches),
            submitted_s=outcome.submitted_s,
            finished_s=outcome.finished_s,
            records=outcome.records,
            run=run,
            spell=spell,
        )


class DriveLoop(Generic[HandleT]):
    """Keeps a runner busy with what a scheduler plans, and commits steps as they finish.

    The steps of a replica are committed in the order in which they were planned.
    """

    def __init__(self, scheduler: ContinuousScheduler, runner: Runner[HandleT]) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._uncommitted: dict[int, StepPlan] = {}  # by step, in the order of planning
        self._handles: dict[int, HandleT] = {}  # of those that were submitted

    @property
    def uncommitted(self) -> list[StepPlan]:
        """The steps that were planned and are not committed, in their order."""
        return list(self._uncommitted.values())

    @property
    def next_handles(self) -> list[HandleT]:
        """Handles of each replica's oldest uncommitted step: those that may finish next."""
        oldest: dict[int, int] = {}
        for step, plan in self._uncommitted.items():
            oldest.setdefault(plan.replica, step)
        return [self._handles[step] for step in oldest.values()]

    def submit(self) -> None:
        """Begin all steps that the scheduler gives."""
        while (plan := self._scheduler.next_plan()) is not None:
            self._uncommitted[plan.step] = plan
            self._handles[plan.step] = self._runner.submit(plan)

    def submit_again(self) -> None:
        """Begin all uncommitted steps anew, once the runner has discarded them."""
        for step, plan in self._uncommitted.items():
            self._handles[step] = self._runner.submit(plan)

    def lose(self, caches: Collection[tuple[int, int]]) -> int:
        """Let requests begin again whose keys and values are gone; `submit_again` has to follow.

        Args:
            caches: (replica, data-parallel rank) of each.

        Returns:
            How many requests these are.
        """
        plans, num_requests = self._scheduler.lose(caches, self.uncommitted)
        self._uncommitted = {plan.step: plan for plan in plans}
        self._handles.clear()
        return num_requests

    def reshape(self, layout: Layout, kept: Mapping[DpRank, DpRank]) -> int:
        """Go on in another layout; `submit_again` has to follow, in it.

        Args:
            kept: by (replica, data-parallel rank) whose keys and values are there, what it was.

        Returns:
            How many requests begin again, beside those of `lose`.
        """
        plans, num_requests = self._scheduler.reshape(layout, kept, self.uncommitted)
        self._uncommitted = {plan.step: plan for plan in plans}
        self._handles.clear()
        return num_requests

    @property
    def is_idle(self) -> bool:
        """True if no step is in flight."""
        return not self._uncommitted

    def commit_next(self) -> FinishedStep | None:
        """Wait until a step is finished and commit it; None if none is under way."""
        if not self._uncommitted:
            return None
        handle = self._runner.first_done(self.next_handles)
        step = next(step for step, of_step in self._handles.items() if of_step is handle)
        plan, outcome = self._uncommitted[step], self._runner.collect(handle)
        self._scheduler.commit(plan, outcome)
        del self._uncommitted[step], self._handles[step]
        return FinishedStep(plan, outcome)


def drive(scheduler: ContinuousScheduler, runner: Runner[HandleT]) -> Iterator[FinishedStep]:
    """Yield steps as they finish, until the scheduler gives no more.

    Raises:
        ModelError: a sequence found no next token, since its logits are not finite.
    """
    loop = DriveLoop(scheduler, runner)
    while True:
        loop.submit()
        finished = loop.commit_next()
        if finished is None:
            return
        for seq in finished.outcome.not_finite:
            raise ModelError(f"sequence {seq + 1}: {not_finite(finished.plan.step)}")
        yield finished


def step_records(steps: Iterable[FinishedStep], run: int = 0) -> Iterator[StepRecord]:
    """Records of steps for metrics; a spell ends where the phase changes."""
    spell, phase = -1, None
    for step in steps:
        if step.plan.phase is not phase:
            spell, phase = spell + 1, step.plan.phase
        yield step.record(run, spell)
