"""Whole steps of a small model: what the engine adds to its operations, and its driver to steps.

Steps are measured and priced without any such overhead. On one rank, what a stage took beyond its
operations' laws is divided among them; what remains beyond all stages is the driver's. On several
ranks, what the steps took beyond all that is divided among their transfers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import numpy.typing as npt

from expertlane.balance.deployed import placements_of
from expertlane.cost.execution import DRIVER_S, OF_TRANSFERS, OVERHEAD_S, Execution, Terms
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.operation import Operation, Transfer
from expertlane.cost.pricing import Pricing
from expertlane.cost.profile import Profile, Term
from expertlane.cost.program import ProgramBuilder
from expertlane.cost.routing import UniformRouting
from expertlane.cost.runner import CostRunner
from expertlane.cost.times import Basis
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.pool import RankPool
from expertlane.experiment.timed_phases import BLOCK_SIZE, limits_for, phase_times, run_batch
from expertlane.schedule.drive import FinishedStep
from expertlane.schedule.limits import Limits
from expertlane.schedule.plan import HandleT, Runner
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.dispatch_table import DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase, Stage

Floats = npt.NDArray[np.float64]

_PROMPT_LEN, _OUTPUT_LEN = 48, 16
_SPREAD = 10, 90  # percentiles of the rounds that are a term's bounds
MODEL = ModelConfig(
    name="calibrate",
    num_hidden_layers=4,
    hidden_size=256,
    num_attention_heads=4,
    head_dim=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    vocab_size=1024,
    max_position_embeddings=_PROMPT_LEN + _OUTPUT_LEN,
    hidden_act="silu",
    gated_mlp=True,
)


@dataclass(frozen=True, eq=False)
class StepSample:
    """Decode steps of one deployment with so many sequences a data-parallel rank, in one round.

    Attributes:
        step_s: from the end of one to the end of the next, not recorded.
        stage_s: [num_stages]; of its first rank, recorded.
    """

    deployment: Deployment
    num_seqs: int
    step_s: float
    stage_s: Floats


def deployments_for(num_ranks: int) -> list[Deployment]:
    """One rank alone, and all of them in every way of sending."""
    found = [Deployment("one rank", Layout())]
    if num_ranks > 1:
        all_ranks = Layout(dp=num_ranks, ep=num_ranks)
        found.append(Deployment("all-to-all", all_ranks))
        found.append(Deployment("all-gather", all_ranks, Options(dispatch="all_gather")))
        found.append(Deployment("sharded", Layout(dp=num_ranks)))
    return found


def measure_steps(pool: RankPool, num_ranks: int, step_seqs: Sequence[int]) -> list[StepSample]:
    """One round: the steps of every deployment, with each number of sequences a rank."""
    samples = []
    for deployment in deployments_for(num_ranks):
        limits = _limits(deployment, max(step_seqs))
        runner = ModelRunner(pool, MODEL, deployment, limits, seed=0, ranks_per_node=num_ranks)
        for num_seqs in step_seqs:
            _run(runner, deployment, num_seqs)  # warms up
            step_s = phase_times(_run(runner, deployment, num_seqs)).decode_s
            recorded = _decodes(_run(runner, deployment, num_seqs, record=True))
            stage_s = [step.outcome.records[0].wall_s.sum(axis=(0, 1)) for step in recorded]
            samples.append(StepSample(deployment, num_seqs, step_s, np.median(stage_s, axis=0)))
    return samples


def _limits(deployment: Deployment, num_seqs: int) -> Limits:
    num_requests = num_seqs * deployment.layout.dp
    return limits_for(deployment, num_requests, _PROMPT_LEN + _OUTPUT_LEN, MODEL.vocab_size)


def _run(
    runner: Runner[HandleT], deployment: Deployment, num_seqs: int, *, record: bool = False
) -> list[FinishedStep]:
    num_requests = num_seqs * deployment.layout.dp
    prompts = np.arange(num_requests * _PROMPT_LEN).reshape(num_requests, -1) * 7
    return run_batch(
        runner,
        deployment,
        _limits(deployment, num_seqs),
        prompts % MODEL.vocab_size,
        _OUTPUT_LEN,
        record=record,
    )


def _decodes(steps: Sequence[FinishedStep]) -> list[FinishedStep]:
    return [step for step in steps if step.plan.phase is Phase.DECODE]


def overhead_terms(
    rounds: Sequence[Sequence[StepSample]], profile: Profile, dtype: str, origin: str
) -> dict[str, Term]:
    """The terms of the timeline, with the spread over rounds as bounds.

    Args:
        rounds: [num_rounds][num_samples].
        profile: has all laws.
        dtype: the ranks'.
    """
    values: dict[str, list[float]] = {}
    for samples in rounds:
        for name, value in _solve(samples, profile, dtype).items():
            values.setdefault(name, []).append(value)
    return {
        name: Term(
            value=median(found),
            low=float(np.percentile(found, _SPREAD[0])),
            high=float(np.percentile(found, _SPREAD[1])),
            basis=Basis.MEASURED,
            origin=origin,
        )
        for name, found in values.items()
    }


def _solve(samples: Sequence[StepSample], profile: Profile, dtype: str) -> dict[str, float]:
    alone = [each for each in samples if each.deployment.layout.world_size == 1]
    together = [each for each in samples if each.deployment.layout.world_size > 1]
    extra_s, num_steps = np.zeros(len(Stage)), np.zeros(len(Stage))
    for sample in alone:
        priced = _Priced(sample, profile, dtype, {})
        busy = np.arange(len(Stage)) != Stage.IDLE
        extra_s += np.where(busy, sample.stage_s - priced.stage_s, 0.0)
        num_steps += priced.num_steps
    found = {
        f"{OVERHEAD_S}.{stage.label}": max(0.0, float(extra_s[stage] / num_steps[stage]))
        for stage in Stage
        if num_steps[stage]
    }
    busy_s = [float(np.delete(each.stage_s, Stage.IDLE).sum()) for each in alone]
    found[DRIVER_S] = max(
        0.0, median(each.step_s - busy for each, busy in zip(alone, busy_s, strict=True))
    )
    found[OVERHEAD_S] = max(0.0, float(extra_s.sum() / num_steps.sum()))
    rest_s, num_transfers = 0.0, 0
    for sample in together:
        priced = _Priced(sample, profile, dtype, found)
        rest_s += sample.step_s - priced.step_s
        num_transfers += priced.num_transfers
    if num_transfers:
        found[f"{OVERHEAD_S}.{OF_TRANSFERS}"] = max(0.0, rest_s / num_transfers)
    return found


class _Priced:
    """A sample's step on the virtual clock.

    Attributes:
        stage_s, num_steps: [num_stages]; of its first rank; operations, not transfers.
        num_transfers: of a rank.
    """

    def __init__(
        self, sample: StepSample, profile: Profile, dtype: str, overheads: dict[str, float]
    ) -> None:
        deployment, layout = sample.deployment, sample.deployment.layout
        terms = {
            name: Term(value, value, value, Basis.MEASURED, "found so far")
            for name, value in ({OVERHEAD_S: 0.0, DRIVER_S: 0.0} | overheads).items()
        } | {f"{OVERHEAD_S}.{OF_TRANSFERS}": Term(0.0, 0.0, 0.0, Basis.MEASURED, "not known yet")}
        profile = replace(profile, terms={**profile.terms, **terms})
        types = NumberTypes.all_of(dtype)  # type: ignore[arg-type]
        options = deployment.options
        assert options.dispatch != "auto", "none is timed here"
        builder = ProgramBuilder(
            MODEL,
            layout,
            placements_of(MODEL, layout, options),
            types=types,
            dispatch=DispatchTable.fixed(options.dispatch),
            ranks_per_node=layout.world_size,
            block_size=BLOCK_SIZE,
        )
        routing = UniformRouting(MODEL.num_experts, MODEL.num_experts_per_tok)
        pricing = Pricing(profile, types)
        runner = CostRunner(
            MODEL, layout, builder, routing, pricing, Terms.of(profile, Execution.SERIAL)
        )
        steps = _run(runner, deployment, sample.num_seqs, record=True)
        self.step_s = phase_times(steps).decode_s
        last = _decodes(steps)[-1]
        self.stage_s = last.outcome.records[0].wall_s.sum(axis=(0, 1))
        self.num_steps = np.zeros(len(Stage))
        self.num_transfers = 0
        ((stage,),) = builder.build(last.plan, routing).stages
        for step in (step for part in stage.parts for step in part.steps()):
            self.num_steps[step.stage] += isinstance(step, Operation)
            self.num_transfers += isinstance(step, Transfer)
