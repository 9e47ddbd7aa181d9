"""Put load on an engine, and measure throughput and latency.

Closed loop: a constant concurrency. Open loop: requests arrive at random, however
far the engine is (Poisson arrivals). All times of a request count from when it was due, so that
one that the loop could only add late, because a step was under way, does not look faster.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expertlane.engine.engine import Engine
from expertlane.engine.llm import LLM
from expertlane.errors import ModelError
from expertlane.progress import Progress
from expertlane.results.estimate import Estimate
from expertlane.results.metrics import ServedRequest, serving_record
from expertlane.results.serving_record import ServingRecord
from expertlane.schedule.request import RequestOutput
from expertlane.spec.layout import Layout
from expertlane.spec.sampling import SamplingParams
from expertlane.spec.workload import (
    SLO,
    Load,
    TimedRequest,
    check_lengths,
    draw_requests,
    warm_up_of,
)


@dataclass(frozen=True, eq=False)
class TimedOutput:
    """A finished request; `due_s` is on the clock of its arrival."""

    due_s: float
    output: RequestOutput

    @property
    def token_times_s(self) -> list[float]:
        """The time of each token, on the same clock."""
        return [self.output.arrival_s + each for each in self.output.token_times_s]


def serve(
    engine: Engine[Any],
    requests: Iterable[TimedRequest],
    max_unfinished: int | None = None,
    *,
    on_finished: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[TimedOutput]:
    """Add requests when they are due, greedy and beyond any end of sequence; wait for all.

    Args:
        requests: by due time.
        max_unfinished: a request waits while there are so many; then it is due when added.
        clock: the clock that outputs' arrivals are on.

    Raises:
        ModelError: the logits of a request are not finite.
    """
    waiting, served = deque(requests), list[TimedOutput]()
    num_unfinished, started_s = 0, clock()
    while waiting or engine.has_unfinished:
        while waiting and (max_unfinished is None or num_unfinished < max_unfinished):
            due_s = started_s + waiting[0].due_s
            if clock() < due_s:
                break
            request = waiting.popleft()
            params = SamplingParams(temperature=0, max_tokens=request.output_len, ignore_eos=True)
            output = engine.add(str(len(served)), list(request.prompt_token_ids), params)
            # In a closed loop it takes the place of one that has just ended.
            begin_s = due_s if max_unfinished is None else output.arrival_s
            served.append(TimedOutput(begin_s, output))
            num_unfinished += 1
        if not engine.has_unfinished:
            sleep(max(0.0, started_s + waiting[0].due_s - clock()))
            continue
        for chunk in engine.step():
            if chunk.error is not None:
                raise ModelError(chunk.error)
            if chunk.finish_reason is not None:
                num_unfinished -= 1
                on_finished()
    return served


def measure(load: Load, served: Sequence[TimedOutput], slos: Sequence[SLO] = ()) -> ServingRecord:
    """The numbers of a load that has been served, each request with one token or more."""
    outputs = [each.output for each in served]
    record = serving_record(
        [
            ServedRequest(
                len(each.output.prompt_token_ids),
                len(each.output.token_ids),
                each.due_s,
                each.token_times_s,
            )
            for each in served
        ],
        slos,
    )
    prefill_tps = None
    if load.batch is not None and load.batch >= load.num_requests:
        prefilled_s = max(each.token_times_s[0] for each in served)
        started_s = min(each.due_s for each in served)
        num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        prefill_tps = Estimate(num_prompt_tokens / (prefilled_s - started_s))
    return replace(
        record,
        batch=load.batch,
        rate=load.rate,
        num_preemptions=sum(output.num_preemptions for output in outputs),
        prefill_tps=prefill_tps,
    )


def run_loads(
    llm: LLM,
    layout: Layout,
    loads: Sequence[Load],
    seed: int,
    progress: Progress,
    slos: Sequence[SLO] = (),
) -> Iterator[ServingRecord]:
    """Warm up and measure one load after the other; each has prompts of its own.

    Raises:
        UserError: requests are too long; before any is run.
        RankError: a rank died, hung or failed.
    """
    for load in loads:
        check_lengths(load, llm.limits.max_positions)
    for index, load in enumerate(loads):
        progress.task(f"{layout}, {load}", load.num_requests)
        serve(llm.engine, draw_requests(warm_up_of(load), llm.model.vocab_size, [seed, index, 1]))
        requests = draw_requests(load, llm.model.vocab_size, [seed, index, 0])
        num_cached = llm.engine.num_cached_tokens
        served = serve(llm.engine, requests, load.batch, on_finished=progress.advance)
        progress.done()
        num_cached = llm.engine.num_cached_tokens - num_cached
        yield replace(measure(load, served, slos), num_cached_tokens=num_cached)
