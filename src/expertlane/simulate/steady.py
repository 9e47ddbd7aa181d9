"""A closed load in its steady state: what it comes to, from a short stretch of it.

A whole load takes as many steps as its outputs have tokens, several times over. Here requests are
found all along their outputs, evenly spread and with keys and values in place, and are served until
enough others have come for them. Where a pool is short (of room in its cache, or of prefill for
those that decode), requests wait: how many is found from a step's time before the stretch begins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from expertlane.cost.laws.execution import BOUNDS, LIKELY
from expertlane.cost.step.operation import Floats
from expertlane.results.metrics import ServedRequest
from expertlane.simulate.pools import Pool, run_load
from expertlane.simulate.simulator import PoolRanks, SimulatedPool, Simulator
from expertlane.spec.workload import TimedRequest

_FEWEST_FIRST = 4  # first tokens of a stretch
_SETTLING_STEPS = 4
_NUM_GUESSES = 4  # of how many requests decode while others wait for prefill
_PROBE_STEPS = 2
_FULL_STEPS = 5  # of a pool that always has prompts; the first and the last of them do not count


@dataclass(frozen=True, eq=False)
class SteadyRates:
    """What a closed load comes to; [3] each: low, likely and high.

    Attributes:
        ttft_s, tpot_s: means over requests.
        output_tps: of all requests together.
        steps_per_token: likely; steps of the pool that decodes, over tokens of a request in them.
        num_decoding, num_waiting: likely requests past their first token, and before it.
        prefill_rate: likely prompts a second of a pool for prompts that always has some; 0 without.
        prompt_s: likely seconds that this pool takes for a prompt alone; 0 without.
        num_steps, num_priced: of all pools, in the stretch and before it.
    """

    ttft_s: Floats
    tpot_s: Floats
    output_tps: Floats
    steps_per_token: float
    num_decoding: float
    num_waiting: float
    prefill_rate: float
    prompt_s: float
    num_steps: int
    num_priced: int


def steady_rates(
    simulator: Simulator, seed: int, least_steps: int = 48, *, with_skew: bool = True
) -> SteadyRates:
    """The rates of a closed load.

    Args:
        least_steps: that the stretch has about, of the pool that decodes.
        with_skew: whether bounds hold those of an assumed routing; each asks for further steps.
    """
    return _Stretch(simulator, seed, least_steps, with_skew=with_skew).rates()


class _Stretch:
    def __init__(
        self, simulator: Simulator, seed: int, least_steps: int, *, with_skew: bool
    ) -> None:
        assert simulator.load.batch is not None, "a closed load"
        self._simulator = simulator
        self._with_skew = with_skew
        self._load = simulator.load
        self._batch = simulator.load.batch
        self._multi_token = simulator.setup.multi_token
        self._rng = np.random.default_rng([seed])
        mean_output = self._load.mean_lens[1]
        steps_of_output = self._multi_token.num_steps(ceil(mean_output))
        self._steps_of_output = steps_of_output
        enough = ceil(least_steps * self._batch / steps_of_output)
        first_together = self._simulator.setup.layout.dp if simulator.setup.prompt_wait_steps else 1
        self._num_first = max(_FEWEST_FIRST, 2 * first_together, enough)
        self._prefill_rate = self._prompt_s = 0.0

    def rates(self) -> SteadyRates:
        """Serve the stretch and add it up."""
        num_running = self._num_running()
        spread = self._spread(num_running)
        pools, apart = self._simulator.start(observed=False)
        decode = pools[-1].pool
        watch = _Watch(num_running, self._num_first, decode)
        served = run_load(
            pools[0].pool,
            self._requests(num_running),
            self._batch,
            apart=apart,
            is_done=watch.is_done,
        )
        return self._sum(served, watch, [each.pool for each in pools], spread)

    def _spread(self, num_running: int) -> Floats:
        """[3]; a decode step by each bound's own routing, over one by the likely routing."""
        if self._simulator.num_runs == 1 or not self._with_skew:
            return np.ones(len(BOUNDS))

        def steps_s(lead: int) -> Floats:
            pools = self._simulator.start(lead, observed=False)[0]
            return self._decode_step_s(pools[-1], num_running, lead)

        likely = steps_s(LIKELY)
        of_bounds = [steps_s(lead)[lead] / likely[lead] for lead in range(len(BOUNDS))]
        return np.array(of_bounds)

    def _requests(self, num_running: int) -> Iterator[TimedRequest]:
        """Those under way, then those that wait, then others without end."""
        places = (self._rng.permutation(num_running) + 0.5) / max(num_running, 1)
        for place in places:
            yield self._under_way(float(place))
        while True:
            output = self._draw(self._load.output_len.low, self._load.output_len.high)
            prompt = self._draw(self._load.prompt_len.low, self._load.prompt_len.high)
            yield TimedRequest([0] * prompt, self._multi_token.num_steps(output), 0.0)

    def _under_way(self, place: float) -> TimedRequest:
        """A request that has so large a share of its output."""
        prompt = self._draw(self._load.prompt_len.low, self._load.prompt_len.high)
        output = self._draw(self._load.output_len.low, self._load.output_len.high)
        num_done = min(1 + int(place * output), max(output - 1, 1))
        steps = self._multi_token.num_steps(output - num_done + 1) - 1
        num_tokens = prompt + num_done
        return TimedRequest([0] * num_tokens, max(steps, 1), 0.0, num_arrived=num_tokens - 1)

    def _draw(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))

    def _num_running(self) -> int:
        """Requests past their first token: as many as have room and as prefill keeps up with."""
        pools = self._simulator.start(observed=False)[0]
        most = min(self._batch, self._room(pools[-1].ranks))
        if len(pools) == 1:
            return most
        self._prefill_rate = rate = self._rate_of_prompts(pools[0])
        self._prompt_s = self._seconds_of_prompt(pools[0])
        running = most
        for _ in range(_NUM_GUESSES):
            step_s = float(self._decode_step_s(pools[-1], running)[LIKELY])
            running = max(1, min(most, round(rate * self._steps_of_output * step_s)))
            if running == most:
                break
        return running

    def _room(self, ranks: PoolRanks) -> int:
        """Requests under way that the cache of a pool holds."""
        prompt, output = self._load.mean_lens
        limits, layout = ranks.limits, ranks.layout
        blocks = (prompt + output / 2) / limits.block_size + 1.5  # half a block, and one to come
        of_rank = min(int(limits.num_blocks / blocks), limits.max_num_seqs)
        return max(1, of_rank * layout.dp * layout.replicas)

    def _rate_of_prompts(self, pool: SimulatedPool) -> float:
        """Prompts a second of a pool that always has some to compute."""
        layout, limits = pool.ranks.layout, pool.ranks.limits
        prompt = ceil(self._load.mean_lens[0])
        options = self._simulator.setup.options_of(pool.ranks.role)
        in_flight = options.num_micro_batches if options.micro_batch_schedule == "rotating" else 1
        of_rank = max(1, limits.max_num_batched_tokens // prompt) * in_flight
        together = of_rank * layout.dp * layout.replicas
        requests = [TimedRequest([0] * prompt, 1, 0.0)] * (_FULL_STEPS * together)
        served = run_load(self._alone(pool), requests, 2 * together)
        ends = np.sort([each.token_times_s[0][LIKELY] for each in served])
        # From the end of a step to that of another: all prompts of a step end at once.
        begin, end = ends[together - 1], ends[-together - 1]
        return float(np.sum((begin < ends) & (ends <= end)) / max(end - begin, 1e-9))

    def _seconds_of_prompt(self, pool: SimulatedPool) -> float:
        """Of a prompt that finds the pool at rest."""
        (served,) = run_load(
            self._alone(pool), [TimedRequest([0] * ceil(self._load.mean_lens[0]), 1, 0.0)]
        )
        return float((served.token_times_s[0] - served.due_s)[LIKELY])

    def _decode_step_s(self, pool: SimulatedPool, num_running: int, lead: int = LIKELY) -> Floats:
        """[3]; a step in which all decode."""
        requests = [
            replace(self._under_way((place + 0.5) / num_running), output_len=1 + _PROBE_STEPS)
            for place in range(num_running)
        ]
        served = run_load(self._alone(pool, lead), requests, num_running)
        times = [each.token_times_s for each in served]
        gaps: Floats = np.median([each[-1] - each[0] for each in times], axis=0) / _PROBE_STEPS
        return gaps

    def _alone(self, pool: SimulatedPool, lead: int = LIKELY) -> Pool:
        """The same ranks at rest, with the steps that are known."""
        pools = self._simulator.start(lead, observed=False)[0]
        return next(each.pool for each in pools if each.ranks is pool.ranks)

    def _sum(
        self,
        served: Sequence[ServedRequest[Floats]],
        watch: "_Watch",
        pools: Sequence[Pool],
        spread: Floats,
    ) -> SteadyRates:
        begin, end = watch.begin_s, watch.end_s
        seconds = end - begin
        waited, num_first, num_others = np.zeros(len(BOUNDS)), 0, 0
        for place, each in enumerate(served):
            times = each.token_times_s
            is_new = place >= watch.num_running
            if is_new:
                first = times[0] if times else end
                waited += np.maximum(np.minimum(first, end) - np.maximum(each.due_s, begin), 0.0)
            inside = sum(begin[LIKELY] < at_s[LIKELY] <= end[LIKELY] for at_s in times)
            is_first = is_new and bool(times) and begin[LIKELY] < times[0][LIKELY] <= end[LIKELY]
            num_first += is_first
            num_others += inside - is_first
        tokens = np.maximum(num_others * self._multi_token.tokens_bounds / spread, 1.0)
        decoding = self._batch * seconds - waited
        num_decoding = float(decoding[LIKELY] / seconds[LIKELY])
        return SteadyRates(
            ttft_s=waited / max(num_first, 1),
            tpot_s=decoding / tokens,
            output_tps=(tokens + num_first) / seconds,
            steps_per_token=float(watch.num_steps * num_decoding / tokens[LIKELY]),
            num_decoding=num_decoding,
            num_waiting=self._batch - num_decoding,
            prefill_rate=self._prefill_rate,
            prompt_s=self._prompt_s,
            num_steps=sum(len(pool.runner.bounds) for pool in pools),
            num_priced=sum(pool.runner.num_priced for pool in pools),
        )


class _Watch:
    """Says when the stretch begins and ends: each time with somebody's first token."""

    def __init__(self, num_running: int, num_first: int, decode: Pool) -> None:
        self.num_running = num_running
        self.begin_s = self.end_s = np.zeros(len(BOUNDS))
        self.num_steps = 0
        self._num_first = num_first
        self._decode = decode
        self._next = num_running  # the first request without its first token, in their order
        self._num_begun = 0
        self._steps_before = 0

    def is_done(self, served: Sequence[ServedRequest[Floats]]) -> bool:
        """Whether enough requests have their first token."""
        while self._next < len(served) and served[self._next].token_times_s:
            self._take(served[self._next].token_times_s[0])
        return self._num_begun > self._num_first

    def _take(self, at_s: Floats) -> None:
        self._next += 1
        if self._num_begun == 1 and at_s[LIKELY] <= self.begin_s[LIKELY]:
            return  # of the same step as the one that it begins with
        steps = len(self._decode.runner.bounds)
        if not self._num_begun and steps < _SETTLING_STEPS:
            return
        if not self._num_begun:
            self.begin_s, self._steps_before = at_s, steps
        self._num_begun += 1
        self.end_s, self.num_steps = np.maximum(self.end_s, at_s), steps - self._steps_before
