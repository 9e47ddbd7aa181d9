"""What clients of a benchmark of some waves see of two pools, and how long they wait.

The steady state of a closed loop has requests all along their outputs. A benchmark of a few waves
begins otherwise: all requests come at once and wait for each other's prefill. Then they wait for a
place in the pool that decodes, where the benchmark keeps more open than it has places. Played here
with every request of all waves, but without pricing a step of each: prompts take what a step of the
pool for prompts was simulated to take, alone and full, tokens the time between them.
"""

import hashlib
import heapq
import json
import multiprocessing
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from serving_rows import Row
from serving_simulation import Bounds, Projected

from expertlane.cost.laws.execution import BOUNDS, LIKELY
from expertlane.cost.step.operation import Floats

NUM_WAVES = 10  # requests of a benchmark, over those it keeps open; assumed
_DRAINING_WAVES = 0.5
_SEED = 0
_PLAYED = Path("build/judge_waves.jsonl")
CHUNK_TOKENS = 8192  # of a step of a data-parallel rank


@dataclass(frozen=True)
class Seen:
    """Of all requests of the waves, in the order in which they were sent.

    Attributes:
        ttft_s: [num_requests]; the first token comes with the first step that decodes.
        total_s: until the last one ends.
        num_tokens: of all outputs.
    """

    ttft_s: Floats
    total_s: float
    num_tokens: int


@dataclass(frozen=True)
class TwoPools:
    """Pools that serve a closed load.

    Attributes:
        num_prefill, num_decode: replicas; each takes requests in turn.
        alone_s, full_s: of a step of one prompt of mean length, and of one that is full.
        step_tokens: of a full step of a replica.
        num_places: requests that a replica decodes at once.
        arrival_s: from a client to the pool for prompts.
    """

    num_prefill: int
    num_decode: int
    alone_s: float
    full_s: float
    step_tokens: int
    num_places: int
    tpot_s: float
    arrival_s: float = 0.0

    def serve(self, num_open: int, prompts: tuple[int, int], outputs: tuple[int, int]) -> Seen:
        """All waves, each request sent as another one ends.

        Args:
            prompts, outputs: shortest and longest length; drawn uniformly.
        """
        return _Waves(self, num_open, prompts, outputs).seen()


class _Waves:
    def __init__(
        self, pools: TwoPools, num_open: int, prompts: tuple[int, int], outputs: tuple[int, int]
    ) -> None:
        rng, number = np.random.default_rng(_SEED), NUM_WAVES * num_open
        self._pools = pools
        self._prompts = rng.integers(prompts[0], prompts[1] + 1, number).tolist()
        self._outputs = rng.integers(outputs[0], outputs[1] + 1, number).tolist()
        self._mean_prompt = sum(prompts) / 2
        self._num_sent = 0
        self._sent_s = [0.0] * number
        self._first_s = [0.0] * number
        # (moment, kind of event in that order, replica, requests): what is about to happen
        self._events: list[tuple[float, int, int, list[int]]] = []
        self._queued: list[deque[int]] = [deque() for _ in range(pools.num_prefill)]
        self._left: dict[int, int] = {}  # tokens of a prompt that a step took a part of
        self._is_busy = [False] * pools.num_prefill
        self._waiting: list[deque[int]] = [deque() for _ in range(pools.num_decode)]
        self._num_free = [pools.num_places] * pools.num_decode
        self._num_prefilled = 0
        self._total_s = 0.0
        for _ in range(num_open):
            self._send(0.0)

    def seen(self) -> Seen:
        """Let everything happen."""
        acts = (self._arrive, self._prefilled, self._ended)
        while self._events:
            self._total_s, kind, replica, requests = heapq.heappop(self._events)
            acts[kind](self._total_s, replica, requests)
        ttft_s = np.array(self._first_s) - np.array(self._sent_s)
        return Seen(ttft_s, self._total_s, sum(self._outputs))

    def _send(self, now_s: float) -> None:
        if self._num_sent < len(self._sent_s):
            request, self._num_sent = self._num_sent, self._num_sent + 1
            self._sent_s[request] = now_s
            replica = request % self._pools.num_prefill
            heapq.heappush(self._events, (now_s + self._pools.arrival_s, 0, replica, [request]))

    def _arrive(self, now_s: float, replica: int, requests: list[int]) -> None:
        self._queued[replica] += requests
        if not self._is_busy[replica]:
            # After all that comes at the same moment.
            self._is_busy[replica] = True
            heapq.heappush(self._events, (now_s, 1, replica, []))

    def _prefilled(self, now_s: float, replica: int, requests: list[int]) -> None:
        """A step of prompts ends, and the next begins."""
        for request in requests:
            place = self._num_prefilled % self._pools.num_decode
            self._num_prefilled += 1
            self._waiting[place].append(request)
            self._decode(now_s, place)
        queue, room, done = self._queued[replica], self._pools.step_tokens, []
        while queue and room:
            left = self._left.pop(queue[0], self._prompts[queue[0]])
            if left > room:
                self._left[queue[0]] = left - room
                room = 0
            else:
                room -= left
                done.append(queue.popleft())
        taken = self._pools.step_tokens - room
        self._is_busy[replica] = taken > 0
        if taken:
            heapq.heappush(self._events, (now_s + self._step_s(taken), 1, replica, done))

    def _step_s(self, num_tokens: int) -> float:
        """Of so many tokens in all: between a prompt alone and a full step, in a straight line."""
        alone, pools = self._mean_prompt, self._pools
        if num_tokens <= alone or pools.step_tokens <= alone:
            return pools.alone_s * min(num_tokens / alone, 1.0)
        share = (num_tokens - alone) / (pools.step_tokens - alone)
        return pools.alone_s + share * max(pools.full_s - pools.alone_s, 0.0)

    def _decode(self, now_s: float, replica: int) -> None:
        while self._waiting[replica] and self._num_free[replica]:
            request = self._waiting[replica].popleft()
            self._num_free[replica] -= 1
            self._first_s[request] = now_s
            end_s = now_s + self._pools.tpot_s * (self._outputs[request] - 1)
            heapq.heappush(self._events, (end_s, 2, replica, [request]))

    def _ended(self, now_s: float, replica: int, requests: list[int]) -> None:
        self._num_free[replica] += len(requests)
        self._send(now_s)
        self._decode(now_s, replica)


def all_in_waves(pairs: Sequence[tuple[Row, Projected]], jobs: int) -> list[Projected]:
    """`in_waves` of each, kept in a file as long as nothing that it rests on changes."""
    own = Path(__file__).read_bytes()
    keys = [
        hashlib.sha256(
            own + json.dumps((str(row.point), row.decode_seqs, asdict(each))).encode()
        ).hexdigest()
        for row, each in pairs
    ]
    lines = _PLAYED.read_text(encoding="utf-8").splitlines() if _PLAYED.exists() else []
    known = {key: Projected(**fields) for key, fields in map(json.loads, lines)}
    wanted = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
    with multiprocessing.Pool(jobs) as pool, _PLAYED.open("a", encoding="utf-8") as file:
        for key, found in pool.imap_unordered(_played, wanted.items()):
            known[key] = found
            file.write(json.dumps((key, asdict(found))) + "\n")
            file.flush()
    return [known[key] for key in keys]


def _played(asked: tuple[str, tuple[Row, Projected]]) -> tuple[str, Projected]:
    key, pair = asked
    return key, in_waves(*pair)


def in_waves(row: Row, steady: Projected) -> Projected:
    """A row as a benchmark measures it.

    In one pool throughput counts the time until the last request ends, when others already have:
    half a wave with a half of the requests. In two pools TTFT has bounds of its own: low where the
    pool that decodes has a place for every request, which the file does not say.
    """
    if row.prefill is None or not steady.prefill_rate:
        drained = _scaled(steady.output_tps, NUM_WAVES / (NUM_WAVES + _DRAINING_WAVES))
        return replace(steady, output_tps=drained)
    likely = _two_pools(row, steady, LIKELY)
    output_tps = likely.num_tokens / likely.total_s / row.decode.layout.world_size
    low_s, likely_s, high_s = (
        float(np.median(seen.ttft_s))
        for seen in (_two_pools(row, steady, 0), likely, _two_pools(row, steady, len(BOUNDS) - 1))
    )
    return replace(
        steady,
        ttft_s=(min(low_s, likely_s), likely_s, max(high_s, likely_s)),
        output_tps=_scaled(steady.output_tps, output_tps / steady.output_tps[LIKELY]),
    )


def _two_pools(row: Row, steady: Projected, bound: int) -> Seen:
    assert row.prefill is not None
    prefill, decode, load = row.prefill.layout, row.decode.layout, row.load
    tokens_per_s = steady.prefill_rate * load.mean_lens[0] / prefill.replicas
    step_tokens = prefill.dp * CHUNK_TOKENS
    scale = steady.tpot_s[bound] / steady.tpot_s[LIKELY]
    pools = TwoPools(
        prefill.replicas,
        decode.replicas,
        alone_s=scale * steady.prompt_s,
        full_s=scale * step_tokens / tokens_per_s,
        step_tokens=step_tokens,
        num_places=row.conc if bound < LIKELY else row.decode_seqs * decode.dp,
        tpot_s=steady.tpot_s[bound],
    )
    prompts, outputs = ((each.low, each.high) for each in (load.prompt_len, load.output_len))
    return pools.serve(row.conc, prompts, outputs)


def _scaled(bounds: Bounds, factor: float) -> Bounds:
    low, likely, high = bounds
    return factor * low, factor * likely, factor * high
