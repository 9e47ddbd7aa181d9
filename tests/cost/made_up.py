"""Made-up work for a timeline, with times that a reader can follow by hand."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from expertlane.cost.laws.profile import Execution, Terms
from expertlane.cost.laws.times import Basis, Times
from expertlane.cost.pricing import Block, StageWork, TimedStep
from expertlane.cost.step.operation import (
    OUTSIDE,
    Operation,
    OpKind,
    RankGroups,
    Transfer,
    TransferKind,
)
from expertlane.cost.timeline import StepTimes, Timeline, events
from expertlane.spec.names import Stage, Traffic


@dataclass(frozen=True, eq=False)
class OfLayer(TimedStep):
    """A step, and the hidden layer that `part` puts it in."""

    layer: int = 0


def seconds(values: Sequence[float], low: float = 1.0, high: float = 1.0) -> Times:
    """Bounds as factors."""
    likely = np.array(values, dtype=np.float64)
    bounds = np.array([likely * low, likely, likely * high])
    return Times(bounds, Basis.BOUND, np.zeros(len(likely), bool))


def compute(
    *values: float,
    stage: Stage = Stage.EXPERTS,
    layer: int = 0,
    num_kernels: int = 1,
    flops: int = 0,
    weight_bytes: int = 0,
    kv_bytes: int = 0,
    low: float = 1.0,
    high: float = 1.0,
) -> OfLayer:
    """An operation that takes each rank so long."""
    num_ranks = len(values)
    operation = Operation(
        OpKind.GEMM,
        stage,
        {},
        np.full(num_ranks, flops),
        np.full(num_ranks, weight_bytes),
        np.full(num_ranks, kv_bytes),
        num_kernels,
    )
    return OfLayer(operation, seconds(values, low, high), layer=layer)


def send(
    *values: float,
    stage: Stage = Stage.DISPATCH,
    layer: int = 0,
    group: Sequence[int] | None = None,
    contention: float = 0.0,
    num_kernels: int = 1,
    low: float = 1.0,
    high: float = 1.0,
    **flags,
) -> OfLayer:
    """A transfer; all ranks in one group unless said otherwise."""
    num_ranks = len(values)
    transfer = Transfer(
        TransferKind.ALL_TO_ALL,
        stage,
        RankGroups(np.array(group or [0] * num_ranks), np.zeros(num_ranks, dtype=np.int64)),
        np.zeros((len(Traffic), num_ranks, num_ranks), dtype=np.int64),
        num_kernels,
        **flags,
    )
    return OfLayer(transfer, seconds(values, low, high), contention, layer=layer)


def part(*steps: OfLayer) -> list[Block]:
    """A block for every step, of the step's own layer."""
    return [Block([each], (each.layer,)) for each in steps]


def one_stage(*parts: list[Block]) -> list[list[StageWork]]:
    """A micro-batch on a single pipeline stage."""
    return [[StageWork(parts)]]


def run(
    work: list[list[StageWork]], num_ranks: int, terms: Terms | None = None, plan_s: float = 0.0
) -> StepTimes:
    """A step on clocks at zero."""
    return Timeline(terms or Terms.free(), len(work), num_ranks).run(work, plan_s, may_skip=False)


def terms(execution: Execution, launch_s: float) -> Terms:
    """The same launch at best and at worst."""
    return Terms(execution, np.full(3, launch_s), np.zeros(3))


def log(times: StepTimes, rank: int = 0) -> list[str]:
    """What a rank did: `track stage[.part] begin-end`, in order of begin."""
    lines = []
    for each in sorted(events(times), key=lambda each: (each.begin_s[rank], each.track)):
        place = f"{each.layer}" if each.layer != OUTSIDE else "-"
        name = f"{each.track} {each.stage.label} {place}{'ab'[each.part]}"
        lines.append(f"{name} {each.begin_s[rank]:g}-{each.end_s[rank]:g}")
    return lines


durations = st.floats(0.0, 10.0, allow_subnormal=False)


@st.composite
def halves(draw):
    """Two parts of equal structure on three ranks, with bounds and contention."""
    is_transfer = draw(st.lists(st.booleans(), min_size=1, max_size=8))
    groups = draw(st.sampled_from([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 2]]))
    contention = draw(st.floats(0.0, 1.0))
    low, high = draw(st.floats(0.1, 1.0)), draw(st.floats(1.0, 5.0))
    size = len(is_transfer)
    num_kernels = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    syncs_host = draw(st.booleans())
    parts = []
    for _ in range(draw(st.integers(1, 2))):
        steps = []
        for each, num in zip(is_transfer, num_kernels, strict=True):
            values = [draw(durations) for _ in range(3)]
            flags = {"low": low, "high": high, "num_kernels": num}
            if each:
                flags |= {"contention": contention, "syncs_host": syncs_host}
                steps.append(send(*values, group=groups, **flags))
            else:
                steps.append(compute(*values, **flags))
        parts.append(part(*steps))
    return parts
