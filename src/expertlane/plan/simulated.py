"""The few best deployments, simulated request by request; screening only says which those are.

Static formulas take the requests of all ranks to be alike. Served one by one, prompts meet decodes,
and data-parallel ranks wait for each other: here a scheduler plans every step. A short stretch
finds the number of sequences within the limits; what is told of a deployment is the steady state
that `simulate` gives too.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, gcd, log
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.multi_token import MultiToken
from expertlane.errors import CapacityError, UserError
from expertlane.plan.candidates import Candidate, Goals, PlanRequest, family_of
from expertlane.plan.screen import Screened, ScreenedCandidate, TooLarge, fitting
from expertlane.plan.search import Finalist, OnePool, Search
from expertlane.plan.throughput import ThroughputCurve
from expertlane.simulate.setup import ServingSetup, scheduling_of
from expertlane.simulate.simulator import Simulator
from expertlane.simulate.steady import ROUGH, USUAL, Precision, steady_state
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.workload import LengthRange, Load

NUM_SIMULATED = 12  # options
_MOST_TRIALS = 6  # numbers of sequences of an option
_NUM_TOLD = 5  # of the best, beside the best with experts spread and without
_CLOSE = 0.96  # of a limit, or of the most sequences: nearer is not worth another trial
_AIM = 0.99  # of a limit
_FURTHER = 1.3  # times as many sequences, where none broke a limit yet
_MOST_OF_LAYOUT = 2
_LEAST_SHARE = 0.5  # of the most that was screened, for a family to be worth a look
_MOST_RANKS = 1024  # of a replica: a step tells what each pair of a stage's ranks exchanges
_MOST_REPLICAS = 16  # of both pools
_NUM_NEAREST = 6  # of those that break a limit as screened


def simulate(
    option: ScreenedCandidate, precision: Precision = USUAL, *, request: PlanRequest
) -> ThroughputCurve | None:
    """A closed load at the option's number of sequences.

    None where not even one request of the longest output fits.
    """
    layout, options, num_drafts = option.candidate
    of_rank = -(-option.num_seqs // (layout.replicas * layout.dp))
    setup = _Served(layout, options, num_drafts, of_rank)
    return _rates(request, setup, None, option.num_seqs, precision)


def simulate_pools(
    prefill: ScreenedCandidate,
    decode: ScreenedCandidate,
    request: PlanRequest,
    precision: Precision = USUAL,
) -> ThroughputCurve | None:
    """A closed load on two pools.

    None where too many of their replicas do not divide alike, or not even one request fits.
    """
    (first, of_prompts, _), (second, options, num_drafts) = prefill.candidate, decode.candidate
    num_parts = gcd(first.replicas, second.replicas)
    if (first.replicas + second.replicas) // num_parts > _MOST_REPLICAS:
        return None
    of_rank = -(-decode.num_seqs // (second.replicas * second.dp))
    setup = _Served(second, options, num_drafts, of_rank)
    return _rates(request, setup, (first, of_prompts), request.workload.num_sequences, precision)


class _Served(NamedTuple):
    """A pool that decodes, and sequences of a data-parallel rank at most."""

    layout: Layout
    options: Options
    num_drafts: int
    max_num_seqs: int


def _rates(
    request: PlanRequest,
    served: _Served,
    prefill: tuple[Layout, Options] | None,
    batch: int,
    precision: Precision,
) -> ThroughputCurve | None:
    """What a load comes to."""
    setting, workload, profile = request.setting, request.workload, request.cluster.profile
    setup = ServingSetup(
        served.layout,
        None if prefill is None else prefill[0],
        served.options,
        setting.types,
        setting.execution,
        setting.routing,
        setting.multi_token if served.num_drafts else MultiToken(),
        max_num_seqs=served.max_num_seqs,
        **scheduling_of(profile.framework, setting.step_tokens, served.max_num_seqs),
        prefill_options=None if prefill is None else prefill[1],
    )
    lengths = workload.prompt_len, workload.output_len
    prompt, output = (LengthRange(each, each) for each in lengths)
    load = Load(batch, prompt, output, batch).varied(request.model.max_position_embeddings)
    cluster = ModelledCluster(profile, setup.num_devices)
    try:
        simulator = Simulator(request.model, cluster, setup, load)
        # Bounds of skew follow in `Finalist.simulated`.
        state = steady_state(simulator, workload.seed, precision, with_skew=False)
    except CapacityError:
        return None
    rates = state.rates
    assert rates.ttft_s is not None, "a closed load"
    goals = request.goals
    return ThroughputCurve(
        num_seqs=np.array([batch]),
        tps=rates.output_tps[::-1, None],
        tpot_s=rates.tpot_s[:, None],
        ttft_s=rates.ttft_s[:, None],
        excess=np.array([goals.excess(rates.tpot_s, rates.ttft_s, state.served)]),
    )


@dataclass(frozen=True, eq=False)
class SimulatedCandidate(ScreenedCandidate):
    """A candidate that was simulated, at one number of sequences; `place` is 0.

    Attributes:
        served: as simulated.
        option: as screened.
    """

    option: ScreenedCandidate

    @property
    def num_seqs(self) -> int:
        """Running at once, over the whole system."""
        return self.option.num_seqs

    def breach(self, goals: Goals) -> float:
        """The factor by which it misses the worst limit; 1 or less where it keeps all."""
        return float(self.served.breach(goals)[0])

    @classmethod
    def of(cls, option: ScreenedCandidate, served: ThroughputCurve) -> "SimulatedCandidate":
        """An option with what its simulation gave."""
        return cls(**vars(option) | {"served": served, "place": 0, "option": option})


Run = Callable[[ScreenedCandidate, Precision], ThroughputCurve | None]


@dataclass(frozen=True, eq=False)
class Simulations:
    """What was simulated.

    Attributes:
        kept: options that keep the limits, each with the most tokens a second that it was found to
            have within them, the best first.
        broke: those that do not, each as near to the limits as it came.
        num_open: not simulated, though they may have more tokens a second than the best.
    """

    kept: Sequence[SimulatedCandidate]
    broke: Sequence[SimulatedCandidate]
    num_open: int


class BestFirst:
    """Simulates those that may be the best, the likeliest first.

    First the best of each family as screened, except where it is far from the most. Then those that
    may have more tokens a second than the best has: screened ones times the largest ratio of
    simulated to screened of their kind (data-parallel ranks, stages, experts spread or not), or of
    all where none of the kind was simulated.

    Args:
        run: simulates an option; None where it cannot be.
        advance: called with 1 for each that is simulated.
    """

    def __init__(
        self,
        options: Sequence[ScreenedCandidate],
        request: PlanRequest,
        run: Run,
        advance: Callable[[int], None],
        most: int = NUM_SIMULATED,
    ) -> None:
        self._request, self._goals = request, request.goals
        self._run, self._advance, self._most = run, advance, most
        self._kept: list[SimulatedCandidate] = []
        self._broke: list[SimulatedCandidate] = []
        self._of_layout = Counter[object]()
        self._ratios: dict[object, float] = {}
        able = [
            (tps, each)
            for each in options
            if (tps := each.within(self._goals)[1])
            and each.candidate.layout.replica_size <= _MOST_RANKS
        ]
        self._waiting = sorted(able, key=lambda pair: -pair[0])

    def result(self) -> Simulations:
        """All of it."""
        best: dict[str, tuple[float, ScreenedCandidate]] = {}
        for tps, option in self._waiting:
            best.setdefault(family_of(option.candidate.layout), (tps, option))
        seen: set[bool] = set()
        most = self._waiting[0][0] if self._waiting else 0.0
        for tps, option in best.values():
            if self._num_done >= self._most:
                break
            has_experts = option.candidate.layout.ep > 1
            if tps >= _LEAST_SHARE * most or has_experts not in seen:
                self._take(tps, option)
                seen.add(has_experts)
        while self._num_done < self._most and (may_win := self._may_win()):
            self._take(*may_win[0])
        kept = sorted(self._kept, key=lambda each: -each.tps)
        return Simulations(kept, self._broke, len(self._may_win()))

    @property
    def _num_done(self) -> int:
        return len(self._kept) + len(self._broke)

    def _may_win(self) -> list[tuple[float, ScreenedCandidate]]:
        """Those that may have more than the best, the likeliest first; few of one layout."""
        best_tps = max((each.tps for each in self._kept), default=0.0)
        usual = max(self._ratios.values(), default=1.0)
        may_be = [
            (tps * ratio, tps, each)
            for tps, each in self._waiting
            if tps * (ratio := self._ratios.get(_kind_of(each), usual)) > best_tps
            and self._of_layout[each.candidate.layout] < _MOST_OF_LAYOUT
        ]
        return [(tps, each) for _, tps, each in sorted(may_be, key=lambda each: -each[0])]

    def _take(self, tps: float, option: ScreenedCandidate) -> None:
        """Simulate an option with the number of sequences that suits the limits."""
        self._waiting = [pair for pair in self._waiting if pair[1] is not option]
        found = settled(option, self._request, self._run, ROUGH)
        if found is None:
            return
        self._advance(1)
        if found.breach(self._goals) > 1:
            self._broke.append(found)
            return
        kind = _kind_of(option)
        self._ratios[kind] = max(found.tps / tps, self._ratios.get(kind, 0.0))
        self._of_layout[option.candidate.layout] += 1
        self._kept.append(found)


def settled(
    option: ScreenedCandidate,
    request: PlanRequest,
    run: Run,
    precision: Precision,
    tried: Sequence[SimulatedCandidate] = (),
    most_trials: int = _MOST_TRIALS,
) -> SimulatedCandidate | None:
    """An option with as many sequences as keep the limits when simulated, if any do.

    The formula proposes their number; what a simulation has beyond the formula corrects it, and
    between one that keeps the limits and one that does not lies the next.

    Args:
        tried: numbers of sequences that were simulated already.

    Returns:
        The one with most tokens a second that keeps the limits, else the nearest; None where none
        can be simulated.
    """
    goals = request.goals
    found = list(tried)
    num = _next_num(option, goals, found)
    for _ in range(most_trials):
        if num is None:
            break
        at = option.at(num, request.workload)
        served = run(at, precision)
        if served is None:
            break
        found.append(SimulatedCandidate.of(at, served))
        num = _next_num(option, goals, found)
    kept = [each for each in found if each.breach(goals) <= 1]
    if kept:
        return max(kept, key=lambda each: each.tps)
    return min(found, key=lambda each: each.breach(goals), default=None)


def _next_num(
    option: ScreenedCandidate, goals: Goals, found: Sequence[SimulatedCandidate]
) -> int | None:
    """How many sequences to try next; None where what was found is close enough."""
    if not found:
        return max(option.within(goals)[0], 1)
    last = found[-1]
    formula = float(last.option.served.breach(goals)[last.option.place or 0])
    if formula <= 0:
        return None
    kept = max((each for each in found if each.breach(goals) <= 1), key=_num_of, default=None)
    broken = [each for each in found if each.breach(goals) > 1]
    few = min(broken, key=_num_of, default=None)
    if kept is not None and few is not None and kept.num_seqs < few.num_seqs:
        low, high = kept.breach(goals), few.breach(goals)
        share = log(_AIM / low) / log(high / low) if low < _AIM else 0.0
        if len({each.breach(goals) > 1 for each in found[-2:]}) == 1:  # the line leads astray
            share = 0.5
        num = int(kept.num_seqs * (few.num_seqs / kept.num_seqs) ** share)
    else:
        num, _ = option.within(goals, last.breach(goals) / formula / _AIM)
        if few is not None:
            num = min(num, int(_CLOSE * few.num_seqs))
        elif kept is not None:  # where TPOT hardly grows, many more may keep the limit
            num = min(max(num, ceil(_FURTHER * kept.num_seqs)), option.most_seqs)
    if num < 1 or (kept is not None and num * _CLOSE <= kept.num_seqs):
        return None
    return num


def _num_of(found: SimulatedCandidate) -> int:
    return found.num_seqs


def _kind_of(option: ScreenedCandidate) -> object:
    """What the ratio of simulated to screened turns on most."""
    layout = option.candidate.layout
    return layout.dp, layout.pp, layout.ep > 1


def simulated_pool(
    search: Search,
    screened: Sequence[Screened],
    advance: Callable[[int], None],
    *,
    with_families: bool = True,
) -> OnePool:
    """The best of those screened, simulated; each explained by its steps in full.

    Args:
        advance: called with 1 for each of the best.
        with_families: whether more than the best two are wanted in full.

    Raises:
        UserError: nothing fits, or nothing keeps the limits; with the nearest deployment.
    """
    request, options = search.request, search.options(screened)

    run = partial(simulate, request=request)
    found = BestFirst(options, request, run, advance).result()
    kept, broke = list(found.kept), list(found.broke)
    if not kept:
        for each in nearest_simulated(options, request, run):
            (broke if each.breach(request.goals) > 1 else kept).append(each)
    first = _told(kept) if with_families else kept[:2]
    told = [each for each in map(partial(in_full, request, run), first) if each is not None]
    if not told:
        if not broke:
            raise UserError(too_many_ranks(request))
        nearest = min(broke, key=lambda each: each.breach(request.goals))
        raise UserError(search.missed(nearest.option, nearest.served))
    finalists = [
        search.finish(each.option).simulated(each.served)
        for each in sorted(told, key=lambda each: -each.tps)
    ]
    num_too_large = sum(isinstance(each, TooLarge) for each in screened)
    num_simulated = len(kept) + len(broke)
    return OnePool(options, finalists, len(screened), num_too_large, num_simulated, found.num_open)


def evaluated(request: PlanRequest, candidates: Sequence[Candidate]) -> Finalist | None:
    """The best of some deployments, with as many sequences as serve the workload best.

    None where none of them holds a sequence.
    """
    search = Search(request)
    options = fitting(search.screen(candidates=candidates))
    if not options:
        return None

    run = partial(simulate, request=request)
    best = max(options, key=lambda each: each.within(request.goals)[1])
    found = settled(best, request, run, USUAL)
    return None if found is None else search.finish(found.option).simulated(found.served)


def _told(kept: Sequence[SimulatedCandidate]) -> list[SimulatedCandidate]:
    """The few best, and the best with experts spread and without."""
    best: dict[bool, SimulatedCandidate] = {}
    for each in kept:
        best.setdefault(each.candidate.layout.ep > 1, each)
    return [each for place, each in enumerate(kept) if place < _NUM_TOLD or each in best.values()]


def in_full(request: PlanRequest, run: Run, found: SimulatedCandidate) -> SimulatedCandidate | None:
    """The same in its steady state, with fewer sequences where it breaks a limit there."""
    served = run(found.option, USUAL)
    assert served is not None, "a short stretch of it was simulated"
    told = SimulatedCandidate.of(found.option, served)
    best = settled(found.option, request, run, USUAL, [told], most_trials=3)
    return best if best is not None and best.breach(request.goals) <= 1 else None


def too_many_ranks(request: PlanRequest) -> str:
    """Why none can be simulated."""
    return (
        f"{request.model.name} fits {request.cluster} with replicas of more than {_MOST_RANKS:,} "
        f"ranks alone, and those are not simulated; take float8, shorter sequences or devices with "
        "more memory"
    )


def nearest_simulated(
    options: Sequence[ScreenedCandidate], request: PlanRequest, run: Run
) -> list[SimulatedCandidate]:
    """Those that come nearest to the limits as screened, one of each layout, simulated."""
    goals = request.goals
    breaches = [float(each.served.breach(goals).min()) for each in options]
    nearest: dict[object, ScreenedCandidate] = {}
    for number in sorted(range(len(options)), key=breaches.__getitem__):
        option = options[number]
        if option.candidate.layout.replica_size <= _MOST_RANKS:
            nearest.setdefault(option.candidate.layout, option.nearest(goals))
        if len(nearest) == _NUM_NEAREST:
            break
    served = [(option, run(option, ROUGH)) for option in nearest.values()]
    return [SimulatedCandidate.of(option, each) for option, each in served if each is not None]
