"""The machine that replaces ranks, against a pool that loses more of them at any of its moments."""

import re
from collections import deque
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cli.screen import telling, tells
from expertlane.balance.transition import Arrangement
from expertlane.engine.elastic.recovery import CurrentArrangement, Recovery, RepeatedLosses
from expertlane.engine.elastic.recovery_record import NEXT, RecoveryKind, State
from expertlane.errors import RankError, RanksLostError, UserError
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.layout import Layout, Members
from expertlane.spec.names import Phase

LAYOUT = Layout.parse("replicas=2,pp=2,dp=2,tp=2,ep=4")
LAYOUTS = [LAYOUT, *map(Layout.parse, ("tp=1", "dp=2,ep=2", "replicas=3,dp=8,ep=8"))]
RANKS = st.frozensets(st.integers(0, LAYOUT.world_size), max_size=3)  # one rank more than it needs
FIRST = {
    RecoveryKind.RECOVERY: State.FENCING,
    RecoveryKind.SCALING: State.SCALING,
    RecoveryKind.GROWTH: State.GROWING,
}
REPLICAS = st.sets(st.integers(0, 2), min_size=1)
# Where a recovery may be disturbed: before and after ranks are killed, and so on.
PLACES = ("fence", "replace", "redeploy", "half redeployed", "submit")


def plan_of(replica):
    """A step of one request, which has the replica's number."""
    one, nothing = np.array([replica]), np.empty((1, 0), np.int32)
    batch = Batch(one, one * 0 + 1, one * 0, one * 0, nothing, np.array([True]))
    return StepPlan(replica, replica, Phase.DECODE, micro_batches=((batch,),))


def arrangement(members):
    """Of a model without experts."""
    return Arrangement.alike(members, (), ranks_per_node=1)


def recovery_of(ranks, log=lambda line: None):
    """Of disturbed ranks, which follow it."""
    arranged = CurrentArrangement(arrangement(Members(LAYOUT)))
    arranged.follow(Follower(ranks))
    return Recovery(ranks, arranged, ranks.redeploy, log)


PLANS = [plan_of(replica) for replica in range(3)]


class Disturbed:
    """A pool, ranks, shrinker and the loop in one, which logs what is asked of it.

    Attributes:
        to_come: what happens next: a place, and what is raised there.
        lost: ranks that are dead and not replaced yet.
        caches: (replica, dp_rank) that are gone, and that the scheduler does not know of.
        not_loaded: ranks without weights.
        joined: the epoch of every rank.
        absent, ahead: ranks that have no process of the epoch, and those of them that are up.
        members: that the scheduler, the runner and the ranks of the last epoch have.
        is_running: whether the uncommitted steps are with the ranks.
    """

    def __init__(self):
        self.to_come = deque()
        self.lost, self.caches, self.not_loaded = set(), set(), set()
        self.new = set()  # ranks of a larger layout, which have no caches that could be lost
        self.layout = LAYOUT
        self.absent, self.ahead = set(), set()
        self.members = self.running = Members(LAYOUT)
        self.epoch, self.joined = 0, [0] * (LAYOUT.world_size + 1)
        self.is_running, self.is_closed = True, False
        self.to_cut = set()  # (replica, dp_rank) of requests that were too often in steps
        self.num_epochs_since_commit = 0

    @property
    def uncommitted(self):
        """A step of each replica."""
        return PLANS[: self.members.layout.replicas]

    def lose(self, ranks):
        self.lost |= {rank for rank in ranks if rank < len(self.joined)}
        self.caches |= self.members.dp_ranks_of(ranks)

    @property
    def present(self):
        """As of a `RankPool`."""
        return frozenset(range(len(self.joined))) - self.absent

    def _pass(self, place):
        if self.to_come and self.to_come[0][0] == place:
            error = self.to_come.popleft()[1]
            if isinstance(error, RanksLostError):
                self.lose(error.ranks)
            raise error

    def begin_epoch(self, lost, on_fenced, num_ranks, *, replaces=True, joining=None):
        assert not self.is_closed
        if num_ranks is not None:
            self.new |= set(range(len(self.joined), num_ranks))
            self.not_loaded |= self.new
            self.joined[:] = (self.joined + [0] * num_ranks)[:num_ranks]
            self.lost = {rank for rank in self.lost if rank < num_ranks}
            self.not_loaded = {rank for rank in self.not_loaded if rank < num_ranks}
            self.absent = {rank for rank in self.absent if rank < num_ranks}
            self.ahead = {rank for rank in self.ahead if rank < num_ranks}
        assert self.lost <= set(lost), "a rank that is lost is not fenced"
        self.epoch += 1
        self.num_epochs_since_commit += 1
        self.is_running = False
        self._pass("fence")
        gone = {rank for rank in lost if rank < len(self.joined)}
        self.not_loaded |= gone
        if replaces:
            self.absent -= gone
        else:
            self.absent |= gone
        self.ahead -= gone
        if joining is None:
            self.absent, self.ahead = self.absent - self.ahead, set()
        self.lost.clear()
        on_fenced()
        self._pass("replace")

    def redeploy(self, replaced, plans):
        assert not self.lost
        assert self.running == self.members
        assert not self.absent & {*self.members.numbers}
        if self.members == self.whole:  # which does not have the rank that is one too many
            assert not self.absent & {*self.members.numbers}
        assert not self.caches, "steps would be run on caches that are gone"
        left = [
            plan for plan in self.uncommitted if plan in plans
        ]  # of replicas that are back: none
        assert plans[: len(left)] == left, "ranks are to undo all that is to come again"
        self._pass("redeploy")
        for rank in self.members.numbers[::2]:
            self._join(rank)
        self._pass("half redeployed")
        for rank in self.present:
            self._join(rank)
        self.new.clear()

    def _join(self, rank):
        self.joined[rank] = self.epoch
        if rank in self.members.numbers:
            self.not_loaded.discard(rank)

    @property
    def whole(self):
        return Members(self.layout)

    # What a shrinker has.

    can_shrink = True

    def smaller(self, members, lost):
        if not self.can_shrink:
            raise UserError("no memory")
        return members.without(lost)

    def arrange(self, members):
        return arrangement(members)

    def is_ready(self, members):
        assert members == self.whole
        return self.ahead == self.absent

    def reshape(self, layout, kept):
        assert self.running.layout == layout
        assert kept.items() <= self.running.kept_caches(self.members).items()
        self.members = self.running
        return 1

    def lose_caches(self, caches):
        assert caches >= self.caches | self.to_cut
        self.caches.clear()
        self.to_cut.clear()
        return len(caches)

    def submit_again(self):
        assert not self.not_loaded & {*self.members.numbers}
        assert {self.joined[rank] for rank in self.present} == {self.epoch}
        self._pass("submit")
        self.is_running = True

    def close(self, *, failed):
        assert failed
        self.is_closed = True


class Follower:
    """The runner, as the arrangement is handed on to it."""

    def __init__(self, disturbed):
        self._disturbed = disturbed

    def abandon(self, plans):
        assert plans == self._disturbed.uncommitted

    def reshape(self, given):
        self._disturbed.running = given.members


class Loop:
    """What the machine needs of a `DriveLoop`."""

    def __init__(self, disturbed):
        self._disturbed = disturbed
        self.lose, self.submit_again = disturbed.lose_caches, disturbed.submit_again
        self.reshape = disturbed.reshape

    @property
    def uncommitted(self):
        return self._disturbed.uncommitted


class Machine(RuleBasedStateMachine):
    """Steps are committed, ranks are lost, and more while they are replaced, in any order.

    Where that is drawn, the others go on without those that are lost, which come back at some time.
    """

    @initialize(shrinks=st.booleans())
    def choose(self, shrinks):
        """Whether a smaller layout may be taken."""
        self.recovery.shrinker = self.ranks if shrinks else None

    def __init__(self):
        super().__init__()
        self.ranks, self.lines = Disturbed(), []
        self.recovery = recovery_of(self.ranks, self.lines.append)
        self.num_in_vain = [0] * len(PLANS)  # losses of each replica since it has committed
        self.states = [self.recovery.state]
        self.starts()

    def starts(self):
        assert self.recovery.state is State.LOADING
        self.recovery.settle()

    @property
    def is_stopped(self):
        return self.recovery.state is State.STOPPED

    @precondition(lambda self: not self.is_stopped)
    @rule(replicas=REPLICAS)
    def commit(self, replicas):
        """Steps of some replicas are committed."""
        assert self.ranks.is_running
        for replica in replicas:
            self.recovery.settle(PLANS[replica])
            self.num_in_vain[replica] = 0
        self.ranks.num_epochs_since_commit = 0
        is_whole = self.ranks.members == self.ranks.whole
        assert self.recovery.state is (State.SERVING if is_whole else State.SHRUNK)
        assert (self.recovery.shrunk_at is None) == is_whole

    @precondition(lambda self: self.recovery.state is State.SHRUNK)
    @rule(
        is_up=st.booleans(),
        more=st.lists(st.tuples(st.sampled_from(PLACES), RANKS), max_size=4),
        ends=st.sampled_from([None] * 6 + [UserError("no file"), RankError("no server")]),
        where=st.sampled_from(PLACES),
        is_interrupted=st.integers(0, 9).map(lambda number: number == 0),
    )
    def grow(self, is_up, more, ends, where, is_interrupted):
        """What was lost may be up, and ranks are lost while it joins."""
        if not is_up:
            self.recovery.grow(Loop(self.ranks))
            assert self.recovery.state is State.SHRUNK
            return
        self.ranks.ahead = set(self.ranks.absent)
        num_growths = self.recovery.num_growths
        self.ranks.num_epochs_since_commit = -1
        self.disturb(self.recovery.grow, more, ends, where, is_interrupted)
        if not self.is_stopped:
            self.commit({0, 1, 2})
            assert self.recovery.num_growths == num_growths + 1

    @precondition(lambda self: not self.is_stopped)
    @rule(can_shrink=st.booleans())
    def change_memory(self, can_shrink):
        """There is room for the experts of those that are lost, or not."""
        self.ranks.can_shrink = can_shrink

    @precondition(lambda self: not self.is_stopped)
    @rule(
        ranks=RANKS,
        more=st.lists(st.tuples(st.sampled_from(PLACES), RANKS), max_size=4),
        ends=st.sampled_from([None] * 6 + [UserError("no file"), RankError("no server")]),
        where=st.sampled_from(PLACES),
        is_interrupted=st.integers(0, 9).map(lambda number: number == 0),
    )
    def lose(self, ranks, more, ends, where, is_interrupted):
        """Ranks are lost, more while they are replaced, and it may end there."""
        self.ranks.lose(ranks)
        members = self.ranks.members
        replicas = range(members.layout.replicas)
        struck = [r for r in replicas if not ranks.isdisjoint(members.of_replica[r])]
        for replica in struck or replicas:
            self.num_in_vain[replica] += 1
        to_end = {replica for replica, number in enumerate(self.num_in_vain) if number > 3}
        to_end = {max(to_end)} if to_end else to_end  # the newest
        self.num_in_vain = [
            0 if replica in to_end else min(number, 3)
            for replica, number in enumerate(self.num_in_vain)
        ]
        self.ranks.to_cut = {(replica, 0) for replica in to_end}
        error = RanksLostError(f"first: {sorted(ranks)}", ranks)
        recover = partial(self.recovery.recover, error)
        ended = self.disturb(recover, more, ends, where, is_interrupted)
        assert self.is_stopped or set(ended) == to_end

    @precondition(lambda self: self.recovery.state is State.SERVING)
    @rule(
        layout=st.sampled_from(LAYOUTS),
        more=st.lists(st.tuples(st.sampled_from(PLACES), RANKS), max_size=4),
        ends=st.sampled_from([None] * 6 + [UserError("no file"), RankError("no server")]),
        where=st.sampled_from(PLACES),
        is_interrupted=st.integers(0, 9).map(lambda number: number == 0),
    )
    def scale(self, layout, more, ends, where, is_interrupted):
        """Another layout is asked for, and ranks are lost while they change."""
        num_scalings = self.recovery.num_scalings

        def scale(loop):
            assert self.recovery.state is State.SERVING
            self.ranks.layout = layout
            self.recovery.scale(arrangement(Members(layout)), loop)

        self.ranks.num_epochs_since_commit = -1  # its own does not count
        self.disturb(scale, more, ends, where, is_interrupted)
        if not self.is_stopped:
            assert len(self.ranks.joined) == layout.world_size
            self.commit({0, 1, 2})
            assert self.recovery.num_scalings == num_scalings + 1
            assert f" to {layout} in " in self.lines[-1]

    def disturb(self, action, more, ends, where, is_interrupted):
        """Do something of the machine's, to its end, while other things happen; what it gave."""
        disturbed = self.ranks
        disturbed.is_running = False
        disturbed.to_come = deque(
            (place, RanksLostError(f"more: {sorted(lost)}", lost)) for place, lost in more
        )
        if ends is not None:
            disturbed.to_come.append((where, ends))
        elif is_interrupted:
            disturbed.to_come.append((where, KeyboardInterrupt()))
        num_before = disturbed.num_epochs_since_commit
        ended = None
        while ended is None:
            try:
                found = action(Loop(disturbed))
                break
            except KeyboardInterrupt:
                assert self.recovery.is_interrupted
                action = partial(self.recovery.recover, RanksLostError("it goes on", ()))
            except (RankError, UserError) as raised:
                ended = raised
        if ended is not None:
            assert self.is_stopped
            if ended is not ends:
                assert disturbed.num_epochs_since_commit in (3, 4)
                assert disturbed.is_closed
                assert tells(str(ended), "step ranks ended")
            return None
        assert self.recovery.state is State.REPLAYING
        assert not self.recovery.is_interrupted
        assert disturbed.is_running
        assert num_before < disturbed.num_epochs_since_commit <= 4
        return found

    @precondition(lambda self: self.is_stopped)
    @rule()
    def stay_stopped(self):
        self.recovery.settle()
        assert self.is_stopped

    @invariant()
    def records_are_paths_of_the_machine(self):
        for record in self.recovery.records:
            states = [moment.state for moment in record.moments]
            assert states[0] is FIRST[record.kind]
            assert all(then in NEXT[now] for now, then in pairwise(states))
            assert sum(record.seconds().values()) == pytest.approx(record.total_s)
            assert record.causes or record.kind is not RecoveryKind.RECOVERY
        over = [record for record in self.recovery.records if record.is_over]
        assert over == list(self.recovery.records)[: len(over)]
        num = sum(record.moments[-1].state is not State.STOPPED for record in over)
        found = self.recovery
        assert found.num_recoveries + found.num_scalings + found.num_growths == num
        assert len([line for line in self.lines if "computed again" in line]) == len(over)

    @invariant()
    def nothing_is_left_half_done(self):
        if not self.is_stopped:
            assert not self.ranks.lost
            assert not self.ranks.caches
            assert not self.ranks.not_loaded & {*self.ranks.members.numbers}
            assert self.recovery.members == self.ranks.members
            assert self.recovery.whole == self.ranks.whole


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    derandomize=True, deadline=None, max_examples=100, stateful_step_count=20
)


def test_one_replica_is_struck_again_and_again():
    """Steps of the other are committed for ever; that of the one never is."""
    ranks, lines = Disturbed(), []
    recovery = recovery_of(ranks, lines.append)
    recovery.settle()
    found = []
    for rank in (9, 12, 9, 1, 12, 9):  # 1 is of the other replica
        found.append(recovery.recover(RanksLostError("a rank is dead", {rank}), Loop(ranks)))
        recovery.settle(PLANS[0])
    assert [[*each] for each in found] == [[], [], [], [], [1], []]
    assert recovery.state is State.SERVING


def test_steps_that_are_committed_again_forget_no_loss_and_further_ones_do():
    def step(num_computed):
        one, nothing = np.array([0]), np.empty((1, 0), np.int32)
        batch = Batch(one, one + 1, one + num_computed, one * 0, nothing, np.array([True]))
        return StepPlan(0, 0, Phase.DECODE, micro_batches=((batch,),))

    losses = RepeatedLosses()
    for number in range(3):
        assert losses.add([step(7)], [0], 3) is None
        losses.committed(step(6))  # computed again after the loss
        assert losses.most == number + 1
    assert losses.add([step(7)], [0], 3) == (0, (0, 0))
    losses.add([step(7)], [0], 3)
    losses.committed(step(7))
    assert losses.most == 0


def test_losses_at_the_start():
    """Whatever was done with ranks is done again, from the beginning."""
    ranks, calls = Disturbed(), []
    recovery = recovery_of(ranks)

    def start():
        calls.append(recovery.state)
        if len(calls) < 3:
            raise RanksLostError("lost", {1})
        return "started"

    assert recovery.start(start) == "started"
    assert calls == [State.LOADING] * 3
    recovery.settle()
    assert recovery.state is State.SERVING
    (record,) = recovery.records
    assert (record.ranks, record.num_requests) == ([1], 0)
    assert "recovered in" in record.line


def test_a_start_that_never_works():
    recovery = recovery_of(Disturbed())

    def start():
        raise RanksLostError("rank 1 is dead", {1})

    with pytest.raises(RankError, match=telling("rank 1 dead 3 recoveries")):
        recovery.start(start)
    assert recovery.state is State.STOPPED


def test_the_page_draws_the_machine():
    """Its table has every state, and the states that may follow."""
    page = (Path(__file__).parents[3] / "docs/recovery.md").read_text()
    rows = re.findall(r"^\| `([A-Z]+)` \|[^|]*\| ([^|]*) \|$", page, re.MULTILINE)
    drawn = {name: set(re.findall(r"`([A-Z]+)`", then)) for name, then in rows}
    assert drawn == {state.name: {each.name for each in then} for state, then in NEXT.items()}


# The owner of the arrangement.

WHOLE = Arrangement.alike(Members(Layout.parse("replicas=2,dp=2,ep=2")), ("at first",), 2)
SMALLER = Arrangement.alike(WHOLE.members.without({1}), ("on fewer",), 2)


def test_experts_that_move_while_fewer_serve_are_back_with_all():
    arranged = CurrentArrangement(WHOLE)
    arranged.change(SMALLER)
    arranged.move(0, ("moved",))
    assert arranged.now.placements == (("moved",),)
    assert arranged.whole is WHOLE
    arranged.change(arranged.whole)
    arranged.move(0, ("later",))
    assert arranged.whole.placements[0] == ("later",)
