"""Changes of the layout while requests run: checks, weights made ahead, and the switch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from expertlane.balance.holding import Holding, Placements, check_deployment, keeping_placements
from expertlane.balance.transition import Arrangement
from expertlane.cost.memory import FREE_SHARE
from expertlane.engine.elastic.rebalancing import HELD_UP
from expertlane.engine.elastic.recovery_record import RecoveryRecord
from expertlane.engine.engine import Engine
from expertlane.engine.launch import LoadPlan, describe_ranks
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ops import host
from expertlane.engine.ranks.commands import (
    DropPreparation,
    HeldBytes,
    PreparationProgress,
    Prepare,
    RankMachine,
    StageSpec,
    Ticket,
)
from expertlane.engine.ranks.pool import RankPool
from expertlane.engine.ranks.rank_settings import check_num_ranks
from expertlane.errors import CapacityError, UserError
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout, Members
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Origin

PREPARING = "preparing"  # the state before those of `engine.elastic.recovery`
_SLICE_S = 0.005  # of a rank that runs steps; the part under way is finished
_IDLE_SLICE_S = 0.1  # without steps; delays a new request by this at most
_NEW_SLICE_S = 0.5  # of a rank that runs no steps: it then reports its progress
_MOST_LOST = 3
_NOTHING = PreparationProgress(0.0, 0, 0.0)


class WeightsAhead:
    """Starts additional ranks of a layout, and lets all its ranks make the weights that they lack.

    Ranks that run steps make them in slices between steps, which take a fifth longer at most by
    that, unless a single matrix or expert takes longer to make.

    Args:
        spec: spec of the stages in the new layout.
        room_bytes: memory for the new weights of each rank that runs steps; it makes the rest
            later.

    Attributes:
        began_s: when it began, on the monotonic clock.
        prepared: by rank, its last report; `_NOTHING` before the first.
    """

    def __init__(self, pool: RankPool, spec: StageSpec, room_bytes: int) -> None:
        self._pool, self._spec, self._room_bytes = pool, spec, room_bytes
        self.began_s = time.monotonic()
        self._places = range(spec.layout.world_size)
        self._epoch = pool.epoch
        self.prepared = dict.fromkeys(self._places, _NOTHING)
        self._asked: dict[int, Ticket[PreparationProgress]] = {}  # of ranks that run no steps
        self._slice: Ticket[PreparationProgress] | None = None  # of the others
        self._slice_began_s = self._next_slice_s = 0.0
        self._started: set[int] = set()
        self._num_lost = 0

    @property
    def layout(self) -> Layout:
        """The new layout."""
        return self._spec.layout

    @property
    def placements(self) -> Placements:
        """The placements of the new layout's experts."""
        return self._spec.placements

    @property
    def share(self) -> float:
        """The share of all ranks' layers that is prepared, 0 … 1."""
        found = sum(each.share for each in self.prepared.values()) / len(self._places)
        return min(found, 1.0)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights prepared so far."""
        return sum(each.num_bytes for each in self.prepared.values())

    def advance(self, *, is_idle: bool) -> bool:
        """Go on with preparing, between steps; gives whether everything is prepared.

        Args:
            is_idle: no steps run.

        Raises:
            CapacityError: new ranks have ended repeatedly.
            RankError: ranks were lost; the preparation can go on after their recovery.
        """
        self._pool.check()
        if self._epoch != self._pool.epoch:  # a rank may have been replaced
            self._epoch = self._pool.epoch
            for place in self._present:
                self.prepared[place] = _NOTHING
        self._take_answers()
        self._start_ranks()
        self._ask_new_ranks()
        self._ask_others(is_idle=is_idle)
        return all(self._is_done(place) for place in self._places)

    @property
    def _present(self) -> list[int]:
        """Ranks of the layout that are of the present epoch."""
        return [place for place in self._places if place in self._pool.present]

    def _is_done(self, place: int) -> bool:
        return self.prepared[place].share == 1

    def _take_answers(self) -> None:
        for place, ticket in list(self._asked.items()):
            if ticket.is_done or ticket.is_lost:
                del self._asked[place]
                self.prepared |= ticket.results
        if self._slice is not None and (self._slice.is_done or self._slice.is_lost):
            if self._slice.is_done:
                self.prepared |= self._slice.results
                period_s = max(each.seconds for each in self._slice.results.values()) / HELD_UP
                # Counted from when the next slice could have begun, however late this is called.
                due_s = max(self._next_slice_s, self._slice_began_s - period_s)
                self._next_slice_s = due_s + period_s
            self._slice = None

    def _start_ranks(self) -> None:
        pool = self._pool
        there = pool.present | pool.starting | pool.ahead
        for place in self._started - there:
            self.prepared[place] = _NOTHING
            self._num_lost += 1
        if self._num_lost >= _MOST_LOST:
            raise CapacityError(
                f"layout {self.layout}: new ranks ended {self._num_lost} times while they loaded "
                "weights, so the layout stays as it is; the log says why they ended"
            )
        if lacking := [place for place in self._places if place not in there]:
            pool.start(lacking)
            self._started.update(lacking)

    def _ask_new_ranks(self) -> None:
        for place in self._pool.ahead & {*self._places}:
            if place not in self._asked and not self._is_done(place):
                command = Prepare(self._spec, place, _NEW_SLICE_S)
                self._asked[place] = self._pool.submit(command, ranks=[place])

    def _ask_others(self, *, is_idle: bool) -> None:
        if self._slice is not None or not (is_idle or time.monotonic() >= self._next_slice_s):
            return
        most_s = _IDLE_SLICE_S if is_idle else _SLICE_S
        commands: list[tuple[Prepare, Sequence[int]]] = [
            (Prepare(self._spec, place, most_s, self._room_bytes), [place])
            for place in self._present
            if not self._is_done(place)
        ]
        if commands:
            self._slice_began_s = time.monotonic()
            self._slice = self._pool.submit_each(commands)

    def give_up(self) -> None:
        """End the ranks that were started, and free what the others have prepared."""
        self._pool.end(self._started)
        if there := sorted(self._pool.present):
            self._pool.call(DropPreparation(), ranks=there)


@dataclass(frozen=True, eq=False)
class LayoutChange:
    """A change of the layout that was made.

    Attributes:
        record: its states; over once a step was committed.
        held: [world_size]; bytes of each rank's weights, by origin, and of its cache.
        ahead_s: seconds for which ranks prepared weights before the layout changed.
    """

    before: Layout
    after: Layout
    record: RecoveryRecord
    held: tuple[HeldBytes, ...]
    ahead_s: float

    def bytes_from(self, origin: Origin) -> int:
        """Bytes of all ranks' weights of one origin."""
        return sum(each.bytes_from.get(origin, 0) for each in self.held)


class Scaling:
    """Changes of the layout of one engine, whose model, options and limits stay.

    Args:
        deployment: the deployment, whose options stay.
        machine: [num_ranks]; the machine as ranks saw it before the model was loaded.
        ranks_per_node: see `check_deployment`.
        folder: the checkpoint's folder; None where weights are random.

    Attributes:
        machine: [num_ranks]; the machine as the present ranks see it.
        changes: all changes so far, in order. Other threads may copy it.
        ahead: the preparation of a change that `prepare` has begun; None without one.
    """

    def __init__(
        self,
        pool: RankPool,
        runner: ModelRunner,
        engine: Engine[Any],
        model: ModelConfig,
        deployment: Deployment,
        limits: Limits,
        machine: Sequence[RankMachine],
        *,
        ranks_per_node: int,
        folder: Path | None,
        oversubscribe: bool,
    ) -> None:
        self._pool, self._runner, self._engine = pool, runner, engine
        self._model, self._deployment, self._limits = model, deployment, limits
        self._arranged = runner.arranged
        self.machine = tuple(machine)
        self._ranks_per_node, self._folder = ranks_per_node, folder
        self._oversubscribe = oversubscribe
        self.changes: list[LayoutChange] = []
        self.ahead: WeightsAhead | None = None

    @property
    def deployment(self) -> Deployment:
        """The deployment with the present layout, as if no rank were missing."""
        return replace(self._deployment, layout=self._arranged.whole.layout)

    def prepare(self, layout: Layout) -> None:
        """Begin a change: ranks start, and make weights, while steps go on.

        `advance` has to follow until all is prepared, then `scale`; or `give_up`.

        Raises:
            UserError: see `check`; nothing has changed then.
        """
        placements = self.check(layout)
        self.give_up()
        if layout == self.deployment.layout:
            return
        pool = self._pool
        placed = self._plan(layout, placements).placed(self.machine[0])
        new = [rank for rank in range(layout.world_size) if rank not in pool.present]
        needed = sum(placed.rank_memory(self._limits, rank).total_bytes for rank in new)
        room = max(0.0, FREE_SHARE * host.memory_bytes()[0] - needed)
        spec = self._runner.spec_of(self._arrangement(layout, placements))
        self.ahead = WeightsAhead(pool, spec, int(room / len(pool.present)))

    def advance(self) -> bool:
        """Go on with preparing, between steps; gives whether all that can be prepared is.

        Raises:
            CapacityError: new ranks do not stay alive; the change was given up.
            RankError: ranks were lost, and could not be replaced.
        """
        if self.ahead is None:
            return True
        recovery = self._engine.recovery
        if recovery is not None and recovery.members != recovery.whole:
            return False  # lost ranks have to be back first
        advance = partial(self.ahead.advance, is_idle=self._engine.is_idle)
        try:
            return self._engine.with_ranks(advance)
        except CapacityError:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Drop the change, and free the weights that were prepared for it."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            self._engine.with_ranks(ahead.give_up)

    def check(self, layout: Layout) -> Placements:
        """Check another layout, as at the start; gives its first placements.

        Ranks keep the experts that they hold, as far as they have slots for them, unless a
        placement file says otherwise.

        Raises:
            UserError: these ranks cannot change their layout, there may not be so many, the model
                does not fit the layout, or does not fit into memory.
        """
        if self._engine.recovery is None:
            raise UserError(
                "the layout can change only with --on-failure replace or shrink "
                "(on_failure='replace')"
            )
        self._engine.recovery.check_whole()
        if self.machine[0].on_gpu:
            raise UserError("the layout can change only on CPUs, not on GPUs")
        num_ranks, now = layout.world_size, self._pool.num_ranks
        if num_ranks != now:
            self._check_num_ranks(layout)
        deployment = replace(self.deployment, layout=layout)
        placements = check_deployment(self._model, deployment, self._nodes_of(layout))
        per_node = self._per_node(num_ranks)
        seen = replace(self.machine[0], free_bytes=self.free_bytes, ranks_per_node=per_node)
        advice = "; a start with a smaller --num-blocks leaves more room"
        self.check_room(layout, placements, seen, advice)
        if self.deployment.options.placement_file is not None:
            return placements
        before, holdings = self._arranged.now, partial(Holding.of_members, self._model)
        return keeping_placements(
            holdings(before.members, before.placements),
            holdings(Members(layout), (placements,) * layout.replicas),
        )

    def _plan(self, layout: Layout, placements: Placements) -> LoadPlan:
        options = self._deployment.options
        return LoadPlan(self._model, layout, options, placements, self._folder)

    @property
    def free_bytes(self) -> int:
        """Memory of this host that ranks hold, or can still allocate."""
        held = sum(each.weight_bytes + each.kv_bytes for each in self._runner.held)
        return host.memory_bytes()[0] + held

    def check_room(
        self, layout: Layout, placements: Placements, seen: RankMachine, advice: str = ""
    ) -> None:
        """Check that a layout's weights fit into memory, with as many blocks as now.

        Args:
            seen: the machine of every rank, with the memory that is free before they are loaded.
            advice: added to the message.

        Raises:
            CapacityError: they do not.
        """
        try:
            plan = self._plan(layout, placements)
            plan.with_blocks(self._limits, self._limits.num_blocks, [seen] * layout.world_size)
        except CapacityError as error:
            raise CapacityError(f"layout {layout}: {error}{advice}") from None

    def _arrangement(self, layout: Layout, placements: Placements) -> Arrangement:
        return Arrangement.alike(Members(layout), placements, self._nodes_of(layout))

    def _check_num_ranks(self, layout: Layout) -> None:
        num_ranks, most = layout.world_size, self._pool.most_ranks
        if self._pool.is_of_nodes:
            raise UserError(
                f"layout {layout} has {num_ranks} ranks; on several nodes their number cannot "
                f"change: {most}"
            )
        check_num_ranks(num_ranks, oversubscribe=self._oversubscribe)
        if num_ranks > most:
            raise CapacityError(
                f"layout {layout} has {num_ranks} ranks; valid here: {most} at most"
            )

    def _nodes_of(self, layout: Layout) -> int:
        """Ranks of a layout on one node."""
        return self._ranks_per_node or self._per_node(layout.world_size)

    def _per_node(self, num_ranks: int) -> int:
        return self.machine[0].ranks_per_node if self._pool.is_of_nodes else num_ranks

    def scale(self, layout: Layout) -> None:
        """Change the layout; requests keep their tokens, and some are computed again.

        Raises:
            UserError: see `check`; nothing has changed then.
            RankError: ranks were lost, and could not be replaced.
        """
        placements = self.check(layout)
        if self.ahead is not None and self.ahead.layout != layout:
            self.give_up()
        if self.ahead is not None:
            placements = self.ahead.placements  # experts may have moved since
        if layout == self.deployment.layout:
            return
        ahead_s = 0.0 if self.ahead is None else time.monotonic() - self.ahead.began_s
        before = self.deployment.layout
        self._engine.with_ranks(self._runner.before_reshape)
        self._engine.scale(self._arrangement(layout, placements))
        self.ahead = None
        recovery = self._engine.recovery
        assert recovery is not None, "it was checked"
        self.changes.append(
            LayoutChange(before, layout, recovery.records[-1], tuple(self._runner.held), ahead_s)
        )
        self.machine = tuple(self._engine.with_ranks(partial(describe_ranks, self._pool)))
