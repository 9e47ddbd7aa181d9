"""What the engine itself costs a step: scheduling, batch building and bookkeeping, no model.

Real `Engine` and scheduler, with a runner that answers at once; what the runner takes is timed and
taken off. Times are the thread's processor time, which other programs disturb least; nothing here
waits. As many requests as the batch holds are always there: when one ends the next is added, in the
same step's time. Prompts have 32 tokens and outputs 64 to 192.

With lookahead, as here and in `LLM`, all of it is done while ranks compute the next step.

    python benchmarks/bench_engine_overhead.py [STEPS]
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import tokenizers
from rich.console import Console
from rich.table import Table
from tokenizers import decoders, models, pre_tokenizers, trainers

from expertlane import __version__
from expertlane.engine.engine import Engine
from expertlane.engine.ops.host import num_cores
from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.schedule.request import Limits
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.sampling import SamplingParams, TokenLogprobs
from expertlane.text.tokenizer import Tokenizer

VOCAB_SIZE = 512
PROMPT_LEN = 32
OUTPUT_LENS = (64, 192)
BATCH_SIZES = (32, 256)
TARGET_S = 300e-6  # at the largest batch, without text
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=1, ignore_eos=True)
TOP = tuple((token_id, -1.0) for token_id in range(5))


class StubRunner:
    """Chooses tokens at random.

    Attributes:
        busy_s: what its last step took.
    """

    def __init__(self, *, logprobs: bool) -> None:
        self.busy_s = 0.0
        self._logprobs = logprobs
        self._random = np.random.default_rng(0)

    def submit(self, plan: StepPlan) -> StepPlan:
        """Plans are their own handles."""
        return plan

    def first_done(self, handles: Sequence[StepPlan]) -> StepPlan:
        """The oldest."""
        return handles[0]

    def collect(self, handle: StepPlan) -> StepOutcome:
        """A random token for every sequence."""
        began_s = time.thread_time()
        ids: dict[int, int] = {}
        for batch in (batch for batches in handle.micro_batches for batch in batches):
            seqs = batch.seq_ids[batch.yields_token].tolist()
            ids |= zip(seqs, self._random.integers(0, VOCAB_SIZE, len(seqs)).tolist(), strict=True)
        found = {seq: TokenLogprobs(t, -1.0, TOP) for seq, t in ids.items() if self._logprobs}
        outcome = StepOutcome(ids, {}, (), began_s, began_s, found)
        self.busy_s = time.thread_time() - began_s
        return outcome


def byte_level_tokenizer() -> Tokenizer:
    """One trained on what lies around."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    return Tokenizer(core)


class Load:
    """An engine that never runs out of requests."""

    def __init__(
        self, batch_size: int, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        num_blocks = batch_size * -(-(PROMPT_LEN + OUTPUT_LENS[1]) // 16) + batch_size
        limits = Limits(VOCAB_SIZE, 4096, num_blocks, max_num_seqs=batch_size)
        scheduler = ContinuousScheduler(Layout(), Options(), limits, lookahead=True, record=False)
        self.runner = StubRunner(logprobs=params.logprobs is not None)
        self.engine = Engine(scheduler, self.runner, tokenizer=tokenizer)
        self._prompts = cycle(
            np.random.default_rng(1).integers(0, VOCAB_SIZE, (4000, PROMPT_LEN)).tolist()
        )
        lens = range(OUTPUT_LENS[0], OUTPUT_LENS[1] + 1)
        self._params = cycle([replace(params, max_tokens=length) for length in lens])
        self._num_added = 0
        self.add(batch_size)

    def add(self, num: int) -> None:
        """Queue requests."""
        for _ in range(num):
            self.engine.add(str(self._num_added), next(self._prompts), next(self._params))
            self._num_added += 1

    def step_seconds(self, num_steps: int) -> list[float]:
        """Seconds of the engine's own in each step."""
        seconds = []
        for _ in range(num_steps):
            began_s = time.thread_time()
            chunks = self.engine.step()
            stepped_s = time.thread_time() - began_s - self.runner.busy_s
            num_ended = sum(chunk.finish_reason is not None for chunk in chunks)
            began_s = time.thread_time()
            self.add(num_ended)
            seconds.append(stepped_s + time.thread_time() - began_s)
        return seconds


def rows(num_steps: int) -> Iterator[dict[str, float | int | str]]:
    """Measure every kind of request at every batch size."""
    kinds = {
        "greedy": (GREEDY, None),
        "sampled": (SAMPLED, None),
        "5 logprobs": (replace(SAMPLED, logprobs=5), None),
        "greedy, with text": (GREEDY, byte_level_tokenizer()),
    }
    for batch_size in BATCH_SIZES:
        for name, kind in kinds.items():
            load = Load(batch_size, *kind)
            load.step_seconds(2 * OUTPUT_LENS[1])  # until ends are spread evenly
            seconds = load.step_seconds(num_steps)
            median, p95 = np.percentile(seconds, [50, 95]).tolist()
            yield {
                "requests": name,
                "batch_size": batch_size,
                "steps": num_steps,
                "median_s": median,
                "p95_s": p95,
                "least_s": min(seconds),
            }


def main() -> None:
    """Measure; a table, then one JSON line."""
    num_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    found = list(rows(num_steps))
    table = Table(title=f"engine without a model, µs a step; goal {TARGET_S * 1e6:.0f} at 256")
    for heading in ("requests", "batch", "steps", "median", "p95", "least"):
        table.add_column(heading, justify="right")
    for row in found:
        times = [float(row[key]) for key in ("median_s", "p95_s", "least_s")]
        counts = [str(row[key]) for key in ("requests", "batch_size", "steps")]
        table.add_row(*counts, *(f"{seconds * 1e6:.0f}" for seconds in times))
    Console(width=100).print(table)
    result = {"benchmark": "engine_overhead", "version": __version__, "num_cores": num_cores()}
    print(json.dumps(result | {"target_s": TARGET_S, "rows": found}))


if __name__ == "__main__":
    main()
