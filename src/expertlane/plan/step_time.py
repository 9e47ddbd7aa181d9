"""Steps of a deployment from what micro-batches take on its stages: overlap, pipeline, launches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertlane.cost.laws.execution import LIKELY, Execution, Terms
from expertlane.cost.step.operation import Floats, Ints
from expertlane.plan.stage_times import ScenarioTimes
from expertlane.spec.deployment import MicroBatchSchedule
from expertlane.spec.names import ProjectedCause

_CAUSES = list(ProjectedCause)
_EXPERTS = [
    _CAUSES.index(cause) for cause in (ProjectedCause.EXPERT_COMPUTE, ProjectedCause.WEIGHT_READS)
]
_LOW, _HIGH = 0, 2


@dataclass(frozen=True, eq=False)
class StepEstimates:
    """Steps of N sizes; C causes.

    Attributes:
        seconds: [3, N]; low, likely, high. Where micro-batches rotate, of a round in which each
            went one step on.
        by_cause_s: [C, N]; the likely seconds, mean over the ranks of the replica.
        bound_s: [N]; of the likely seconds, what rests on bounds alone.
    """

    seconds: Floats
    by_cause_s: Floats
    bound_s: Floats


@dataclass(frozen=True)
class Pipelining:
    """How a step is cut.

    Attributes:
        overlap: whether a micro-batch runs in two halves.
    """

    overlap: bool = False
    num_micro_batches: int = 1
    schedule: MicroBatchSchedule = "drained"

    @property
    def num_parts(self) -> int:
        """Parts that a data-parallel rank's batch is cut into."""
        return self.num_micro_batches * (1 + self.overlap)


def step_estimates(
    stages: Sequence[ScenarioTimes],
    imbalance_s: Sequence[Floats],
    hand_over_s: Floats,
    places: Ints,
    terms: Terms,
    how: Pipelining,
    num_layers: int,
    num_ranks: int,
) -> StepEstimates:
    """Put steps together.

    A drained step of m micro-batches takes the way through all stages and m - 1 times the slowest;
    a round of m rotating ones takes m times the slowest, or the way through all if that is longer.

    Args:
        stages: [pp]; a part on each.
        imbalance_s: [pp], [S] each.
        hand_over_s: [3, S]; of a part, to the next stage.
        places: [N]; the scenario of each size's parts.
        num_layers: of the model.
        num_ranks: of a replica.
    """
    num_stages, m = len(stages), how.num_micro_batches
    alike: dict[tuple[int, int], StepEstimates] = {}  # stages that do the same are one object
    batches = []
    for each, of_stage in zip(stages, imbalance_s, strict=True):
        key = id(each), id(of_stage)
        if key not in alike:
            alike[key] = _micro_batch(
                each, of_stage[places], places, terms, how.overlap, num_layers / num_stages
            )
        batches.append(alike[key])
    seconds = np.stack([each.seconds for each in batches])  # [pp, 3, N]
    sent_s = hand_over_s[:, places] * ((1 + how.overlap) * (num_stages - 1))
    through, slowest = seconds.sum(axis=0) + sent_s, seconds.max(axis=0)
    driver_s = terms.step_s(num_ranks)[:, None]
    if how.schedule == "rotating":
        total = np.maximum(m * slowest, through) + driver_s
    else:
        total = through + (m - 1) * slowest + driver_s
    by_cause = (m / num_stages) * np.sum([each.by_cause_s for each in batches], axis=0)
    by_cause[_CAUSES.index(ProjectedCause.ENGINE)] += driver_s[LIKELY]
    if num_stages > 1:
        waits = total[LIKELY] - by_cause.sum(axis=0)
        own = np.minimum(waits, sent_s[LIKELY] * m / num_stages)
        by_cause[_CAUSES.index(ProjectedCause.HAND_OVER)] += own
        by_cause[_CAUSES.index(ProjectedCause.PIPELINE_BUBBLE)] += waits - own
    bound_s = (m / num_stages) * np.sum([each.bound_s for each in batches], axis=0)
    return StepEstimates(total, by_cause, bound_s)


def _micro_batch(
    priced: ScenarioTimes,
    imbalance_s: Floats,
    places: Ints,
    terms: Terms,
    overlap: bool,
    layers_of_stage: float,
) -> StepEstimates:
    """Operations and transfers in turn, or two halves of them side by side; on one stage."""
    halves = 1 + overlap
    compute = halves * priced.compute_s[:, :, places]
    transfer = halves * priced.transfer_s[:, :, places]
    computing, moving = compute.sum(axis=0), transfer.sum(axis=0)  # [3, N]
    seconds = computing + moving
    slowed = np.zeros(len(places))
    if overlap:
        # The share that transfers take of computing beside them, mean over transfers.
        share = halves * priced.slowed_s[places] / np.maximum(moving[LIKELY], 1e-12)
        slowed = share * np.minimum(moving[LIKELY], computing[LIKELY])
        ramp = moving[LIKELY] / halves / max(layers_of_stage, 1)  # the first layer's hides nothing
        beside = np.maximum(moving[LIKELY], computing[LIKELY] + slowed) + ramp
        seconds[LIKELY] = np.minimum(beside, seconds[LIKELY])
        seconds[_LOW] = np.maximum(computing[_LOW], moving[_LOW])
        slowed = np.minimum(slowed, seconds[LIKELY] - computing[LIKELY])
    by_cause = compute[:, LIKELY]
    exposed = np.maximum(seconds[LIKELY] - computing[LIKELY] - slowed, 0)
    by_cause = by_cause + transfer[:, LIKELY] * (exposed / np.maximum(moving[LIKELY], 1e-12))
    by_cause[_CAUSES.index(ProjectedCause.CONTENTION)] += slowed
    _move_to_imbalance(by_cause, halves * imbalance_s)
    launched = _launched(seconds, halves * priced.num_kernels, halves * priced.in_series_s, terms)
    launch = launched[LIKELY] - by_cause.sum(axis=0)
    by_cause[_CAUSES.index(ProjectedCause.LAUNCH)] += np.maximum(launch, 0)
    return StepEstimates(launched, by_cause, halves * priced.bound_s[places])


def _move_to_imbalance(by_cause: Floats, seconds: Floats) -> None:
    """What the busiest rank spends above the mean, the others wait; mean over ranks."""
    experts = by_cause[_EXPERTS].sum(axis=0)
    share = np.minimum(seconds / np.maximum(experts, 1e-12), 1)
    by_cause[_CAUSES.index(ProjectedCause.IMBALANCE)] += share * experts
    by_cause[_EXPERTS] *= 1 - share


def _launched(seconds: Floats, num_kernels: int, in_series_s: Floats, terms: Terms) -> Floats:
    """[3, N]; with what getting the work onto the device takes."""
    launch_s = terms.launch_s[:, None]
    match terms.execution:
        case Execution.EAGER:
            return np.maximum(seconds, num_kernels * launch_s)
        case Execution.GRAPH:
            return seconds + launch_s
        case Execution.SERIAL:
            return seconds + in_series_s[:, None]
