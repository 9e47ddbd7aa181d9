"""How long requests wait for prefill where a benchmark sends as many as it keeps open at once.

The steady state of a closed loop has requests all along their outputs. A benchmark of a few waves
never gets there: all requests come at once, wait for each other's prefill, and end near each
other, so that the next wave comes nearly together too. Played here by a queue of its own, at the
rate at which the pool for prompts was simulated to take them and the time between tokens that was.
"""

import heapq
from dataclasses import replace

import numpy as np
from serving_rows import Row
from serving_simulation import Bounds, Projected

NUM_WAVES = 10  # requests of a benchmark, over those it keeps open; assumed
_DRAINING_WAVES = 0.5
_SEED = 0


def in_waves(row: Row, steady: Projected) -> Projected:
    """A row as a benchmark measures it.

    Its throughput counts the time until the last request ends, when others already have: half a
    wave with a half of the requests. Waiting for prefill is that of two pools alone.
    """
    drained = _scaled(steady.output_tps, NUM_WAVES / (NUM_WAVES + _DRAINING_WAVES))
    steady = replace(steady, output_tps=drained)
    if row.prefill is None or not steady.prefill_rate:
        return steady
    layout, load = row.prefill.layout, row.load
    num_servers = layout.replicas * layout.dp
    waits = waits_s(
        row.conc,
        steady.prefill_rate,
        num_servers,
        steady.tpot_s[1],
        (load.output_len.low, load.output_len.high),
    )
    # Of a prompt alone: where many wait in the steady state too, what a rank takes for it.
    alone_s = min(steady.ttft_s[1], num_servers / steady.prefill_rate)
    ttft_s = alone_s + float(np.median(waits))
    before_s = steady.ttft_s[1] + load.mean_lens[1] * steady.tpot_s[1]
    after_s = before_s - steady.ttft_s[1] + alone_s + float(waits.mean())
    return replace(
        steady,
        ttft_s=_scaled(steady.ttft_s, ttft_s / steady.ttft_s[1]),
        output_tps=_scaled(steady.output_tps, before_s / after_s),
    )


def _scaled(bounds: Bounds, factor: float) -> Bounds:
    low, likely, high = bounds
    return factor * low, factor * likely, factor * high


def waits_s(
    num_open: int, rate: float, num_servers: int, tpot_s: float, output_len: tuple[int, int]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Seconds that each request of all waves waits in the queue.

    Args:
        rate: prompts a second of all servers together.
        num_servers: data-parallel ranks that each take a prompt at a time.
        output_len: shortest and longest; drawn uniformly.
    """
    service_s = num_servers / rate
    free_s = [0.0] * num_servers
    sent_s = [0.0] * num_open  # a heap: when each of those open was sent
    rng = np.random.default_rng(_SEED)
    outputs = rng.integers(output_len[0], output_len[1] + 1, NUM_WAVES * num_open)
    waits = np.zeros(len(outputs))
    for place, decode_s in enumerate((tpot_s * (outputs - 1)).tolist()):
        at_s = heapq.heappop(sent_s)
        begin_s = max(at_s, heapq.heappop(free_s))
        waits[place] = begin_s - at_s
        heapq.heappush(free_s, begin_s + service_s)
        heapq.heappush(sent_s, begin_s + service_s + decode_s)
    return waits
