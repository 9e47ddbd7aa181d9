"""Cases that hold every possible pair of fault, moment, layout and transport."""

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import OnFailure, Phase, Stage
from faults.planted import KINDS, Fault

NUM_CASES = 312
NUM_LAYERS = 4  # of the model
TRANSPORTS = ("shared_memory", "gloo")
_COPIES = {"num_redundant_experts": 4}
_MOVES = {"rebalance_steps": 3}
# Layout, options; `_MOVES` have their experts moved all the time.
LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tp=2", {}),
    ("pp=2", {"num_micro_batches": 2, "micro_batch_schedule": "rotating"}),
    ("dp=2", {}),
    ("dp=2,ep=2", _MOVES),
    ("dp=2,ep=2", {"overlap": True}),
    ("tp=2,ep=2", _COPIES | _MOVES),
    ("dp=4,ep=4", _COPIES | _MOVES),
    ("dp=2,tp=2,ep=4", _COPIES),
    ("dp=2,tp=2,ep=2", {"dispatch": "all_gather"}),
    ("pp=2,dp=2,ep=2", _COPIES | _MOVES),
    ("pp=2,tp=2", {"num_micro_batches": 2}),
    ("replicas=2,dp=2,ep=2", {}),
    ("replicas=2", {}),
)
# To what each may change while it serves: more ranks, then as many, and fewer where that is valid.
CHANGES = (
    ("dp=2,tp=2", "dp=2", "tp=1"),
    ("pp=2,tp=2", "tp=2", "tp=1"),
    ("dp=4", "tp=2", "tp=1"),
    ("dp=3,ep=3", "tp=2,ep=2"),
    ("dp=3,ep=3", "tp=2,ep=2", "tp=1"),
    ("dp=2,tp=2,ep=4", "dp=2,ep=2"),
    ("dp=6,ep=6", "dp=2,tp=2,ep=4", "dp=2,ep=2"),
    ("dp=3,tp=2,ep=6", "dp=4,ep=4", "dp=2,ep=2"),
    ("dp=3,tp=2,ep=2", "dp=4,ep=2", "dp=2,ep=2"),
    ("pp=2,dp=3,ep=3", "dp=4,ep=4", "dp=2,ep=2"),
    ("pp=2,dp=2,tp=2", "tp=4", "pp=2"),
    ("replicas=3,dp=2,ep=2", "dp=4,ep=4", "dp=2,ep=2"),
    ("replicas=3", "dp=2", "tp=1"),
)
_STAGES = (Stage.ATTENTION, Stage.ROUTER, Stage.DISPATCH, Stage.EXPERTS, Stage.COMBINE)
_ENDS = (Stage.EMBED, Stage.COLLECTIVES, Stage.HAND_OVER, Stage.HEAD)
# Name, and what of a `Fault` it decides.
MOMENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(
        (f"{phase}, {stage.label}", {"phase": phase, "stage": stage})
        for phase in (Phase.PREFILL, Phase.DECODE)
        for stage in (*_STAGES, *_ENDS)
    ),
    ("drain", {"stage": Stage.EXPERTS, "is_later": True}),
    ("change, preparing", {"command": "preparing"}),
    ("change, before", {"command": "change begins"}),
    ("change, in", {"command": "change"}),
    ("change, after", {"stage": Stage.EXPERTS, "is_later": True}),
    ("start-up", {"command": "start-up"}),
    ("moves begin", {"command": "moves begin"}),
    ("moves end", {"command": "moves end"}),
    ("second", {"phase": Phase.DECODE, "stage": Stage.ATTENTION}),
    ("second, of the replacement", {"phase": Phase.DECODE, "stage": Stage.ATTENTION}),
)
_Place = tuple[int, int, int, int]  # of kind, moment, layout and transport


@dataclass(frozen=True)
class Draw:
    """A case.

    Attributes:
        faults: the second one, if there is one, happens while the first is recovered from.
        target: the layout that it changes to while it serves, and then back; None if it does not.
        prepares: ranks make weights of that layout before it changes.
        on_failure: shrink in half of the cases whose layout can.
        dtype: bfloat16 in one case of eight.
    """

    number: int
    moment: str
    layout: Layout
    options: Options
    transport: str
    faults: tuple[Fault, ...]
    dtype: str
    target: Layout | None = None
    prepares: bool = False
    on_failure: OnFailure = "replace"

    def __str__(self) -> str:
        first = self.faults[0]
        layout = " ".join([str(self.layout), *self.named_options])
        if self.target is not None:
            layout += f" to {self.target}" + ", prepared" * self.prepares
        if self.on_failure == "shrink":
            layout += ", shrinks"
        return f"{first.kind} rank {first.rank}, {self.moment}: {layout}, {self.transport}"

    @property
    def named_options(self) -> list[str]:
        """Those that are not as by default."""
        default = Options()
        return [
            f"{name}={value}"
            for name, value in vars(self.options).items()
            if value != getattr(default, name)
        ]


def _is_possible(place: _Place) -> bool:
    _, moment, chosen, _ = place
    (name, facts), (text, options) = MOMENTS[moment], LAYOUTS[chosen]
    layout = Layout.parse(text)
    if name.startswith("moves"):
        return "rebalance_steps" in options
    needed = {Stage.HAND_OVER: layout.pp, Stage.COLLECTIVES: layout.tp}
    return needed.get(facts.get("stage"), 2) > 1  # type: ignore[arg-type]


def _pairs(place: _Place) -> set[tuple[int, int, int, int]]:
    return {(i, j, place[i], place[j]) for i, j in itertools.combinations(range(4), 2)}


@cache
def places() -> tuple[_Place, ...]:
    """[NUM_CASES]; each the possible place that brings most pairs that are still missing."""
    random = np.random.default_rng(20)
    sizes = len(KINDS), len(MOMENTS), len(LAYOUTS), len(TRANSPORTS)
    possible = [p for p in itertools.product(*map(range, sizes)) if _is_possible(p)]
    random.shuffle(possible)
    missing = set().union(*map(_pairs, possible))
    chosen: list[_Place] = []
    while missing:
        best = max(possible, key=lambda place: len(_pairs(place) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    rest = [place for place in possible if place not in set(chosen)]
    chosen += rest[: NUM_CASES - len(chosen)]
    return tuple(chosen)


def draw(number: int) -> Draw:
    """The case of a number."""
    kind, moment, chosen, transport = places()[number]
    random = np.random.default_rng([20, number])
    (name, facts), (text, options) = MOMENTS[moment], LAYOUTS[chosen]
    layout, target = Layout.parse(text), None
    has_rank = layout
    if name.startswith("change"):
        target = Layout.parse(str(random.choice(CHANGES[chosen])))
        has_rank = layout if name == "change, before" else target
    rank = int(random.integers(has_rank.world_size))
    is_early = facts.get("phase") is Phase.PREFILL
    step = 0 if is_early else int(random.integers(3, 20))
    layer = int(random.integers(NUM_LAYERS))
    if has_rank.pp > 1:  # one of its own
        at = has_rank.coordinates(rank)
        layer = int(random.choice(list(has_rank.layers_of_stage(NUM_LAYERS, at.pp_rank))))
    faults = [Fault(rank, KINDS[kind], step=step, layer=layer, **facts)]
    if name.startswith("second"):
        others = [r for r in range(layout.world_size) if r != rank]
        of = rank if "replacement" in name else int(random.choice(others))
        faults = [Fault(rank, "kill", step=step, layer=layer, **facts)]
        faults.append(Fault(of, KINDS[kind], command="second"))
    dtype = "bfloat16" if number % 8 == 7 else "float32"
    return Draw(
        *(number, name, layout, Options(**options), TRANSPORTS[transport], tuple(faults), dtype),
        target,
        target is not None and (name == "change, preparing" or bool(random.integers(2))),
        "shrink" if layout.replicas * layout.dp > 1 and random.integers(2) else "replace",
    )
