"""Prices of the parts of steps, over many scenarios at once: each distinct part is priced once.

A scenario is a number of alike sequences; one rank of the stage stands for all. A part turns on few
of a layout's sizes: attention, MLPs and the two ends of the model on the tensor-parallel group and
its sequences; dispatch, experts and combine on the stage, its experts and the tokens that a rank
owns. So layouts share their parts, and their number grows far more slowly than that of layouts.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import LIKELY, Execution, Profile, Terms, kernels_of
from expertlane.cost.pricing import forwarded_times, operation_times
from expertlane.cost.step.attention import (
    mixer_steps,
    spread_over_streams,
)
from expertlane.cost.step.batch_sizes import Scenarios
from expertlane.cost.step.counts import StageMesh
from expertlane.cost.step.expected_counts import ExpectedFanOut, busiest_counts
from expertlane.cost.step.layer import (
    arrival_steps,
    dense_steps,
    embedding_steps,
    expert_steps,
    head_steps,
    projection_steps,
    residual_steps,
    router_steps,
    shared_expert_steps,
)
from expertlane.cost.step.operation import (
    Floats,
    Ints,
    NumberTypes,
    OneOfGroup,
    Operation,
    RankGroups,
    Transfer,
)
from expertlane.cost.step.step_list import ExpectedStepList
from expertlane.spec.deployment import DispatchForm, PayloadType, is_by_node_on
from expertlane.spec.mixers import Mixing
from expertlane.spec.model import LayerKind, ModelConfig
from expertlane.spec.names import Stage
from expertlane.spec.tensors import kinds_of_layers

# Rows of what is added up: three bounds of computing, of transfers, what all transfers would cost
# computing beside them, launches, and three bounds of the engine's own work where all is in series.
COMPUTE, MOVED, IN_SERIES = slice(0, 3), slice(3, 6), slice(8, 11)
SLOWED, LAUNCHES = 6, 7
_NUM_ROWS = 11
_AnyColumn = npt.NDArray[Any]


class Shape(NamedTuple):
    """Sizes, beside the sequences, that the parts of a stage depend on.

    Attributes:
        mesh: of the first pipeline stage.
        fan_out: expected fan-out of an MoE layer's tokens.
    """

    mesh: StageMesh
    fan_out: ExpectedFanOut
    form: DispatchForm
    payload: PayloadType


@dataclass(frozen=True, eq=False)
class Points(Scenarios):
    """P scenarios of some shapes; all attributes are [P].

    Attributes:
        shape: number from `SharedParts.add`.
    """

    num_drafts: Ints
    shape: Ints = field(kw_only=True)


@dataclass(eq=False)
class _Column:
    """Shapes by the key of those that share a kind of parts; a key's first stands for it."""

    number_of: dict[object, int] = field(default_factory=dict)
    firsts: list[Shape] = field(default_factory=list)
    of_shape: list[int] = field(default_factory=list)

    def add(self, key: object, shape: Shape) -> None:
        number = self.number_of.setdefault(key, len(self.firsts))
        if number == len(self.firsts):
            self.firsts.append(shape)
        self.of_shape.append(number)


class PricedPoints(NamedTuple):
    """Parts of P points, priced: tables over distinct ones, and where each point's stand.

    Attributes:
        layers: by kind, [rows, U]; an MoE layer without dispatch, experts and combine.
        experts: [rows, V]; dispatch, experts and combine.
        embedding, arrival, head, projection: [rows, U].
        own, of_experts: [P]; each point's index in U and V.
    """

    layers: dict[LayerKind, Floats]
    experts: Floats
    embedding: Floats
    arrival: Floats
    head: Floats
    projection: Floats
    own: Ints
    of_experts: Ints


class SharedParts:
    """Prices parts of stages; those of one layout are added up in `cost.closed_form`.

    Args:
        has_drafts: whether any deployment uses multi-token prediction.
    """

    def __init__(
        self,
        model: ModelConfig,
        types: NumberTypes,
        profile: Profile,
        terms: Terms,
        *,
        has_drafts: bool = False,
    ) -> None:
        self._model, self._types = model, types
        self._profile, self._terms = profile, terms
        self._kernels = kernels_of(profile)
        self._row_bytes = model.hidden_size * types.activation_bytes
        self._own, self._experts = _Column(), _Column()
        self._ones: dict[tuple[int, int], OneOfGroup] = {}
        self._keeps_all: list[bool] = []  # by shape
        of_drafts = model.draft_kinds if has_drafts else ()
        self._kinds = list(dict.fromkeys((*kinds_of_layers(model), *of_drafts)))
        self._mlps = {kind.mlp for kind in self._kinds}
        self._has_experts = "experts" in self._mlps
        self._has_drafts = has_drafts

    def add(self, shape: Shape) -> int:
        """Register a shape; return its number."""
        layout, fan_out = shape.mesh.layout, shape.fan_out
        keeps_all = self._kernels.keeps_all(layout, shape.form)
        groups = (self._one_of(shape.mesh, size) for size in (layout.tp, layout.dcp))
        self._own.add((layout.tp, layout.dcp, keeps_all, *groups), shape)
        sizes = layout.ep, layout.stage_size
        self._experts.add((*sizes, shape.form, shape.payload, keeps_all, fan_out), shape)
        self._keeps_all.append(keeps_all)
        return len(self._keeps_all) - 1

    def price(self, points: Points) -> PricedPoints:
        """All parts of all points."""
        own_key = np.array(self._own.of_shape)[points.shape]
        experts_key = np.array(self._experts.of_shape)[points.shape]
        keeps_all = np.array(self._keeps_all)[points.shape]
        is_normed = keeps_all & (points.tokens * self._row_bytes <= self._kernels.normed_bytes)
        of_own: list[_AnyColumn] = [
            own_key,
            is_normed,
            points.num_new == 1 + points.num_drafts,
            points.num_drafts,
            points.num_seqs,
            points.num_new,
            points.num_cached,
        ]
        firsts, own = _distinct(of_own)
        rows = np.where(keeps_all, points.tokens, points.owned)
        length = points.num_new if self._are_alike else np.ones_like(points.num_new)
        of_experts: list[_AnyColumn] = [
            experts_key,
            is_normed,
            rows,
            points.stage_tokens,
            length,
        ]
        lists = self._own_lists([each[firsts] for each in of_own])
        chosen, places = _distinct(of_experts)
        experts = self._expert_lists([each[chosen] for each in of_experts])
        names = list(dict.fromkeys(name for name, _, _ in lists))
        priced = price(
            self._profile,
            self._types,
            self._terms,
            [steps for _, _, steps in lists] + [steps for _, steps in experts],
        )
        nothing = np.zeros((_NUM_ROWS, len(firsts)))
        tables = defaultdict(lambda: nothing) | {name: nothing.copy() for name in names}
        for (name, at, _), times in zip(lists, priced, strict=False):
            tables[name][:, at] = times
        of_all = np.zeros((_NUM_ROWS, len(chosen)))
        for (at, _), times in zip(experts, priced[len(lists) :], strict=True):
            of_all[:, at] = times
        return PricedPoints(
            layers={
                kind: tables["mixer", kind.mixing] + tables[kind.mlp, None] for kind in self._kinds
            },
            experts=of_all,
            embedding=tables["embedding", None],
            arrival=tables["arrival", None],
            head=tables["head", None],
            projection=tables["projection", None],
            own=own,
            of_experts=places,
        )

    @property
    def _are_alike(self) -> bool:
        """True if tokens of one sequence choose similar experts."""
        return any(len(each.fan_out.of_prompts) > 0 for each in self._experts.firsts)

    def _one_of(self, mesh: StageMesh, size: int) -> OneOfGroup:
        """The rank that stands for all, in groups of `size` consecutive ranks."""
        if (key := (mesh.size, size)) not in self._ones:
            groups = RankGroups(np.arange(mesh.size) // size, mesh.node)
            self._ones[key] = groups.one
        return self._ones[key]

    def _own_lists(
        self, columns: Sequence[_AnyColumn]
    ) -> list[tuple[tuple[str, Mixing | None], Ints, ExpectedStepList]]:
        """Parts without experts: name and mixing, their indices in the columns, and their steps."""
        model = self._model
        lists: list[tuple[tuple[str, Mixing | None], Ints, ExpectedStepList]] = []
        key, is_normed, is_decode, num_drafts, *sizes = columns
        for at in _alike((key, is_normed, is_decode, num_drafts)):
            shape = self._own.firsts[key[at[0]]]
            num_seqs, num_new, num_cached = (each[at] for each in sizes)
            part = Scenarios(
                shape.mesh.layout.tp,
                num_seqs,
                num_new,
                num_cached,
                num_seqs,
                int(num_drafts[at[0]]),
            )

            def begin(
                name: str,
                mixing: Mixing | None = None,
                shape: Shape = shape,
                at: Ints = at,
            ) -> ExpectedStepList:
                lists.append(((name, mixing), at, self._begun(shape, len(at))))
                return lists[-1][-1]

            for mixing in dict.fromkeys(kind.mixing for kind in self._kinds):
                if mixing is not None:
                    mixer_steps(begin("mixer", mixing), model, mixing, part)
            if "none" in self._mlps:
                residual_steps(begin("none"), model, part)
            if "dense" in self._mlps:
                dense_steps(begin("dense"), model, part)
            if self._has_experts:
                router = begin("experts")
                router_steps(router, model, part)
                shared_expert_steps(router, model, part)
                spread_over_streams(router, model, Stage.EXPERTS, part)
            embedding_steps(begin("embedding"), model, part)
            arrival_steps(begin("arrival"), model, part)
            head_steps(begin("head"), model, part)
            if self._has_drafts:
                projection_steps(begin("projection"), model, part)
        return lists

    def _expert_lists(self, columns: Sequence[_AnyColumn]) -> list[tuple[Ints, ExpectedStepList]]:
        """Indices in the columns of parts with experts, and their steps."""
        lists: list[tuple[Ints, ExpectedStepList]] = []
        if not self._has_experts:
            return lists
        key, is_normed, rows, stage_tokens, length = columns
        for at in _alike((key, is_normed)):
            shape = self._experts.firsts[key[at[0]]]
            layout, steps = shape.mesh.layout, self._begun(shape, len(at))
            one = np.ones_like(rows[at])
            tp = layout.tp if steps.keeps_all else 1  # else rows are those that a rank owns
            part = Scenarios(tp, rows[at], one, one, stage_tokens[at])
            counts = busiest_counts(
                shape.fan_out,
                part,
                layout,
                by_node=is_by_node_on(layout, shape.form),
                num_new=length[at],
            )
            expert_steps(steps, self._model, part, counts, shape.payload)
            lists.append((at, steps))
        return lists

    def _begun(self, shape: Shape, size: int) -> ExpectedStepList:
        return ExpectedStepList(shape.mesh, size, self._types, shape.form, self._kernels)


def _distinct(columns: Sequence[_AnyColumn]) -> tuple[Ints, Ints]:
    """Index of the first of each distinct row of columns [P], and each row's number, [P]."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, place = np.unique(column, return_inverse=True)
        _, code = np.unique(code * len(values) + place, return_inverse=True)
    _, firsts, which = np.unique(code, return_index=True, return_inverse=True)
    return firsts, which


def _alike(columns: Sequence[_AnyColumn]) -> list[Ints]:
    """Indices of equal rows, in groups."""
    firsts, which = _distinct(columns)
    order = np.argsort(which, kind="stable")
    return np.split(order, np.cumsum(np.bincount(which, minlength=len(firsts)))[:-1])


def price(
    profile: Profile, types: NumberTypes, terms: Terms, lists: Sequence[ExpectedStepList]
) -> list[Floats]:
    """Prices of each list of steps, [rows, S], in order."""
    links = LinkModel(profile)
    steps = [(step, each.size) for each in lists for step in each.steps]
    operations = [(step, size) for step, size in steps if isinstance(step, Operation)]
    transfers = [step for step, _ in steps if isinstance(step, Transfer)]
    of_operations = operation_times(DeviceModel(profile), types, operations)
    times = {id(step): each for (step, _), each in zip(operations, of_operations, strict=True)}
    times |= zip(map(id, transfers), links.times_of(transfers), strict=True)
    priced = []
    for of_list in lists:
        moved = [step for step in of_list.steps if isinstance(step, Transfer)]
        times |= forwarded_times(links, moved)
        total = np.zeros((_NUM_ROWS, of_list.size))
        for step in of_list.steps:
            seconds = times[id(step)].bounds
            if isinstance(step, Operation):
                total[COMPUTE] += seconds
            else:
                total[MOVED] += seconds
                total[SLOWED] += seconds[LIKELY] * links.contention(step, of_list.mesh.size)
            total[LAUNCHES] += step.num_kernels
            if terms.execution is Execution.SERIAL:
                total[IN_SERIES] += terms.overhead_s(step)[:, None]
        priced.append(total)
    return priced
