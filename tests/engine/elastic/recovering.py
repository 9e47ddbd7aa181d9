"""An LLM whose ranks are harmed at chosen moments, and what it gives held against calm runs."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distributed.running import Inline
from expertlane import LLM, SamplingParams
from expertlane.engine.elastic.recovery_record import RecoveryRecord, State
from expertlane.engine.rank_watch import Reading
from expertlane.engine.ranks.commands import Command
from expertlane.engine.ranks.pool import RankPool

SETTINGS = {"dtype": "float32", "num_blocks": 64, "block_size": 4, "max_num_seqs": 4}
PROMPTS = [[number + 1, 7, 3 * number + 2, *range(number)] for number in range(6)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, logprobs=0),
    SamplingParams(seed=1, max_tokens=24),
    SamplingParams(temperature=0, max_tokens=10, prompt_logprobs=1),
    SamplingParams(temperature=0.7, seed=3, repetition_penalty=1.3, max_tokens=24),
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(seed=4, presence_penalty=0.5, max_tokens=24),
]


def model(layout: str, name: str = "paper-tiny", **more: Any) -> LLM:
    """A small model on ranks that are replaced, unless `on_failure` is given."""
    given = {"on_failure": "replace", "timeout_s": 30.0, "oversubscribe": True}
    return LLM(name, layout=layout, **SETTINGS | given | more)


@contextmanager
def harmed(
    rank: int | Callable[[], int | None],
    command: type[Command[Any]],
    number: int,
    harm: int = signal.SIGKILL,
) -> Iterator[list[int]]:
    """Send a signal to a rank once commands of a kind are under way; so many of them, from 1.

    Args:
        rank: the rank, or a function that tells it; None to wait for the next command.

    Yields:
        The process that was harmed; empty until then.
    """
    submit_each: Callable[..., Any] = RankPool.submit_each
    num_seen, pids = 0, []

    def submit_and_harm(pool: RankPool, commands: Any) -> Any:
        nonlocal num_seen
        ticket = submit_each(pool, commands)
        num_seen += isinstance(commands[0][0], command)
        if num_seen < number or pids:
            return ticket
        chosen = rank if isinstance(rank, int) else rank()
        if chosen is not None:
            pid = pool.pid(chosen)
            assert pid is not None
            pids.append(pid)
            os.kill(pid, harm)
        return ticket

    RankPool.submit_each = submit_and_harm  # type: ignore[method-assign]
    try:
        yield pids
    finally:
        RankPool.submit_each = submit_each  # type: ignore[method-assign]


def facts(llm: LLM) -> list[tuple[Any, ...]]:
    """What `PROMPTS` give: all that must be equal bit for bit but logarithms of probabilities."""
    found = []
    for output in llm.generate(PROMPTS, PARAMS):
        scored = output.prompt_logprobs
        found.append(
            (
                output.token_ids,
                output.finish_reason,
                [each.token_id for each in output.logprobs],
                None if scored is None else [each and each.token_id for each in scored],
                None if scored is None else scored.ranks.tolist(),
            )
        )
    return found


def record_of(llm: LLM) -> RecoveryRecord:
    """The latest recovery, which is over."""
    recovery = llm.engine.recovery
    assert recovery is not None
    assert recovery.state is State.SERVING
    assert recovery.num_recoveries == len(recovery.records)
    return recovery.records[-1]


def move_experts(llm: LLM) -> None:
    """Let the rebalancer move experts whenever it may, whether that pays or not."""
    rebalancer = llm._runner.rebalancer
    assert rebalancer is not None
    rebalancer._worth = lambda decision: decision.num_bytes
    rebalancer._executor = Inline()


def reading(llm: LLM) -> Reading:
    """What all ranks have counted so far; `llm.watch` was called."""
    watch = llm._runner._watch
    assert watch is not None
    watch._asked_s = 0.0
    watch.poll()
    assert watch._ticket is not None
    llm._pool.collect(watch._ticket)
    watch.poll()
    return watch.readings[-1]


def pids(llm: LLM) -> list[int | None]:
    """[world_size]."""
    return [llm._pool.pid(rank) for rank in range(llm._pool.num_ranks)]
