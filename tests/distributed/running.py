"""Run a deployment on a pool the way a comparison does, and keep all it gives."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertlane.cost.memory import workload_limits
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.pool import RankPool
from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler, FinishedStep, drive
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.names import CheckLevel
from expertlane.spec.workload import Workload

LONG_MODEL = PRESETS["paper-tiny"].with_overrides(max_position_embeddings=5000)
LONG = Workload(num_sequences=8, prompt_len=2, output_len=4000)  # minutes


class Run(NamedTuple):
    """A finished workload.

    Attributes:
        tokens: [num_sequences, output_len].
        logits: [num_sequences, output_len, vocab_size]; None unless asked for.
    """

    tokens: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32] | None
    steps: list[FinishedStep]


def deployment(layout: str, **options: object) -> Deployment:
    """A deployment named after its layout."""
    return Deployment(layout, Layout.parse(layout), Options(**options))  # type: ignore[arg-type]


def runner_on(
    pool: RankPool,
    model: ModelConfig,
    deployment: Deployment,
    limits: Limits,
    *,
    ranks_per_node: int = 8,
    seed: int = 0,
    check: CheckLevel = "off",
    **given: object,
) -> ModelRunner:
    """The runner of a deployment."""
    config = EngineConfig(
        layout=deployment.layout,
        options=deployment.options,
        ranks_per_node=ranks_per_node,
        seed=seed,
        check=check,
    )
    return ModelRunner(pool, model, config, limits, **given)  # type: ignore[arg-type]


class Inline(Executor):
    """Runs what is submitted at once, so that it is done at the same step in every run."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        future.set_result(function(*args, **kwargs))
        return future


def run_deployment(
    pool: RankPool,
    model: ModelConfig,
    deployment: Deployment,
    workload: Workload,
    *,
    seed: int = 0,
    forced: npt.NDArray[np.int64] | None = None,
    return_logits: bool = False,
    ranks_per_node: int = 8,
    checkpoint: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
    **flags: bool,
) -> Run:
    """Prefill and decode; with `forced`, those tokens are fed in place of the chosen ones.

    Args:
        log: as `ModelRunner` takes it.
        flags: what the plans ask for, as `ContinuousScheduler` takes it.
    """
    limits = workload_limits(workload, model, deployment.layout)
    runner = runner_on(
        *(pool, model, deployment, limits),
        seed=seed,
        ranks_per_node=ranks_per_node,
        checkpoint=checkpoint,
        log=log,
    )
    scheduler = ContinuousScheduler(
        deployment.layout, deployment.options, limits, return_logits=return_logits, **flags
    )
    prompts = workload.prompt_token_ids(model.vocab_size)
    for seq, prompt in enumerate(prompts):
        scheduler.add(Request(str(seq), prompt, max_tokens=workload.output_len))
    steps = list(drive(scheduler if forced is None else Forced(scheduler, forced), runner))
    by_seq: dict[int, list[int]] = {seq: [] for seq in range(len(prompts))}
    logits: dict[int, list[npt.NDArray[np.float32]]] = {seq: [] for seq in by_seq}
    for step in steps:
        for seq, token in step.outcome.token_ids.items():
            by_seq[seq].append(token)
        for seq, of_token in step.outcome.logits.items():
            logits[seq].append(of_token)
    return Run(
        np.array([by_seq[seq] for seq in by_seq]),
        np.array([logits[seq] for seq in logits]) if return_logits else None,
        steps,
    )


class Forced:
    """A scheduler that is told other tokens than the ranks chose.

    Args:
        tokens: by sequence id, all its output tokens.
    """

    def __init__(
        self, scheduler: ContinuousScheduler, tokens: Sequence[npt.ArrayLike] | np.ndarray
    ) -> None:
        self._scheduler = scheduler
        self._tokens = {seq: iter(np.asarray(given).tolist()) for seq, given in enumerate(tokens)}

    def next_plan(self) -> StepPlan | None:
        return self._scheduler.next_plan()

    def commit(self, plan: StepPlan, outcome: StepOutcome) -> None:
        forced = {seq: next(self._tokens[seq]) for seq in outcome.token_ids}
        self._scheduler.commit(plan, replace(outcome, token_ids=forced))
