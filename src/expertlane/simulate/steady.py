"""A load in its steady state: what plan, simulate and projected comparisons say of a deployment.

A whole load takes as many steps as its outputs have tokens, several times over. Here requests are
found under way, anywhere along their outputs and with keys and values in place, and are served
until enough others have come for them. Where a pool is short (of room in its cache, or of prefill
for those that decode), requests wait: how many is found from a step's time before, and they have
waited as long as such a queue lets them.

A stretch has some prompts more or less than its share, each of which takes time. What the share is
follows from the load, so the surplus is a control variate (Law and Kelton, Simulation Modeling and
Analysis, section 11.4): its effect on the time, by regression over parts of the stretch, is taken
out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, log, sqrt
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.execution import BOUNDS, LIKELY
from expertlane.cost.multi_token import MultiToken
from expertlane.cost.runner import PricedStep
from expertlane.cost.step.operation import Floats, Ints
from expertlane.results.metrics import PERCENTILES, ServedRequest
from expertlane.results.statistics import half_interval
from expertlane.simulate.pools import Pool, run_load
from expertlane.simulate.simulator import Outcome, PoolRanks, Rates, SimulatedPool, Simulator
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.slo import SLO
from expertlane.spec.workload import Load, TimedRequest

_SETTLING_STEPS = 8
_SETTLING_SHARE = 0.1  # of the steps that a stretch has at least
_NUM_GUESSES = 4  # iterations for the number of requests that decode, in an open loop
_SAME_RUNNING = 0.01  # relative difference of two numbers of requests that count as equal
_PROBE_STEPS = 2
_FULL_STEPS = 5  # of a pool that always has prompts; the first and the last of them do not count
_FEW_STEPS, _FEWEST_ROUNDS = 2, 8  # of a round, the usual; least number of longer rounds
_NUM_PARTS = 20  # of a stretch, for its regression
_FEWEST_FIRST = 4  # first tokens of a stretch, where so many are under way
_STRATUM = 24  # steps
_MOST_STEPS = 4_000  # where many first tokens are asked for
_FEWEST_PARTS = 5  # for a regression
_FEWEST_PROMPT_TOKENS = 8  # of a prompt that is told from a decode


@dataclass(frozen=True)
class Precision:
    """When a stretch is long enough.

    Attributes:
        least_steps, most_steps: of the pool that decodes.
        share: half of the 90 % interval of tokens a second, over them; in a closed loop, and not
            for longer than usual.
        quantile: that is to be known of TTFT: so many first tokens that one is likely above it.
        least_first: first tokens.
    """

    least_steps: int = 96
    most_steps: int = 288
    share: float = 0.015
    quantile: float = 0.95
    least_first: int = 0

    @classmethod
    def of(cls, slos: Sequence[SLO], num_requests: int | None = None) -> "Precision":
        """What tells the statistics of the objectives, of so many first tokens at least."""
        shares = [PERCENTILES[each.statistic] / 100 for each in slos if each.statistic != "mean"]
        precision = cls(quantile=max([cls.quantile, *shares]), least_first=num_requests or 0)
        asks_more = precision.num_first > cls().num_first
        return replace(precision, most_steps=_MOST_STEPS) if asks_more else precision

    def of_rounds(self, num_steps: int) -> "Precision":
        """Fewer rounds where each has many steps (micro-batches, replicas)."""
        share = _FEW_STEPS / max(num_steps, _FEW_STEPS)

        def of(steps: int) -> int:
            return min(max(_FEWEST_ROUNDS, ceil(share * steps)), steps)

        return replace(self, least_steps=of(self.least_steps), most_steps=of(self.most_steps))

    @property
    def settling_steps(self) -> int:
        """Steps before the stretch."""
        return max(_SETTLING_STEPS, round(_SETTLING_SHARE * self.least_steps))

    @property
    def last_step(self) -> int:
        """Where a stretch ends at the earliest."""
        return self.settling_steps + self.least_steps

    @property
    def num_first(self) -> int:
        """First tokens, one of which is above the quantile in 95 of 100 cases."""
        of_quantile = ceil(log(0.05) / log(self.quantile)) if self.quantile else 1
        return max(of_quantile, self.least_first)


PrefillRates = dict[tuple[Layout, Options], tuple[float, float]]
"""By pool: prompts/s when it never runs out of prompts, and seconds of a prompt alone."""

USUAL = Precision()
ROUGH = Precision(least_steps=24, most_steps=24, quantile=0.0)


@dataclass(eq=False)
class SampledRequest(ServedRequest[Floats]):
    """A request whose first token came in the stretch, which it may outlast.

    Attributes:
        pace_s: [3]; the mean time of its tokens after the first.
    """

    pace_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)))

    @property
    def tpot_s(self) -> Floats | None:
        """Mean time of the tokens after the first; None where there is one alone."""
        return None if self.output_len == 1 else self.pace_s

    @property
    def e2e_s(self) -> Floats:
        """From when it was due to its last token, at its pace."""
        return self.ttft_s + (self.output_len - 1) * self.pace_s


@dataclass(frozen=True, eq=False)
class SteadyState(Outcome):
    """A stretch of a load, and what the load comes to.

    Attributes:
        steps_per_token: likely; steps of the pool that decodes, over tokens of a request in them.
        prefill_rate: likely prompts a second of a pool for prompts that always has some; 0 without.
        prompt_s: likely seconds that this pool takes for a prompt alone; 0 without.
        num_steps, num_priced: of all pools, in the stretch and before it.
    """

    rates: Rates
    steps_per_token: float = 0.0
    prefill_rate: float = 0.0
    prompt_s: float = 0.0
    num_steps: int = 0
    num_priced: int = 0


def steady_state(
    simulator: Simulator,
    seed: int,
    precision: Precision = USUAL,
    *,
    with_skew: bool = True,
    with_totals: bool = False,
    known: PrefillRates | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> SteadyState:
    """A load that goes on without end, in its steady state.

    Where more requests arrive than can be served, it is what is served with as many under way as
    there is room for.

    Args:
        with_skew: whether bounds hold those of an assumed routing; each asks for further steps.
        with_totals: whether steps are added up, to say where their time goes.
        known: rates of prefill pools; new ones are added.
        advance: called with a number of steps of `precision.most_steps` that are done.
    """
    part, factor = _part_of(simulator)
    stretch = _Stretch(part, seed, precision, known)
    found = stretch.run(with_skew=with_skew, with_totals=with_totals, advance=advance)
    if part is simulator:
        return found
    num_parts = simulator.setup.num_parts
    return replace(found, rates=found.rates.times(factor), num_parts=num_parts)


def pools_apart(simulator: Simulator, seed: int, known: PrefillRates | None = None) -> Rates:
    """A closed load on two pools, each taken by itself.

    One decode step represents all, and the prefill pool runs at its largest rate.

    Args:
        known: rates of prefill pools; new ones are added.
    """
    part, factor = _part_of(simulator)
    return _Stretch(part, seed, ROUGH, known).apart().times(factor)


def _part_of(simulator: Simulator) -> tuple[Simulator, float]:
    """One of the independent parts, and the factor from its throughput to that of all."""
    num_parts, load = simulator.setup.num_parts, simulator.load
    if num_parts == 1:
        return simulator, 1.0
    part = simulator.part(num_parts)
    return part, load.batch / (part.load.batch or 1) if load.batch else num_parts


class _Stretch:
    def __init__(
        self,
        simulator: Simulator,
        seed: int,
        precision: Precision,
        known: PrefillRates | None = None,
    ) -> None:
        assert simulator.load.is_endless
        self._simulator = simulator
        options = simulator.setup.options
        rotates = options.micro_batch_schedule == "rotating"
        in_flight, batch = options.num_micro_batches if rotates else 1, simulator.load.batch
        if batch is not None:  # fewer requests fill fewer micro-batches
            in_flight = min(in_flight, ceil(batch / simulator.setup.layout.replicas))
        self._num_in_flight = in_flight
        self._precision = precision.of_rounds(self._steps_of_round())
        self._load = simulator.load
        self._rate, self._batch = simulator.load.rate, simulator.load.batch
        self._multi_token = simulator.setup.multi_token
        self._rng = np.random.default_rng([seed])
        self._seed = seed
        self._lengths = _Lengths(simulator.load, self._multi_token)
        self._mean_steps = self._lengths.mean_steps
        # The first token is of the pool for prompts, where there is one.
        self._decodes = max(self._mean_steps - (len(simulator.setup.pools) > 1), 1.0)
        self._prefill_rate = self._prompt_s = 0.0
        self._step_s: Floats = np.zeros(len(BOUNDS))
        self._known = {} if known is None else known
        self._zeros = np.zeros(self._load.max_len, dtype=np.int64)

    def run(
        self, *, with_skew: bool, with_totals: bool, advance: Callable[[int], None]
    ) -> SteadyState:
        """Serve the stretch and add it up."""
        num_running = self._num_running()
        share = self._prompt_share()
        watch = _Watch(
            self._precision,
            num_running,
            self._steps_of_round(),
            share,
            advance,
            is_open=self._batch is None,
        )
        pools, apart = self._simulator.start(
            is_snapshot=True,
            observe=watch.observe,
            has_begun=(lambda: watch.has_begun) if with_totals else None,
        )
        watch.decode = pools[-1].pool
        served = run_load(
            pools[0].pool,
            self._requests(num_running),
            self._batch,
            apart=apart,
            is_done=watch.is_done,
        )
        for each in pools:
            each.totals.close()
        # Last, so that the likely times are the same with bounds of skew and without.
        spread = self._spread(num_running) if with_skew else np.ones(len(BOUNDS))
        return self._sum(served, watch, pools, spread)

    def apart(self) -> Rates:
        """Rates of two pools, each taken by itself."""
        assert self._batch is not None, "a closed load"
        running = self._num_running()
        step_s, further = self._step_s, max(self._mean_steps - 1, 1.0)
        requests_per_s = np.minimum(running / (further * step_s), self._prefill_rate)
        return Rates(
            requests_per_s=requests_per_s,
            output_tps=requests_per_s * self._load.mean_lens[1],
            ttft_s=np.maximum((self._batch - running) / requests_per_s, self._prompt_s),
            tpot_s=step_s / self._multi_token.tokens_per_step,
            error=0.0,
            num_decoding=float(running),
            num_waiting=float(self._batch - running),
        )

    def _prompt_share(self) -> float | None:
        """Tokens of prompts over those given; None where the pool that decodes computes none."""
        mean_prompt = self._load.mean_lens[0]
        if len(self._simulator.setup.pools) > 1 or mean_prompt < _FEWEST_PROMPT_TOKENS:
            return None
        return mean_prompt / self._mean_steps

    def _steps_of_round(self) -> int:
        """Steps in which each request under way has a token."""
        return self._simulator.setup.layout.replicas * self._num_in_flight

    def _spread(self, num_running: int) -> Floats:
        """[3]; a decode step by each bound's own routing, over one by the likely routing."""
        if self._simulator.num_runs == 1 or not num_running:
            return np.ones(len(BOUNDS))

        def steps_s(lead: int) -> Floats:
            pools = self._simulator.start(lead, is_snapshot=True)[0]
            rng = np.random.default_rng([self._seed, 1])  # the same requests for all
            return self._decode_step_s(pools[-1], num_running, lead, rng)

        likely = steps_s(LIKELY)
        of_bounds = [steps_s(lead)[lead] / likely[lead] for lead in range(len(BOUNDS))]
        return np.array(of_bounds)

    def _requests(self, num_running: int) -> Iterator[TimedRequest]:
        """Those under way, then those that wait, then others without end."""
        for left in self._steps_left(num_running).tolist():
            yield self._under_way(left, self._rng)
        due_s = 0.0
        while True:
            if self._rate is not None:
                due_s += float(self._rng.exponential(1 / self._rate))
            prompt, output = self._lengths.draw(self._rng)
            yield TimedRequest(self._blank(prompt), self._multi_token.num_steps(output), due_s)

    def _steps_left(self, num_running: int) -> Ints:
        """[num_running]; steps until requests under way end, in random order.

        So many end in a step as of many independent ones. The numbers are stratified: any
        `_STRATUM` steps have as nearly as can be the quiet and the crowded ones that they should.
        """
        ended: list[int] = []
        first, size = 1, self._precision.settling_steps
        while len(ended) < num_running and first <= self._lengths.most_steps:
            steps = np.arange(first, min(first + size, self._lengths.most_steps + 1))
            mean = float(np.mean(num_running * self._lengths.chance_in(steps)))
            ranks = (self._rng.permutation(len(steps)) + self._rng.random(len(steps))) / len(steps)
            ended += np.repeat(steps, poisson_quantiles(mean, ranks)).tolist()
            first, size = first + size, _STRATUM
        rest = num_running - len(ended)
        if rest > 0:
            ended += self._rng.choice(self._lengths.left_of(self._rng, num_running), rest).tolist()
        left = np.array(ended[:num_running], dtype=np.int64)
        soon = min(_FEWEST_FIRST, num_running)
        if (left <= self._precision.last_step).sum() < soon:  # what that shifts is taken out
            begin = self._precision.settling_steps
            spaced = (np.arange(soon) + 0.5) * self._precision.least_steps / soon
            left[:soon] = np.minimum(begin + spaced.astype(int), self._lengths.most_steps)
        return self._rng.permutation(left)

    def _blank(self, num_tokens: int) -> Ints:
        """A prompt of zeros; a projection reads no tokens."""
        if num_tokens > len(self._zeros):
            self._zeros = np.zeros(num_tokens, dtype=np.int64)
        return self._zeros[:num_tokens]

    def _under_way(self, steps_left: int, rng: np.random.Generator) -> TimedRequest:
        """A request that ends after so many steps; longer ones are met more often."""
        prompt, output = self._lengths.draw(rng, steps_left)
        further = ceil(steps_left * self._multi_token.tokens_per_step)
        num_tokens = prompt + max(output - further, 1)
        return TimedRequest(self._blank(num_tokens), steps_left, 0.0, num_arrived=num_tokens - 1)

    def _num_running(self) -> int:
        """Requests past their first token: as many as have room and as prefill keeps up with."""
        pools = self._simulator.start(is_snapshot=True)[0]
        room = self._room(pools[-1].ranks)
        if len(pools) > 1 or self._rate is not None:
            ranks = pools[0].ranks
            key = ranks.layout, self._simulator.setup.options_of(ranks.role)
            if key not in self._known:
                of_pool = self._rate_of_prompts(pools[0]), self._seconds_of_prompt(pools[0])
                self._known[key] = of_pool
            self._prefill_rate, self._prompt_s = self._known[key]
        if self._rate is not None:
            running = self._num_arriving(pools[-1], room, self._rate)
            if running is not None:
                return running
            self._rate, self._batch = None, room
        assert self._batch is not None, "a closed load"
        if self._mean_steps == 1:
            return 0
        running = min(self._batch, room)
        return self._num_fed(pools[-1], running) if len(pools) > 1 else running

    def _num_fed(self, pool: SimulatedPool, most: int) -> int:
        """Requests that decode, as many as prefill keeps up with; sets `_step_s` accordingly.

        Step time is taken to be linear in their number.
        """
        first_s = self._step_s = self._decode_step_s(pool, most)
        rate = self._prefill_rate * self._decodes
        fed = round(rate * float(first_s[LIKELY]))
        if fed >= (1 - _SAME_RUNNING) * most:
            return most
        fewer = max(fed, 1)
        second_s = self._decode_step_s(pool, fewer)
        slope = (first_s - second_s) / max(most - fewer, 1)
        flat = second_s - slope * fewer
        fed = round(rate * float(flat[LIKELY]) / max(1 - rate * float(slope[LIKELY]), 1e-9))
        running = max(1, min(most, fed))
        self._step_s = flat + slope * running
        return running

    def _num_arriving(self, pool: SimulatedPool, room: int, rate: float) -> int | None:
        """Requests past their first token, by Little's law; None where more come than go.

        Prompts take their share of the steps of a pool that computes both.
        """
        busy = rate / self._prefill_rate
        if busy >= 1:
            return None
        slowed = 1.0 if pool.ranks.role == "decode" else 1 / (1 - busy)
        running = 1
        for _ in range(_NUM_GUESSES):
            step_s = float(self._decode_step_s(pool, running)[LIKELY])
            wanted = rate * (self._mean_steps - 1) * step_s * slowed
            if wanted > room and running == room:
                return None
            running = max(1, min(room, round(wanted)))
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
        requests = [TimedRequest(self._blank(prompt), 1, 0.0)] * (_FULL_STEPS * together)
        served = run_load(self._alone(pool), requests, 2 * together)
        ends = np.sort([each.token_times_s[0][LIKELY] for each in served])
        # From the end of a step to that of another: all prompts of a step end at once.
        begin, end = ends[together - 1], ends[-together - 1]
        return float(np.sum((begin < ends) & (ends <= end)) / max(end - begin, 1e-9))

    def _seconds_of_prompt(self, pool: SimulatedPool) -> float:
        """Of a prompt that finds the pool at rest."""
        (served,) = run_load(
            self._alone(pool), [TimedRequest(self._blank(ceil(self._load.mean_lens[0])), 1, 0.0)]
        )
        return float((served.token_times_s[0] - served.due_s)[LIKELY])

    def _decode_step_s(
        self,
        pool: SimulatedPool,
        num_running: int,
        lead: int = LIKELY,
        rng: np.random.Generator | None = None,
    ) -> Floats:
        """[3]; a step in which all decode."""
        rng = rng or self._rng
        requests = [
            replace(self._under_way(left, rng), output_len=1 + _PROBE_STEPS)
            for left in self._lengths.left_of(rng, num_running).tolist()
        ]
        served = run_load(self._alone(pool, lead), requests, num_running)
        times = [each.token_times_s for each in served]
        gaps: Floats = np.median([each[-1] - each[0] for each in times], axis=0) / _PROBE_STEPS
        return gaps

    def _alone(self, pool: SimulatedPool, lead: int = LIKELY) -> Pool:
        """The same ranks at rest, with the steps that are known."""
        pools = self._simulator.start(lead, is_snapshot=True)[0]
        return next(each.pool for each in pools if each.ranks is pool.ranks)

    def _sum(
        self,
        served: list[ServedRequest[Floats]],
        watch: "_Watch",
        pools: tuple[SimulatedPool, ...],
        spread: Floats,
    ) -> SteadyState:
        mean_output = self._load.mean_lens[1]
        was_calm = not any(each.pool.scheduler.num_preemptions for each in pools)
        stretch = watch.stretch(self._prompt_share() if was_calm else None)
        steps_of_bounds = 1 + (mean_output - 1) / self._multi_token.tokens_bounds
        factors = spread * steps_of_bounds / steps_of_bounds[LIKELY]
        seconds = stretch.seconds * factors
        requests_per_s = stretch.num_tokens / self._decodes / seconds
        if self._batch is not None:
            self._queue(served[watch.num_running : self._batch], requests_per_s)
        num_waiting = watch.waited_s(served) / (watch.end_s - watch.begin_s)
        further = max(mean_output - 1, 1e-9)
        if self._batch is None:
            assert self._rate is not None
            num_decoding = watch.num_decoding(served)
            tpot_s = num_decoding / (requests_per_s * further)
            requests_per_s = np.full(len(BOUNDS), self._rate)
        else:
            num_decoding = np.maximum(self._batch - num_waiting, 0.0)
            tpot_s = num_decoding / (requests_per_s * further)
        sample = self._sampled(served, watch, tpot_s)
        tokens = stretch.num_tokens * (self._mean_steps - 1) / self._decodes
        tokens *= self._multi_token.tokens_per_step
        is_overloaded = self._simulator.load.rate is not None and self._rate is None
        rates = Rates(
            requests_per_s=requests_per_s,
            output_tps=requests_per_s * mean_output,
            ttft_s=None if is_overloaded else np.mean([each.ttft_s for each in sample], axis=0),
            tpot_s=tpot_s,
            error=stretch.error,
            num_decoding=float(num_decoding[LIKELY]),
            num_waiting=float(num_waiting[LIKELY]),
        )
        return SteadyState(
            served=sample,
            pools=pools,
            rates=rates,
            steps_per_token=stretch.num_steps * rates.num_decoding / max(tokens, 1.0),
            prefill_rate=self._prefill_rate,
            prompt_s=self._prompt_s,
            num_steps=sum(len(each.pool.runner.bounds) for each in pools),
            num_priced=sum(each.pool.runner.num_priced for each in pools),
        )

    def _queue(self, waiting: Sequence[ServedRequest[Floats]], requests_per_s: Floats) -> None:
        """Let those that waited at the start have come one by one, as fast as others went."""
        for number, each in enumerate(reversed(waiting)):
            each.due_s = -(number + 0.5) / requests_per_s

    def _sampled(
        self, served: Sequence[ServedRequest[Floats]], watch: "_Watch", tpot_s: Floats
    ) -> list[SampledRequest]:
        """Those whose first token came in the stretch; with another's pace if seen too briefly."""
        tokens = self._multi_token.tokens_per_step
        least = min(watch.num_steps_of_request(served) / 2, self._mean_steps - 1)
        paces: dict[int, Floats] = {}
        for number, each in enumerate(served):
            gaps = len(each.token_times_s) - 1
            if gaps and gaps >= least:
                span = each.token_times_s[-1] - each.token_times_s[0]
                paces[number] = span / gaps / tokens
        known = list(paces.values()) or [tpot_s]
        sample = []
        for number, each in enumerate(served[watch.num_running :], watch.num_running):
            if not watch.has_in(each):
                continue
            pace_s = paces.get(number)
            if pace_s is None:
                pace_s = known[int(self._rng.integers(len(known)))]
            output = round(1 + (each.output_len - 1) * tokens)
            sample.append(
                SampledRequest(
                    each.prompt_len,
                    output,
                    each.due_s,
                    each.token_times_s,
                    each.num_preemptions,
                    pace_s,
                )
            )
        return sample


class _Lengths:
    """Lengths of a load's requests, in tokens and in steps.

    Attributes:
        mean_steps: that give a request a token.
        most_steps: of the longest request, after its first token.
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
        """A prompt and its output, of so many steps at least after its first token."""
        first = int(np.searchsorted(self._further, least_steps))
        number = int(self._order[rng.integers(first, len(self._order))])
        low, high = self._prompts[number]
        return int(rng.integers(low, high + 1)), int(self._outputs[number])

    def chance_in(self, steps: Ints) -> Floats:
        """[steps]; that a request under way ends in a step: as many do not end before it."""
        longer = len(self._further) - np.searchsorted(self._further, steps)
        chance: Floats = longer / self._further.sum()
        return chance

    def left_of(self, rng: np.random.Generator, num: int) -> Ints:
        """[num]; steps left of requests under way, evenly spread over what they can be."""
        chance = np.cumsum(self.chance_in(np.arange(1, self.most_steps + 1)))
        places = (rng.permutation(num) + 0.5) / num
        left: Ints = 1 + np.minimum(np.searchsorted(chance, places), self.most_steps - 1)
        return left


def poisson_quantiles(mean: float, ranks: Floats) -> Ints:
    """[ranks]; the numbers of a Poisson distribution that lie at shares of it."""
    counts = np.arange(ceil(mean + 12 * sqrt(mean)) + 12)
    logs = counts * log(mean) - mean - np.cumsum(np.log(np.maximum(counts, 1)))
    numbers: Ints = np.searchsorted(np.cumsum(np.exp(logs)), ranks)
    return numbers


class _StepFacts(NamedTuple):
    """A step of the pool that decodes: its end [3], tokens that it gave, and those of prompts."""

    end_s: Floats
    num_tokens: int
    num_prompt_tokens: int


class _Stretched(NamedTuple):
    """What a stretch comes to once prompts have their share: seconds [3], tokens, and steps."""

    seconds: Floats
    num_tokens: float
    num_steps: int
    error: float


class _Watch:
    """Collects the steps of the pool that decodes, and says when they are enough."""

    def __init__(
        self,
        precision: Precision,
        num_running: int,
        steps_of_round: int,
        prompt_share: float | None,
        advance: Callable[[int], None],
        *,
        is_open: bool,
    ) -> None:
        self._prompt_share, self._is_open = prompt_share, is_open
        self.num_running = num_running
        self._advance, self._num_told = advance, 0
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
        """Whether steps are enough, and first tokens."""
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
        self._advance(num - self._num_told)
        self._num_told = num
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
        return self.stretch(self._prompt_share).error <= self._precision.share

    def _ended(self, num: int) -> list[_StepFacts]:
        """So many steps, in the order in which they end."""
        return sorted(self._steps, key=lambda step: float(step.end_s[LIKELY]))[:num]

    def has_in(self, request: ServedRequest[Floats]) -> bool:
        """Whether a request has its first token in the stretch."""
        times = request.token_times_s
        return bool(times) and self.begin_s[LIKELY] < times[0][LIKELY] <= self.end_s[LIKELY]

    def waited_s(self, served: Sequence[ServedRequest[Floats]]) -> Floats:
        """[3]; for first tokens, in the stretch and over all requests."""
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

    def stretch(self, prompt_share: float | None) -> _Stretched:
        """The stretch with as many tokens of prompts as it should have.

        Args:
            prompt_share: tokens of prompts over those given, in the steady state; None where that
                is not known.
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
        of_strata = [part.sum() for part in np.array_split(left, max(len(steps) // _STRATUM, 2))]
        error = half_interval(of_strata) * len(of_strata) / float(whole_s[LIKELY])
        return _Stretched(whole_s, float(tokens.sum()), len(steps), error)
