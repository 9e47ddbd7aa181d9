"""Workloads and loads: sequences, prompt and output lengths, and the seed of the prompts.

Below: service level objectives, the limits of latency statistics.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, expm1, log
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from expertlane.errors import SpecError, UserError
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import MAX_TOKENS_OF_A_RUN, RANGES, Strict, shown, take, take_fields


@dataclass(frozen=True)
class Workload(Strict):
    """`num_sequences` prompts of `prompt_len` tokens, each continued by `output_len` tokens.

    Raises:
        SpecError: a number is out of its range.
    """

    num_sequences: int
    prompt_len: int
    output_len: int
    seed: int = 0

    def __post_init__(self) -> None:
        take_fields(self, "workload: {}".format)

    @property
    def max_len(self) -> int:
        """Positions a sequence takes: the last output token is never fed back."""
        return self.prompt_len + self.output_len - 1

    @property
    def load(self) -> "Load":
        """The workload as a closed loop."""
        prompt, output = (LengthRange(each, each) for each in (self.prompt_len, self.output_len))
        return Load(self.num_sequences, prompt, output, self.num_sequences)

    @property
    def mean_context(self) -> int:
        """Positions cached before a decode step, on average."""
        return self.prompt_len + (self.output_len - 1) // 2

    def check_model(self, model: ModelConfig, *, as_options: bool = False) -> None:
        """Check that every sequence fits the model's positions.

        Args:
            as_options: lengths are called as a command has them, not as a file.

        Raises:
            SpecError: prompt and output together pass `max_position_embeddings`.
        """
        limit = model.max_position_embeddings
        if self.max_len > limit:
            names = ("--prompt-len", "--output-len") if as_options else ("prompt_len", "output_len")
            prompt_len, output_len = names
            valid = (
                f"valid {output_len} with a prompt of one token: 1 to {limit}"
                if self.output_len > limit
                else f"valid {prompt_len} at this {output_len}: 1 to {limit - self.output_len + 1}"
            )
            raise SpecError(
                f"workload: a prompt of {self.prompt_len} and {self.output_len} output tokens take "
                f"{self.max_len} positions but {model.name} has {limit}; {valid}"
            )

    def check_size(self) -> None:
        """Check that its tokens can be held in memory.

        Raises:
            SpecError: they are too many.
        """
        num_tokens = self.num_sequences * (self.prompt_len + self.output_len)
        if num_tokens > MAX_TOKENS_OF_A_RUN:
            raise SpecError(
                f"workload: {self.num_sequences:,} sequences of {self.prompt_len:,} and "
                f"{self.output_len:,} tokens are {num_tokens:,} in all; a run holds at most "
                f"{MAX_TOKENS_OF_A_RUN:,}"
            )

    def prompt_token_ids(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """The prompts, drawn uniformly from the vocabulary: [num_sequences, prompt_len]."""
        generator = np.random.Generator(np.random.Philox(key=self.seed))
        return generator.integers(0, vocab_size, size=(self.num_sequences, self.prompt_len))


@dataclass(frozen=True)
class LengthRange:
    """Lengths in tokens, drawn uniformly; both ends included.

    Attributes:
        is_range: given by its two ends, if equal ones: no mean to draw lengths around.
    """

    low: int
    high: int
    is_range: bool = False

    @classmethod
    def parse(cls, name: str, text: str) -> "LengthRange | None":
        """Read `32` or `4:8`, of a field's range; None where it is neither."""
        ends = [RANGES[name].parse(part) for part in text.split(":")]
        low, high = ends[0], ends[-1]
        if low is None or high is None or len(ends) > 2 or low > high:
            return None
        return cls(int(low), int(high), len(ends) > 1)

    def varied(self, most: int) -> "LengthRange":
        """Lengths around a single one, at most `most`; a range stays."""
        if self.low < self.high or self.is_range:
            return self
        away = min(round(LENGTHS_APART * self.low), most - self.low)
        away = max(min(away, self.low - 1), 0)
        return LengthRange(self.low - away, self.high + away)

    def __str__(self) -> str:
        is_one = self.low == self.high and not self.is_range
        return f"{self.low}" if is_one else f"{self.low}:{self.high}"


LENGTHS_APART = 0.2  # of a mean, below and above it
_RARELY = 10  # a chance of e to the power of minus so much is small enough
_HALVINGS = 40  # of an interval, until its ends are the same in all digits that count
HASH_BLOCK = 512  # tokens that a hash id of a recorded request stands for


@dataclass(frozen=True)
class RecordedRequest:
    """A request of a file.

    Attributes:
        line: number of its line.
        due_s: seconds after the first one's arrival.
        hash_ids: of each block of `HASH_BLOCK` tokens, the last perhaps shorter; equal ones stand
            for equal tokens. Empty where nothing is known of the prompt.
    """

    line: int
    due_s: float
    prompt_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()

    @property
    def max_len(self) -> int:
        """Positions that it takes in the cache."""
        return self.prompt_len + self.output_len - 1


@dataclass(frozen=True)
class Load:
    """A load on the engine.

    Attributes:
        batch: concurrency, requests kept unfinished; None in an open loop.
        rate: requests that arrive a second, on average; None in a closed loop, or where they
            arrive as recorded.
        recorded: requests of a file, by due time; empty where lengths are drawn.
        prefix_len: tokens at the beginning that a prompt shares with others.
        num_prefixes: different beginnings; each prompt has one of them, at random.

    Raises:
        UserError: a number or the sum of all tokens is out of its range.
    """

    num_requests: int
    prompt_len: LengthRange
    output_len: LengthRange
    batch: int | None = None
    rate: float | None = None
    recorded: tuple[RecordedRequest, ...] = field(default=(), repr=False)
    prefix_len: int = 0
    num_prefixes: int = 1

    @classmethod
    def of(
        cls,
        recorded: Sequence[RecordedRequest],
        batch: int | None = None,
        rate: float | None = None,
    ) -> "Load":
        """The requests of a file, at their own arrivals unless a batch or a rate is given."""
        prompt_lens = [each.prompt_len for each in recorded]
        output_lens = [each.output_len for each in recorded]
        return cls(
            len(recorded),
            LengthRange(min(prompt_lens), max(prompt_lens)),
            LengthRange(min(output_lens), max(output_lens)),
            batch,
            rate,
            tuple(recorded),
        )

    def __post_init__(self) -> None:
        take("num_requests", self.num_requests)
        for name, value in (("batch", self.batch), ("rate", self.rate)):
            if value is not None:
                take(name, value)
        for name, lengths in (("prompt_len", self.prompt_len), ("output_len", self.output_len)):
            if take(name, lengths.low) > take(name, lengths.high):
                raise UserError(f"{name} is {lengths}; the first end must be the lower one")
        take("prefix_len", self.prefix_len)
        take("num_prefixes", self.num_prefixes)
        if self.prefix_len >= self.prompt_len.low:
            raise UserError(
                f"prefix_len is {self.prefix_len}, prompt_len {self.prompt_len}; a prompt must be "
                "longer than its prefix"
            )
        num_tokens = self.num_requests * (self.prompt_len.high + self.output_len.high)
        if self.recorded:
            num_tokens = sum(each.prompt_len + each.output_len for each in self.recorded)
        if num_tokens > MAX_TOKENS_OF_A_RUN:
            raise UserError(
                f"{self.num_requests:,} requests with prompts of {self.prompt_len} and outputs of "
                f"{self.output_len} tokens may be {num_tokens:,} in all; a run holds at most "
                f"{MAX_TOKENS_OF_A_RUN:,}: give fewer requests or shorter ones"
            )

    @property
    def is_closed(self) -> bool:
        """True if a request comes when another is done, not at a time of its own."""
        return self.batch is not None

    @property
    def is_endless(self) -> bool:
        """True if it has a steady state: requests keep arriving, and all are drawn alike.

        Recorded requests with hash ids have none: what they share depends on their order.
        """
        return not self._has_hash_ids and (self.is_closed or self.rate is not None)

    @property
    def varies(self) -> bool:
        """True if lengths differ, or are no means."""
        ends = self.prompt_len, self.output_len
        return bool(self.recorded) or any(each.is_range or each.low < each.high for each in ends)

    def varied(self, num_positions: int) -> "Load":
        """With outputs drawn around a single length, as far as the model has positions.

        Requests of equal length would stay in step, and those that come together end together.
        """
        if self.recorded:
            return self
        room = num_positions - self.prompt_len.high + 1
        return replace(self, output_len=self.output_len.varied(room))

    @property
    def outputs(self) -> str:
        """Lengths of outputs, in words."""
        low, high = self.output_len.low, self.output_len.high
        if self.recorded:
            return "as recorded"
        if low == high:
            return f"{low:,} tokens each"
        return (
            f"drawn from {low:,} to {high:,} tokens (a single length is a mean: requests of equal "
            "length would all end together)"
        )

    @property
    def has_prefixes(self) -> bool:
        """True if prompts share prefixes."""
        return self.prefix_len > 0 or self._has_hash_ids

    @property
    def _has_hash_ids(self) -> bool:
        return any(each.hash_ids for each in self.recorded)

    def shared(self, block_size: int) -> "SharedPrefixes":
        """The prefixes as a cache shares them."""
        num = self.num_prefixes if self.prefix_len >= block_size else 0
        return SharedPrefixes(num, self.prefix_len // block_size if num else 0, block_size)

    @property
    def max_len(self) -> int:
        """Positions of the longest sequence; its last token is not fed back."""
        if self.recorded:
            return max(each.max_len for each in self.recorded)
        return self.prompt_len.high + self.output_len.high - 1

    @property
    def mean_lens(self) -> tuple[float, float]:
        """Mean lengths of prompts and outputs; of drawn ones, as expected."""
        if self.recorded:
            prompts = sum(each.prompt_len for each in self.recorded)
            outputs = sum(each.output_len for each in self.recorded)
            return prompts / self.num_requests, outputs / self.num_requests
        ends = self.prompt_len, self.output_len
        prompt, output = ((each.low + each.high) / 2 for each in ends)
        return prompt, output

    def of_lengths(self) -> "Load":
        """The load without hash ids: prompts share nothing."""
        return replace(self, recorded=tuple(replace(each, hash_ids=()) for each in self.recorded))

    def means(self, seed: int = 0, batch: int | None = None) -> Workload:
        """A closed loop of requests that are all of the mean lengths.

        Args:
            batch: its concurrency; None for the load's own.
        """
        batch = batch or self.batch
        assert batch is not None, "a closed loop"
        prompt, output = map(round, self.mean_lens)
        return Workload(batch, prompt, output, seed)

    def __str__(self) -> str:
        if self.batch is not None:
            return f"batch {self.batch}"
        return "recorded arrivals" if self.rate is None else f"{self.rate:g} req/s"


@dataclass(frozen=True)
class SharedPrefixes:
    """Prefixes that prompts share, in whole blocks of a cache; the rest of them is not shared.

    Attributes:
        num: different prefixes, equally likely; 0 where they are shorter than a block.
        num_blocks: whole blocks of each prefix.
    """

    num: int
    num_blocks: int
    block_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of each prefix that are shared."""
        return self.num_blocks * self.block_size

    def num_distinct(self, num_seqs: float) -> float:
        """Mean number of different prefixes among so many sequences."""
        return -self.num * expm1(-num_seqs / self.num) if self.num else 0.0

    def num_sharing(self, num_blocks: float, of_each: float) -> float:
        """Sequences that a cache of so many blocks holds, each prefix once.

        Args:
            of_each: blocks of a sequence that it does not share; more than 0.
        """
        low, high = num_blocks / (of_each + self.num_blocks), num_blocks / of_each
        for _ in range(_HALVINGS if self.num else 0):
            middle = (low + high) / 2
            needed = middle * of_each + self.num_distinct(middle) * self.num_blocks
            low, high = (middle, high) if needed <= num_blocks else (low, middle)
        return low

    def num_kept(self, of_each: int) -> int:
        """Blocks for all prefixes and nearly all that is freed between two uses of one.

        Args:
            of_each: blocks of a sequence that it does not share.
        """
        between = ceil(self.num * (log(self.num) + _RARELY)) if self.num else 0
        return self.num * self.num_blocks + between * of_each

    def found_share(self, num_blocks: float, of_each: float) -> float:
        """Share of prompts whose prefix is found in a cache of so many blocks.

        The cache holds the latest sequences, since it evicts the least recently used first (Che,
        Tung and Wang, Hierarchical Web Caching Systems, 2002).

        Args:
            of_each: blocks of a sequence that it does not share; more than 0.
        """
        return self.num_distinct(self.num_sharing(num_blocks, of_each)) / max(self.num, 1)


NOTHING_SHARED = SharedPrefixes(0, 0, 1)


@dataclass(frozen=True, eq=False)
class TimedRequest:
    """A request to come.

    Attributes:
        due_s: seconds from the start; 0 in a closed loop, where it is due when there is room.
        num_arrived: positions of the prompt that come with keys and values; 0 but in a snapshot.
    """

    prompt_token_ids: list[int] | npt.NDArray[np.int64]
    output_len: int
    due_s: float
    num_arrived: int = 0


_WARM_UP_LEN = 2  # output tokens: a prefill and a decode
_OPEN_WARM_UP_BATCH = 8


def warm_up_of(load: Load, num_requests: int | None = None) -> Load:
    """Requests at once before a load, with outputs as short as they can be.

    Args:
        num_requests: as many as the load has at once if None.
    """
    batch = num_requests or min(load.batch or _OPEN_WARM_UP_BATCH, load.num_requests)
    output_len = min(_WARM_UP_LEN, load.output_len.low)
    return Load(batch, load.prompt_len, LengthRange(output_len, output_len), batch=batch)


def check_lengths(load: Load, max_positions: int) -> None:
    """Check that all requests of a load can have their whole output.

    Args:
        max_positions: positions that a sequence can take.

    Raises:
        UserError: the longest ones cannot.
    """
    if load.max_len <= max_positions:
        return
    if not load.recorded:
        raise UserError(
            f"prompts of {load.prompt_len.high} and outputs of {load.output_len.high} tokens take "
            f"{load.max_len} positions; valid: {max_positions} at most"
        )
    first, *others = (each for each in load.recorded if each.max_len > max_positions)
    raise UserError(
        f"--requests: line {first.line} has a prompt of {first.prompt_len} and an output of "
        f"{first.output_len} tokens, {first.max_len} positions; valid: {max_positions} at most"
        + (f" (lines that are too long: {1 + len(others):,})" if others else "")
    )


def draw_requests(
    load: Load, vocab_size: int, seed: Sequence[int], *, blank: bool = False
) -> list[TimedRequest]:
    """Random prompts, lengths and, in an open loop, arrivals; the first is due at once.

    Of recorded requests lengths are known, and arrivals unless the load has a rate; blocks of
    equal hash ids get equal tokens. Of drawn ones, prompts begin with one of the load's prefixes.

    Args:
        seed: equal ones give equal requests.
        blank: prompts that nobody reads; lengths and arrivals are the same.
    """
    generator = np.random.default_rng(seed)
    size, recorded = load.num_requests, load.recorded
    due_s = np.zeros(size)
    if recorded:
        prompt_lens = np.array([each.prompt_len for each in recorded])
        output_lens = np.array([each.output_len for each in recorded])
        if not load.is_closed:
            due_s[:] = [each.due_s for each in recorded]
    else:
        prompt_lens = generator.integers(load.prompt_len.low, load.prompt_len.high + 1, size)
        output_lens = generator.integers(load.output_len.low, load.output_len.high + 1, size)
    if load.rate is not None:
        due_s[1:] = np.cumsum(generator.exponential(1 / load.rate, size - 1))
    shared = []
    if load.prefix_len and not blank:
        of_prefixes = np.random.default_rng([*seed, load.prefix_len])
        prefixes = of_prefixes.integers(vocab_size, size=(load.num_prefixes, load.prefix_len))
        shared = prefixes[of_prefixes.integers(load.num_prefixes, size=size)].tolist()
    blocks: dict[int, list[int]] = {}

    def block(hash_id: int) -> list[int]:
        if hash_id not in blocks:
            of_block = np.random.default_rng([*seed, hash_id])
            blocks[hash_id] = of_block.integers(vocab_size, size=HASH_BLOCK).tolist()
        return blocks[hash_id]

    def prompt(number: int, length: int) -> list[int]:
        if blank:
            return [0] * length
        if recorded and recorded[number].hash_ids:
            tokens = [token for hash_id in recorded[number].hash_ids for token in block(hash_id)]
            return tokens[:length]
        own: list[int] = generator.integers(vocab_size, size=length - load.prefix_len).tolist()
        return [*shared[number], *own] if shared else own

    return [
        TimedRequest(prompt(number, prompt_len), output_len, due)
        for number, (prompt_len, output_len, due) in enumerate(
            zip(prompt_lens.tolist(), output_lens.tolist(), due_s.tolist(), strict=True)
        )
    ]


LatencyMetric = Literal["ttft", "tpot", "itl", "e2e"]
Statistic = Literal["mean", "median", "p90", "p95", "p99"]

_EXAMPLE = "ttft.p95=500ms,tpot.mean=20ms"
_UNITS_S = {"ms": 1e-3, "s": 1.0}  # `ms` first: it ends in `s` too


@dataclass(frozen=True)
class SLO(Strict):
    """A statistic of a latency over all requests of a load, and its limit.

    One request meets it if its own latency is within the limit; of its ITL, that statistic.
    """

    metric: LatencyMetric
    statistic: Statistic
    limit_s: float

    def __str__(self) -> str:
        return f"{self.metric.upper()} {self.statistic} ≤ {self.limit}"

    @property
    def limit(self) -> str:
        """The limit with its unit: `500 ms`, `10 s`."""
        return f"{self.limit_s:g} s" if self.limit_s >= 1 else f"{1e3 * self.limit_s:g} ms"

    @property
    def name(self) -> str:
        """Metric and statistic, as in the option: `ttft.p95`."""
        return f"{self.metric}.{self.statistic}"

    @property
    def counts_wait(self) -> bool:
        """True if its latency begins as a request is due, so that it counts the wait in a queue."""
        return self.metric in ("ttft", "e2e")


def parse_slos(texts: Iterable[str], option: str = "--slo") -> tuple[SLO, ...]:
    """Read `ttft.p95=500ms,tpot.mean=20ms`, each text with one objective or several.

    Args:
        option: the option's name in messages.

    Raises:
        UserError: one is malformed, or given twice.
    """
    found: dict[str, SLO] = {}
    for part in (part for text in texts for part in text.split(",")):
        slo = _parse(part.strip(), option)
        if slo.name in found:
            raise UserError(f"{option}: {slo.name} is given twice")
        found[slo.name] = slo
    return tuple(found.values())


def _parse(text: str, option: str) -> SLO:
    name, _, limit = text.partition("=")
    metric, _, statistic = (part.strip() for part in name.lower().partition("."))
    statistic = "median" if statistic == "p50" else statistic
    if not statistic and metric in get_args(LatencyMetric):
        first, *others = (f".{each}" for each in get_args(Statistic))
        raise UserError(
            f"{option} is {shown(text)}: of which statistic? write "
            f"{metric}{first}={limit.strip()}, or {', '.join(others)}"
        )
    for what, word, valid in (
        ("latency", metric, get_args(LatencyMetric)),
        ("statistic", statistic, get_args(Statistic)),
    ):
        if word not in valid:
            raise UserError(
                f"{option} is {shown(text)}: no {what} is called {shown(word)}; valid: "
                f"{', '.join(valid)}; an example: {_EXAMPLE}"
            )
    limit, allowed = limit.strip().lower(), RANGES["limit_s"]
    unit = next((unit for unit in _UNITS_S if limit.endswith(unit)), None)
    number = None if unit is None else allowed.parse(limit.removesuffix(unit))
    if unit is None or number is None:
        raise UserError(
            f"{option} is {shown(text)}: the limit must be {allowed}, with its unit, ms or s; an "
            f"example: {_EXAMPLE}"
        )
    return SLO(metric, statistic, number * _UNITS_S[unit])  # type: ignore[arg-type]
