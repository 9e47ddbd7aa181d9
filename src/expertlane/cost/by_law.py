"""Errors of single laws in a step's time: two clocks for every error, at its low and at its high.

The three clocks of `BOUNDS` have all laws low, all likely and all high. Those that are added here
have one law low or high and all others likely, so that what two deployments share can cancel
(`planner.ties`).

What is one error, the same wherever it occurs, and so in two deployments at once:

- of a law that was fitted, the scatter of its measurements around it: of alike sizes (the same to
  a power of two, of what the law is looked up by). How far it is off for one size says next to
  nothing of another, twice as large (docs/validation.md);
- where a law stands in for another device or type, what its bounds are wider for that: of the law;
- of a law that nothing was measured for, and of single terms, launch and driver for example: all;
- how well transfers hide behind what computes beside them.

Different errors are independent of each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertlane.cost.laws.execution import BOUNDS, LIKELY, Terms
from expertlane.cost.laws.roofline import looked_up_by
from expertlane.cost.laws.times import Basis, Times
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.pricing import Block, StageWork, TimedStep, law_dtype
from expertlane.cost.step.operation import Floats, Operation, Transfer

LawError = tuple[str, tuple[int, ...]]  # the law, and the sizes where it is of alike sizes alone
ErrorSeconds = Mapping[LawError, tuple[float, float]]  # at the error's low and its high

_LAUNCHING, _HIDING = ("launches", ()), ("hiding of transfers", ())
_SINGLE_TERMS = ("driver_s", "driver_per_rank_s", "dp_sync_s")
_HIGH = BOUNDS.index("high")
_Work = Sequence[Sequence[StageWork]]  # [num_stages][num_micro_batches]


@dataclass(frozen=True, eq=False)
class ClocksByLaw:
    """The clocks of some steps: those of `BOUNDS`, then two for each error."""

    errors: Sequence[LawError]
    _types: NumberTypes

    @classmethod
    def of(cls, works: Sequence[_Work], terms: Terms, types: NumberTypes) -> "ClocksByLaw":
        """Clocks for all errors that these steps, and the terms of their execution, have."""
        found: dict[LawError, None] = dict.fromkeys([_LAUNCHING, _HIDING])
        for name in _SINGLE_TERMS:
            found[name, ()] = None
        found |= dict.fromkeys((place, ()) for place in terms.in_series)
        for stage in (each for work in works for of_stage in work for each in of_stage):
            for timed in _steps_of(stage):
                found |= dict.fromkeys(_errors(timed.step, timed.times, types))
            if stage.hand_over is not None:
                found |= dict.fromkeys(_errors(None, stage.hand_over, types))
        return cls(list(found), types)

    def terms(self, terms: Terms) -> Terms:
        """The terms on all clocks."""
        hiding = [*BOUNDS, *[BOUNDS[LIKELY]] * (2 * len(self.errors))]
        low, high = self._clocks(_HIDING)
        hiding[low], hiding[high] = BOUNDS[0], BOUNDS[_HIGH]
        return Terms(
            execution=terms.execution,
            launch_s=self._on_clocks(terms.launch_s, {_LAUNCHING: terms.launch_s}),
            in_series={
                place: self._on_clocks(each, {(place, ()): each})
                for place, each in terms.in_series.items()
            },
            hiding=hiding,
            **{
                name: self._on_clocks(each, {(name, ()): each})
                for name in _SINGLE_TERMS
                for each in (getattr(terms, name),)
            },
        )

    def work(self, works: Sequence[_Work]) -> list[list[list[StageWork]]]:
        """The same steps with times on all clocks; blocks that were shared stay shared."""
        blocks: dict[int, Block] = {}
        steps: dict[int, TimedStep] = {}

        def timed(step: TimedStep) -> TimedStep:
            if id(step) not in steps:
                steps[id(step)] = replace(step, times=self._times(step.step, step.times))
            return steps[id(step)]

        def block(one: Block) -> Block:
            if id(one) not in blocks:
                blocks[id(one)] = Block([timed(each) for each in one.steps], one.layers)
            return blocks[id(one)]

        def stage(one: StageWork) -> StageWork:
            sent = None if one.hand_over is None else self._times(None, one.hand_over)
            return StageWork([[block(each) for each in part] for part in one.parts], sent)

        known: dict[int, list[list[StageWork]]] = {}
        for work in works:  # of equal sizes one stands for all
            if id(work) not in known:
                known[id(work)] = [[stage(each) for each in of_stage] for of_stage in work]
        return [known[id(work)] for work in works]

    def seconds(self, on_clocks: Floats) -> ErrorSeconds:
        """Seconds at the low and the high of each error, from seconds [B] on all clocks."""
        pairs = on_clocks[len(BOUNDS) :].reshape(-1, 2).tolist()
        return {error: (low, high) for error, (low, high) in zip(self.errors, pairs, strict=True)}

    def _clocks(self, error: LawError) -> tuple[int, int]:
        low = len(BOUNDS) + 2 * self.errors.index(error)
        return low, low + 1

    def _on_clocks(self, bounds: Floats, of_errors: Mapping[LawError, Floats]) -> Floats:
        """Bounds [3, ...] on all clocks, [B, ...]: likely but on those of its own errors."""
        num = len(BOUNDS) + 2 * len(self.errors)
        spread = np.broadcast_to(bounds[LIKELY], (num, *bounds.shape[1:])).copy()
        spread[: len(BOUNDS)] = bounds
        for error, own in of_errors.items():
            low, high = self._clocks(error)
            spread[low], spread[high] = own[0], own[_HIGH]
        return spread

    def _times(self, step: Operation | Transfer | None, times: Times) -> Times:
        of_errors = _errors(step, times, self._types)
        return replace(times, bounds=self._on_clocks(times.bounds, of_errors))


def _steps_of(stage: StageWork) -> Iterator[TimedStep]:
    return (timed for part in stage.parts for block in part for timed in block.steps)


def _errors(
    step: Operation | Transfer | None, times: Times, types: NumberTypes
) -> dict[LawError, Floats]:
    """A step's errors, and its bounds [3, R] under each; the step of a PP transfer is None."""
    law, sizes = _law_of(step, types)
    low, likely, high = times.bounds
    if times.basis is Basis.BOUND and times.wider == 1:
        return {(law, ()): times.bounds}
    alike = tuple(np.rint(np.log2(np.maximum(sizes, 1))).astype(int).tolist())
    scatter = np.array(
        [np.minimum(low * times.wider, likely), likely, np.maximum(high / times.wider, likely)]
    )
    if times.wider == 1:
        return {(law, alike): scatter}
    common = np.array(
        [np.maximum(low, likely / times.wider), likely, np.minimum(high, likely * times.wider)]
    )
    return {(law, ()): common, (law, alike): scatter}


def _law_of(step: Operation | Transfer | None, types: NumberTypes) -> tuple[str, list[float]]:
    """The name of a step's law, and the sizes it is looked up by, each the largest of all ranks."""
    if step is None:
        return "send", []
    if isinstance(step, Operation):
        looked_up = looked_up_by(step.kind, step.sizes)
        name = f"{step.kind}.{law_dtype(types, step)}"
        return name, [float(np.max(size)) for size in looked_up.values()]
    load = step.load
    where = "inter_node" if (load.num_nodes > 1).any() else "intra_node"
    carried = np.maximum(load.out_bytes, load.in_bytes).sum(axis=0)
    name = f"{step.stage.label}.{step.kind}.{where}"
    return name, [float(carried.max()), float(load.group_size.max())]
