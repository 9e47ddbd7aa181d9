"""Recovery from lost ranks: a state machine, what happens on each transition, and the arrangement.

A loss may come in any state, in the midst of a recovery too. Lost ranks are killed for certain and
replaced by new processes; the others keep their weights and caches. Requests whose keys and values
were on a lost rank are computed again, and steps that were not committed run again in their order,
so that each request gets the tokens that it would have had.

Where the others can serve without those that are lost, they may go on at once in a smaller layout;
the new processes start meanwhile, and the layout grows back once they have their weights.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from expertlane.balance.holding import Placements
from expertlane.balance.transition import Arrangement, Transition
from expertlane.engine.elastic.recovery_record import (
    CHANGING,
    NEXT,
    Moment,
    RecoveryKind,
    RecoveryRecord,
    State,
)
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import ExpertlaneError, RankError, RanksLostError, UserError
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.scheduler import DriveLoop
from expertlane.spec.layout import DpRank, Members

ResultT = TypeVar("ResultT")

_MOST_FRUITLESS = 3  # epochs in a row without a committed step
_MOST_RECORDS = 1000


class Follower(Protocol):
    """An object whose state depends on the arrangement."""

    def abandon(self, plans: Sequence[StepPlan]) -> None:
        """Drop decisions about steps to come, since ranks go on in a new epoch.

        Args:
            plans: plans of all steps that are not committed; ranks will undo them.
        """
        ...

    def reshape(self, arrangement: Arrangement) -> None:
        """Change to another arrangement, which ranks get with the next `Redeploy`."""
        ...


class CurrentArrangement:
    """The owner of the arrangement. Methods belong to the thread that has the pool.

    Only `Recovery` changes it; rebalancing notes moves of experts.

    Attributes:
        now: the arrangement that serves, or is about to.
        whole: the arrangement when no rank is missing; `now`, unless ranks are missing or the
            layout is being changed.
    """

    def __init__(self, whole: Arrangement) -> None:
        self.now = self.whole = whole
        self._followers: list[Follower] = []

    def follow(self, follower: Follower) -> None:
        """Register a follower, which is told of changes after those that are registered."""
        self._followers.append(follower)

    def begin(self, whole: Arrangement) -> None:
        """Set the arrangement that the first ranks load, and remove all followers."""
        self.now = self.whole = whole
        self._followers.clear()

    def move(self, replica: int, placements: Placements) -> None:
        """Set the placements of a replica whose experts have moved."""
        is_whole = self.now is self.whole
        self.now = self.now.moved(replica, placements)
        if is_whole:
            self.whole = self.now

    def want(self, whole: Arrangement) -> None:
        """Set the arrangement that will serve when no rank is missing; `change` has to follow."""
        self.whole = whole

    def abandon(self, plans: Sequence[StepPlan]) -> None:
        """Call `Follower.abandon` of all; placements are then those before these steps."""
        for follower in self._followers:
            follower.abandon(plans)

    def change(self, now: Arrangement) -> None:
        """Set another arrangement, and call `Follower.reshape` of all; `abandon` comes before."""
        self.now = now
        for follower in self._followers:
            follower.reshape(now)


class RepeatedLosses:
    """Counts, for each request, losses in its steps since it last got further than ever before.

    A request that ends ranks does so at the same position each time: its steps up to there may be
    committed again after each loss, those beyond never are.
    """

    def __init__(self) -> None:
        # By sequence: losses, and its computed tokens when it had most of them.
        self._found: dict[int, tuple[int, int]] = {}

    @property
    def most(self) -> int:
        """The largest number of losses of a request."""
        return max((num_losses for num_losses, _ in self._found.values()), default=0)

    def add(
        self, plans: Sequence[StepPlan], replicas: Collection[int], most: int
    ) -> tuple[int, DpRank] | None:
        """Count a loss.

        Args:
            plans: plans of all steps that are not committed, in order.
            replicas: replicas that lost ranks.
            most: losses that a request may have.

        Returns:
            The newest of the sequences that would have more now, and where it is; None if none
            would. The others ran before it came, so it is the likeliest cause; it is forgotten.
        """
        struck: dict[int, tuple[int, DpRank]] = {}  # tokens computed before the first lost step
        for plan in plans:
            parts = [
                (dp_rank, batch)
                for micro_batch in plan.micro_batches
                for dp_rank, batch in enumerate(micro_batch)
                if plan.replica in replicas
            ]
            for dp_rank, batch in parts:
                pairs = zip(batch.seq_ids.tolist(), batch.num_computed_tokens.tolist(), strict=True)
                for seq, num_computed in pairs:
                    struck.setdefault(seq, (num_computed, (plan.replica, dp_rank)))
        newest: int | None = None
        for seq, (num_computed, _) in struck.items():
            num_losses, furthest = self._found.get(seq, (0, 0))
            self._found[seq] = min(num_losses + 1, most), max(furthest, num_computed)
            if num_losses == most and (newest is None or seq > newest):
                newest = seq
        if newest is None:
            return None
        del self._found[newest]
        return newest, struck[newest][1]

    def committed(self, plan: StepPlan) -> None:
        """Forget the losses of requests that a committed step has brought further; a hot path."""
        if not self._found:
            return
        for batch in plan.batches:
            ends = (batch.num_computed_tokens + batch.num_scheduled_tokens).tolist()
            for seq, end in zip(batch.seq_ids.tolist(), ends, strict=True):
                if seq in self._found and end > self._found[seq][1]:
                    del self._found[seq]

    def clear(self) -> None:
        """Forget all losses, since no request is unfinished."""
        self._found.clear()


class Shrinker(Protocol):
    """Finds smaller layouts for a recovery; `engine.elastic.shrinking.Shrinking` implements it."""

    def smaller(self, members: Members, lost: Collection[int]) -> Members:
        """The members of a smaller layout, without those that are lost.

        Raises:
            UserError: the others cannot serve.
        """
        ...

    def arrange(self, members: Members) -> Arrangement:
        """An arrangement of these members, a part of the present ones; moves were abandoned."""
        ...

    def is_ready(self, members: Members) -> bool:
        """Start members that are not up; true once all are, with their weights.

        Raises:
            RanksLostError: ranks were lost.
        """
        ...


class Recovery:
    """Replaces lost ranks. Methods belong to the thread that has the pool; attributes, to any.

    Args:
        arranged: the arrangement, which only the recovery changes.
        redeploy: called with the ranks that were replaced, and the plans of all steps that ranks
            may have to undo; lets ranks load missing weights and connect to each other.
        log: called with a line when a recovery begins and when it is over.

    Attributes:
        state: the current state.
        records: records of recoveries, one under way included, the latest last.
        num_recoveries: recoveries that are over and did not end in STOPPED.
        num_scalings, num_growths: changes of the layout, and returns from a smaller one, that are
            over and did not end in STOPPED.
        shrunk_at: since when fewer ranks serve, in seconds since 1970; None while all do.
        shrinker: finds smaller layouts; None if lost ranks are replaced at once. May be set while
            no recovery is under way.
    """

    shrinker: Shrinker | None = None

    def __init__(
        self,
        pool: RankPool,
        arranged: CurrentArrangement,
        redeploy: Callable[[frozenset[int], Sequence[StepPlan]], None],
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.state = State.LOADING
        self.records: deque[RecoveryRecord] = deque(maxlen=_MOST_RECORDS)
        self.num_recoveries = self.num_scalings = self.num_growths = 0
        self._arranged = arranged
        self.shrunk_at: float | None = None
        self._target = self.members  # of the epoch that begins
        self._must_replace = False  # in this recovery, since the others cannot serve
        self._num_ranks: int | None = None  # of the pool, once it was scaled
        self._pool, self._redeploy, self._log = pool, redeploy, log
        self._num_fruitless = 0
        self._repeated = RepeatedLosses()
        self._to_end: list[int] = []  # sequences that end ranks
        self._to_cut: set[DpRank] = set()  # their data-parallel ranks
        self._is_under_way = False
        self._to_fence: frozenset[int] = frozenset()
        self._to_redeploy: frozenset[int] = frozenset()  # lost since they all loaded

    @property
    def members(self) -> Members:
        """Members that serve, or are about to."""
        return self._arranged.now.members

    @property
    def whole(self) -> Members:
        """The members when none is missing."""
        return self._arranged.whole.members

    @property
    def is_interrupted(self) -> bool:
        """Whether a recovery was interrupted, as by Ctrl-C; another has to follow."""
        return self._is_under_way

    def start(self, action: Callable[[], ResultT]) -> ResultT:
        """Run an action with ranks that do not serve yet; again from its start after each loss.

        Raises:
            RankError, UserError: see `recover`; or the action raises them.
        """
        return self._until_done(action, None)

    def recover(self, error: RanksLostError, loop: DriveLoop[Any]) -> Collection[int]:
        """Replace lost ranks and start uncommitted steps again; `settle` has to follow.

        Returns:
            Sequences to be ended before other steps are planned, since ranks were lost each time
            that they were computed: none, one, or more after an interruption.

        Raises:
            RankError: there were too many losses, or ranks could not be replaced; all were ended.
            UserError: a rank found a mistake, such as a checkpoint that is no longer there.
        """
        if not self._is_under_way:
            lost = {replica for replica, _ in self.members.dp_ranks_of(error.ranks)}
            replicas = lost or range(self.members.layout.replicas)
            found = self._repeated.add(loop.uncommitted, replicas, _MOST_FRUITLESS)
            if found is not None:
                self._to_end.append(found[0])
                self._to_cut = {found[1]}
        self._is_under_way = True
        self._until_done(partial(self._bring_back, loop), error)
        self._is_under_way = False
        ended, self._to_end = self._to_end, []
        return ended

    def stop_waiting(self) -> None:
        """Stop waiting for lost nodes; their loss then ends all ranks. For any thread."""
        self._pool.stop_waiting()

    def _until_done(self, action: Callable[[], ResultT], error: RanksLostError | None) -> ResultT:
        """Replace lost ranks, then run the action; both again after each further loss."""
        while True:
            try:
                if error is not None:
                    self._replace(error)
                return action()
            except RanksLostError as more:
                error = more
            except ExpertlaneError:
                self._enter(State.STOPPED)
                raise

    def scale(self, whole: Arrangement, loop: DriveLoop[Any]) -> None:
        """Change to another layout, while no step is in flight; `settle` has to follow.

        Raises:
            RankError, UserError: see `recover`.
        """
        self._is_under_way = True
        layouts = self.members.layout, whole.layout
        self.records.append(RecoveryRecord(time.time(), RecoveryKind.SCALING, layouts))
        self._enter(State.SCALING)
        self._arranged.want(whole)
        self._target, self._num_ranks = whole.members, whole.layout.world_size
        self._until_done(partial(self._change_now, loop), None)
        self._is_under_way = False

    def check_whole(self) -> None:
        """Check that all members serve.

        Raises:
            UserError: fewer serve.
        """
        if self.members != self.whole:
            raise UserError(
                f"{self.shares}: the layout can change once all ranks serve again; try again later"
            )

    @property
    def shares(self) -> str:
        """A text that says how many data-parallel ranks serve."""
        now, whole = len(self.members.dp_ranks), len(self.whole.dp_ranks)
        return f"{now} of {whole} data-parallel ranks serve"

    def grow(self, loop: DriveLoop[Any]) -> None:
        """Let all members serve again, if fewer do and the others are ready.

        `settle` has to follow, once a step is committed.

        Raises:
            RankError, UserError: see `recover`.
        """
        if self.state is not State.SHRUNK:
            return
        assert self.shrinker is not None, "it has shrunk"
        if not self.shrinker.is_ready(self.whole):
            return
        self._is_under_way = True
        layouts = self.members.layout, self.whole.layout
        self.records.append(RecoveryRecord(time.time(), RecoveryKind.GROWTH, layouts))
        self._enter(State.GROWING)
        self._target = self.whole
        self._until_done(partial(self._change_now, loop), None)
        self._is_under_way = False

    def _change_now(self, loop: DriveLoop[Any]) -> None:
        if self.state in CHANGING:  # else ranks were lost meanwhile: another epoch has begun
            self._pool.begin_epoch((), lambda: None, self._num_ranks)
            self._enter(State.LOADING)
        self._bring_back(loop)

    def _replace(self, error: RanksLostError) -> None:
        self._to_fence |= error.ranks
        self._enter(State.FENCING, error)
        # Once more where requests may have been the reason, which are ended now.
        if self._num_fruitless >= _MOST_FRUITLESS + bool(self._to_end):
            self._pool.close(failed=True)
            raise RankError(
                f"{error}; {self._num_fruitless} recoveries in a row led to no finished step, so "
                "all ranks were ended"
            ) from None
        self._num_fruitless += 1
        self._target = self._choose()
        if self._target == self.whole:
            lost = self._to_fence | (self._missing - self._pool.ahead)
            self._pool.begin_epoch(lost, lambda: self._enter(State.REPLACING), self._num_ranks)
        else:
            lost = self._to_fence
            fenced = partial(self._enter, State.LOADING)
            self._pool.begin_epoch(lost, fenced, self._num_ranks, replaces=False, joining=())
        self._to_redeploy, self._to_fence = self._to_redeploy | lost, frozenset()
        if self.state is not State.LOADING:
            self._enter(State.LOADING)

    def _choose(self) -> Members:
        """The members of the coming epoch: a part of the present ones, or all with replacements."""
        record = self.records[-1]
        if self.shrinker is None or self._must_replace or record.kind is RecoveryKind.SCALING:
            return self.whole
        lost = self._to_fence | self._to_redeploy | self._missing
        if lost.isdisjoint(self.whole.numbers):
            return self.whole
        try:
            target = self.shrinker.smaller(self.members, lost)
        except UserError as error:
            self._must_replace = True
            self._log(f"the layout cannot shrink, so requests wait for the lost ranks: {error}")
            return self.whole
        record.layouts = self.whole.layout, target.layout
        return target

    @property
    def _missing(self) -> frozenset[int]:
        return frozenset(self.whole.numbers) - self._pool.present

    def _bring_back(self, loop: DriveLoop[Any]) -> None:
        """Let ranks load missing weights, and submit all uncommitted steps again."""
        plans, before, record = loop.uncommitted, self.members, self.records[-1]
        arranged, alive = self._arranged, {*before.numbers} - self._to_redeploy
        is_other = self._target == self.whole and arranged.now is not arranged.whole
        is_other = is_other or self._target != before
        if is_other:
            arranged.abandon(plans)
        after = self._arrangement() if is_other else arranged.now
        change = Transition(arranged.now, after, alive)
        kept = {new: old for new, old in change.caches.items() if old not in self._to_cut}
        begin_again = {*before.dp_ranks} - {*kept.values()}
        if record.kind is RecoveryKind.SCALING:  # no step was in flight, so `reshape` is enough
            begin_again = before.dp_ranks_of(change.lost) | self._to_cut
        record.num_requests += loop.lose(begin_again)
        self._to_cut.clear()
        if is_other:
            arranged.change(after)
            record.num_requests += loop.reshape(self._target.layout, kept)
        self._redeploy(self._to_redeploy & {*self.members.numbers}, plans)
        self._to_redeploy = frozenset()
        self._enter(State.REPLAYING)
        loop.submit_again()

    def _arrangement(self) -> Arrangement:
        if self._target == self.whole:
            return self._arranged.whole
        assert self.shrinker is not None, "or the target is the whole"
        return self.shrinker.arrange(self._target)

    def settle(self, plan: StepPlan | None = None) -> None:
        """End a recovery: a step was committed, no step was to be done, or all ranks have started.

        Args:
            plan: the committed step's; None in the other cases.
        """
        if plan is None:
            self._repeated.clear()
        else:
            self._repeated.committed(plan)
        if self.state in (State.LOADING, State.REPLAYING):
            self._num_fruitless, self._must_replace = 0, False
            self._to_redeploy = frozenset()
            is_whole = self.members == self.whole
            if is_whole:
                self.shrunk_at = None
            elif self.shrunk_at is None:
                self.shrunk_at = time.time()
            self._enter(State.SERVING if is_whole else State.SHRUNK)

    def _enter(self, state: State, error: RanksLostError | None = None) -> None:
        assert state in NEXT[self.state], f"{self.state} is not followed by {state}"
        self.state = state
        record = self.records[-1] if self.records and not self.records[-1].is_over else None
        if error is not None:
            self._log(f"{error}; recovering")
            if record is None:
                record = RecoveryRecord(time.time())
                self.records.append(record)
        if record is None:
            return  # it has started, or ends without a loss
        loss = (error.ranks, str(error)) if error is not None else ()
        record.moments.append(Moment(state, time.monotonic(), *loss))
        if record.is_over and state is not State.STOPPED:
            self.num_recoveries += record.kind is RecoveryKind.RECOVERY
            self.num_scalings += record.kind is RecoveryKind.SCALING
            self.num_growths += record.kind is RecoveryKind.GROWTH
        if record.is_over:
            self._log(record.outcome)
