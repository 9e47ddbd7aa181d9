"""What one micro-batch takes on each pipeline stage of a layout, over many scenarios."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from expertlane.cost.number_types import NumberTypes, PayloadBytes
from expertlane.cost.step.attention import attention_steps
from expertlane.cost.step.layer import (
    embedding_steps,
    head_steps,
    norm_steps,
    router_steps,
    shared_expert_steps,
)
from expertlane.cost.step.mlp import mlp_steps
from expertlane.cost.step.operation import OUTSIDE, Floats
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.plan.expected_dispatch import ExpectedDispatch
from expertlane.plan.prices import Priced
from expertlane.plan.scenario import Scenarios, ScenarioSteps
from expertlane.plan.spread import Spread
from expertlane.spec.deployment import DispatchForm, PayloadType
from expertlane.spec.model import ModelConfig

_LayerKind = tuple[bool, int | None]  # whether dense, and the attention window


class StagePlan:
    """The steps of a layout with one dispatch form and placement.

    Args:
        mesh: of the first stage.
        spread: of an MoE layer's tokens; None for a model without experts in any layer.
    """

    def __init__(
        self,
        model: ModelConfig,
        types: NumberTypes,
        mesh: StageMesh,
        spread: Spread,
        form: DispatchForm,
        payload: PayloadType,
    ) -> None:
        self._model = model
        self._types = types
        self._mesh = mesh
        self._spread = spread
        self._form = form
        self._payload = PayloadBytes.of(payload, types.activation_bytes, model.hidden_size)
        layout = mesh.layout
        self._kinds_of_stage = [
            Counter(
                (model.is_dense(layer), model.window_of_layer(layer))
                for layer in layout.layers_of_stage(model.num_hidden_layers, pp_rank)
            )
            for pp_rank in range(layout.pp)
        ]
        kinds = (kind for of_stage in self._kinds_of_stage for kind in of_stage)
        self._kinds: list[_LayerKind] = list(dict.fromkeys(kinds))

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

    def lists(self, part: Scenarios) -> list[ScenarioSteps]:
        """Embedding, head, each kind of layer, and a mean rank's experts; to be priced."""
        outside = [ScenarioSteps(self._mesh, part.size, self._types, OUTSIDE) for _ in range(2)]
        embedding_steps(outside[0], self._model, part)
        head_steps(outside[1], self._model, part)
        layers = [self._layer(kind, part) for kind in self._kinds]
        return [*outside, *layers, self._mean_experts(part)]

    def _layer(self, kind: _LayerKind, part: Scenarios) -> ScenarioSteps:
        is_dense, window = kind
        model = self._model
        out = ScenarioSteps(self._mesh, part.size, self._types)
        attention_steps(out, model, window, part)
        if is_dense:
            norm_steps(out, model, part)
            mlp_steps(out, model, model.intermediate_size, part)
            return out
        router_steps(out, model, part)
        self._dispatch(out, part).put_down()
        shared_expert_steps(out, model, part)
        return out

    def _dispatch(self, out: ScenarioSteps, part: Scenarios) -> ExpectedDispatch:
        return ExpectedDispatch(out, self._model, part, self._spread, self._form, self._payload)

    def _mean_experts(self, part: Scenarios) -> ScenarioSteps:
        out = ScenarioSteps(self._mesh, part.size, self._types)
        self._dispatch(out, part).put_down_mean_experts()
        return out

    def stages(self, priced: Sequence[Priced]) -> list[Priced]:
        """[pp]; a micro-batch on each stage, from the prices of `lists`.

        Stages that do the same are one object.
        """
        embedding, head, *layers, _ = priced
        last = len(self._kinds_of_stage) - 1
        made: dict[object, Priced] = {}
        stages = []
        for place, kinds in enumerate(self._kinds_of_stage):
            key = tuple(kinds[kind] for kind in self._kinds), place == 0, place == last
            if key not in made:
                parts = [(kinds[k], each) for k, each in zip(self._kinds, layers, strict=True)]
                parts += [(int(place == 0), embedding), (int(place == last), head)]
                made[key] = Priced.sum(part for part in parts if part[0])
            stages.append(made[key])
        return stages

    def imbalance_s(self, priced: Sequence[Priced]) -> list[Floats]:
        """[pp], [S] each; what a rank with a mean load does not spend on experts.

        Those of stages with the same layers are one array.
        """
        _, _, *layers, mean = priced
        of_layer = {
            kind: np.maximum(each.experts_s - mean.experts_s, 0)
            for kind, each in zip(self._kinds, layers, strict=True)
            if not kind[0]
        }
        none = np.zeros_like(mean.experts_s)
        made: dict[tuple[int, ...], Floats] = {}
        found = []
        for kinds in self._kinds_of_stage:
            key = tuple(kinds[kind] for kind in self._kinds)
            if key not in made:
                parts = (kinds[kind] * seconds for kind, seconds in of_layer.items())
                made[key] = sum(parts, none)
            found.append(made[key])
        return found
