"""2,000 requests of all kinds through a cache far too small, many cancelled: nothing is left."""

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import psutil
import pytest

from engine.stub_runner import StubEngine
from expertlane.engine.engine import Engine
from expertlane.engine.llm import LLM
from expertlane.schedule.request import FinishReason
from expertlane.spec.deployment import Options
from expertlane.spec.sampling import SamplingParams
from schedule.paged import check_empty

NUM_REQUESTS, WINDOW = 2000, 500
NUM_AT_ONCE = 24  # of which only some run
CANCEL_RATE = 0.04  # at each chance
MAX_GROWTH_BYTES = 1_000_000  # each window after the first
KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, seed=1),
    SamplingParams(temperature=0, logprobs=2),
]


class Soak:
    """Requests that come, end, and are cancelled at random moments; outputs are not kept.

    Args:
        resident: resident memory of the processes to watch, in bytes.

    Attributes:
        reasons: how many requests ended how.
        num_preemptions: of requests that ended.
        memory: of each process, in bytes, whenever another `WINDOW` of requests has ended.
    """

    def __init__(self, engine: Engine, vocab_size: int, resident: Callable[[], list[int]]) -> None:
        self.reasons = Counter[FinishReason]()
        self.num_preemptions = 0
        self.memory: list[list[int]] = []
        self._engine = engine
        self._vocab_size = vocab_size
        self._resident = resident
        self._random = np.random.default_rng(0)
        self._num_added = 0
        self._live = {}

    def run(self) -> None:
        while self._num_added < NUM_REQUESTS or self._live:
            while self._num_added < NUM_REQUESTS and len(self._live) < NUM_AT_ONCE:
                self._add()
            self._maybe_cancel()
            for chunk in self._engine.step():
                if chunk.finish_reason is not None:
                    self._end(chunk.request_id)
            self._maybe_cancel()  # what is in flight may be hit here as well
        while self._engine._loop.uncommitted:
            assert self._engine.step() == []

    def _add(self) -> None:
        random, name = self._random, str(self._num_added)
        prompt = random.integers(0, self._vocab_size, random.integers(1, 13))
        prompt[: random.integers(0, 10)] = 1  # some begin alike
        params = replace(
            KINDS[random.integers(4)],
            max_tokens=int(random.integers(1, 13)),
            stop_token_ids=random.integers(0, self._vocab_size, 2),
        )
        self._live[name] = self._engine.add(
            name, prompt.tolist(), params, priority=int(random.integers(0, 2))
        )
        self._num_added += 1

    def _maybe_cancel(self) -> None:
        if self._live and self._random.random() < CANCEL_RATE:
            names = [name for name, output in self._live.items() if output.finish_reason is None]
            if names:
                assert self._engine.cancel(names[self._random.integers(len(names))])

    def _end(self, name: str) -> None:
        output = self._live.pop(name)
        self.reasons[output.finish_reason] += 1
        self.num_preemptions += output.num_preemptions
        if sum(self.reasons.values()) % WINDOW == 0:
            gc.collect()
            self.memory.append(self._resident())


def check(soak: Soak) -> None:
    assert sum(soak.reasons.values()) == NUM_REQUESTS
    assert set(soak.reasons) == set(FinishReason) - {FinishReason.ERROR, FinishReason.GRAMMAR}
    assert soak.reasons[FinishReason.CANCELLED] > NUM_REQUESTS / 20
    assert soak.num_preemptions > NUM_REQUESTS / 40
    growth = np.diff(np.array(soak.memory), axis=0)
    print(f"{dict(soak.reasons)}, {soak.num_preemptions} preemptions")
    print(f"resident memory grew by {growth.tolist()} bytes in each {WINDOW} requests")
    assert growth.shape == (NUM_REQUESTS // WINDOW - 1, len(soak.memory[0]))
    assert (growth < MAX_GROWTH_BYTES).all()


def resident_bytes(*pids: int | None) -> Callable[[], list[int]]:
    processes = [psutil.Process(pid) for pid in pids]
    return lambda: [process.memory_info().rss for process in processes]


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("tp=1", Options()),
        ("replicas=2,dp=2", Options(num_micro_batches=2)),
        ("replicas=2,dp=2,pp=2", Options(num_micro_batches=2, micro_batch_schedule="rotating")),
    ],
)
def test_the_engine_alone(layout, options):
    random = np.random.default_rng(1)
    engine = StubEngine(
        layout,
        options,
        choose=lambda plans: plans[random.integers(len(plans))],
        num_blocks=9,
        block_size=3,
        max_num_batched_tokens=11,
    )
    soak = Soak(engine, 26, resident_bytes(None))
    soak.run()
    check(soak)
    check_empty(engine.scheduler)
    # What ranks still know of sampled requests goes with the next plans.
    for replica in range(len(engine.scheduler.tables)):
        engine.add(str(replica), [1], SamplingParams(temperature=0, max_tokens=1))
    while engine.has_unfinished:
        engine.step()
    assert engine.runner.states == {}


@pytest.mark.full
def test_a_rank_and_its_engine():
    with LLM(
        "paper-tiny",
        dtype="float32",
        num_blocks=12,
        block_size=3,
        max_num_batched_tokens=32,
        max_num_seqs=12,
    ) as llm:
        soak = Soak(llm.engine, llm.model.vocab_size, resident_bytes(None, llm._pool.pid(0)))
        soak.run()
        check(soak)
        scheduler = llm.engine.scheduler
        assert scheduler.tables[0][0].blocks.num_used == 0
        check_empty(scheduler)
