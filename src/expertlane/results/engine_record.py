"""An engine's own metrics under a load, and the counts of its client."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce

from expertlane.spec.ranges import Strict


@dataclass(frozen=True)
class EngineCounts(Strict):
    """Increase of an engine's counters over some time; None for counters that it lacks.

    Attributes:
        num_requests: completed requests.
        num_aborted: requests that ended early: the client disconnected, or the engine failed.
        num_prompt_tokens: prompt tokens of prefilled requests.
        num_output_tokens: output tokens, aborted requests included.
        num_cached_tokens: prompt tokens found in the prefix cache.
        num_preemptions: times that a request lost its KV blocks, to be computed again.
    """

    num_requests: int | None = None
    num_aborted: int | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_preemptions: int | None = None

    @property
    def values(self) -> Iterator[int | None]:
        """The counts, in the order of the fields."""
        return (getattr(self, each.name) for each in fields(self))

    def __add__(self, other: "EngineCounts") -> "EngineCounts":
        pairs = zip(self.values, other.values, strict=True)
        return EngineCounts(*(_sum(one, two) for one, two in pairs))

    def since(self, before: "EngineCounts") -> "EngineCounts | None":
        """These counts minus earlier ones; None if one fell: the engine was restarted."""
        found = []
        for now, then in zip(self.values, before.values, strict=True):
            # A counter with labels has no series before its first event.
            found.append(None if now is None else now - (then or 0))
            if found[-1] is not None and found[-1] < 0:
                return None
        return EngineCounts(*found)

    @classmethod
    def total(cls, several: Iterable["EngineCounts"]) -> "EngineCounts":
        """The sum of counts; a field is None if it is None in all of them."""
        return reduce(cls.__add__, several, cls())


def _sum(one: int | None, other: int | None) -> int | None:
    known = [each for each in (one, other) if each is not None]
    return sum(known) if known else None


@dataclass(frozen=True)
class Difference:
    """A count that differs between client and engine.

    Attributes:
        what: `requests`, `prompt tokens` or `output tokens`.
    """

    what: str
    client: int
    engine: int


_COMPARED = {
    "requests": "num_requests",
    "prompt tokens": "num_prompt_tokens",
    "output tokens": "num_output_tokens",
}


@dataclass(frozen=True)
class RoundCounts(Strict):
    """One round of a load, counted by engine and client.

    Attributes:
        engine: the engine's counts, over all ranks.
        client: the client's counts of completed requests and their tokens, with failed requests as
            `num_aborted`. Tokens are None if the server sent no `usage`.
        failed_prompt_tokens, failed_output_tokens: prompt lengths and requested output lengths of
            failed requests: the most tokens of them that the engine may have counted.
    """

    engine: EngineCounts
    client: EngineCounts
    failed_prompt_tokens: int = 0
    failed_output_tokens: int = 0

    @property
    def differences(self) -> list[Difference]:
        """Counts that differ by more than failed requests explain."""
        may_be_more = {
            "num_requests": self.client.num_aborted or 0,
            "num_prompt_tokens": self.failed_prompt_tokens,
            "num_output_tokens": self.failed_output_tokens,
        }
        found = []
        for what, name in _COMPARED.items():
            client, engine = getattr(self.client, name), getattr(self.engine, name)
            if client is None or engine is None:
                continue
            if not client <= engine <= client + may_be_more[name]:
                found.append(Difference(what, client, engine))
        return found

    @property
    def num_others(self) -> int:
        """Requests that the engine completed beyond those of this client: of other clients."""
        sent = (self.client.num_requests or 0) + (self.client.num_aborted or 0)
        return max((self.engine.num_requests or 0) - sent, 0)


@dataclass(frozen=True)
class RankGauges(Strict):
    """Gauges of one data-parallel rank over time, each [num_samples]; empty for those it lacks.

    Attributes:
        num_running: requests in the running batch.
        num_waiting: requests in the queue.
        kv_usage: share of the KV cache in use, 0 to 1.
    """

    num_running: tuple[float, ...] = field(default=(), repr=False)
    num_waiting: tuple[float, ...] = field(default=(), repr=False)
    kv_usage: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class GaugesRecord(Strict):
    """An engine's gauges during the rounds of a load.

    Attributes:
        rounds: [num_samples]; round of each sample, from 1.
        times_s: [num_samples]; seconds from the round's start to the sample.
        ranks: gauges by the label of the data-parallel rank.
    """

    rounds: tuple[int, ...] = field(repr=False)
    times_s: tuple[float, ...] = field(repr=False)
    ranks: dict[str, RankGauges] = field(repr=False)

    def total(self, name: str) -> list[float]:
        """A gauge summed over ranks, [num_samples]; empty if no rank has it.

        Args:
            name: a field of `RankGauges`.
        """
        columns = [getattr(each, name) for each in self.ranks.values()]
        told = [each for each in columns if each]
        return [sum(each) for each in zip(*told, strict=True)]

    @property
    def most_kv_usage(self) -> float | None:
        """Highest use of the KV cache over ranks and samples; None if no rank has it."""
        told = [max(each.kv_usage) for each in self.ranks.values() if each.kv_usage]
        return max(told, default=None)


@dataclass(frozen=True)
class EngineRecord(Strict):
    """An engine's metrics of a load.

    Attributes:
        engine: engine whose metric names the server has: `vllm`, `sglang`, `trtllm` or
            `expertlane`.
        counts: sum over rounds and ranks.
        rounds: counts of each round that was not stopped early.
        by_rank: sum over rounds, by the label of the data-parallel rank; empty if counters have no
            such label.
        gauges: gauges over time; None without samples.
    """

    engine: str
    counts: EngineCounts
    rounds: tuple[RoundCounts, ...] = ()
    by_rank: dict[str, EngineCounts] = field(default_factory=dict)
    gauges: GaugesRecord | None = None

    @property
    def differences(self) -> list[Difference]:
        """Counts that differ between client and engine, of all rounds."""
        return [one for each in self.rounds for one in each.differences]

    @property
    def num_others(self) -> int:
        """Requests of other clients that completed during the rounds."""
        return sum(each.num_others for each in self.rounds)

    @property
    def cached_share(self) -> float | None:
        """Share of prompt tokens found in the prefix cache; None if the engine lacks a count."""
        cached, prompts = self.counts.num_cached_tokens, self.counts.num_prompt_tokens
        return None if cached is None or not prompts else cached / prompts

    @property
    def work_by_rank(self) -> dict[str, float]:
        """Tokens of each data-parallel rank; else its mean number of running requests."""
        if len(self.by_rank) > 1:
            return {
                rank: float((each.num_prompt_tokens or 0) + (each.num_output_tokens or 0))
                for rank, each in self.by_rank.items()
            }
        found = {} if self.gauges is None else self.gauges.ranks
        running = {
            rank: sum(each.num_running) / len(each.num_running)
            for rank, each in found.items()
            if each.num_running
        }
        return running if len(running) > 1 else {}

    @property
    def max_over_mean(self) -> float | None:
        """The busiest rank's work over the mean; None without work by rank."""
        work = list(self.work_by_rank.values())
        return max(work) * len(work) / sum(work) if sum(work) else None


def joined(
    engine: str,
    rounds: Sequence[RoundCounts],
    by_rank: Sequence[dict[str, EngineCounts]],
    gauges: GaugesRecord | None,
) -> EngineRecord:
    """The record of a load of several rounds.

    Args:
        engine: engine whose metric names the server has.
        rounds: counts of each round by engine and client.
        by_rank: counts of each round, by data-parallel rank.
        gauges: gauges of all rounds.
    """
    ranks = dict.fromkeys(rank for each in by_rank for rank in each)
    summed = {
        rank: EngineCounts.total(each[rank] for each in by_rank if rank in each) for rank in ranks
    }
    # Some engines label only a few counters by rank: without output tokens it is not the work.
    apart = {
        rank: each for rank, each in summed.items() if rank and each.num_output_tokens is not None
    }
    return EngineRecord(engine, EngineCounts.total(summed.values()), tuple(rounds), apart, gauges)
