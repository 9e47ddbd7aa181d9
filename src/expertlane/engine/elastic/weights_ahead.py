"""Prepares the weights of a new layout while the present one serves requests."""

import time
from collections.abc import Sequence

from expertlane.balance.placement_file import Placements
from expertlane.engine.elastic.move_pace import HELD_UP
from expertlane.engine.ranks.commands import DropPrepared, Prepare, Prepared, StageSpec
from expertlane.engine.ranks.pool import RankPool
from expertlane.engine.ranks.tickets import Ticket
from expertlane.errors import CapacityError
from expertlane.spec.layout import Layout

_SLICE_S = 0.005  # of a rank that runs steps; the part under way is finished
_IDLE_SLICE_S = 0.1  # without steps; delays a new request by this at most
_NEW_SLICE_S = 0.5  # of a rank that runs no steps: it then reports its progress
_MOST_LOST = 3
_NOTHING = Prepared(0.0, 0, 0.0)


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
        self._asked: dict[int, Ticket[Prepared]] = {}  # of ranks that run no steps
        self._slice: Ticket[Prepared] | None = None  # of the others
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
            self._pool.call(DropPrepared(), ranks=there)
