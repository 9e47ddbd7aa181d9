"""Counts and gauges of a server's `/metrics` before, during and after a load."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from expertlane.client.connection import (
    Answer,
    ClosedEarly,
    ConnectionFailed,
    Connections,
)
from expertlane.client.prometheus import MOST_PAGE_BYTES, Gauges, Page, read_page
from expertlane.results.engine_record import (
    EngineCounts,
    EngineRecord,
    GaugesRecord,
    RankGauges,
    RoundCounts,
    joined,
)

# The second is TensorRT-LLM's, whose /metrics is a list of iterations in JSON.
_ROUTES = ("/metrics", "/prometheus/metrics")
_READ_S = 5.0  # timeout of one page
_EVERY_S = 0.5  # interval of samples
_MOST_SHARE = 0.05  # of the time for reading pages, since a server makes them while it serves
_MOST_SAMPLES = 256  # in a round; beyond it every second one is dropped
_SETTLED_S = 2.0  # time in which a server counts a request that it has answered
_STILL_S = 0.1  # between two reads of the counters


@dataclass(frozen=True)
class Sample:
    """Gauges by data-parallel rank, and the time since the load's start at which they were read."""

    time_s: float
    gauges: dict[str, Gauges]


@dataclass
class ServerSamples:
    """A server's metrics over one load.

    Attributes:
        engine: the engine whose metric names the server has.
        counts: increase of the counters by data-parallel rank; None if there are no counters, or
            the server was restarted.
        both: the client's and the engine's counts; None also if the load was stopped early.
        samples: gauges over time.
    """

    engine: str
    counts: dict[str, EngineCounts] | None = None
    both: RoundCounts | None = None
    samples: list[Sample] = field(default_factory=list)


class Watch:
    """Reader of one server's metrics.

    Args:
        route: path of its metrics page.
        engine: the engine whose metric names the page has.
        kv_tokens: tokens that the KV caches of all ranks hold, by the page; None if unknown.
    """

    def __init__(
        self, connections: Connections, route: str, engine: str, kv_tokens: int | None = None
    ) -> None:
        self.engine, self.kv_tokens = engine, kv_tokens
        self._connections, self._route = connections, route

    @classmethod
    async def find(cls, connections: Connections) -> "Watch | None":
        """Look for a server's metrics page; None if it has no metrics of a known engine."""
        best: tuple[str, Page] | None = None
        for route in _ROUTES:
            page = await _read(connections, route)
            if page is not None and (best is None or page.counts):
                best = route, page
            if page is not None and page.counts:
                break
        if best is None:
            return None
        found = cls(connections, best[0], best[1].engine, best[1].kv_tokens)
        await found._still()  # requests of the readiness check are counted by then
        return found

    async def read(self) -> Page | None:
        """The page now; None if it cannot be read."""
        return await _read(self._connections, self._route)

    async def _still(self) -> None:
        """Wait until counters stop rising, at most `_SETTLED_S`."""
        end_s = time.perf_counter() + _SETTLED_S
        before = await self.read()
        while before is not None and time.perf_counter() < end_s:
            await asyncio.sleep(_STILL_S)
            after = await self.read()
            if after is None or after.counts == before.counts:
                return
            before = after

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[ServerSamples]:
        """Sample gauges while a load runs."""
        watched = ServerSamples(self.engine)
        sampling = asyncio.ensure_future(self._sample(watched.samples))
        try:
            yield watched
        finally:
            sampling.cancel()
            with suppress(asyncio.CancelledError):
                await sampling

    async def _sample(self, samples: list[Sample]) -> None:
        began_s, every_s = time.perf_counter(), _EVERY_S
        while True:
            asked_s = time.perf_counter()
            page = await self.read()
            taken_s = time.perf_counter() - asked_s
            if page is not None and page.gauges:
                samples.append(Sample(asked_s - began_s, page.gauges))
            if len(samples) >= _MOST_SAMPLES:
                del samples[1::2]
                every_s *= 2
            await asyncio.sleep(max(every_s, taken_s / _MOST_SHARE))

    async def settle(
        self,
        watched: ServerSamples,
        before: Page | None,
        compare: Callable[[EngineCounts], RoundCounts],
    ) -> None:
        """Set the counts since `before`, once they agree with the client's or `_SETTLED_S` passed.

        Args:
            compare: combines the engine's counts with the client's.
        """
        if before is None or not before.counts:
            return
        if compare(EngineCounts()).client.num_aborted:
            await self._still()  # aborted requests are counted later
        end_s = time.perf_counter() + _SETTLED_S
        while True:
            page = await self.read()
            watched.counts = None if page is None else _since(before, page)
            if watched.counts is None:
                return
            watched.both = compare(EngineCounts.total(watched.counts.values()))
            if not watched.both.differences or time.perf_counter() > end_s:
                return
            await asyncio.sleep(_STILL_S)


def _since(before: Page, after: Page) -> dict[str, EngineCounts] | None:
    found = {}
    for rank, counts in after.counts.items():
        since = counts.since(before.counts.get(rank, EngineCounts()))
        if since is None:
            return None
        found[rank] = since
    return found or None


async def _read(connections: Connections, route: str) -> Page | None:
    answer = Answer(most_bytes=MOST_PAGE_BYTES)
    try:
        async with asyncio.timeout(_READ_S):
            await connections.ask("GET", route, into=answer)
    except (TimeoutError, ConnectionFailed, ClosedEarly):
        return None
    return read_page(bytes(answer.body)) if answer.status == 200 else None


def engine_record(rounds: Sequence[ServerSamples | None]) -> EngineRecord | None:
    """The record of a load of several rounds; None if the server has no metrics."""
    watched = [(number, each) for number, each in enumerate(rounds, 1) if each is not None]
    known = [each for _, each in watched if each.counts is not None]
    gauges = _gauges(watched)
    if not known and gauges is None:
        return None
    return joined(
        watched[0][1].engine,
        [each.both for each in known if each.both is not None],
        [each.counts for each in known if each.counts is not None],
        gauges,
    )


def _gauges(rounds: Sequence[tuple[int, ServerSamples]]) -> GaugesRecord | None:
    """The gauges of all samples that have the same ranks and gauges as the last sample."""
    samples = [(number, each) for number, watched in rounds for each in watched.samples]
    if not samples:
        return None
    ranks = samples[-1][1].gauges
    kinds = {rank: _told(each) for rank, each in ranks.items()}
    kept = [
        (number, each)
        for number, each in samples
        if {rank: _told(one) for rank, one in each.gauges.items()} == kinds
    ]
    return GaugesRecord(
        tuple(number for number, _ in kept),
        tuple(round(each.time_s, 3) for _, each in kept),
        {
            rank: RankGauges(
                **{
                    name: tuple(round(getattr(each.gauges[rank], name), 4) for _, each in kept)
                    for name in names
                }
            )
            for rank, names in kinds.items()
        },
    )


def _told(gauges: Gauges) -> tuple[str, ...]:
    names = "num_running", "num_waiting", "kv_usage"
    return tuple(name for name in names if getattr(gauges, name) is not None)
