"""TPS, TTFT and TPOT on the clock of whoever drove the runner."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertlane.results.step_record import StepRecord


@dataclass(frozen=True)
class Latency:
    """How fast one phase went.

    Attributes:
        num_steps: steps of all replicas; a rotating micro-batch's step counts as one.
        num_rounds: how often the sequence that stepped most often got a token: a round
            advances every sequence by one token, whatever the steps it was cut into.
        num_tokens: tokens computed.
        wall_s: from the first submission to the last finish, of all spells together.
        tps: tokens per second of `wall_s`, over the whole system.
        tps_of_runs: the same, of each run by itself.
        token_median_s, token_p95_s: over all tokens of all sequences, the time from a
            sequence's last token (the spell's start for its first) to this one: TTFT in a
            prefill, TPOT in decoding.
        step_median_s: from a step's submission to its finish.
    """

    num_steps: int
    num_rounds: int
    num_tokens: int
    wall_s: float
    tps: float
    tps_of_runs: tuple[float, ...]
    token_median_s: float
    token_p95_s: float
    step_median_s: float


def latency(steps: Sequence[StepRecord]) -> Latency:
    """Throughput and latency of the steps of one phase, in any order.

    Raises:
        ValueError: there are no steps, or no sequence took part in any.
    """
    if not any(step.seq_ids for step in steps):
        raise ValueError("no step with a sequence in it")
    wall_s, num_rounds, intervals, tps_of_runs = 0.0, 0, [], []
    for run in sorted({step.run for step in steps}):
        of_run = [step for step in steps if step.run == run]
        run_s = 0.0
        for spell in sorted({step.spell for step in of_run}):
            of_spell = [step for step in of_run if step.spell == spell]
            start_s = min(step.submitted_s for step in of_spell)
            run_s += max(step.finished_s for step in of_spell) - start_s
            tokens_s = _token_times(of_spell, start_s)
            num_rounds += max(map(len, tokens_s), default=1) - 1
            intervals += [np.diff(times) for times in tokens_s]
        wall_s += run_s
        tps_of_runs.append(sum(step.num_tokens for step in of_run) / run_s)
    of_tokens = np.concatenate(intervals)
    num_tokens = sum(step.num_tokens for step in steps)
    return Latency(
        num_steps=len(steps),
        num_rounds=num_rounds,
        num_tokens=num_tokens,
        wall_s=wall_s,
        tps=num_tokens / wall_s,
        tps_of_runs=tuple(tps_of_runs),
        token_median_s=float(np.median(of_tokens)),
        token_p95_s=float(np.percentile(of_tokens, 95)),
        step_median_s=float(np.median([step.finished_s - step.submitted_s for step in steps])),
    )


def _token_times(steps: Sequence[StepRecord], start_s: float) -> list[list[float]]:
    """Of every sequence: the start, then when each of its tokens came."""
    times: defaultdict[int, list[float]] = defaultdict(lambda: [start_s])
    for step in sorted(steps, key=lambda step: step.finished_s):
        for seq in step.seq_ids:
            times[seq].append(step.finished_s)
    return list(times.values())
