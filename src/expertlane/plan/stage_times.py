"""What one micro-batch takes on each pipeline stage of a layout, over many scenarios.

A scenario is a number of alike sequences; one rank of the stage stands for all. Its steps are those
of `cost.step` over expected counts, and those of many layouts are priced together: few calls over
long arrays.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.execution import LIKELY, Execution, Terms
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import Profile
from expertlane.cost.laws.times import Times
from expertlane.cost.multi_token import projection_steps
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.pricing import forwarding_hops, law_dtype
from expertlane.cost.step.batch_sizes import Scenarios
from expertlane.cost.step.counts import DispatchCounts
from expertlane.cost.step.expected_counts import ExpectedFanOut, busiest_counts
from expertlane.cost.step.kernel_sets import GPU_LIBRARIES
from expertlane.cost.step.layer import arrival_steps, embedding_steps, head_steps, layer_steps
from expertlane.cost.step.operation import (
    SIZES,
    Floats,
    Kind,
    Operation,
    Transfer,
)
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.cost.step.step_list import ExpectedStepList
from expertlane.spec.deployment import DispatchForm, PayloadType, is_by_node_on
from expertlane.spec.model import ModelConfig

_LayerKind = tuple[bool, int | None]  # whether dense, and the attention window


@dataclass(frozen=True, eq=False)
class ScenarioTimes:
    """What a list of steps takes, or several of them; three bounds (low, likely, high).

    Attributes:
        compute_s, transfer_s: [3, S].
        slowed_s: [S]; what all of these transfers would cost computing that runs beside them.
        num_kernels: launches where nothing is captured in a graph.
        in_series_s: [3]; the engine's own work around steps, where all is in series.
    """

    compute_s: Floats
    transfer_s: Floats
    slowed_s: Floats
    num_kernels: int
    in_series_s: Floats

    @classmethod
    def sum(cls, parts: Iterable[tuple[int, "ScenarioTimes"]]) -> "ScenarioTimes":
        """The sum of parts, each done a number of times; one part at least."""
        (num, first), *others = parts
        total = [num * getattr(first, each.name) for each in fields(cls)]
        for num, other in others:
            total = [
                so_far + num * getattr(other, each.name)
                for so_far, each in zip(total, fields(cls), strict=True)
            ]
        return cls(*total)


@dataclass(frozen=True, eq=False)
class StageSteps:
    """The steps of a layout with one dispatch form and placement.

    Attributes:
        mesh: of the first stage.
        fan_out: of an MoE layer's tokens.
        num_drafts: of multi-token prediction.
    """

    model: ModelConfig
    types: NumberTypes
    mesh: StageMesh
    fan_out: ExpectedFanOut
    form: DispatchForm
    payload: PayloadType
    num_drafts: int = 0

    def _kind(self, layer: int) -> _LayerKind:
        return self.model.is_dense(layer), self.model.window_of_layer(layer)

    @cached_property
    def _layers(self) -> dict[_LayerKind, int]:
        """The first of each kind."""
        layers: dict[_LayerKind, int] = {}
        for layer in range(self.model.num_hidden_layers):
            layers.setdefault(self._kind(layer), layer)
        return layers

    def lists(self, part: Scenarios) -> list[ExpectedStepList]:
        """To be priced: each kind of layer, embedding, arrival from the stage before, head, and
        where there are any the first pass that guesses and a later one.
        """
        model, busiest = self.model, self._busiest(part)
        around = []
        for steps in (embedding_steps, arrival_steps, head_steps):
            around.append(self._begun(part))
            steps(around[-1], model, part)
        layers = []
        for layer in self._layers.values():
            layers.append(self._begun(part))
            self._layer(layers[-1], layer, part, busiest)
        return [*layers, *around, *self._drafts(part, busiest)]

    def _begun(self, part: Scenarios) -> ExpectedStepList:
        return ExpectedStepList(self.mesh, part.size, self.types, self.form, GPU_LIBRARIES)

    def _busiest(self, part: Scenarios) -> DispatchCounts:
        layout, top_k = self.mesh.layout, self.model.num_experts_per_tok
        by_node = is_by_node_on(layout, self.form)
        return busiest_counts(self.fan_out, part, layout, top_k, by_node=by_node)

    def _layer(
        self, out: ExpectedStepList, layer: int, part: Scenarios, busiest: DispatchCounts
    ) -> None:
        counts = None if self.model.is_dense(layer) else busiest
        layer_steps(out, self.model, layer, part, counts, self.payload)

    def _drafts(self, part: Scenarios, busiest: DispatchCounts) -> list[ExpectedStepList]:
        """As `ProgramBuilder` has them: the first takes all tokens of the step."""
        further = part.further()
        passes = [(part, busiest), (further, self._busiest(further))][: self.num_drafts]
        lists = []
        for sizes, counts in passes:
            lists.append(self._begun(part))
            projection_steps(lists[-1], self.model, sizes)
            self._layer(lists[-1], self.model.num_hidden_layers - 1, sizes, counts)
            head_steps(lists[-1], self.model, further)
        return lists

    def stages(self, priced: Sequence[ScenarioTimes]) -> list[ScenarioTimes]:
        """[pp]; a micro-batch on each stage, from the times of `lists`.

        Stages that do the same are one object.
        """
        layout, num_layers = self.mesh.layout, self.model.num_hidden_layers
        made: dict[tuple[int, ...], ScenarioTimes] = {}
        stages = []
        for pp_rank in range(layout.pp):
            kinds = Counter(map(self._kind, layout.layers_of_stage(num_layers, pp_rank)))
            of_layers = (kinds[kind] for kind in self._layers)
            is_last = int(pp_rank == layout.pp - 1)
            passes = (is_last, is_last * (self.num_drafts - 1))[: self.num_drafts]
            counts = *of_layers, int(pp_rank == 0), int(pp_rank > 0), is_last, *passes
            if counts not in made:
                done = zip(counts, priced, strict=True)
                made[counts] = ScenarioTimes.sum((num, part) for num, part in done if num)
            stages.append(made[counts])
        return stages


def price(
    profile: Profile, types: NumberTypes, terms: Terms, lists: Sequence[ExpectedStepList]
) -> list[ScenarioTimes]:
    """Times of each list of steps, in order."""
    links = LinkModel(profile)
    times = _operation_times(DeviceModel(profile), types, lists) | _transfer_times(links, lists)
    priced = []
    for of_list in lists:
        size = of_list.size
        compute, moved = np.zeros((2, 3, size))
        slowed, in_series = np.zeros(size), np.zeros(3)
        for step in of_list.steps:
            seconds = times[id(step)].bounds
            if isinstance(step, Operation):
                compute += seconds
            else:
                moved += seconds
                slowed += seconds[LIKELY] * links.contention(step).value
            if terms.execution is Execution.SERIAL:
                in_series += terms.overhead_s(step)
        num_kernels = sum(step.num_kernels for step in of_list.steps)
        priced.append(ScenarioTimes(compute, moved, slowed, num_kernels, in_series))
    return priced


def _operation_times(
    device: DeviceModel, types: NumberTypes, lists: Sequence[ExpectedStepList]
) -> dict[int, Times]:
    """Times by the id of an operation; the operations of one law are priced at once."""
    alike: defaultdict[tuple[Kind, str], list[tuple[Operation, int]]] = defaultdict(list)
    for of_list in lists:
        for step in of_list.steps:
            if isinstance(step, Operation):
                alike[step.kind, law_dtype(types, step)].append((step, of_list.size))
    found = {}
    for (kind, dtype), operations in alike.items():
        sizes = {
            name: np.concatenate([np.broadcast_to(each.sizes[name], n) for each, n in operations])
            for name in SIZES[kind]
        }
        whole = device.times(kind, dtype, sizes)
        end = 0
        for operation, num in operations:
            begin, end = end, end + num
            found[id(operation)] = whole.part(slice(begin, end))
    return found


def _transfer_times(links: LinkModel, lists: Sequence[ExpectedStepList]) -> dict[int, Times]:
    """Times by the id of a transfer; both hops of a hierarchical dispatch together."""
    by_list = [[step for step in of_list.steps if isinstance(step, Transfer)] for of_list in lists]
    transfers = [transfer for of_list in by_list for transfer in of_list]
    times = links.times_of(transfers)
    found = {id(transfer): each for transfer, each in zip(transfers, times, strict=True)}
    for of_list in by_list:
        for between, inside in forwarding_hops(of_list):
            found[id(between)], found[id(inside)] = links.forwarded(between, inside)
    return found
