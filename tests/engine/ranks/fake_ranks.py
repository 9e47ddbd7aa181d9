"""Ranks in this process that can be lost at any moment, behind what a pool of real ones offers."""

from engine.stage.token_stage import TokenStage
from expertlane.balance.transition import Arrangement
from expertlane.engine.ranks.commands import Deploy, HeldBytes, RecordGraphs, Redeploy, RunStep
from expertlane.errors import RanksLostError
from expertlane.spec.layout import Members


class _CutOffError(Exception):
    """A rank has stopped in the middle of a command."""


class FakeTicket:
    def __init__(self, ranks):
        self.ranks, self.results = sorted(ranks), {}

    @property
    def is_done(self):
        return len(self.results) == len(self.ranks)


class FakePool:
    """Runs every command at once, on a `TokenStage` a rank; also what `Recovery` uses.

    Whatever happens to real ranks may happen here: one is lost before, in or after a command, or
    between commands; the others of its replica then stop in the middle of a step, or do not begin
    it; several are lost, or none is found that was; and more are while those are replaced.

    Args:
        rng: draws what happens.
        loss_rate: of a command on a rank, and of each part of a recovery.
        most_losses: in a row without a committed step.

    Attributes:
        members: of the layout that ranks were asked to take last.
        absent, ahead: as of a `RankPool`.
        stages: by rank; None where a process has just started.
        recorded: by epoch and rank, sizes of graphs, in order.
        placement_of_step: by replica and step, the placements that it ran with last.
        num_losses, num_replaced: events, and ranks.
        is_patient: whether one more loss would not be one too many.
    """

    is_closed = has_shrunk = False
    is_patient = staticmethod(lambda: True)

    def __init__(self, layout, limits, rng, loss_rate, *, most_losses=2):
        self.num_ranks = layout.world_size
        self.stages = [None] * self.num_ranks
        self.placement_of_step = {}
        self.num_losses = self.num_replaced = self.epoch = 0
        self.members, self.absent, self.ahead = Members(layout), frozenset(), frozenset()
        self._limits, self._rng = limits, rng
        self._loss_rate, self._most_losses = loss_rate, most_losses
        self._lost, self._broken = set(), set()  # ranks, and replicas that can do nothing
        self._stuck = set()  # ranks that wait for others until the epoch ends
        self._num_in_a_row = 0
        self._is_ready = [True] * self.num_ranks
        self._epochs = [0] * self.num_ranks  # that each has joined
        self.recorded = {}

    def committed(self):
        """A step was: losses no longer come in a row."""
        self._num_in_a_row = 0

    # What a `RankPool` has.

    def call(self, command, *, ranks=None):
        return self.collect(self.submit(command, ranks=ranks))

    @property
    def present(self):
        return frozenset(range(self.num_ranks)) - self.absent

    def start(self):
        """All that are absent are ahead."""
        self.ahead = self.absent

    def submit(self, command, *, ranks=None):
        return self.submit_each([(command, self.present if ranks is None else ranks)])

    def submit_each(self, commands):
        self._notice(0.3)
        ticket = FakeTicket([rank for _, ranks in commands for rank in ranks])
        for command, ranks in commands:
            for rank in ranks:
                self._run(rank, command, ticket)
        self._notice(0.3)
        return ticket

    def first_done(self, tickets):
        done = [ticket for ticket in tickets if ticket.is_done]
        self._notice(0.5 if done else 1.0)
        return done[self._rng.integers(len(done))]

    def collect(self, ticket):
        self._notice(0.1 if ticket.is_done else 1.0)
        return [ticket.results[rank] for rank in ticket.ranks]

    def close(self, *, failed=False):
        self.is_closed = True

    # What `Recovery` uses beside that.

    def begin_epoch(self, lost, on_fenced, num_ranks, *, replaces=True, joining=None):
        self.epoch += 1
        if not lost and self._lost:  # nobody has noticed it before
            self._notice(1.0)
        assert self._lost <= set(lost), "a rank is lost and not fenced"
        self.num_replaced += len(lost)
        for rank in lost:
            self.stages[rank], self._is_ready[rank] = None, False
        if not replaces:
            self.has_shrunk = True
            self.absent |= frozenset(lost)
        else:
            self.absent -= frozenset(lost)
        if joining is None:
            self.absent, self.ahead = self.absent - self.ahead, frozenset()
        self._lost.clear()
        self._broken.clear()
        self._stuck.clear()
        self._lose_some()
        on_fenced()
        self._lose_some()
        self._is_ready = [rank not in self.absent for rank in range(self.num_ranks)]

    def _lose_some(self):
        if self._may_lose():
            self._lose([int(self._rng.choice(sorted(self.present)))])
            self._notice(1.0)

    # What happens on ranks.

    def _may_lose(self):
        is_bounded = self._num_in_a_row < self._most_losses and self.is_patient()
        return is_bounded and self._rng.random() < self._loss_rate

    def _lose(self, ranks):
        self.num_losses += 1
        self._num_in_a_row += 1
        self._lost.update(ranks)
        self._broken.update(map(self._replica_of, ranks))

    def _replica_of(self, rank):
        """-1 of a rank that has no place."""
        place = self.members.rank_of(rank)
        return -1 if place is None else self.members.layout.coordinates(place).replica

    def _notice(self, rate):
        if self._broken and self._rng.random() < rate:
            raise RanksLostError(f"lost {sorted(self._lost)}", self._lost)

    def _run(self, rank, command, ticket):
        """Run a command on a rank; perhaps not, or not to its end, or without an answer."""
        assert rank in self.present, "it has no process"
        if isinstance(command, Redeploy):
            self.members = command.deploy.spec.members
        replica = self._replica_of(rank)
        is_spared = isinstance(command, RecordGraphs) and self._rng.random() < 0.95  # of so many
        if not is_spared and self._may_lose() and rank not in self._lost | self._stuck:
            others = self._rng.choice(sorted(self.present), self._rng.integers(0, 2)).tolist()
            none_is_found = isinstance(command, RunStep) and self._rng.random() < 0.2
            self._lose([] if none_is_found else [rank, *others])
            self._broken.add(replica)
            self._run_cut_off(rank, command)
            return
        if rank in self._lost or rank in self._stuck:
            return
        if self._broken and (isinstance(command, Redeploy) or replica in self._broken):
            self._run_cut_off(rank, command)
            return
        ticket.results[rank] = self._answer(rank, command)

    def _run_cut_off(self, rank, command):
        """As on a rank that others keep waiting until the epoch ends."""
        self._stuck.add(rank)
        if isinstance(command, Redeploy) or self._rng.random() < 0.3:
            return  # it does not come to it
        self._is_cut_off = self._rng.random() < 0.7
        try:
            self._answer(rank, command)
        except _CutOffError:
            pass
        finally:
            self._is_cut_off = False

    _is_cut_off = False

    def _before_output(self):
        if self._is_cut_off:
            raise _CutOffError

    def _answer(self, rank, command):
        assert self._is_ready[rank], "its process has not started"
        if isinstance(command, Deploy):
            self._build(rank, placements=0)
            return HeldBytes(0, 0, has_graphs=True)
        if isinstance(command, Redeploy):
            self._epochs[rank] = self.epoch
            self._redeploy(rank, command)
            return HeldBytes(0, 0, has_graphs=True)
        assert self._epochs[rank] == self.epoch, "it has not joined this epoch"
        if isinstance(command, RecordGraphs):
            self.recorded.setdefault(self.epoch, {}).setdefault(rank, []).append(command.size)
            return 1
        assert isinstance(command, RunStep)
        stage, step = self.stages[rank], command.step
        outcome = stage.run(step, command.placements)
        key = self.epoch, step.replica, step.step
        self.placement_of_step.setdefault(key, {})[rank] = stage.migration.now
        return outcome

    def _redeploy(self, rank, command):
        before, members = self.stages[rank], command.deploy.spec.members
        if before is not None and before.spec.members == members:
            before.rejoin(command.discard)
            if before.migration.now == command.deploy.spec.placements:
                return
            assert self.has_shrunk
        after = Arrangement.alike(members, (), members.layout.world_size)
        left = before and before.leave(after, command.discard)
        self.stages[rank] = None
        if members.rank_of(rank) is not None:
            self._build(rank, placements=command.deploy.spec.placements)
            if left is not None:
                self.stages[rank].take(left)

    def _build(self, rank, placements):
        self.stages[rank] = TokenStage(
            self.members.layout,
            self._limits,
            rank=self.members.numbers.index(rank),
            placements=placements,
            before_output=self._before_output,
            members=self.members,
        )
