"""Records of deployments, and of pairs that were measured in turns, from their steps."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.balance.holding import Holding, placements_of
from expertlane.engine.elastic.rebalancing import Rebalance, Rebalancer, StepLoad
from expertlane.engine.ranks.commands import HeldBytes
from expertlane.results.estimate import (
    jackknife_difference,
    jackknife_interval,
    median_interval,
)
from expertlane.results.metrics import find_bottleneck
from expertlane.results.record import (
    DeploymentRecord,
    HeldRecord,
    PairRecord,
    RebalanceRecord,
    Source,
    StepsRecord,
)
from expertlane.results.step_record import StepRecord
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase


def measured_record(
    deployment: Deployment,
    model: ModelConfig,
    phases: Sequence[StepsRecord],
    held: Sequence[HeldBytes],
    tokens: npt.NDArray[np.int64],
    source: Source = "measured",
    **parts: Any,
) -> DeploymentRecord:
    """A deployment's record.

    Args:
        phases: prefill, and decode if there was any.
        held: [num_ranks]; what each rank has allocated.
        tokens: [num_sequences, output_len]; all generated tokens.
        parts: further fields of the record.

    Raises:
        ValueError: `held` is not of the layout's ranks.
    """
    layout = deployment.layout
    if len(held) != layout.world_size:
        raise ValueError(f"memory of {len(held)} ranks for layout {layout}")
    placements = placements_of(model, layout, deployment.options)

    def num_experts(rank: int) -> tuple[int, ...]:
        experts = Holding(model, layout, rank, placements).experts
        return tuple(len(experts(layer)) for layer in range(model.num_hidden_layers))

    return DeploymentRecord(
        name=deployment.name,
        layout=layout,
        options=deployment.options,
        source=source,
        is_baseline=deployment.is_baseline,
        steps=tuple(phases),
        held=tuple(
            HeldRecord(rank, num_experts(rank), each.weight_bytes, each.kv_bytes)
            for rank, each in enumerate(held)
        ),
        bottleneck=find_bottleneck(layout, phases[-1]),
        tokens_sha256=hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(),
        **parts,
    )


def traced_steps(
    options: Options, measured: Mapping[Phase, Sequence[StepRecord]]
) -> list[StepRecord]:
    """A prefill and a decode step with events, for traces.

    Of those with most tokens the one that takes about as long as most did; of micro-batches that
    rotate, as many steps of each as make a round.
    """
    is_rotating = options.micro_batch_schedule == "rotating"
    num_kept = options.num_micro_batches if is_rotating else 1
    kept: list[StepRecord] = []
    for of_phase in measured.values():
        traced = [step for step in of_phase if step.records[0].events is not None]
        if traced:
            kept += _typical(traced, of_phase, num_kept)
    return kept


def _typical(
    steps: Sequence[StepRecord], measured: Sequence[StepRecord], num_kept: int
) -> Sequence[StepRecord]:
    """`num_kept` steps in a row: of those with most tokens, those nearest to the usual time."""
    rows = [steps[first : first + num_kept] for first in range(len(steps) - num_kept + 1)]
    if not rows:
        return steps

    def num_tokens(row: Sequence[StepRecord]) -> int:
        return sum(step.num_tokens for step in row)

    def seconds(row: Sequence[StepRecord]) -> float:
        return row[-1].finished_s - row[0].submitted_s

    full = [row for row in rows if num_tokens(row) == max(map(num_tokens, rows))]
    usual = [measured[first : first + num_kept] for first in range(len(measured) - num_kept + 1)]
    alike = [row for row in usual if num_tokens(row) == num_tokens(full[0])] or full
    usual_s = median(map(seconds, alike))
    return min(full, key=lambda row: abs(seconds(row) - usual_s))


def rebalance_records(rebalancer: Rebalancer) -> tuple[RebalanceRecord, ...]:
    """Records of a run's rebalances, with the loads seen before and after."""
    return tuple(_rebalance(each, rebalancer) for each in rebalancer.decisions)


def _rebalance(taken: Rebalance, rebalancer: Rebalancer) -> RebalanceRecord:
    num_steps = taken.decision.num_steps
    own = [each for each in rebalancer.loads if each.replica == taken.replica]
    before = [each for each in own if each.step < taken.step][-num_steps:]
    after: list[StepLoad] = []
    if taken.switched is not None:
        later = [each for each in rebalancer.decisions if each.replica == taken.replica]
        ends = [each.switched or 0 for each in later]
        until = min((end for end in ends if end > taken.switched), default=own[-1].step + 1)
        after = [each for each in own if taken.switched <= each.step < until][:num_steps]
    return RebalanceRecord(
        replica=taken.replica,
        step=taken.step,
        switched=taken.switched,
        gain_s=taken.decision.gain_s,
        cost_s=taken.decision.cost_s,
        num_bytes=taken.decision.num_bytes,
        predicted_before=taken.predicted_before,
        predicted_after=taken.predicted_after,
        load_before=_load(before),
        load_after=_load(after) if after else None,
        experts_s_before=_experts_s(before),
        experts_s_after=_experts_s(after) if after else None,
        paid_s=taken.paid_s,
    )


def _load(steps: Sequence[StepLoad]) -> float:
    return sum(each.most for each in steps) / sum(each.mean for each in steps)


def _experts_s(steps: Sequence[StepLoad]) -> float:
    return sum(each.experts_s for each in steps) / len(steps)


@dataclass(frozen=True)
class Repetitions:
    """Throughput and time by cause of one deployment's repetitions.

    Attributes:
        tps: [n]; of each repetition, or of all but each.
        causes_s: [n]; seconds of a step by cause, of the same repetitions.
    """

    tps: tuple[float, ...]
    causes_s: tuple[dict[str, float], ...]

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        return median(sum(each.values()) for each in self.causes_s)

    @classmethod
    def of(cls, runs: Sequence[StepsRecord]) -> "Repetitions":
        """From the records of single repetitions."""
        return cls(tuple(each.tps.value for each in runs), tuple(e.breakdown_s for e in runs))

    def without_each(self, around: "Repetitions | None" = None) -> "Repetitions":
        """The means over all repetitions but one, for each one.

        Args:
            around: where a repetition takes something of the one after it (`cost.virtual`): what
                stands for the two that one takes part in when it is left out.
        """
        num = len(self.tps)
        if num < 2:
            return self

        def without(values: Sequence[float], others: Sequence[float] | None) -> list[float]:
            total = sum(values)
            return [
                (total - values[at] + (others[at] - values[at - 1] if others else 0)) / (num - 1)
                for at in range(num)
            ]

        def token_s(of: Repetitions) -> list[float]:
            return [1 / each for each in of.tps]

        def of_cause(of: Repetitions, cause: str) -> list[float]:
            return [each[cause] for each in of.causes_s]

        seconds = without(token_s(self), token_s(around) if around else None)
        by_cause = {
            cause: without(of_cause(self, cause), of_cause(around, cause) if around else None)
            for cause in self.causes_s[0]
        }
        causes_s = ({cause: of[at] for cause, of in by_cause.items()} for at in range(num))
        return Repetitions(tuple(1 / each for each in seconds), tuple(causes_s))


def pair_record(
    names: tuple[str, str],
    phase: Phase,
    repeated: tuple[Repetitions, Repetitions],
    steps: tuple[StepsRecord, StepsRecord] | None = None,
) -> PairRecord:
    """The pair, from repetitions that were measured in turns.

    In virtual time from all repetitions together, and from all but each.

    Args:
        names: the deployment that the first sentence is about, and the other.
        repeated: both deployments' repetitions; in virtual time all but each.
        steps: in virtual time, all repetitions of each deployment.
    """
    one, other = repeated
    ratios = [a / b for a, b in zip(one.tps, other.tps, strict=True)]
    causes = {
        cause: [a[cause] - b[cause] for a, b in zip(one.causes_s, other.causes_s, strict=True)]
        for cause in one.causes_s[0]
    }
    if steps is None:
        ratio, step_s = median_interval(ratios), (one.step_s, other.step_s)
        causes_s = {cause: median_interval(each) for cause, each in causes.items()}
    else:
        first, second = steps
        ratio = jackknife_interval(first.tps.value / second.tps.value, ratios)
        step_s = first.round_s.value, second.round_s.value
        causes_s = {
            cause: jackknife_difference(
                first.breakdown_s[cause] - second.breakdown_s[cause], causes[cause]
            )
            for cause in first.breakdown_s
        }
    source: Source = "measured" if steps is None else "virtual"
    return PairRecord(source, *names, phase, len(one.tps), ratio, *step_s, causes_s)
