"""One micro-batch on one pipeline stage, on a virtual clock, in the engine's order.

All clocks are [B, R]: three bounds (low, likely, high) by the ranks of the stage. They go side by
side, each with its own times. The low one hides transfers perfectly, the high one not at all.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from expertlane.cost.pricing import Block, Compiler, Entry
from expertlane.cost.step.operation import Floats, Transfer

_MIN_REPEATS = 3  # layers of a block below which looking for a period does not pay
_ROUNDING = 1e-9


@dataclass(eq=False)
class Clocks:
    """Clocks of the ranks of a stage; [B, R] each.

    Attributes:
        compute: when the rank is free.
        network: when its last transfer is through.
        host: when the host is done with launching, where it runs ahead.
    """

    compute: Floats
    network: Floats
    host: Floats

    @classmethod
    def zero(cls, num_bounds: int, num_ranks: int) -> "Clocks":
        """All clocks at 0."""
        compute, network, host = np.zeros((3, num_bounds, num_ranks))
        return cls(compute, network, host)

    def later(self, seconds: Floats) -> "Clocks":
        """The clocks moved on by `seconds`, [B]."""
        by = seconds[:, None]
        return Clocks(self.compute + by, self.network + by, self.host + by)

    def add(self, work: "Clocks") -> None:
        """Go on by work whose clocks began at 0, once all ranks can begin."""
        start = self.compute.max(axis=1, keepdims=True)
        self.compute = start + work.compute
        self.network, self.host = (
            np.maximum(now, np.where(its > 0, start, 0.0) + its)
            for now, its in ((self.network, work.network), (self.host, work.host))
        )


class ExecutedStep(NamedTuple):
    """An operation that ran, or a transfer that was posted and waited for.

    Attributes:
        layers, place: layers of its block, and its index among them.
        begin: the rank came to it.
        start: it could begin: launched by the host, and of a transfer, posted.
        met: of a transfer, its group's last member had posted and was free; else `start`.
        wait: of a transfer, the rank began to wait for it; else `start`.
        end: it was done; of a transfer, not before `wait`. Both hold once it was waited for.
        done: of a transfer, when it was through; else `end`.
    """

    entry: Entry
    part: int
    layers: Sequence[int]
    place: int
    begin: Floats
    start: Floats
    met: Floats
    wait: Floats
    end: Floats
    done: Floats

    @property
    def layer(self) -> int:
        """Its hidden layer, or `OUTSIDE`."""
        return self.layer_after(0)

    def layer_after(self, times: int) -> int:
        """The layer of the same step when its block was repeated so often."""
        return self.layers[self.place + times] + self.entry.offset


class RepeatedLayers(NamedTuple):
    """Layers skipped as equal to those before: `times` more of the log's `first` to `last`."""

    first: int
    last: int
    times: int


@dataclass(eq=False)
class Log:
    """Steps that ran, in the order of each rank."""

    executed: list[ExecutedStep] = field(default_factory=list)
    repeated: list[RepeatedLayers] = field(default_factory=list)


class _Place(NamedTuple):
    """Place of a recorded step: its part, and its layer in the block."""

    part: int
    layers: Sequence[int]
    place: int

    def executed(self, entry: Entry, *moments: Floats) -> ExecutedStep:
        """The step there."""
        return ExecutedStep(entry, *self, *moments)


class RecordedStep(NamedTuple):
    """A computation, the begin of a transfer, or the wait for one, in the order of the ranks.

    Attributes:
        entry: entry of a computation or of a transfer that begins; None for a wait.
        layer: hidden layer, or `OUTSIDE`.
        transfer: index of the transfer in the micro-batch; -1 for a computation.
    """

    entry: Entry | None
    layer: int
    transfer: int = -1


class _Cursor:
    """A part's place in its blocks."""

    def __init__(self, part: int, blocks: Sequence[Block], compiler: Compiler) -> None:
        self.part = part
        self._blocks = [(compiler.entries(block), block.layers) for block in blocks if block.steps]
        self.block = -1
        self.entries: list[Entry] = []
        self.layers: Sequence[int] = ()
        self.place = self.step = 0

    def next(self) -> Entry | None:
        """The next step; None at the end."""
        if self.step == len(self.entries):
            if self.place + 1 < len(self.layers):
                self.place += 1
            elif self.block + 1 < len(self._blocks):
                self.block += 1
                self.entries, self.layers = self._blocks[self.block]
                self.place = 0
            else:
                return None
            self.step = 0
        entry = self.entries[self.step]
        self.step += 1
        return entry

    def executed(self, entry: Entry, *moments: Floats) -> ExecutedStep:
        """A step of the present layer."""
        return ExecutedStep(entry, self.part, self.layers, self.place, *moments)

    @property
    def num_left(self) -> int:
        """Layers of its block after the present one."""
        return len(self.layers) - 1 - self.place


class Replay:
    """Runs the parts of a micro-batch; each up to its next transfer in turn, as the engine does.

    A transfer begins when the last member of its group has posted it and has no earlier one under
    way; it ends for all of them after the longest of their times. One that takes no time is a part
    of the one before (both hops of a dispatch by one kernel): there it is not another part's turn,
    which would hide less than that kernel does. Of what a rank computes while a
    transfer of its own is in flight, a share is lost (`TimedStep.contention`).

    Args:
        may_skip: a block's layers that go exactly like the two before are not run one by one.
    """

    def __init__(self, compiler: Compiler, clocks: Clocks, *, may_skip: bool = True) -> None:
        self.clocks = clocks
        self.log = Log()
        self._compiler = compiler
        self._may_skip = may_skip
        self._period = _Period()

    def run(self, parts: Sequence[Sequence[Block]]) -> Log:
        """Run all parts to their ends; `clocks` go on."""
        cursors = [
            _Cursor(part, blocks, self._compiler) for part, blocks in enumerate(parts) if blocks
        ]
        queue: deque[tuple[_Cursor, ExecutedStep | None]] = deque((each, None) for each in cursors)
        while queue:
            if self._may_skip and queue[0][0] is cursors[0]:
                self._skip_layers(queue)
            cursor, pending = queue.popleft()
            if pending is not None:
                self._wait(pending)
            in_flight = queue[-1][1] if queue else None  # of several, the last posted ends last
            while True:
                if self._may_skip and len(cursors) == 1:  # it may have no transfer to wait for
                    self._skip_layers(deque([(cursor, None)]))
                entry = cursor.next()
                if entry is None:
                    break
                if not isinstance(entry.step, Transfer):
                    self._compute(cursor, entry, in_flight)
                    continue
                if entry.is_included:
                    self._pass(cursor, entry)
                    continue
                posted = self._post(cursor, entry)
                for _ in range(entry.step.num_steps_before_wait):
                    if (beside := cursor.next()) is not None:
                        self._compute(cursor, beside, posted)
                queue.append((cursor, posted))
                break
        return self.log

    def run_recorded(self, steps: Sequence[RecordedStep]) -> Log:
        """Run what ranks did in the order in which they did it; `clocks` go on."""
        posted: dict[int, ExecutedStep] = {}
        in_flight: list[int] = []
        for entry, layer, transfer in steps:
            if entry is None:
                self._wait(posted.pop(transfer))
                in_flight.remove(transfer)
                continue
            place = _Place(0, (layer,), 0)
            if transfer < 0:
                self._compute(place, entry, posted[in_flight[-1]] if in_flight else None)
            else:
                posted[transfer] = self._post(place, entry)
                in_flight.append(transfer)
        return self.log

    def _launch(self, entry: Entry) -> Floats:
        """Time at which a step can begin on the rank; moves the host's clock."""
        clocks = self.clocks
        if entry.launch_s is None:
            return clocks.compute
        clocks.host = clocks.host + entry.launch_s
        return np.maximum(clocks.compute, clocks.host)

    def _compute(
        self, cursor: _Cursor | _Place, entry: Entry, in_flight: ExecutedStep | None
    ) -> None:
        begin = self.clocks.compute
        start = self._launch(entry)
        end = start + entry.seconds
        if in_flight is not None:
            beside = in_flight.entry
            lost = beside.lost_share * np.maximum(in_flight.done - start, 0.0)
            end = np.minimum(end + lost, start + entry.seconds * beside.stretch)
        self.clocks.compute = end
        self.log.executed.append(cursor.executed(entry, begin, start, start, start, end, end))

    def _post(self, cursor: _Cursor | _Place, entry: Entry) -> ExecutedStep:
        clocks, groups = self.clocks, entry.groups
        assert groups is not None
        begin = clocks.compute
        posted = clocks.compute = self._launch(entry) + entry.overhead_s
        met = groups.largest(np.maximum(posted, clocks.network))
        done = clocks.network = met + entry.seconds
        return cursor.executed(entry, begin, posted, met, posted, done, done)

    def _pass(self, cursor: _Cursor, entry: Entry) -> None:
        """Log a hop made by the kernel of the one before: nobody posts it, or waits for it."""
        now = self.clocks.compute
        self.log.executed.append(cursor.executed(entry, now, now, now, now, now, now))

    def _wait(self, pending: ExecutedStep) -> None:
        clocks, step = self.clocks, pending.entry.step
        wait = clocks.compute
        end = clocks.compute = np.maximum(wait, pending.done)
        if isinstance(step, Transfer) and step.syncs_host:
            clocks.host = np.maximum(clocks.host, end)
        self.log.executed.append(pending._replace(wait=wait, end=end))

    def _skip_layers(self, queue: deque[tuple[_Cursor, ExecutedStep | None]]) -> None:
        """Skip the rest of a block once two of its layers took equally long on every rank."""
        first = queue[0][0]
        if len(first.layers) < _MIN_REPEATS or not self._period.is_new_layer(first):
            return
        clocks = self.clocks
        pendings = [pending for _, pending in queue if pending is not None]
        state = np.stack(
            [clocks.compute, clocks.network, clocks.host, *(each.done for each in pendings)]
        )
        places = [
            (cursor.block, cursor.step, cursor.place - first.place, pending is None)
            for cursor, pending in queue
        ]
        step_s = self._period.step(places, state, len(self.log.executed))
        times = min(cursor.num_left for cursor, _ in queue)
        if step_s is None or times < 1 or not self._is_in_step(step_s):
            return
        self.log.repeated.append(RepeatedLayers(self._period.first, self._period.last, times))
        clocks.compute, clocks.network, clocks.host, *dones = state + times * step_s
        shifted = iter(zip(dones, step_s[3:], strict=True))
        for number, (cursor, pending) in enumerate(queue):
            cursor.place += times
            if pending is not None:
                done, of_layer = next(shifted)
                ahead = times * of_layer
                queue[number] = (
                    cursor,
                    pending._replace(
                        place=pending.place + times,
                        begin=pending.begin + ahead,
                        start=pending.start + ahead,
                        met=pending.met + ahead,
                        done=done,
                    ),
                )
        self._period = _Period()

    def _is_in_step(self, step_s: Floats) -> bool:
        """True if all clocks that depend on each other advance equally, and so will for ever.

        Two layers may take equally long while one rank's slack still shrinks. A host may advance
        faster than its device, if the device did not have to wait for it.
        """
        of_device, of_host = step_s[0], step_s[2]
        tolerance = _ROUNDING * np.abs(of_device).max()
        ran = self.log.executed[self._period.first : self._period.last]
        depend = any(each.entry.groups is not None for each in ran)  # ranks, on each other
        if depend and np.abs(step_s[[1, *range(3, len(step_s))]] - of_device).max() > tolerance:
            return False
        for groups in {each.entry.groups for each in ran if each.entry.groups is not None}:
            if (groups.largest(of_device) - of_device > tolerance).any():
                return False
        if all(each.entry.launch_s is None for each in ran):
            return True
        is_apart = np.abs(of_host - of_device) > tolerance
        is_late = np.any([each.start > each.begin for each in ran], axis=0)
        return not (is_apart & (is_late | (of_host > of_device))).any()


class _Period:
    """Finds two layers in a row that took equally long on every rank.

    Attributes:
        first, last: range of the log that the last layer added.
    """

    def __init__(self) -> None:
        self.first = self.last = 0
        self._layer = (-1, -1)
        self._places: list[tuple[int, int, int, bool]] = []
        self._state: Floats | None = None
        self._step_s: Floats | None = None

    def is_new_layer(self, cursor: _Cursor) -> bool:
        """True if the first part has come to another layer."""
        layer = (cursor.block, cursor.place)
        is_new, self._layer = layer != self._layer, layer
        return is_new

    def step(
        self, places: list[tuple[int, int, int, bool]], state: Floats, num_ran: int
    ) -> Floats | None:
        """Seconds that each layer adds to every clock of the state; None while layers differ."""
        before, before_s = self._state, self._step_s
        is_alike = places == self._places and before is not None and before.shape == state.shape
        self._places, self._state = places, state
        self.first, self.last = self.last, num_ran
        self._step_s = state - before if is_alike and before is not None else None
        if self._step_s is None or before_s is None or before_s.shape != self._step_s.shape:
            return None
        if np.abs(self._step_s - before_s).max() > _ROUNDING * np.abs(self._step_s).max():
            return None
        return self._step_s
