"""What an engine counts itself under a load, beside what its client counts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce

from expertlane.spec.ranges import Strict


@dataclass(frozen=True)
class EngineCounts(Strict):
    """Requests and tokens over a stretch of time; None where it is not told.

    Attributes:
        num_requests: requests that were answered to the end.
        num_aborted: requests that ended before, as their client left or the engine failed.
        num_prompt_tokens: of requests whose prompt was computed.
        num_output_tokens: those of aborted requests included.
        num_cached_tokens: prompt tokens that the prefix cache had.
        num_preemptions: requests that lost their blocks and were computed again.
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
        """Counts less those of an earlier moment; None if one fell: the engine was started anew."""
        found = []
        for now, then in zip(self.values, before.values, strict=True):
            # A counter with labels has no series before its first event.
            found.append(None if now is None else now - (then or 0))
            if found[-1] is not None and found[-1] < 0:
                return None
        return EngineCounts(*found)

    @classmethod
    def total(cls, several: Iterable["EngineCounts"]) -> "EngineCounts":
        """Their sum; None where none of them tells."""
        return reduce(cls.__add__, several, cls())


def _sum(one: int | None, other: int | None) -> int | None:
    known = [each for each in (one, other) if each is not None]
    return sum(known) if known else None


@dataclass(frozen=True)
class Difference:
    """A count on which client and engine do not agree.

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
    """One repetition of a load, counted on both sides.

    Attributes:
        engine: by the engine, over all ranks.
        client: by the client: answered requests and their tokens; `num_aborted` are those that
            failed. Tokens are None where the server's `usage` told none.
        failed_prompt_tokens, failed_output_tokens: tokens that requests that failed had or asked
            for: the most that an engine may have counted of them.
    """

    engine: EngineCounts
    client: EngineCounts
    failed_prompt_tokens: int = 0
    failed_output_tokens: int = 0

    @property
    def differences(self) -> list[Difference]:
        """Counts that differ; of requests that failed an engine may have counted any part."""
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
        """Requests that the engine answered beyond those of this client: others use the server."""
        sent = (self.client.num_requests or 0) + (self.client.num_aborted or 0)
        return max((self.engine.num_requests or 0) - sent, 0)


@dataclass(frozen=True)
class RankGauges(Strict):
    """One data-parallel rank over time; [num_samples], empty where it is not told.

    Attributes:
        num_running, num_waiting: requests in the batch, and in the queue.
        kv_usage: share of the KV cache in use, 0 to 1.
    """

    num_running: tuple[float, ...] = field(default=(), repr=False)
    num_waiting: tuple[float, ...] = field(default=(), repr=False)
    kv_usage: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class GaugesRecord(Strict):
    """What an engine's gauges showed during the rounds.

    Attributes:
        rounds: repetition of each sample, from 1; [num_samples].
        times_s: when each was read, since the round's start.
        ranks: by the label of the data-parallel rank.
    """

    rounds: tuple[int, ...] = field(repr=False)
    times_s: tuple[float, ...] = field(repr=False)
    ranks: dict[str, RankGauges] = field(repr=False)

    def total(self, name: str) -> list[float]:
        """[num_samples]; a gauge summed over ranks; empty where it is not told."""
        columns = [getattr(each, name) for each in self.ranks.values()]
        told = [each for each in columns if each]
        return [sum(each) for each in zip(*told, strict=True)]

    @property
    def most_kv_usage(self) -> float | None:
        """The fullest rank's cache at its fullest."""
        told = [max(each.kv_usage) for each in self.ranks.values() if each.kv_usage]
        return max(told, default=None)


@dataclass(frozen=True)
class EngineRecord(Strict):
    """A load as the engine's own metrics tell it.

    Attributes:
        engine: whose names the metrics have: `vllm`, `sglang`, `trtllm` or `expertlane`.
        counts: of all rounds and ranks.
        rounds: round by round, of those that ran to their end.
        by_rank: of all rounds, by the label of the data-parallel rank; empty where counters do not
            tell ranks apart.
        gauges: None without a sample.
    """

    engine: str
    counts: EngineCounts
    rounds: tuple[RoundCounts, ...] = ()
    by_rank: dict[str, EngineCounts] = field(default_factory=dict)
    gauges: GaugesRecord | None = None

    @property
    def differences(self) -> list[Difference]:
        """Counts of all rounds that differ between client and engine."""
        return [one for each in self.rounds for one in each.differences]

    @property
    def num_others(self) -> int:
        """Requests of other clients that ended during the rounds."""
        return sum(each.num_others for each in self.rounds)

    @property
    def cached_share(self) -> float | None:
        """Share of prompt tokens that the prefix cache had."""
        cached, prompts = self.counts.num_cached_tokens, self.counts.num_prompt_tokens
        return None if cached is None or not prompts else cached / prompts

    @property
    def work_by_rank(self) -> dict[str, float]:
        """Tokens that each data-parallel rank computed; else its running requests, on average."""
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
        """The busiest rank's work over the mean; None where ranks are not told apart or idle."""
        work = list(self.work_by_rank.values())
        return max(work) * len(work) / sum(work) if sum(work) else None


def joined(
    engine: str,
    rounds: Sequence[RoundCounts],
    by_rank: Sequence[dict[str, EngineCounts]],
    gauges: GaugesRecord | None,
) -> EngineRecord:
    """The record of a load of several rounds."""
    ranks = dict.fromkeys(rank for each in by_rank for rank in each)
    summed = {
        rank: EngineCounts.total(each[rank] for each in by_rank if rank in each) for rank in ranks
    }
    # Some engines tell ranks apart for a few counters alone: not for their work.
    apart = {
        rank: each for rank, each in summed.items() if rank and each.num_output_tokens is not None
    }
    return EngineRecord(engine, EngineCounts.total(summed.values()), tuple(rounds), apart, gauges)
