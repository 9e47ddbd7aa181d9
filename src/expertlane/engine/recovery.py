"""What is done when ranks are lost: one machine of six states, and how it gets from each to others.

A loss may come in any state, in the midst of a recovery too. Lost ranks are killed for certain and
replaced by new processes; the others keep their weights and caches. Requests whose keys and values
were on a lost rank are computed again, and steps that were not committed run again in their order,
so that each request gets the tokens that it would have had.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from expertlane.engine.recovery_record import NEXT, Moment, RecoveryRecord, State
from expertlane.engine.repeated_losses import RepeatedLosses
from expertlane.errors import ExpertlaneError, RankError, RanksLostError
from expertlane.schedule.drive import DriveLoop
from expertlane.schedule.plan import StepPlan
from expertlane.spec.layout import Layout

ResultT = TypeVar("ResultT")

_MOST_FRUITLESS = 3  # epochs in a row without a committed step; losses that keep a request back
_MOST_RECORDS = 1000


class EpochPool(Protocol):
    """What a recovery needs of the ranks' pool; `engine.pool.RankPool` has it."""

    def begin_epoch(
        self, lost: Collection[int], on_fenced: Callable[[], None], num_ranks: int | None
    ) -> None:
        """End these ranks for certain, refuse what comes from before, and start others.

        Args:
            on_fenced: called when no lost rank is alive any more.
            num_ranks: how many there are from then on; None for as many as before.

        Raises:
            RanksLostError: more were lost meanwhile.
        """
        ...

    def close(self, *, failed: bool) -> None:
        """End all ranks."""
        ...


class Recovery:
    """Replaces lost ranks; of the thread that has the pool, but for its attributes.

    Args:
        layout: tells which data-parallel rank's cache is lost with a rank.
        redeploy: lets ranks load what they lack and connect to each other; takes the ranks that
            were replaced and all steps that they may have to undo.
        log: takes a line when a recovery begins and when it is over.

    Attributes:
        state: of now.
        records: of recoveries, also of one under way, the latest last.
        num_recoveries: that are over and ended in SERVING.
        num_scalings: changes of the layout that did.
    """

    def __init__(
        self,
        pool: EpochPool,
        layout: Layout,
        redeploy: Callable[[frozenset[int], Sequence[StepPlan]], None],
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.state = State.LOADING
        self.records: deque[RecoveryRecord] = deque(maxlen=_MOST_RECORDS)
        self.num_recoveries = self.num_scalings = 0
        self._num_ranks: int | None = None  # of the pool, once it was scaled
        self._pool, self._layout, self._redeploy, self._log = pool, layout, redeploy, log
        self._num_fruitless = 0
        self._repeated = RepeatedLosses()
        self._is_under_way = False
        self._to_fence: frozenset[int] = frozenset()
        self._to_redeploy: frozenset[int] = frozenset()  # replaced since they all loaded

    @property
    def is_interrupted(self) -> bool:
        """Whether a recovery was left before its end, as by Ctrl-C; another has to follow."""
        return self._is_under_way

    def start(self, action: Callable[[], ResultT]) -> ResultT:
        """Do something with ranks that do not serve yet; all of it again once some are replaced.

        Raises:
            RankError, UserError: as `recover`; or what the action raises.
        """
        return self._until_done(action, None)

    def recover(self, error: RanksLostError, loop: DriveLoop[Any]) -> None:
        """Bring ranks and steps to where they go on; `settle` has to follow.

        Raises:
            RankError: there were too many losses, or ranks could not be replaced; all were ended.
            UserError: a rank found a mistake, such as a checkpoint that is no longer there.
        """
        if not self._is_under_way:
            found = {replica for replica, _ in self._caches(error.ranks)}
            self._repeated.add(loop.uncommitted, found or range(self._layout.replicas))
        self._is_under_way = True
        self._until_done(partial(self._bring_back, loop), error)
        self._is_under_way = False

    def _until_done(self, action: Callable[[], ResultT], error: RanksLostError | None) -> ResultT:
        """Replace what was lost, then act; both again after each further loss."""
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

    def scale(self, layout: Layout, change: Callable[[], int], loop: DriveLoop[Any]) -> None:
        """Go on in another layout, while no step is in flight; `settle` has to follow.

        Args:
            change: has scheduler and runner take the layout; gives how many requests are to be
                computed again.

        Raises:
            RankError, UserError: as `recover`.
        """
        self._is_under_way = True
        self.records.append(RecoveryRecord(time.time(), (self._layout, layout)))
        self._enter(State.SCALING)
        self.records[-1].num_requests += change()
        self._layout, self._num_ranks = layout, layout.world_size
        self._until_done(partial(self._scale_now, loop), None)
        self._is_under_way = False

    def _scale_now(self, loop: DriveLoop[Any]) -> None:
        if self.state is State.SCALING:  # else ranks were lost, and another epoch has begun
            self._pool.begin_epoch((), lambda: None, self._num_ranks)
            self._enter(State.LOADING)
        self._bring_back(loop)

    def _replace(self, error: RanksLostError) -> None:
        self._to_fence |= error.ranks
        self._enter(State.FENCING, error)
        if (why := self._why_given_up) is not None:
            self._pool.close(failed=True)
            raise RankError(
                f"{error}; {_MOST_FRUITLESS} recoveries in a row {why}, so all ranks were ended"
            ) from None
        self._num_fruitless += 1
        self._pool.begin_epoch(
            self._to_fence, lambda: self._enter(State.REPLACING), self._num_ranks
        )
        self._to_redeploy, self._to_fence = self._to_redeploy | self._to_fence, frozenset()
        self._enter(State.LOADING)

    @property
    def _why_given_up(self) -> str | None:
        if self._num_fruitless == _MOST_FRUITLESS:
            return "led to no finished step"
        if self._repeated.most > _MOST_FRUITLESS:
            return "brought a request no further"
        return None

    def _bring_back(self, loop: DriveLoop[Any]) -> None:
        """Let ranks load, and begin all steps anew that are not committed."""
        plans = loop.uncommitted
        self.records[-1].num_requests += loop.lose(self._caches(self._to_redeploy))
        self._redeploy(self._to_redeploy, plans)
        self._to_redeploy = frozenset()
        self._enter(State.REPLAYING)
        loop.submit_again()

    def settle(self, plan: StepPlan | None = None) -> None:
        """All is as before: a step was committed, nothing was to be done, or all have started.

        Args:
            plan: of the step; None in the other cases.
        """
        if plan is None:
            self._repeated.clear()
        else:
            self._repeated.committed(plan)
        if self.state in (State.LOADING, State.REPLAYING):
            self._num_fruitless = 0
            self._to_redeploy = frozenset()
            self._enter(State.SERVING)

    def _caches(self, ranks: Collection[int]) -> set[tuple[int, int]]:
        """(replica, data-parallel rank) of each rank that has a part in the layout."""
        places = [
            self._layout.coordinates(rank) for rank in ranks if rank < self._layout.world_size
        ]
        return {(at.replica, at.dp_rank) for at in places}

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
        if state is State.SERVING:
            self.num_recoveries += record.layouts is None
            self.num_scalings += record.layouts is not None
        if record.is_over:
            self._log(record.outcome)
