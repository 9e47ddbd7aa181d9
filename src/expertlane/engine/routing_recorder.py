"""A runner that keeps which experts each token chose."""

from collections.abc import Sequence
from typing import Generic

import numpy as np
import numpy.typing as npt

from expertlane.balance.trace import RoutingTrace, RoutingTraceWriter
from expertlane.errors import UserError
from expertlane.schedule.plan import HandleT, Runner, StepOutcome, StepPlan
from expertlane.spec.model import ModelConfig


class RoutingRecorder(Generic[HandleT]):
    """Passes plans on to `runner`; implements `schedule.plan.Runner`.

    The plans must ask for `record_routing`. What is kept grows with every token; a step that was
    never collected is not in it.

    Raises:
        UserError: the model has no MoE layer.
    """

    def __init__(self, runner: Runner[HandleT], model: ModelConfig) -> None:
        self._runner = runner
        self._model = model
        self._moe_layers = moe_layers(model)
        self._step_of: dict[HandleT, int] = {}
        # [steps collected]; the step, and by rank of its replica the choices in each layer
        self._kept: list[tuple[int, list[dict[int, npt.NDArray[np.int32]]]]] = []

    def submit(self, plan: StepPlan) -> HandleT:
        """Begin a step."""
        handle = self._runner.submit(plan)
        self._step_of[handle] = plan.step
        return handle

    def first_done(self, handles: Sequence[HandleT]) -> HandleT:
        """Wait until one of the steps is finished, and say which."""
        return self._runner.first_done(handles)

    def collect(self, handle: HandleT) -> StepOutcome:
        """Wait for a step, take its outcome, and keep its routing, whole or not at all."""
        outcome = self._runner.collect(handle)
        step = self._step_of.pop(handle)
        self._kept.append((step, [record.topk_ids for record in outcome.records]))
        return outcome

    def trace(self) -> RoutingTrace:
        """The steps collected so far.

        Within a step, tokens stand by the rank of the pipeline stage that owns them, then in the
        order of computation: the same in all layers, since all stages cut a plan's batches alike.
        """
        model = self._model
        writer = RoutingTraceWriter(
            model.name, model.num_experts, model.num_experts_per_tok, self._moe_layers
        )
        for step, of_ranks in self._kept:
            for of_rank in of_ranks:
                for layer, topk_ids in of_rank.items():
                    writer.add(step, layer, topk_ids)
        return writer.trace()


def moe_layers(model: ModelConfig) -> list[int]:
    """The indices of the MoE layers, of which there must be one for routing to be recorded.

    Raises:
        UserError: there is none.
    """
    layers = [i for i in range(model.num_hidden_layers) if not model.is_dense(i)]
    if not layers:
        raise UserError(
            f"{model.name} has no routing to record: all its {model.num_hidden_layers} layers are "
            "dense"
        )
    return layers
