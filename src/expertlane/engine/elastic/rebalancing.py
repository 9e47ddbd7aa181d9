"""Online rebalancing: an observer of steps that moves experts between them when that pays.

It measures the load of the last steps. Of several new placements, near the present one or wholly
new, it takes the one that is expected to save most time over as many coming steps, less its cost.
If that pays, experts are sent in slices, one beside each step, in the time that steps leave for
them (`MovePace`). When all have arrived every rank switches between two steps. Placements are
planned in a thread, since that takes seconds for many layers of many experts: no step waits for a
decision, and none runs with a part of a placement.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import numpy.typing as npt

from expertlane.balance.holding import Placements
from expertlane.balance.placement import (
    WHOLE,
    MovedPart,
    Placement,
    most_of_a_rank,
    next_slice,
)
from expertlane.balance.rebalance import (
    Decision,
    LoadTracker,
    PairCost,
    Proposal,
    RebalanceGate,
    propose,
)
from expertlane.balance.transition import Transition
from expertlane.engine.elastic.recovery import CurrentArrangement
from expertlane.engine.ranks.commands import FinishMoves, StartMoves, Ticket, TimeOneMove
from expertlane.engine.ranks.pool import RankPool
from expertlane.results.step_record import RankRecord
from expertlane.schedule.plan import StepPlan
from expertlane.spec.names import Phase, Stage

HELD_UP = 0.2  # share of a step by which a slice may delay it
_SEEN = 32  # latest steps, and slices, that are taken into account
_LEAST = 1 / 4096  # of an expert
_MOST_LOADS = 50_000
_LINKED = [Stage.DISPATCH, Stage.COMBINE, Stage.COLLECTIVES, Stage.HAND_OVER]


class MovePace:
    """The pace of moving a replica's experts: how much of one is sent beside a step, in a slice.

    A slice fits into the time in which a step leaves its ranks' links idle, and delays the step by
    a bounded share. The seconds of a move are timed once; seconds of steps, their idle links, and
    the delays by slices are measured while steps run.

    Args:
        move_s: seconds in which every rank sends an expert and receives one, all at once, without
            the stall.
        stall_s: seconds that a slice costs, however little it moves.

    Attributes:
        paid_s: seconds by which slices have delayed steps so far.
        num_slices: slices that have ended.
    """

    def __init__(self, move_s: float, stall_s: float) -> None:
        self.move_s, self.stall_s = move_s, stall_s
        self.paid_s, self.num_slices = 0.0, 0
        self._steps: deque[tuple[float, float]] = deque(maxlen=_SEEN)
        self._slices: deque[tuple[float, float]] = deque(maxlen=_SEEN)
        self._under_way: deque[tuple[float, tuple[Ticket[float], Ticket[float]]]] = deque()

    @classmethod
    def of_trials(cls, timed: Sequence[Sequence[tuple[int, float, float]]]) -> "MovePace":
        """The pace by the fastest of several trials.

        Args:
            timed: the results of `TimeOneMove`, by trial and rank.
        """
        whole_s, stall_s = (
            max(1e-6, min(max(of_rank[which] for of_rank in trial) for trial in timed))
            for which in (1, 2)
        )
        return cls(max(whole_s - stall_s, whole_s / 16), stall_s)

    def saw_step(self, records: Sequence[RankRecord]) -> None:
        """Take in the seconds of a step, and the mean seconds in which a rank's links were idle."""
        wall_s = np.array([record.wall_s.sum(axis=(0, 1)) for record in records])
        spent_s = wall_s.sum(axis=1) - wall_s[:, Stage.IDLE]
        self._steps.append(
            (float(spent_s.max()), float((spent_s - wall_s[:, _LINKED].sum(axis=1)).mean()))
        )

    @property
    def exposed(self) -> float:
        """Delay of steps over the slices' own time; 1 before the first slice has ended."""
        if not self._slices:
            return 1.0
        expected_s, held_up_s = np.sum(self._slices, axis=0)
        return float(held_up_s / expected_s)

    @property
    def most(self) -> int:
        """The part of an expert, of `WHOLE`, that a rank may send or get beside the next step."""
        if not self._steps:
            return WHOLE
        step_s, idle_s = np.median(self._steps, axis=0)
        held_up_s = HELD_UP * step_s / max(self.exposed, 1e-3) - self.stall_s
        # Less than the stall of a slice would cost more than it moves.
        seconds = max(min(held_up_s, idle_s), self.stall_s)
        return max(1, int(WHOLE * max(seconds / self.move_s, _LEAST)))

    def began(self, share: float, start: Ticket[float], finish: Ticket[float]) -> None:
        """Register a slice that was begun.

        Args:
            share: the part of an expert that the busiest rank sends or receives, 0 … 1.
            start, finish: its commands' tickets.
        """
        self._under_way.append((share, (start, finish)))

    def abandon(self) -> None:
        """Forget the slices under way, since their ranks are gone or have dropped them too."""
        self._under_way.clear()

    def poll(self) -> bool:
        """Take in the slices that have ended; gives whether all have. Does not wait."""
        while self._under_way:
            share, tickets = self._under_way[0]
            if not all(ticket.is_done for ticket in tickets):
                return False
            self._under_way.popleft()
            seconds = sum(max(ticket.results.values()) for ticket in tickets)
            self._slices.append((share * self.move_s + self.stall_s, seconds))
            self.paid_s += seconds
            self.num_slices += 1
        return True


@dataclass(frozen=True)
class StepLoad:
    """The load of one step on the ranks of a replica.

    Attributes:
        most: token-expert pairs of the fullest rank, summed over layers.
        mean: token-expert pairs of a rank on average, summed over layers.
        experts_s: CPU time of experts on the rank that spent most.
    """

    replica: int
    step: int
    most: int
    mean: float
    experts_s: float


@dataclass(frozen=True)
class Rebalance:
    """A decision of the rebalancer, and its outcome.

    Attributes:
        step: the step before which it was taken.
        predicted_before, predicted_after: load of the fullest rank over the mean, summed over
            layers, if tokens came evenly from all ranks.
        switched: the step before which the new placements came into use; None if they did not.
        paid_s: seconds by which the moves have delayed steps; None until all are known.
    """

    replica: int
    step: int
    decision: Decision
    predicted_before: float
    predicted_after: float
    switched: int | None = None
    paid_s: float | None = None


@dataclass(frozen=True)
class _Switch:
    """A switch to new placements, with the state before it.

    Attributes:
        step: the step that brings the new placements.
        decision: index of the decision among all.
        placements: the old placements.
        imbalance_before: mean imbalance before the previous switch; None without one.
    """

    step: int
    decision: int
    placements: Placements
    imbalance_before: float | None


class _Replica:
    """Load, placements and moves of one replica."""

    def __init__(
        self, number: int, arranged: CurrentArrangement, num_steps: int, pace: MovePace
    ) -> None:
        self._number, self._arranged = number, arranged
        self.layers = [i for i, placed in enumerate(self.placements) if placed is not None]
        num_experts = self.now[0].num_experts
        self.tracker = LoadTracker(len(self.layers), num_experts, num_steps)
        self.num_since = 0  # steps since the last decision
        self.imbalances: deque[float] = deque(maxlen=num_steps)  # of steps since the last switch
        self.imbalance_before: float | None = None  # the mean of those before it
        self.saved_s = 0.0
        self.pair_cost = PairCost()
        self.gate: RebalanceGate
        self.planning: Future[Proposal] | None = None
        self.next: Placements | None = None
        self.waiting: deque[MovedPart] = deque()
        self.under_way: tuple[float, Ticket[float]] | None = None
        self.pace = pace
        self.paid_before = 0.0  # `pace.paid_s` when the present moves were decided
        # That and the decision's index, until all slices of a switch have ended.
        self.owed: tuple[float, int] | None = None
        self.switches: list[_Switch] = []  # those that may not be committed yet

    @property
    def placements(self) -> Placements:
        """[num_hidden_layers]; the placements of the step that was planned last."""
        return self._arranged.now.placements[self._number]

    def move(self, placements: Placements) -> None:
        """Set the replica's placements."""
        self._arranged.move(self._number, placements)

    @property
    def now(self) -> list[Placement]:
        """[num_moe_layers]; the present placements of MoE layers."""
        return [placed for placed in self.placements if placed is not None]

    def with_layers(self, placements: Sequence[Placement]) -> Placements:
        """Placements [num_hidden_layers] from those of MoE layers [num_moe_layers]."""
        by_layer = dict(zip(self.layers, placements, strict=True))
        return tuple(by_layer.get(layer) for layer in range(len(self.placements)))


class Rebalancer:
    """Decides on moves of experts, and makes them; called before and after every step.

    Plans must ask for records.

    Args:
        arranged: gets the placements after moves. Ranks keep their numbers of slots.
        num_steps: steps whose load decides, steps between decisions at least, and coming steps over
            which a move has to pay.
        log: called with a line for each decision.
        worth: value of a decision; the placement with the highest is taken, and experts move if it
            is above 0.
        executor: plans placements; a thread of its own by default.

    Attributes:
        decisions: all decisions so far, in order.
        loads: loads of the finished steps, up to the last 50,000.
    """

    def __init__(
        self,
        pool: RankPool,
        arranged: CurrentArrangement,
        *,
        num_steps: int,
        log: Callable[[str], None],
        worth: Callable[[Decision], float] = lambda decision: decision.gain_s - decision.cost_s,
        executor: Executor | None = None,
    ) -> None:
        self._pool, self._arranged = pool, arranged
        self._num_steps = num_steps
        self._log = log
        self._worth = worth
        self._executor = executor or ThreadPoolExecutor(1, "rebalance")
        self._saved_before_s = self._paid_before_s = 0.0  # in other layouts
        self._replicas: list[_Replica] = []
        self.decisions: list[Rebalance] = []
        self.loads: deque[StepLoad] = deque(maxlen=_MOST_LOADS)
        # A discarded step comes again, and brings the same placements.
        self._begun: WeakKeyDictionary[StepPlan, Placements | None] = WeakKeyDictionary()
        self._finished: WeakSet[StepPlan] = WeakSet()
        layout = arranged.now.layout
        timed = [
            pool.call(TimeOneMove(), ranks=layout.ranks_of_replica(0)) for _ in range(3)
        ]  # the first opens connections
        self._expert_bytes = max(num_bytes for num_bytes, *_ in timed[-1]) * layout.etp
        self._trials = timed
        self.begin_again()

    def begin_again(self) -> None:
        """Start again in another arrangement, without moves and loads.

        The seconds of a move stay as measured at the start.
        """
        self._saved_before_s, self._paid_before_s = self.saved_s, self.paid_s
        self._replicas = [
            _Replica(number, self._arranged, self._num_steps, MovePace.of_trials(self._trials))
            for number in range(self._arranged.now.layout.replicas)
        ]

    @property
    def saved_s(self) -> float:
        """Seconds of the fullest ranks' experts that new placements have saved; may be negative.

        Each step since a switch saves the pairs by which its imbalance is below the mean of the
        window before the switch, at the measured seconds of a pair.
        """
        return self._saved_before_s + sum(replica.saved_s for replica in self._replicas)

    @property
    def paid_s(self) -> float:
        """Seconds by which moves have delayed steps so far, as measured by ranks."""
        return self._paid_before_s + sum(replica.pace.paid_s for replica in self._replicas)

    def loads_of(self, replica: int) -> dict[int, npt.NDArray[np.int64]]:
        """Token-expert pairs [num_experts] of the last steps, by hidden layer."""
        of_replica = self._replicas[replica]
        return dict(zip(of_replica.layers, of_replica.tracker.load(), strict=True))

    def before_step(self, plan: StepPlan) -> Placements | None:
        """Send a slice of experts, or decide; gives placements that the step brings, or None."""
        if plan not in self._begun:
            self._begun[plan] = self._begin(self._replicas[plan.replica], plan)
        return self._begun[plan]

    def _begin(self, replica: _Replica, plan: StepPlan) -> Placements | None:
        new = None
        if replica.pace.poll() and replica.owed is not None:
            self._note_paid(replica, plan)
        if replica.next is not None:
            new = self._move_on(replica, plan)
        elif replica.planning is None and replica.num_since >= self._num_steps:
            self._begin_planning(replica)
        if replica.planning is not None and replica.planning.done():
            proposal, replica.planning = replica.planning.result(), None
            new = self._decide(replica, proposal, plan)
        return new

    def after_step(self, plan: StepPlan, records: Sequence[RankRecord]) -> None:
        """Take the load of a finished step into account."""
        switches = self._replicas[plan.replica].switches
        switches[:] = [each for each in switches if each.step > plan.step]
        if records and plan not in self._finished:
            self._finished.add(plan)
            self._take(self._replicas[plan.replica], plan, records)

    def abandon(self, plans: Sequence[StepPlan]) -> None:
        """Drop moves, and restore placements that uncommitted steps have replaced.

        Ranks do so too, in a new epoch.

        Args:
            plans: plans of all steps that are not committed.
        """
        steps = {plan.step for plan in plans}
        for replica in self._replicas:
            for switch in reversed(replica.switches):
                if switch.step in steps:
                    replica.move(switch.placements)
                    replica.imbalance_before = switch.imbalance_before
                    decision = self.decisions[switch.decision]
                    self.decisions[switch.decision] = replace(decision, switched=None)
            replica.switches.clear()
            replica.planning = replica.next = None
            replica.waiting.clear()
            replica.under_way = replica.owed = None
            replica.pace.abandon()
        self._begun |= dict.fromkeys(plans)

    def _take(self, replica: _Replica, plan: StepPlan, records: Sequence[RankRecord]) -> None:
        of_rank = np.array([record.num_tokens_per_expert for record in records])
        load = of_rank.sum(axis=0)
        expert_s = np.array([record.cpu_s[..., Stage.EXPERTS].sum() for record in records])
        layout = self._arranged.now.layout
        at = [layout.coordinates(record.rank) for record in records]
        replica.tracker.add(load[replica.layers])
        replica.num_since += 1
        if plan.phase is Phase.DECODE:
            replica.pace.saw_step(records)
        for stage in range(layout.pp):  # stages may have other numbers of layers
            own = [each.pp_rank == stage and not each.etp_rank for each in at]
            replica.pair_cost.add(of_rank[own].sum(axis=(1, 2)), expert_s[own])
        most = int(of_rank.sum(axis=2).max(axis=0).sum())
        mean = float(load.sum()) / layout.ep
        self.loads.append(StepLoad(plan.replica, plan.step, most, mean, float(expert_s.max())))
        if mean > 0:
            replica.imbalances.append(most / mean)
            if replica.imbalance_before is not None:
                pairs = replica.imbalance_before * mean - most
                replica.saved_s += pairs * replica.pair_cost.pair_s

    def _begin_planning(self, replica: _Replica) -> None:
        replica.num_since = 0
        tracker = replica.tracker
        replica.gate = self._gate(replica)
        replica.planning = self._executor.submit(
            propose,
            tracker.load(),
            tracker.num_steps,
            replica.now,
            self._arranged.now.ep_per_node,
            replica.gate,
            self._worth,
        )

    def _decide(self, replica: _Replica, proposal: Proposal, plan: StepPlan) -> Placements | None:
        decision, now, then = proposal.decision, replica.now, proposal.then
        self.decisions.append(
            Rebalance(plan.replica, plan.step, decision, proposal.before, proposal.after)
        )
        self._tell(plan.replica, f"step {plan.step}: {decision.line}")
        if self._worth(decision) <= 0 or then == now:
            return None
        replica.next, replica.paid_before = replica.with_layers(then), replica.pace.paid_s
        arranged = self._arranged.now
        after = arranged.moved(plan.replica, replica.next)
        change = Transition(arranged, after, arranged.members.numbers)
        replica.waiting = deque(map(MovedPart, change.moves(plan.replica)))
        return self._move_on(replica, plan)

    def _gate(self, replica: _Replica) -> RebalanceGate:
        """The gate with costs measured so far: of pairs by steps' records, of moves by a trial."""
        return RebalanceGate(
            pair_s=replica.pair_cost.pair_s,
            expert_bytes=self._expert_bytes,
            move_s=replica.pace.move_s,
            stall_s=replica.pace.stall_s,
            slice_most=replica.pace.most,
            num_steps=self._num_steps,
            exposed=replica.pace.exposed,
        )

    def _move_on(self, replica: _Replica, plan: StepPlan) -> Placements | None:
        """Send the next slice; after the last one switch, and give the new placements."""
        ranks = self._arranged.now.members.of_replica[plan.replica]
        if replica.under_way is not None:
            replica.pace.began(*replica.under_way, self._pool.submit(FinishMoves(), ranks=ranks))
            replica.under_way = None
        if replica.waiting:
            parts = next_slice(replica.waiting, replica.pace.most)
            begun = self._pool.submit(StartMoves(tuple(parts)), ranks=ranks)
            replica.under_way = most_of_a_rank(parts) / WHOLE, begun
            return None
        assert replica.next is not None, "moves are for placements to come"
        latest = max(i for i, each in enumerate(self.decisions) if each.replica == plan.replica)
        replica.switches.append(
            _Switch(plan.step, latest, replica.placements, replica.imbalance_before)
        )
        replica.move(replica.next)
        replica.next = None
        replica.tracker = LoadTracker(
            len(replica.layers), replica.now[0].num_experts, self._num_steps
        )
        replica.num_since = 0
        if replica.imbalances:
            replica.imbalance_before = sum(replica.imbalances) / len(replica.imbalances)
            replica.imbalances.clear()
        self.decisions[latest] = replace(self.decisions[latest], switched=plan.step)
        replica.owed = replica.paid_before, latest
        return replica.placements

    def _note_paid(self, replica: _Replica, plan: StepPlan) -> None:
        """Note the delay by a decision's moves, once all slices before its switch have ended."""
        assert replica.owed is not None, "asked for after a switch"
        (before_s, place), replica.owed = replica.owed, None
        paid_s, taken = replica.pace.paid_s - before_s, self.decisions[place]
        self.decisions[place] = replace(taken, paid_s=paid_s)
        self._tell(
            plan.replica,
            f"step {taken.switched}: rebalance: experts are in place; moving them delayed steps by "
            f"{paid_s:.3g} s, {taken.decision.cost_s:.3g} s were expected",
        )

    def _tell(self, replica: int, line: str) -> None:
        self._log(f"replica {replica}, {line}" if len(self._replicas) > 1 else line)
