"""A load in its steady state, as plan, simulate and projected comparisons report it.

A whole load takes as many steps as its outputs have tokens, several times over. Here requests
start partway through their outputs, with keys and values in place, and are served
until enough others have come for them. Where a pool is short (of room in its cache, or of prefill
for those that decode), requests wait: how many is found from a step's time before, and they have
waited as long as such a queue lets them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import ceil

import numpy as np

from expertlane.cost.laws.profile import BOUNDS, LIKELY
from expertlane.cost.step.operation import Floats
from expertlane.results.metrics import ServedRequest
from expertlane.results.record import PoolRole
from expertlane.simulator.pools import Pool, run_load
from expertlane.simulator.simulator import Outcome, PoolRanks, Rates, SimulatedPool, Simulator
from expertlane.simulator.watch import ROUGH, USUAL, Draws, Precision, Prompts, Watch
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.workload import TimedRequest

_NUM_GUESSES = 4  # iterations for the number of requests that decode, in an open loop
_SAME_RUNNING = 0.01  # relative difference of two numbers of requests that count as equal
_PROBE_STEPS = 2
_FULL_STEPS = 5  # full steps of a prefill pool; the first and the last do not count
_FEWEST_PROMPT_TOKENS = 8  # fewer new tokens count as a decode


PrefillRates = dict[tuple[Layout, Options], tuple[float, float]]
"""By pool: prompts/s when it never runs out of prompts, and seconds of a prompt alone."""


@dataclass(eq=False)
class SteadyRequest(ServedRequest[Floats]):
    """A request whose first token came in the window, which it may outlast.

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
        """Time from when it was due to its last token, at its pace."""
        return self.ttft_s + (self.output_len - 1) * self.pace_s


@dataclass(frozen=True, eq=False)
class SteadyState(Outcome):
    """A window of a load, with the load's rates."""

    rates: Rates


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
        with_skew: whether bounds include those of an assumed routing; each takes further steps.
        with_totals: whether steps are added up, to break down their time.
        known: rates of prefill pools; new ones are added.
        advance: called with a number of steps of `precision.most_steps` that are done.
    """
    part, factor = _part_of(simulator)
    window = _SteadyWindow(part, seed, precision, known)
    found = window.run(with_skew=with_skew, with_totals=with_totals, advance=advance)
    if part is simulator:
        return found
    num_parts = simulator.setup.num_parts
    return replace(found, rates=found.rates.times(factor), num_parts=num_parts)


def pools_apart(simulator: Simulator, seed: int, known: PrefillRates | None = None) -> Rates:
    """A closed load on two pools, each taken by itself.

    One decode step represents all, and the prefill pool runs at its largest rate. Requests beyond
    the decode slots and those in prefill are ignored.

    Args:
        known: rates of prefill pools; new ones are added.
    """
    part, factor = _part_of(simulator)
    return _SteadyWindow(part, seed, ROUGH, known).apart().times(factor)


@dataclass(frozen=True)
class StepTimes:
    """Likely step times of one replica, for replaying a benchmark without pricing steps.

    Attributes:
        decode_s: by sequences of a replica, of a step in which each has a token.
        beside_s: by some of these numbers, what a prompt of mean length adds to such a step; empty
            where another pool computes prompts.
        prompt_s: seconds of a step with such a prompt alone.
        prompts_per_s: rate of a replica whose steps are always full of prompts.
        num_places: sequences that the cache of a replica which decodes has room for.
    """

    decode_s: Mapping[int, float]
    beside_s: Mapping[int, float]
    prompt_s: float
    prompts_per_s: float
    num_places: int


def step_times(simulator: Simulator, seed: int, num_seqs: Sequence[int]) -> StepTimes:
    """Price steps of one replica of each pool.

    Args:
        num_seqs: numbers of sequences that decode.
    """
    return _SteadyWindow(simulator.single(), seed, ROUGH).step_times(num_seqs)


def _part_of(simulator: Simulator) -> tuple[Simulator, float]:
    """One independent part, and the factor from its throughput to that of all."""
    num_parts, load = simulator.setup.num_parts, simulator.load
    if num_parts == 1:
        return simulator, 1.0
    part = simulator.part(num_parts)
    return part, load.batch / (part.load.batch or 1) if load.batch else num_parts


class _SteadyWindow:
    def __init__(
        self,
        simulator: Simulator,
        seed: int,
        precision: Precision,
        known: PrefillRates | None = None,
    ) -> None:
        assert simulator.load.is_endless
        self._simulator, self._single = simulator, simulator.single()
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
        self._seed = seed
        self._draws = Draws(
            self._load, self._multi_token, self._precision, self._new_prompts(), seed
        )
        self._mean_steps = self._draws.lengths.mean_steps
        # The first token is of the pool for prompts, where there is one.
        self._decodes = max(self._mean_steps - (len(simulator.setup.pools) > 1), 1.0)
        self._prefill_rate = self._prompt_s = 0.0
        self._step_s: Floats = np.zeros(len(BOUNDS))
        self._known = {} if known is None else known

    def run(
        self, *, with_skew: bool, with_totals: bool, advance: Callable[[int], None]
    ) -> SteadyState:
        """Serve the window and summarise it."""
        num_running = self._num_running()
        watch = Watch(
            self._precision,
            num_running,
            self._steps_of_round(),
            self._prompt_share,
            advance,
            is_open=self._batch is None,
        )
        pools, apart = self._simulator.start(
            is_snapshot=True,
            observe=watch.observe,
            has_begun=(lambda: watch.has_begun) if with_totals else None,
        )
        watch.decode = pools[-1].pool
        self._warm_up(pools[0], self._draws.prompts)
        served = run_load(
            pools[0].pool,
            self._draws.requests(num_running, self._rate),
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
        places = self._room(self._simulator.start(is_snapshot=True)[0][-1].ranks)
        in_prefill = ceil(float(requests_per_s[LIKELY]) * self._prompt_s)
        waiting = min(self._batch, places + in_prefill) - running
        return Rates(
            requests_per_s=requests_per_s,
            output_tps=requests_per_s * self._load.mean_lens[1],
            ttft_s=np.maximum(waiting / requests_per_s, self._prompt_s),
            tpot_s=step_s / self._multi_token.tokens_per_step,
            error=0.0,
            num_decoding=float(running),
            num_waiting=float(waiting),
        )

    def step_times(self, num_seqs: Sequence[int]) -> StepTimes:
        """Step times of the prefill pool's prompts and the decode pool's tokens."""
        pools = self._simulator.start(is_snapshot=True)[0]
        first, last = pools[0].ranks.role, pools[-1]
        places = self._room(last.ranks)
        counts = sorted({min(num, places) for num in num_seqs})
        decode_s = {num: float(self._decode_step_s(last, num)[LIKELY]) for num in counts}
        beside_s = {}
        if len(pools) == 1:
            some = {*counts[::3], counts[-1]}
            beside_s = {num: self._mixed_step_s(num) - decode_s[num] for num in sorted(some)}
        return StepTimes(
            decode_s,
            beside_s,
            self._seconds_of_prompt(first),
            self._rate_of_prompts(first),
            places,
        )

    def _mixed_step_s(self, num_running: int) -> float:
        """Time of a step that decodes so many sequences and computes a prompt."""
        pool, ranks = self._alone("both")
        rng, limits = self._draws.rng, ranks.limits
        room = limits.max_num_batched_tokens - ceil(num_running / ranks.layout.dp)
        mean = ceil(self._load.mean_lens[0])
        length = max(min(mean, room), 1)
        prompt = TimedRequest(self._new_prompts().draw(length), 1, 0.0)
        served = run_load(pool, [*self._running(rng, num_running), prompt], num_running + 1)
        seconds = float((served[-1].token_times_s[0] - served[-1].due_s)[LIKELY])
        return seconds * mean / length

    def _prompt_share(self, served: Sequence[ServedRequest[Floats]]) -> float | None:
        """Computed prompt tokens per token given; None where another pool computes prompts.

        None too where next to nothing of a prompt is computed.

        Args:
            served: requests; those with a first token tell how much of a prompt the cache has.
        """
        cached = [each.num_cached_tokens for each in served if each.token_times_s]
        mean_new = self._load.mean_lens[0] - sum(cached) / max(len(cached), 1)
        if len(self._simulator.setup.pools) > 1 or mean_new < _FEWEST_PROMPT_TOKENS:
            return None
        return mean_new / self._mean_steps

    def _steps_of_round(self) -> int:
        """Steps in which each running request gets one token."""
        return self._simulator.setup.layout.replicas * self._num_in_flight

    def _spread(self, num_running: int) -> Floats:
        """[3]; a decode step with each bound's own routing, over one with the likely routing."""
        if self._simulator.num_runs == 1 or not num_running:
            return np.ones(len(BOUNDS))

        def steps_s(lead: int) -> Floats:
            pools = self._simulator.start(lead, is_snapshot=True)[0]
            rng = np.random.default_rng([self._seed, 1])  # the same requests for all
            return self._decode_step_s(pools[-1], num_running, lead, rng)

        likely = steps_s(LIKELY)
        of_bounds = [steps_s(lead)[lead] / likely[lead] for lead in range(len(BOUNDS))]
        return np.array(of_bounds)

    def _num_running(self) -> int:
        """Requests past their first token: as many as have room and as prefill keeps up with."""
        pools = self._simulator.start(is_snapshot=True)[0]
        room = self._room(pools[-1].ranks)
        if len(pools) > 1 or self._rate is not None:
            ranks = pools[0].ranks
            of_one = replace(ranks.layout, replicas=1)
            key = of_one, self._simulator.setup.options_of(ranks.role)
            if key not in self._known:
                of_pool = self._rate_of_prompts(ranks.role), self._seconds_of_prompt(ranks.role)
                self._known[key] = of_pool
            rate, self._prompt_s = self._known[key]
            self._prefill_rate = ranks.layout.replicas * rate
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
        blocks = (prompt + output / 2) / ranks.limits.block_size + 1.5  # half, and one to come
        return max(1, ranks.num_held(blocks))

    def _own_blocks(self, ranks: PoolRanks) -> float:
        """Mean blocks that a finished request leaves beyond its shared prefix, state included."""
        prompt, output = self._load.mean_lens
        length, limits = prompt if ranks.role == "prefill" else prompt + output - 1, ranks.limits
        return length / limits.block_size - ranks.prefixes.num_blocks + limits.state_blocks

    def _new_prompts(self) -> Prompts:
        """New prompts, equal each time: rates of a pool that are known must change no draw."""
        shared = self._load.shared(self._simulator.setup.block_size)
        return Prompts(shared, self._simulator.model.vocab_size, self._seed)

    def _warm_up(self, pool: SimulatedPool, prompts: Prompts) -> None:
        """Fill prefix caches with what earlier requests left."""
        ranks = pool.ranks
        if not ranks.prefixes.num:
            return
        for table in chain.from_iterable(pool.pool.scheduler.tables):
            contents = prompts.cache_contents(ranks.num_page_blocks, self._own_blocks(ranks))
            table.blocks.fill(contents)
            if ranks.limits.state_blocks:
                for digest in prompts.ends_of_prefixes(contents):
                    table.blocks.keep_state(digest)

    def _rate_of_prompts(self, role: PoolRole) -> float:
        """Prompts a second of a replica that always has some to compute."""
        prompts = self._new_prompts()
        pool, ranks = self._alone(role, prompts=prompts)
        layout, limits = ranks.layout, ranks.limits
        prompt, prefixes = ceil(self._load.mean_lens[0]), ranks.prefixes
        found = prefixes.found_share(ranks.num_page_blocks, self._own_blocks(ranks))
        num_new = max(prompt - round(found * prefixes.num_tokens), 1)
        options = self._simulator.setup.options_of(role)
        in_flight = options.num_micro_batches if options.micro_batch_schedule == "rotating" else 1
        of_rank = max(1, limits.max_num_batched_tokens // num_new) * in_flight
        together = of_rank * layout.dp
        requests = (
            TimedRequest(prompts.draw(prompt), 1, 0.0) for _ in range(_FULL_STEPS * together)
        )
        served = run_load(pool, requests, 2 * together)
        ends = np.sort([each.token_times_s[0][LIKELY] for each in served])
        # From the end of a step to that of another: all prompts of a step end at once.
        begin, end = ends[together - 1], ends[-together - 1]
        return float(np.sum((begin < ends) & (ends <= end)) / max(end - begin, 1e-9))

    def _seconds_of_prompt(self, role: PoolRole) -> float:
        """Prefill time of one prompt on an idle pool."""
        prompts = self._new_prompts()
        prompt = prompts.draw(ceil(self._load.mean_lens[0]))
        pool, _ = self._alone(role, prompts=prompts)
        (served,) = run_load(pool, [TimedRequest(prompt, 1, 0.0)])
        return float((served.token_times_s[0] - served.due_s)[LIKELY])

    def _decode_step_s(
        self,
        pool: SimulatedPool,
        num_running: int,
        lead: int = LIKELY,
        rng: np.random.Generator | None = None,
    ) -> Floats:
        """[3]; a step in which all decode, of a replica with its share of them."""
        rng, num = rng or self._draws.rng, ceil(num_running / pool.ranks.layout.replicas)
        served = run_load(self._alone(pool.ranks.role, lead)[0], self._running(rng, num), num)
        times = [each.token_times_s for each in served]
        gaps: Floats = np.median([each[-1] - each[0] for each in times], axis=0) / _PROBE_STEPS
        return gaps

    def _running(self, rng: np.random.Generator, num: int) -> list[TimedRequest]:
        """Requests under way that get a few tokens."""
        return [
            replace(self._draws.under_way(left, rng), output_len=1 + _PROBE_STEPS)
            for left in self._draws.lengths.left_of(rng, num).tolist()
        ]

    def _alone(
        self, role: PoolRole, lead: int = LIKELY, *, prompts: Prompts | None = None
    ) -> tuple[Pool, PoolRanks]:
        """One replica of a pool at rest, with the steps that are known.

        Args:
            prompts: prompts of earlier requests, to fill the prefix caches; None leaves them empty.
        """
        pools = self._single.start(lead, is_snapshot=True)[0]
        found = next(each for each in pools if each.ranks.role == role)
        if prompts is not None:
            self._warm_up(found, prompts)
        return found.pool, found.ranks

    def _sum(
        self,
        served: list[ServedRequest[Floats]],
        watch: Watch,
        pools: tuple[SimulatedPool, ...],
        spread: Floats,
    ) -> SteadyState:
        mean_output = self._load.mean_lens[1]
        was_calm = not any(each.pool.scheduler.num_preemptions for each in pools)
        share = self._prompt_share(served[watch.num_running :]) if was_calm else None
        window = watch.window(share)
        steps_of_bounds = 1 + (mean_output - 1) / self._multi_token.tokens_bounds
        factors = spread * steps_of_bounds / steps_of_bounds[LIKELY]
        seconds = window.seconds * factors
        requests_per_s = window.num_tokens / self._decodes / seconds
        if self._batch is not None:
            self._queue(served[watch.num_running : self._batch], requests_per_s)
        window_s = watch.end_s - watch.begin_s
        num_waiting = watch.waited_s(served) / window_s
        further = max(mean_output - 1, 1e-9)
        if self._draws.is_shifted and self._batch == watch.num_running:
            # More first tokens came than usually: their share is known by Little's law.
            first = [each for each in served[watch.num_running :] if watch.has_in(each)]
            ttft_s = np.mean([each.ttft_s for each in first], axis=0)
            if len(pools) > 1:
                pace_s = (self._batch - num_waiting) * window_s * factors / window.num_tokens
                requests_per_s = self._batch / (ttft_s + self._decodes * pace_s)
            num_waiting = requests_per_s * ttft_s
        if self._batch is None:
            num_decoding = watch.num_decoding(served)
        else:
            num_decoding = np.maximum(self._batch - num_waiting, 0.0)
        tpot_s = num_decoding / (requests_per_s * further)
        if self._rate is not None:
            requests_per_s = np.full(len(BOUNDS), self._rate)
        sample = self._sampled(served, watch, tpot_s)
        is_overloaded = self._simulator.load.rate is not None and self._rate is None
        arrival_s = pools[0].pool.runner.terms.arrival_s  # on its way, which is no queue
        rates = Rates(
            requests_per_s=requests_per_s,
            output_tps=requests_per_s * mean_output,
            ttft_s=None if is_overloaded else np.mean([each.ttft_s for each in sample], axis=0),
            tpot_s=tpot_s,
            error=window.error,
            num_decoding=float(num_decoding[LIKELY]),
            num_waiting=max(float((num_waiting - requests_per_s * arrival_s)[LIKELY]), 0.0),
        )
        return SteadyState(served=sample, pools=pools, rates=rates)

    def _queue(self, waiting: Sequence[ServedRequest[Floats]], requests_per_s: Floats) -> None:
        """Set due times of requests queued at the start, spaced by the throughput."""
        for number, each in enumerate(reversed(waiting)):
            each.due_s = -(number + 0.5) / requests_per_s

    def _sampled(
        self, served: Sequence[ServedRequest[Floats]], watch: Watch, tpot_s: Floats
    ) -> list[SteadyRequest]:
        """Requests whose first token came in the window; ones seen too briefly get another's pace.

        Args:
            tpot_s: [3]; mean TPOT of the load, which paces are scaled to.
        """
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
                pace_s = known[int(self._draws.rng.integers(len(known)))]
            output = round(1 + (each.output_len - 1) * tokens)
            sample.append(
                SteadyRequest(
                    each.prompt_len,
                    output,
                    each.due_s,
                    each.token_times_s,
                    each.num_preemptions,
                    each.num_cached_tokens,
                    pace_s,
                )
            )
        # The load's mean is known better than the sample's; percentiles follow it.
        own_s = [each.pace_s for each in sample if each.output_len > 1]
        factor = tpot_s / np.mean(own_s, axis=0) if own_s else np.ones(len(BOUNDS))
        for each in sample:
            each.pace_s = each.pace_s * factor
        return sample
