"""Whole steps of a small model: what the engine adds to its operations, and its driver to steps.

Steps are measured and priced without any such overhead. On one rank, what a stage took beyond its
operations' laws is divided among them; what remains beyond all stages is the driver's. On several
ranks, what steps took beyond all that is the transfers' as far as it grows with layers, and the
driver's, for each further rank, as far as it does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertlane.balance.holding import placements_of
from expertlane.calibrate.fit import term_of
from expertlane.cost.laws.profile import (
    DRIVER_PER_RANK_S,
    DRIVER_S,
    OF_TRANSFERS,
    OVERHEAD_S,
    Profile,
    Term,
    Terms,
)
from expertlane.cost.pricing import Pricing
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.runner import CostRunner
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.operation import Floats, NumberTypes, Operation, Transfer
from expertlane.cost.step.program import ProgramBuilder
from expertlane.cost.step.step_list import ENGINE, ENGINE_ON_GPUS, KernelSet
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.pool import RankPool
from expertlane.schedule.plan import HandleT, Runner
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler, FinishedStep, drive
from expertlane.spec.deployment import Deployment, DispatchTable, Options
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase, Stage

Prompts = npt.NDArray[np.int64]

BLOCK_SIZE = 16


class PhaseTimes(NamedTuple):
    """Prefill and decode seconds of a batch.

    Attributes:
        prefill_s: from the first plan to the last prompt token.
        decode_s: the median from the end of one decode step to the end of the next.
    """

    prefill_s: float
    decode_s: float


def limits_for(
    deployment: Deployment, num_requests: int, num_positions: int, vocab_size: int
) -> Limits:
    """Room for all requests of a batch at once; a data-parallel rank's prompts are one step."""
    num_seqs = -(-num_requests // deployment.layout.dp)
    return Limits(
        vocab_size,
        max_model_len=num_positions,
        num_blocks=num_seqs * -(-num_positions // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=num_seqs * num_positions,
        max_num_seqs=num_seqs,
        prefix_caching=False,
        phases_apart=True,
    )


def run_batch(
    runner: Runner[HandleT],
    deployment: Deployment,
    limits: Limits,
    prompts: Prompts,
    output_len: int,
    *,
    record: bool = False,
    record_routing: bool = False,
) -> list[FinishedStep]:
    """All steps of a batch.

    Args:
        prompts: [num_requests, prompt_len].
    """
    scheduler = ContinuousScheduler(
        deployment.layout, deployment.options, limits, record=record, record_routing=record_routing
    )
    for number, prompt in enumerate(prompts):
        scheduler.add(Request(str(number), prompt, max_tokens=output_len))
    return list(drive(scheduler, runner))


def phase_times(steps: Sequence[FinishedStep]) -> PhaseTimes:
    """Times of a batch whose phases are apart, and that decodes for two steps or more."""
    by_phase = {
        phase: [step.outcome for step in steps if step.plan.phase is phase] for phase in Phase
    }
    prefill, decode = by_phase[Phase.PREFILL], by_phase[Phase.DECODE]
    ends = [max(each.finished_s for each in prefill), *(each.finished_s for each in decode)]
    return PhaseTimes(
        prefill_s=ends[0] - prefill[0].submitted_s, decode_s=median(np.diff(ends[1:]).tolist())
    )


_PROMPT_LEN, _OUTPUT_LEN = 48, 16
_MODEL = ModelConfig(
    name="calibrate",
    num_hidden_layers=1,
    hidden_size=512,
    num_attention_heads=8,
    head_dim=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=512,
    vocab_size=1024,
    max_position_embeddings=_PROMPT_LEN + _OUTPUT_LEN,
    hidden_act="silu",
    gated_mlp=True,
)


@dataclass(frozen=True, eq=False)
class StepSample:
    """Decode steps of a deployment, with `num_seqs` sequences a data-parallel rank, in one round.

    Attributes:
        num_layers: layers of the small model.
        step_s: from the end of one to the end of the next, not recorded.
        stage_s: [num_stages]; of its first rank: shares of a recorded step, in `step_s`.
    """

    deployment: Deployment
    num_layers: int
    num_seqs: int
    step_s: float
    stage_s: Floats


def deployments_for(num_ranks: int) -> list[Deployment]:
    """One rank alone, and all of them with every dispatch form; a GPU launches kernel by kernel."""
    eager = Options(cuda_graphs=False)
    found = [Deployment("one rank", Layout(), eager)]
    if num_ranks > 1:
        all_ranks = Layout(dp=num_ranks, ep=num_ranks)
        modes = Options(dispatch="auto").modes(all_ranks, num_ranks)
        found += [
            Deployment(str(mode), all_ranks, replace(eager, dispatch=mode.form)) for mode in modes
        ]
        found.append(Deployment("sharded", Layout(dp=num_ranks), eager))
    return found


def measure_steps(
    pool: RankPool, num_ranks: int, step_seqs: Sequence[int], step_layers: tuple[int, int]
) -> list[StepSample]:
    """One round: the steps of every deployment, with each number of sequences a rank."""
    samples = []
    for deployment in deployments_for(num_ranks):
        limits = _limits(deployment, max(step_seqs))
        config = EngineConfig(
            layout=deployment.layout, options=deployment.options, ranks_per_node=num_ranks
        )
        for model, num_seqs in product(_models(deployment, step_layers), step_seqs):
            runner = ModelRunner(pool, model, config, limits)
            _run(runner, deployment, num_seqs)  # warms up
            step_s = phase_times(_run(runner, deployment, num_seqs)).decode_s
            recorded = _run(runner, deployment, num_seqs, record=True)
            of_steps = [
                step.outcome.records[0].wall_s.sum(axis=(0, 1)) for step in _decodes(recorded)
            ]
            # Recording slows a step; without it, stages and what is between have the same shares.
            share = step_s / phase_times(recorded).decode_s
            stage_s = share * np.median(of_steps, axis=0)
            samples.append(
                StepSample(deployment, model.num_hidden_layers, num_seqs, step_s, stage_s)
            )
    return samples


def _models(deployment: Deployment, step_layers: tuple[int, int]) -> list[ModelConfig]:
    """Models to measure: several ranks take two depths, to tell transfers from steps."""
    if deployment.layout.world_size == 1:
        return [replace(_MODEL, num_hidden_layers=step_layers[1])]
    return [replace(_MODEL, num_hidden_layers=num) for num in step_layers]


def _limits(deployment: Deployment, num_seqs: int) -> Limits:
    num_requests = num_seqs * deployment.layout.dp
    return limits_for(deployment, num_requests, _PROMPT_LEN + _OUTPUT_LEN, _MODEL.vocab_size)


def _run(
    runner: Runner[HandleT], deployment: Deployment, num_seqs: int, *, record: bool = False
) -> list[FinishedStep]:
    num_requests = num_seqs * deployment.layout.dp
    prompts = np.arange(num_requests * _PROMPT_LEN).reshape(num_requests, -1) * 7
    return run_batch(
        runner,
        deployment,
        _limits(deployment, num_seqs),
        prompts % _MODEL.vocab_size,
        _OUTPUT_LEN,
        record=record,
    )


def _decodes(steps: Sequence[FinishedStep]) -> list[FinishedStep]:
    return [step for step in steps if step.plan.phase is Phase.DECODE]


def overhead_terms(
    rounds: Sequence[Sequence[StepSample]], profile: Profile, dtype: str, origin: str
) -> dict[str, Term]:
    """The terms of the timeline from the medians of the rounds, with their spread as bounds.

    Args:
        rounds: [num_rounds][num_samples].
        profile: has all laws.
        dtype: the ranks'.
    """
    medians = [
        replace(
            of_rounds[0],
            step_s=median(each.step_s for each in of_rounds),
            stage_s=np.median([each.stage_s for each in of_rounds], axis=0),
        )
        for of_rounds in zip(*rounds, strict=True)
    ]
    priced = [_StepPrices(sample, profile, dtype) for sample in medians]
    likely = _solve(medians, priced)
    spread = [_solve(samples, priced) for samples in rounds]
    terms = {}
    for name, value in likely.items():
        found = term_of(np.array([each[name] for each in spread]), origin)
        terms[name] = replace(
            found, value=value, low=min(found.low, value), high=max(found.high, value)
        )
    return terms


def _solve(samples: Sequence[StepSample], priced: "Sequence[_StepPrices]") -> dict[str, float]:
    """The terms that explain what samples took beyond what they are priced at without any."""
    extra_s, num_steps, driver_s = np.zeros(len(Stage)), np.zeros(len(Stage)), []
    busy = np.arange(len(Stage)) != Stage.IDLE
    for sample, known in zip(samples, priced, strict=True):
        if sample.deployment.layout.world_size == 1:
            extra_s += np.where(busy, sample.stage_s - known.stage_s, 0.0)
            num_steps += known.num_steps
            driver_s.append(sample.step_s - float(sample.stage_s[busy].sum()))
    of_stage = np.maximum(0.0, extra_s / np.maximum(num_steps, 1))
    found = {
        f"{OVERHEAD_S}.{stage.label}": float(of_stage[stage]) for stage in Stage if num_steps[stage]
    }
    found[OVERHEAD_S] = float((of_stage * num_steps).sum() / num_steps.sum())
    found[DRIVER_S] = max(0.0, median(driver_s))
    rest_s: dict[tuple[str, int], list[tuple[int, float, int]]] = {}
    for sample, known in zip(samples, priced, strict=True):
        layout = sample.deployment.layout
        if layout.world_size > 1:
            overhead_s = float((known.num_steps * of_stage).sum())
            rest = sample.step_s - known.step_s - overhead_s - found[DRIVER_S]
            key = sample.deployment.name, sample.num_seqs
            rest_s.setdefault(key, []).append((known.num_transfers, rest, layout.world_size))
    if rest_s:
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in rest_s.values()]
        of_transfer = found[f"{OVERHEAD_S}.{OF_TRANSFERS}"] = max(0.0, median(slopes))
        of_rank = [
            (rest - num * of_transfer) / (ranks - 1)
            for pair in rest_s.values()
            for num, rest, ranks in pair
        ]
        found[DRIVER_PER_RANK_S] = max(0.0, median(of_rank))
    return found


def launch_term(
    rounds: Sequence[Sequence[StepSample]], dtype: str, least_s: Floats, origin: str
) -> Term:
    """A kernel's launch on a GPU: what the engine's take on average in steps that wait for them.

    Args:
        rounds: as for `overhead_terms`.
        least_s: [num_rounds]; of the cheapest kernel there is, which is the lower bound.
    """
    busy = np.arange(len(Stage)) != Stage.IDLE
    found = []
    for samples in rounds:
        alone = [each for each in samples if each.deployment.layout.world_size == 1]
        found.append(
            min(float(each.stage_s[busy].sum()) / _num_launches(each, dtype) for each in alone)
        )
    term = term_of(np.array(found), origin)
    return replace(term, low=min(term.low, float(np.median(least_s))))


def _num_launches(sample: StepSample, dtype: str) -> int:
    """Kernel launches in a decode step of one rank, with the engine's kernels on GPUs."""
    builder = _builder(sample, NumberTypes.all_of(dtype), kernels=ENGINE_ON_GPUS)
    routing = PowerLawRouting(_MODEL.num_experts, _MODEL.num_experts_per_tok)
    part = PartSizes.even(1, 1, sample.num_seqs, 1, _PROMPT_LEN)
    ((stage,),) = builder.build_sized([("all_to_all", [part])], routing).stages
    steps = stage.distinct_steps()
    return sum(num * step.num_kernels for step, num in steps if isinstance(step, Operation))


def _builder(sample: StepSample, types: NumberTypes, kernels: KernelSet = ENGINE) -> ProgramBuilder:
    model = replace(_MODEL, num_hidden_layers=sample.num_layers)
    layout, options = sample.deployment.layout, sample.deployment.options
    assert options.dispatch != "auto", "none is timed here"
    return ProgramBuilder(
        model,
        layout,
        placements_of(model, layout, options),
        types=types,
        dispatch=DispatchTable.fixed(options.dispatch),
        ranks_per_node=layout.world_size,
        block_size=BLOCK_SIZE,
        kernels=kernels,
    )


class _StepPrices:
    """A sample's step on the virtual clock, without any overheads.

    Attributes:
        stage_s, num_steps: [num_stages]; of its first rank; operations, not transfers.
        num_transfers: transfers of a rank.
    """

    def __init__(self, sample: StepSample, profile: Profile, dtype: str) -> None:
        deployment, types = sample.deployment, NumberTypes.all_of(dtype)
        builder = _builder(sample, types)
        routing = PowerLawRouting(_MODEL.num_experts, _MODEL.num_experts_per_tok)
        pricing = Pricing(profile, types)
        runner = CostRunner(builder, routing, pricing, Terms.free())
        steps = _run(runner, deployment, sample.num_seqs, record=True)
        self.step_s = phase_times(steps).decode_s
        last = _decodes(steps)[-1]
        self.stage_s = last.outcome.records[0].wall_s.sum(axis=(0, 1))
        self.num_steps = np.zeros(len(Stage))
        self.num_transfers = 0
        ((stage,),) = builder.build(last.plan, routing).stages
        for step, num in stage.distinct_steps():
            self.num_steps[step.stage] += num * isinstance(step, Operation)
            self.num_transfers += num * isinstance(step, Transfer)
