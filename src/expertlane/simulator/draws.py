"""Requests of a stretch of a steady state: running at its start, waiting, and arriving."""

from collections.abc import Iterator
from math import ceil, log, sqrt

import numpy as np

from expertlane.cost.multi_token import MultiToken
from expertlane.cost.step.operation import Floats, Ints
from expertlane.schedule.blocks import ROOT, block_digest
from expertlane.simulator.watch import STRATUM, Precision
from expertlane.spec.workload import Load, SharedPrefixes, TimedRequest

_FEWEST_FIRST = 4  # first tokens of a stretch, where so many are under way
_OF_PROMPTS = 2  # tells draws of prompts from others of the same seed


class Draws:
    """Draws the requests of a stretch.

    Attributes:
        rng: random numbers for all but prompts.
        lengths, prompts: drawn for the load's requests.
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
        if (left <= self._precision.last_step).sum() < soon:  # what that shifts is taken out
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
