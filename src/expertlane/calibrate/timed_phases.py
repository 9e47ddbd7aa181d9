"""Times of a batch of equal requests by phase, on any runner: on ranks, or on a virtual clock."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertlane.schedule.drive import FinishedStep, drive
from expertlane.schedule.plan import HandleT, Runner
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Deployment
from expertlane.spec.names import Phase

Prompts = npt.NDArray[np.int64]

BLOCK_SIZE = 16


class PhaseTimes(NamedTuple):
    """What a batch took.

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
