"""A window of a steady state: its requests, its length, its tokens, and its corrected time.

A window has some prompts more or less than its share, each of which takes time. What the share is
follows from the load, so the surplus is a control variate (Law and Kelton, Simulation Modeling and
Analysis, section 11.4): its effect on the time, by regression over parts of the window, is taken
out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, log, sqrt
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.profile import BOUNDS, LIKELY
from expertlane.cost.runner import PricedStep
from expertlane.cost.step.operation import Floats, Ints
from expertlane.cost.throughput import MultiToken
from expertlane.results.estimate import half_interval
from expertlane.results.metrics import PERCENTILES, ServedRequest
from expertlane.schedule.request import ROOT, block_digest
from expertlane.simulator.pools import Pool
from expertlane.spec.workload import SLO, Load, SharedPrefixes, TimedRequest

_SETTLING_STEPS = 8
_SETTLING_SHARE = 0.1  # of the steps that a window has at least
_FEW_STEPS, _FEWEST_ROUNDS = 2, 8  # usual steps of a round; least number of longer rounds
_NUM_PARTS = 20  # parts of a window, for its regression
STRATUM = 24  # steps
_MOST_STEPS = 4_000  # where many first tokens are asked for
_FEWEST_PARTS = 5  # for a regression


@dataclass(frozen=True)
class Precision:
    """Precision wanted of a window, and limits of its length.

    Attributes:
        least_steps, most_steps: steps of the decode pool.
        share: half of the 90 % interval of tokens/s, as a share of them; in a closed loop, and up
            to the usual number of steps.
        quantile: quantile of TTFT; enough first tokens are needed that one is likely above it.
        least_first: least number of first tokens.
    """

    least_steps: int = 96
    most_steps: int = 288
    share: float = 0.015
    quantile: float = 0.95
    least_first: int = 0

    @classmethod
    def of(cls, slos: Sequence[SLO], num_requests: int | None = None) -> "Precision":
        """Enough for the objectives' statistics, and at least `num_requests` first tokens."""
        shares = [PERCENTILES[each.statistic] / 100 for each in slos if each.statistic != "mean"]
        precision = cls(quantile=max([cls.quantile, *shares]), least_first=num_requests or 0)
        asks_more = precision.num_first > cls().num_first
        return replace(precision, most_steps=_MOST_STEPS) if asks_more else precision

    def of_rounds(self, num_steps: int) -> "Precision":
        """The precision with fewer rounds where each has many steps (micro-batches, replicas)."""
        share = _FEW_STEPS / max(num_steps, _FEW_STEPS)

        def of(steps: int) -> int:
            return min(max(_FEWEST_ROUNDS, ceil(share * steps)), steps)

        return replace(self, least_steps=of(self.least_steps), most_steps=of(self.most_steps))

    @property
    def settling_steps(self) -> int:
        """Steps before the window."""
        return max(_SETTLING_STEPS, round(_SETTLING_SHARE * self.least_steps))

    @property
    def last_step(self) -> int:
        """The first step at which a window may end."""
        return self.settling_steps + self.least_steps

    @property
    def num_first(self) -> int:
        """First tokens, one of which is above the quantile in 95 of 100 cases."""
        of_quantile = ceil(log(0.05) / log(self.quantile)) if self.quantile else 1
        return max(of_quantile, self.least_first)


USUAL = Precision()
ROUGH = Precision(least_steps=24, most_steps=24, quantile=0.0)


class _StepFacts(NamedTuple):
    """A step of the decode pool: its end [3], its output tokens, and its prompt tokens."""

    end_s: Floats
    num_tokens: int
    num_prompt_tokens: int


class _WindowTotals(NamedTuple):
    """A window corrected for its surplus of prompts: seconds [3], tokens, and the error."""

    seconds: Floats
    num_tokens: float
    error: float


class Watch:
    """Collects the steps of the decode pool, and tells when they suffice."""

    def __init__(
        self,
        precision: Precision,
        num_running: int,
        steps_of_round: int,
        prompt_share: Callable[[Sequence[ServedRequest[Floats]]], float | None],
        advance: Callable[[int], None],
        *,
        is_open: bool,
    ) -> None:
        self._prompt_share, self._is_open = prompt_share, is_open
        self.num_running = num_running
        self._advance, self._num_reported = advance, 0
        self._steps_of_round = steps_of_round
        self.decode: Pool | None = None
        self.begin_s = self.end_s = np.zeros(len(BOUNDS))
        self.has_begun = False
        self._precision = precision
        self._steps: list[_StepFacts] = []
        self._num_before = self._num_checked = 0

    def observe(self, step: PricedStep) -> None:
        """Take in a step when it begins."""
        num_tokens = num_prompt_tokens = 0
        for batch in step.plan.batches:
            num_tokens += int(np.count_nonzero(batch.yields_token))
            if batch.num_tokens > batch.num_seqs:
                new = batch.num_scheduled_tokens
                num_prompt_tokens += int(new[new > 1].sum())
        self._steps.append(_StepFacts(step.times.end_s, num_tokens, num_prompt_tokens))

    def is_done(self, served: Sequence[ServedRequest[Floats]]) -> bool:
        """True once there are enough steps and first tokens."""
        assert self.decode is not None
        num_done = len(self._steps) - self.decode.num_in_flight
        if not self.has_begun:
            if num_done >= self._precision.settling_steps * self._steps_of_round:
                self.has_begun, self._num_before = True, num_done
                self.begin_s = self._ended(num_done)[-1].end_s
            return False
        num = (num_done - self._num_before) // self._steps_of_round
        if num < self._precision.least_steps or num < self._num_checked:
            return False
        self._num_checked = num + max(num // 8, 1)
        self._advance(num - self._num_reported)
        self._num_reported = num
        self.end_s = self._ended(num_done)[-1].end_s
        num_first = sum(map(self.has_in, served[self.num_running :]))
        if num_first < (1 if num < _MOST_STEPS else 0):
            return False
        if num >= self._precision.most_steps:
            return True
        if num_first < self._precision.num_first:
            return False
        if self._is_open or num >= USUAL.most_steps:
            return True
        share = self._prompt_share(served[self.num_running :])
        return self.window(share).error <= self._precision.share

    def _ended(self, num: int) -> list[_StepFacts]:
        """The first `num` steps, in the order in which they end."""
        return sorted(self._steps, key=lambda step: float(step.end_s[LIKELY]))[:num]

    def has_in(self, request: ServedRequest[Floats]) -> bool:
        """True if a request has its first token in the window."""
        times = request.token_times_s
        return bool(times) and self.begin_s[LIKELY] < times[0][LIKELY] <= self.end_s[LIKELY]

    def waited_s(self, served: Sequence[ServedRequest[Floats]]) -> Floats:
        """[3]; seconds that all requests waited for first tokens within the window."""
        waited = np.zeros(len(BOUNDS))
        for each in served[self.num_running :]:
            until = each.token_times_s[0] if each.token_times_s else self.end_s
            inside = np.minimum(until, self.end_s) - np.maximum(each.due_s, self.begin_s)
            waited += np.maximum(inside, 0.0)
        return waited

    def num_decoding(self, served: Sequence[ServedRequest[Floats]]) -> Floats:
        """[3]; requests between their first and last token, on average."""
        spent = np.zeros(len(BOUNDS))
        for number, each in enumerate(served):
            if not each.token_times_s:
                continue
            first = self.begin_s if number < self.num_running else each.token_times_s[0]
            ended = len(each.token_times_s) == each.output_len
            last = each.token_times_s[-1] if ended else self.end_s
            inside = np.minimum(last, self.end_s) - np.maximum(first, self.begin_s)
            spent += np.maximum(inside, 0.0)
        return spent / (self.end_s - self.begin_s)

    def num_steps_of_request(self, served: Sequence[ServedRequest[Floats]]) -> int:
        """The most steps that a request had a token in."""
        return max((len(each.token_times_s) for each in served), default=0)

    def window(self, prompt_share: float | None) -> _WindowTotals:
        """The window with as many tokens of prompts as it should have.

        Args:
            prompt_share: computed prompt tokens per token given, in the steady state; None if
                unknown.
        """
        steps = [
            step
            for step in self._steps
            if self.begin_s[LIKELY] < step.end_s[LIKELY] <= self.end_s[LIKELY]
        ]
        steps.sort(key=lambda step: float(step.end_s[LIKELY]))
        ends = np.array([self.begin_s, *(step.end_s for step in steps)])
        counts = np.array([step[1:] for step in steps], dtype=np.float64)
        edges = np.unique(np.linspace(0, len(steps), _NUM_PARTS + 1).round().astype(int))
        seconds = np.diff(ends[edges], axis=0)
        tokens, prompts = np.add.reduceat(counts, edges[:-1], axis=0).T
        columns = [tokens]
        if prompt_share is not None and len(tokens) > _FEWEST_PARTS:
            surplus = prompts - prompt_share * tokens
            if np.ptp(surplus) > 0:
                columns.append(surplus)
        design = np.stack(columns, axis=1)
        factors = np.linalg.lstsq(design, seconds, rcond=None)[0]
        left = seconds[:, LIKELY] - design @ factors[:, LIKELY]
        whole_s = seconds.sum(axis=0)
        if len(columns) > 1:
            whole_s = whole_s - np.maximum(factors[1], 0.0) * columns[1].sum()
        of_strata = [part.sum() for part in np.array_split(left, max(len(steps) // STRATUM, 2))]
        error = half_interval(of_strata) * len(of_strata) / float(whole_s[LIKELY])
        return _WindowTotals(whole_s, float(tokens.sum()), error)


_FEWEST_FIRST = 4  # first tokens of a window, where so many are under way
_OF_PROMPTS = 2  # tells draws of prompts from others of the same seed


class Draws:
    """Draws the requests of a window.

    Attributes:
        rng: random numbers for all but prompts.
        lengths, prompts: drawn for the load's requests.
        is_shifted: so few requests are under way that some are made to end in the window.
    """

    def __init__(
        self,
        load: Load,
        multi_token: MultiToken,
        precision: Precision,
        prompts: "Prompts",
        seed: int,
    ) -> None:
        self.rng = np.random.default_rng([seed])
        self.lengths = Lengths(load, multi_token)
        self.prompts = prompts
        self._multi_token, self._precision = multi_token, precision
        self.is_shifted = False

    def requests(self, num_running: int, rate: float | None) -> Iterator[TimedRequest]:
        """Requests that run, then those that wait, then new ones without end.

        Args:
            rate: arrivals per second; None in a closed loop, where a request is due once there is
                room.
        """
        for left in self._steps_left(num_running).tolist():
            yield self.under_way(left, self.rng)
        due_s = 0.0
        while True:
            if rate is not None:
                due_s += float(self.rng.exponential(1 / rate))
            prompt, output = self.lengths.draw(self.rng)
            tokens = self.prompts.draw(prompt)
            yield TimedRequest(tokens, self._multi_token.num_steps(output), due_s)

    def _steps_left(self, num_running: int) -> Ints:
        """[num_running]; steps until requests under way end, in random order.

        As many end in a step as of that many independent requests. The numbers are stratified: any
        `STRATUM` steps have nearly the right shares of quiet and of crowded ones.
        """
        ended: list[int] = []
        first, size = 1, self._precision.settling_steps
        while len(ended) < num_running and first <= self.lengths.most_steps:
            steps = np.arange(first, min(first + size, self.lengths.most_steps + 1))
            mean = float(np.mean(num_running * self.lengths.chance_in(steps)))
            ranks = (self.rng.permutation(len(steps)) + self.rng.random(len(steps))) / len(steps)
            ended += np.repeat(steps, poisson_quantiles(mean, ranks)).tolist()
            first, size = first + size, STRATUM
        rest = num_running - len(ended)
        if rest > 0:
            ended += self.rng.choice(self.lengths.left_of(self.rng, num_running), rest).tolist()
        left = np.array(ended[:num_running], dtype=np.int64)
        soon = min(_FEWEST_FIRST, num_running)
        self.is_shifted = bool((left <= self._precision.last_step).sum() < soon)
        if self.is_shifted:  # what that shifts is taken out
            begin = self._precision.settling_steps
            spaced = (np.arange(soon) + 0.5) * self._precision.least_steps / soon
            left[:soon] = np.minimum(begin + spaced.astype(int), self.lengths.most_steps)
        return self.rng.permutation(left)

    def under_way(self, steps_left: int, rng: np.random.Generator) -> TimedRequest:
        """A running request that ends after so many steps; long ones are likelier to run."""
        prompt, output = self.lengths.draw(rng, steps_left)
        further = ceil(steps_left * self._multi_token.tokens_per_step)
        num_tokens = prompt + max(output - further, 1)
        tokens = self.prompts.draw(num_tokens)
        return TimedRequest(tokens, steps_left, 0.0, num_arrived=num_tokens - 1)


class Prompts:
    """Token ids of prompts, which matter only for the prefixes that prompts share.

    Args:
        seed: seed of the prefixes, and of the choice among them.
    """

    def __init__(self, shared: SharedPrefixes, vocab_size: int, seed: int) -> None:
        self._shared, self._vocab_size = shared, vocab_size
        self._rng = np.random.default_rng([seed, _OF_PROMPTS])
        self._heads: dict[int, Ints] = {}  # first blocks of prefixes; the rest of a prefix is zeros
        self._digests: dict[int, list[bytes]] = {}  # digests of their blocks
        self._zeros = np.zeros(0, dtype=np.int64)

    def draw(self, num_tokens: int) -> Ints:
        """A prompt of `num_tokens`; zeros where prompts share no prefix."""
        shared = self._shared
        if not shared.num:
            if num_tokens > len(self._zeros):
                self._zeros = np.zeros(num_tokens, dtype=np.int64)
            return self._zeros[:num_tokens]
        tokens = np.zeros(num_tokens, dtype=np.int64)
        tokens[: shared.block_size] = self._head(int(self._rng.integers(shared.num)))
        own = tokens[shared.num_tokens :][: shared.block_size]
        own[:] = self._rng.integers(self._vocab_size, size=len(own))
        return tokens

    def cache_contents(self, num_blocks: int, of_each: float) -> list[bytes | None]:
        """Contents of a full cache, as `BlockManager.fill` takes them.

        Blocks older than all prefixes are left out: they are reused first, as blank ones are.

        Args:
            of_each: blocks of a sequence that it does not share.
        """
        shared, latest_first = self._shared, list[bytes | None]()
        own: list[None] = [None] * round(of_each)
        seen: set[int] = set()
        while len(latest_first) < num_blocks and len(seen) < shared.num:
            number = int(self._rng.integers(shared.num))
            if number not in seen:
                seen.add(number)
                latest_first += self._digests_of(number)
            latest_first += own
        return latest_first[:num_blocks][::-1]

    def ends_of_prefixes(self, contents: Sequence[bytes | None]) -> list[bytes]:
        """Digests of the last blocks of prefixes, in the order of a cache's contents."""
        ends = {of_prefix[-1] for of_prefix in self._digests.values()}
        return [digest for digest in contents if digest is not None and digest in ends]

    def _head(self, number: int) -> Ints:
        """The first block of a prefix."""
        if number not in self._heads:
            size = self._shared.block_size
            self._heads[number] = self._rng.integers(self._vocab_size, size=size)
        return self._heads[number]

    def _digests_of(self, number: int) -> list[bytes]:
        """Digests of all blocks of a prefix."""
        if number not in self._digests:
            digest = block_digest(ROOT, self._head(number).tobytes())
            found = self._digests[number] = [digest]
            zeros = bytes(8 * self._shared.block_size)
            for _ in range(self._shared.num_blocks - 1):
                found.append(block_digest(found[-1], zeros))
        return self._digests[number]


class Lengths:
    """Lengths of a load's requests, in tokens and in steps.

    Attributes:
        mean_steps: mean steps that give a request a token.
        most_steps: steps of the longest request after its first token.
    """

    def __init__(self, load: Load, multi_token: MultiToken) -> None:
        self._prompts = [(each.prompt_len, each.prompt_len) for each in load.recorded]
        outputs = [each.output_len for each in load.recorded]
        if not outputs:
            outputs = list(range(load.output_len.low, load.output_len.high + 1))
            self._prompts = [(load.prompt_len.low, load.prompt_len.high)] * len(outputs)
        self._outputs = np.array(outputs)
        further = np.array([multi_token.num_steps(each) for each in outputs]) - 1
        self.mean_steps = 1 + float(further.mean())
        self.most_steps = int(further.max())
        self._order = np.argsort(further)
        self._further = further[self._order]

    def draw(self, rng: np.random.Generator, least_steps: int = 0) -> tuple[int, int]:
        """Lengths of a prompt and of an output of at least `least_steps` after its first token."""
        first = int(np.searchsorted(self._further, least_steps))
        number = int(self._order[rng.integers(first, len(self._order))])
        low, high = self._prompts[number]
        return int(rng.integers(low, high + 1)), int(self._outputs[number])

    def chance_in(self, steps: Ints) -> Floats:
        """[steps]; probability that a running request ends in each step."""
        longer = len(self._further) - np.searchsorted(self._further, steps)
        chance: Floats = longer / self._further.sum()
        return chance

    def left_of(self, rng: np.random.Generator, num: int) -> Ints:
        """[num]; steps left of running requests, evenly spread over their distribution."""
        chance = np.cumsum(self.chance_in(np.arange(1, self.most_steps + 1)))
        places = (rng.permutation(num) + 0.5) / num
        left: Ints = 1 + np.minimum(np.searchsorted(chance, places), self.most_steps - 1)
        return left


def poisson_quantiles(mean: float, ranks: Floats) -> Ints:
    """[ranks]; quantiles of a Poisson distribution; a rank is a share from 0 to 1."""
    counts = np.arange(ceil(mean + 12 * sqrt(mean)) + 12)
    logs = counts * log(mean) - mean - np.cumsum(np.log(np.maximum(counts, 1)))
    numbers: Ints = np.searchsorted(np.cumsum(np.exp(logs)), ranks)
    return numbers
