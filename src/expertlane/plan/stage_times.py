"""What one micro-batch takes on each pipeline stage of a layout, over many scenarios.

A scenario is a number of alike sequences; one rank of the stage stands for all. Its steps are those
of `cost.step` over expected counts, and those of many layouts are priced together: few calls over
long arrays.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from expertlane.cost.breakdown import CAUSE_OF_TRANSFER, cause_shares
from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.execution import LIKELY, Execution, Terms
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import Profile
from expertlane.cost.laws.times import Basis, Times
from expertlane.cost.number_types import NumberTypes, PayloadBytes
from expertlane.cost.pricing import forwarding_hops, law_dtype
from expertlane.cost.step.batch_sizes import Scenarios
from expertlane.cost.step.dispatch import ExpertSteps
from expertlane.cost.step.expected_counts import ExpectedFanOut, busiest_counts, mean_counts
from expertlane.cost.step.kernel_sets import GPU_LIBRARIES
from expertlane.cost.step.layer import embedding_steps, head_steps, layer_steps
from expertlane.cost.step.operation import (
    OUTSIDE,
    SIZES,
    ExpectedTransfer,
    Floats,
    Kind,
    Operation,
)
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.cost.step.step_list import ExpectedStepList, OneRank
from expertlane.cost.timeline import bounds_of
from expertlane.spec.deployment import DispatchForm, PayloadType, is_by_node_on
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import ProjectedCause

_PLACE = {cause: place for place, cause in enumerate(ProjectedCause)}

_LayerKind = tuple[bool, int | None]  # whether dense, and the attention window


@dataclass(frozen=True, eq=False)
class ScenarioTimes:
    """What a list of steps takes, or several of them; C causes, three bounds (low, likely, high).

    Attributes:
        compute_s, transfer_s: [C, 3, S]; in the order of `ProjectedCause`.
        slowed_s: [S]; what all of these transfers would cost computing that runs beside them.
        experts_s: [S]; likely time of the grouped products of experts.
        bound_s: [S]; of the likely time, what rests on bounds alone.
        num_kernels: launches where nothing is captured in a graph.
        in_series_s: [3]; the engine's own work around steps, where all is in series.
    """

    compute_s: Floats
    transfer_s: Floats
    slowed_s: Floats
    experts_s: Floats
    bound_s: Floats
    num_kernels: int
    in_series_s: Floats

    @classmethod
    def sum(cls, parts: Iterable[tuple[int, "ScenarioTimes"]]) -> "ScenarioTimes":
        """Of some that are each done a number of times; one at least."""
        (num, first), *others = parts
        total = [num * getattr(first, each.name) for each in fields(cls)]
        for num, other in others:
            total = [
                so_far + num * getattr(other, each.name)
                for so_far, each in zip(total, fields(cls), strict=True)
            ]
        return cls(*total)


class StageSteps:
    """The steps of a layout with one dispatch form and placement.

    Args:
        mesh: of the first stage.
        fan_out: of an MoE layer's tokens.
    """

    def __init__(
        self,
        model: ModelConfig,
        types: NumberTypes,
        mesh: StageMesh,
        fan_out: ExpectedFanOut,
        form: DispatchForm,
        payload: PayloadType,
    ) -> None:
        self._model = model
        self._types = types
        self._mesh = mesh
        self._fan_out = fan_out
        self._form = form
        self._payload: PayloadType = payload
        layout = mesh.layout
        self._kinds_of_stage: list[Counter[_LayerKind]] = []
        self._layers: dict[_LayerKind, int] = {}  # the first of each kind
        for pp_rank in range(layout.pp):
            layers = layout.layers_of_stage(model.num_hidden_layers, pp_rank)
            kinds = [(model.is_dense(layer), model.window_of_layer(layer)) for layer in layers]
            self._kinds_of_stage.append(Counter(kinds))
            for kind, layer in zip(kinds, layers, strict=True):
                self._layers.setdefault(kind, layer)

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self._mesh.layout.tp

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self._model.num_hidden_layers

    @property
    def row_bytes(self) -> int:
        """Of a hidden state."""
        return self._model.hidden_size * self._types.activation_bytes

    def lists(self, part: Scenarios) -> list[ExpectedStepList]:
        """Embedding, head, each kind of layer, and a mean rank's experts; to be priced."""
        model, layout, payload = self._model, self._mesh.layout, self._payload
        rank = OneRank(self._mesh, part.size)
        by_node = is_by_node_on(layout, self._form)
        of_experts = self._fan_out, part, layout, model.num_experts_per_tok
        busiest = busiest_counts(*of_experts, by_node=by_node)

        def begun(layer: int) -> ExpectedStepList:
            return ExpectedStepList(rank, self._types, layer, GPU_LIBRARIES)

        embedding, head, mean = begun(OUTSIDE), begun(OUTSIDE), begun(0)
        embedding_steps(embedding, model, part)
        head_steps(head, model, part)
        layers = []
        for (is_dense, _), layer in self._layers.items():
            layers.append(begun(layer))
            counts = None if is_dense else busiest
            layer_steps(layers[-1], model, layer, part, counts, self._form, payload)
        width = PayloadBytes.of(payload, self._types.activation_bytes, model.hidden_size)
        ExpertSteps(mean, model, part, mean_counts(*of_experts), self._form, width).experts()
        return [embedding, head, *layers, mean]

    def stages(self, priced: Sequence[ScenarioTimes]) -> list[ScenarioTimes]:
        """[pp]; a micro-batch on each stage, from the times of `lists`.

        Stages that do the same are one object.
        """
        embedding, head, *layers, _ = priced
        last = len(self._kinds_of_stage) - 1
        made: dict[object, ScenarioTimes] = {}
        stages = []
        for place, kinds in enumerate(self._kinds_of_stage):
            key = tuple(kinds[kind] for kind in self._layers), place == 0, place == last
            if key not in made:
                parts = [(kinds[k], each) for k, each in zip(self._layers, layers, strict=True)]
                parts += [(int(place == 0), embedding), (int(place == last), head)]
                made[key] = ScenarioTimes.sum(part for part in parts if part[0])
            stages.append(made[key])
        return stages

    def imbalance_s(self, priced: Sequence[ScenarioTimes]) -> list[Floats]:
        """[pp], [S] each; what a rank with a mean load does not spend on experts.

        Those of stages with the same layers are one array.
        """
        _, _, *layers, mean = priced
        of_layer = {
            kind: np.maximum(each.experts_s - mean.experts_s, 0)
            for kind, each in zip(self._layers, layers, strict=True)
            if not kind[0]
        }
        none = np.zeros_like(mean.experts_s)
        made: dict[tuple[int, ...], Floats] = {}
        found = []
        for kinds in self._kinds_of_stage:
            key = tuple(kinds[kind] for kind in self._layers)
            if key not in made:
                parts = (kinds[kind] * seconds for kind, seconds in of_layer.items())
                made[key] = sum(parts, none)
            found.append(made[key])
        return found


def price(
    profile: Profile, types: NumberTypes, terms: Terms, lists: Sequence[ExpectedStepList]
) -> list[ScenarioTimes]:
    """Times of each list of steps, in order."""
    links = LinkModel(profile)
    times = _operation_times(DeviceModel(profile), types, lists) | _transfer_times(links, lists)
    priced = []
    for of_list in lists:
        size = of_list.mesh.size
        compute, moved = np.zeros((2, len(ProjectedCause), 3, size))
        slowed, experts, bound = np.zeros((3, size))
        in_series = np.zeros(3)
        for step in of_list.steps:
            seconds = bounds_of(times[id(step)])
            bound += seconds[LIKELY] * (times[id(step)].basis is Basis.BOUND)
            if isinstance(step, Operation):
                dtype = law_dtype(types, step)
                for cause, share in cause_shares(step, profile.device, dtype, types.weights):
                    compute[_PLACE[cause]] += seconds * share
                experts += seconds[LIKELY] * (step.kind is Kind.EXPERTS)
            else:
                moved[_PLACE[CAUSE_OF_TRANSFER[step.stage]]] += seconds
                slowed += seconds[LIKELY] * links.contention(step).value
            if terms.execution is Execution.SERIAL:
                in_series += terms.overhead_s(step)
        num_kernels = sum(step.num_kernels for step in of_list.steps)
        priced.append(ScenarioTimes(compute, moved, slowed, experts, bound, num_kernels, in_series))
    return priced


def _operation_times(
    device: DeviceModel, types: NumberTypes, lists: Sequence[ExpectedStepList]
) -> dict[int, Times]:
    """By the id of an operation; those of one law at once."""
    alike: defaultdict[tuple[Kind, str], list[tuple[Operation, int]]] = defaultdict(list)
    for of_list in lists:
        for step in of_list.steps:
            if isinstance(step, Operation):
                alike[step.kind, law_dtype(types, step)].append((step, of_list.mesh.size))
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
    """By the id of a transfer; both hops of a hierarchical dispatch together."""
    by_list = [
        [step for step in of_list.steps if isinstance(step, ExpectedTransfer)] for of_list in lists
    ]
    transfers = [transfer for of_list in by_list for transfer in of_list]
    times = links.times_of(transfers)
    found = {id(transfer): each for transfer, each in zip(transfers, times, strict=True)}
    for of_list in by_list:
        for between, inside in forwarding_hops(of_list):
            found[id(between)], found[id(inside)] = links.forwarded(between, inside)
    return found
