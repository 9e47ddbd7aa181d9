"""Run a deployment on a pool the way a comparison does, and keep all it gives."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.pool import RankPool
from expertlane.schedule.drive import FinishedStep, drive
from expertlane.schedule.fixed import FixedScheduler
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import Workload


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


def run_deployment(
    pool: RankPool,
    model: ModelConfig,
    deployment: Deployment,
    workload: Workload,
    *,
    seed: int = 0,
    forced: npt.NDArray[np.int64] | None = None,
    return_logits: bool = False,
    record: bool = True,
    ranks_per_node: int = 8,
) -> Run:
    """Prefill and decode; with `forced`, those tokens are fed in place of the chosen ones."""
    runner = ModelRunner(
        pool, model, deployment, workload, seed=seed, ranks_per_node=ranks_per_node
    )
    scheduler = FixedScheduler(
        workload,
        deployment,
        workload.prompt_token_ids(model.vocab_size),
        forced=forced,
        return_logits=return_logits,
        record=record,
    )
    steps = list(drive(scheduler, runner))
    if scheduler.start_decode():
        steps += drive(scheduler, runner)
    seqs = range(workload.num_sequences)
    logits = None
    if return_logits:
        by_seq: dict[int, list[npt.NDArray[np.float32]]] = {seq: [] for seq in seqs}
        for step in steps:
            for seq, of_token in step.outcome.logits.items():
                by_seq[seq].append(of_token)
        logits = np.array([by_seq[seq] for seq in seqs])
    return Run(np.array([scheduler.outputs[seq] for seq in seqs]), logits, steps)
