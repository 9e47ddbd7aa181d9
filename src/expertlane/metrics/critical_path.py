"""What a phase would cost in CPU time if every rank had a core of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.results.step_record import StepRecord
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage


@dataclass(frozen=True)
class CriticalPath:
    """The critical path of one phase, in CPU time of the ranks' main threads.

    It leaves out transfers and all other threads of a rank; in exchange it does not depend on
    how many ranks share a core.

    Attributes:
        total_s: the whole phase; of the slowest replica.
        tps: the phase's tokens over `total_s`; 0 where no CPU time was counted.
        step_median_s: of a step, from when the last tokens of its sequences were ready.
    """

    total_s: float
    tps: float
    step_median_s: float


def critical_path(layout: Layout, steps: Sequence[StepRecord]) -> CriticalPath:
    """Chain the steps of one phase through the pipeline.

    The ranks of a pipeline stage are taken to meet after every (micro-batch, layer slot, stage),
    so each of these costs the largest `cpu_s` among them. Summed per micro-batch m and pipeline
    stage s to t[m, s], with time spent waiting for a plan left out, they follow the usual
    recurrence finish[m, s] = max(finish[m - 1, s], finish[m, s - 1]) + t[m, s]. It runs on over
    the steps of a replica in the order of submission; a step begins no sooner than the last
    tokens of its own sequences are ready. Drained steps thus follow one another, and rotating
    micro-batches fill the pipeline.
    """
    total_s, step_s = 0.0, []
    for run in sorted({step.run for step in steps}):
        run_s, of_steps_s = _one_run(layout, [step for step in steps if step.run == run])
        total_s += run_s
        step_s += of_steps_s
    num_tokens = sum(step.num_tokens for step in steps)
    return CriticalPath(
        total_s=total_s,
        tps=num_tokens / total_s if total_s else 0.0,
        step_median_s=float(np.median(step_s)),
    )


def _one_run(layout: Layout, steps: Sequence[StepRecord]) -> tuple[float, list[float]]:
    """The whole of a run, and each step."""
    total_s, step_s = 0.0, []
    for replica in range(layout.replicas):
        free = [0.0] * layout.pp
        ready: dict[int, float] = {}
        of_replica = (step for step in steps if step.replica == replica)
        for step in sorted(of_replica, key=lambda step: step.submitted_s):
            begin = max((ready.get(seq, 0.0) for seq in step.seq_ids), default=0.0)
            for of_micro_batch in _stage_cpu_s(layout, step):
                finish = begin
                for pp_rank, cpu_s in enumerate(of_micro_batch):
                    finish = free[pp_rank] = max(free[pp_rank], finish) + float(cpu_s)
            ready |= dict.fromkeys(step.seq_ids, free[-1])
            step_s.append(free[-1] - begin)
        total_s = max(total_s, free[-1])
    return total_s, step_s


def _stage_cpu_s(layout: Layout, step: StepRecord) -> npt.NDArray[np.float64]:
    """[num_micro_batches, pp]; a step's critical CPU time."""
    times = np.zeros((step.num_micro_batches, layout.pp))
    for pp_rank in range(layout.pp):
        of_stage = [
            record.cpu_s
            for record in step.records
            if layout.coordinates(record.rank).pp_rank == pp_rank
        ]
        largest = np.max(of_stage, axis=0)
        largest[..., Stage.IDLE] = 0.0
        times[:, pp_rank] = largest.sum(axis=(1, 2))
    return times
