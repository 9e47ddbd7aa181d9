"""The few best deployments, simulated request by request; screening only says which those are.

Static formulas take the requests of all ranks to be alike. Served one by one, prompts meet decodes,
and data-parallel ranks wait for each other: here a scheduler plans every step. A short window
finds the number of sequences within the limits; what is shown of a deployment is the steady state
that `simulate` gives too.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd

import numpy as np

from expertlane.cost.laws.profile import ModelledCluster
from expertlane.cost.throughput import Goals, MultiToken, ThroughputCurve
from expertlane.errors import CapacityError, UserError
from expertlane.planner.candidates import Candidate, PlanRequest, family_of
from expertlane.planner.engines import ServingEngine, engines_on
from expertlane.planner.screen import Screened, ScreenedCandidate, TooLarge, fitting
from expertlane.planner.search import (
    Finalist,
    OnePool,
    Ratios,
    Run,
    Search,
    SimulatedCandidate,
    Trials,
)
from expertlane.results.serving_record import ServingRecord
from expertlane.simulator.results import serving_of
from expertlane.simulator.simulator import ServingSetup, Simulator, scheduling_of
from expertlane.simulator.steady import PrefillRates, pools_apart, steady_state
from expertlane.simulator.watch import ROUGH, USUAL, Precision
from expertlane.spec.layout import Layout
from expertlane.spec.workload import Load

NUM_SIMULATED = 12  # options
_NUM_SHOWN = 5  # options that are shown, the best with EP, without, and of each engine among them
# Gains in tokens/s that are worth another trial: of the best, of others that are shown, and while
# searching.
_GAIN, _SHOWN_GAIN, _SOUGHT_GAIN = 0.005, 0.05, 0.1
_MOST_OF_LAYOUT = 2
_LEAST_SHARE = 0.5  # of the most tokens/s: options below this share get no trial and no row
_MOST_RANKS = 1024  # ranks of a replica: a step counts what each pair of a stage's ranks exchanges
_MOST_REPLICAS = 16  # replicas of both pools together
_NUM_NEAREST = 6  # options simulated of those that break a limit as screened


def simulate(
    option: ScreenedCandidate, precision: Precision = USUAL, *, request: PlanRequest
) -> ThroughputCurve | None:
    """A closed load at the option's number of sequences.

    None where not even one request of the longest output fits.
    """
    return _rates(request, option, None, option.num_seqs, precision)


def simulate_pools(
    prefill: ScreenedCandidate,
    decode: ScreenedCandidate,
    request: PlanRequest,
    batch: int | None = None,
    known: PrefillRates | None = None,
) -> ThroughputCurve | None:
    """A closed load on two pools.

    None where too many of their replicas do not divide alike, or not even one request fits.

    Args:
        batch: concurrent requests. None takes each pool by itself, at a fraction of the cost, with
            those that have a place to decode or are computed before.
        known: rates of prefill pools; new ones are added.
    """
    if not divide_alike(prefill.candidate.layout, decode.candidate.layout):
        return None
    num, precision = batch or request.workload.num_sequences, USUAL if batch else None
    return _rates(request, decode, prefill, num, precision, known)


def serve_at_rate(
    request: PlanRequest, decode: ScreenedCandidate, prefill: ScreenedCandidate | None = None
) -> ServingRecord:
    """Simulate the load at its rate, on one pool or two, with at most the planned sequences.

    Args:
        decode: the decode pool; it computes prompts too where there is no `prefill`.
    """
    simulator = _simulator(request, decode, prefill, request.load_at_rate())
    state = steady_state(simulator, request.workload.seed)
    return serving_of(simulator, state, request.goals.all)


def divide_alike(prefill: Layout, decode: Layout) -> bool:
    """True if a few replicas of both pools represent all of them."""
    num_parts = gcd(prefill.replicas, decode.replicas)
    return (prefill.replicas + decode.replicas) // num_parts <= _MOST_REPLICAS


def _rates(
    request: PlanRequest,
    decode: ScreenedCandidate,
    prefill: ScreenedCandidate | None,
    batch: int,
    precision: Precision | None,
    known: PrefillRates | None = None,
) -> ThroughputCurve | None:
    """Rates and means of a closed load; None where it does not fit."""
    seed, load = request.workload.seed, request.load_at(batch)
    try:
        simulator = _simulator(request, decode, prefill, load)
        if precision is None:  # requests by themselves have no percentiles
            rates, sample = pools_apart(simulator, seed, known), None
            batch = round(rates.num_decoding + rates.num_waiting)
        else:  # bounds of skew follow in `Finalist.simulated`
            state = steady_state(simulator, seed, precision, with_skew=False, known=known)
            rates, sample = state.rates, state.served
    except CapacityError:
        return None
    assert rates.ttft_s is not None, "a closed load"
    goals = request.goals
    return ThroughputCurve(
        num_seqs=np.array([batch]),
        tps=rates.output_tps[::-1, None],
        tpot_s=rates.tpot_s[:, None],
        ttft_s=rates.ttft_s[:, None],
        slos=None if sample is None else goals.results(rates.tpot_s, rates.ttft_s, sample),
    )


def _simulator(
    request: PlanRequest, decode: ScreenedCandidate, prefill: ScreenedCandidate | None, load: Load
) -> Simulator:
    """A simulator of a load on one pool or two, with places for the sequences planned.

    Raises:
        CapacityError: not even one request fits.
    """
    setting, profile = request.setting, request.cluster.profile
    layout, options, num_drafts = decode.candidate
    places = layout.places_of_rank(decode.num_seqs, request.num_asked)
    setup = ServingSetup(
        layout,
        None if prefill is None else prefill.candidate.layout,
        options,
        setting.types,
        setting.execution,
        setting.routing,
        setting.multi_token if num_drafts else MultiToken(),
        max_num_seqs=places,
        **scheduling_of(profile.framework, setting.step_tokens, places),
        prefill_options=None if prefill is None else prefill.candidate.options,
    )
    cluster = ModelledCluster(profile, setup.num_devices)
    return Simulator(request.model, cluster, setup, load)


Group = Callable[[Candidate], bool]


@dataclass(frozen=True, eq=False)
class Simulations:
    """Results of the simulations.

    Attributes:
        able: trials of options that meet the limits, or may with fewer sequences, in order of
            expected tokens/s.
        num_simulated: options that were simulated.
        num_open: options that were not, though they may have more tokens/s than the best.
    """

    able: Sequence["Trials"]
    num_simulated: int
    num_open: int


class Race:
    """Simulates options that may be the best, in order of expected tokens/s.

    First the best screened of each family, unless it is far behind. Then, in each group (all, with
    EP, without, each engine's), the options that may beat the group's best.
    Expected tokens/s of a screened option: screened ones times the largest ratio of simulated to
    screened of its kind (data-parallel ranks, stages, EP or not), or of a wider kind where none of
    it was simulated; of a simulated one: those at another number of sequences.

    Args:
        run: simulates an option; None where it cannot be.
        advance: called with 1 for each that is simulated.
        groups: the best of each is searched for.
    """

    def __init__(
        self,
        options: Sequence[ScreenedCandidate],
        request: PlanRequest,
        run: Run,
        advance: Callable[[int], None],
        most: int = NUM_SIMULATED,
        groups: Sequence[Group] = (),
    ) -> None:
        self._request, self._goals = request, request.goals
        self._run, self._advance, self._most = run, advance, most
        self._groups = groups
        self._started: list[Trials] = []
        able = [
            (tps, each)
            for each in options
            if (tps := each.within(self._goals)[1])
            and each.candidate.layout.replica_size <= _MOST_RANKS
        ]
        self._waiting = sorted(able, key=lambda pair: -pair[0])

    def result(self) -> Simulations:
        """Race all candidates to the end; the winners, and what was simulated of each."""
        self._start_families()
        self._settle(_anything)
        for group in self._groups:
            self._settle(group)
        may_have = [each.ahead(_SOUGHT_GAIN)[1] for each in self._started]
        order = sorted(range(len(may_have)), key=lambda place: -may_have[place])
        able = [self._started[place] for place in order if may_have[place]]
        best_tps = max((each.tps for each in able), default=0.0)
        num_open = sum(1 for _ in self._expected(_anything, best_tps))
        return Simulations(able, len(self._started), num_open)

    def _start_families(self) -> None:
        best: dict[str, tuple[float, ScreenedCandidate]] = {}
        for tps, option in self._waiting:
            best.setdefault(family_of(option.candidate.layout), (tps, option))
        seen: set[bool] = set()
        most = self._waiting[0][0] if self._waiting else 0.0
        for tps, option in best.values():
            has_experts = option.candidate.layout.ep > 1
            if tps >= _LEAST_SHARE * most or has_experts not in seen:
                self._start(option)
                seen.add(has_experts)

    def _settle(self, group: Group) -> None:
        """Simulate until no option of a group may beat its best."""
        while True:
            started = [
                (*each.ahead(_SOUGHT_GAIN), each)
                for each in self._started
                if group(each.option.candidate)
            ]
            num, tps, trials = max(started, key=lambda each: each[1], default=(None, 0.0, None))
            waiting = self._expected(group, tps) if len(self._started) < self._most else iter(())
            _, option = max(waiting, key=lambda each: each[0], default=(0.0, None))
            if option is not None:
                self._start(option)
            elif num is not None and trials is not None:
                trials.advance(_SOUGHT_GAIN)
            else:
                return

    def _expected(
        self, group: Group, least_tps: float
    ) -> Iterator[tuple[float, ScreenedCandidate]]:
        """A group's options that were only screened, with more expected tokens/s than that."""
        of_layout = Counter(each.option.candidate.layout for each in self._started)
        ratios = Ratios()
        for trials in self._started:
            screened, tps = trials.option.within(self._goals)[1], trials.ahead(_SOUGHT_GAIN)[1]
            ratios.add(_kinds_of(trials.option), tps / screened)
        largest = ratios.largest
        for tps, each in self._waiting:
            if tps * largest <= least_tps:  # nor may those after it, screened slower
                return
            expected = tps * ratios.expected(_kinds_of(each))
            is_open = of_layout[each.candidate.layout] < _MOST_OF_LAYOUT
            if expected > least_tps and is_open and group(each.candidate):
                yield expected, each

    def _start(self, option: ScreenedCandidate) -> None:
        """Simulate an option for the first time."""
        if len(self._started) == self._most:
            return
        self._waiting = [pair for pair in self._waiting if pair[1] is not option]
        trials = Trials(option, self._request, self._run, ROUGH)
        trials.advance(_SOUGHT_GAIN)
        if trials.found:
            self._started.append(trials)
            self._advance(1)


def _anything(candidate: Candidate) -> bool:
    return True


def _kinds_of(option: ScreenedCandidate) -> list[object]:
    """Kinds whose members have alike ratios of simulated to screened, from narrow to wide."""
    layout = option.candidate.layout
    dp, pp, has_experts = layout.dp, layout.pp, layout.ep > 1
    exact, wide = ("dp, pp, ep", dp, pp, has_experts), ("dp, pp", dp > 1, pp > 1)
    return [exact, ("pp, ep", pp, has_experts), wide, "any"]


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
    groups = _groups_of(request) if with_families else []
    found = Race(options, request, run, advance, groups=groups).result()
    first = _to_show(found.able, groups) if with_families else list(found.able[:2])
    if not found.able:
        first = _nearest(nearest_simulated(options, request, run), request.goals)
    shown, missed = in_full(request, run, first)
    if not shown:
        if not missed:
            raise UserError(too_many_ranks(request))
        least = min(missed, key=lambda each: each.breach(request.goals))
        raise UserError(search.missed(least.option, least.served))
    finalists = [search.finish(each.option).simulated(each.served) for each in shown]
    num_too_large = sum(isinstance(each, TooLarge) for each in screened)
    num_simulated = found.num_simulated
    return OnePool(options, finalists, len(screened), num_too_large, num_simulated, found.num_open)


def _groups_of(request: PlanRequest) -> list[Group]:
    """Options with EP, and without; and of each engine, where none was asked for."""
    groups: list[Group] = [lambda each: each.layout.ep > 1, lambda each: each.layout.ep == 1]
    if request.engine is None:
        engines = engines_on(request.cluster.profile)
        groups += [partial(_is_run, engine, request) for engine in engines.values()]
    return groups


def _is_run(engine: ServingEngine, request: PlanRequest, candidate: Candidate) -> bool:
    return engine.runs(candidate, request.model)


def evaluated(
    request: PlanRequest, candidates: Sequence[Candidate], num_seqs: int | None = None
) -> Finalist | None:
    """The best of some deployments, simulated with the whole workload.

    None where none of them holds a sequence.

    Args:
        num_seqs: concurrent sequences; fewer where they do not fit, or miss a limit. None: as many
            as serve the workload best.
    """
    search = Search(request)
    options = fitting(search.screen(candidates=candidates))
    if not options:
        return None

    run = partial(simulate, request=request)
    best = max(options, key=lambda each: each.within(request.goals)[1])
    num = None if num_seqs is None else min(num_seqs, best.most_seqs)
    trials = Trials(best, request, run, USUAL, num)
    trials.advance(_GAIN)
    if num is None or not trials.tps:
        trials.settle(_GAIN, boldly=True)
    found = trials.best
    return None if found is None else search.finish(found.option).simulated(found.served)


def _nearest(near: Sequence[Trials], goals: Goals) -> list[Trials]:
    """The trials that meet the limits, else the one nearest to them."""
    kept = [each for each in near if each.tps]
    breaches = [min(found.breach(goals) for found in each.found) for each in near]
    return kept or [near[place] for place in np.argsort(breaches)[:1]]


def _to_show(able: Sequence[Trials], groups: Sequence[Group]) -> list[Trials]:
    """Trials to show: the best of each group, and the best of all that are not far behind."""
    best = [next((e for e in able if group(e.option.candidate)), None) for group in groups]
    least = _LEAST_SHARE * able[0].ahead(_SOUGHT_GAIN)[1] if able else 0.0
    shown = [each for each in able if each in best]
    others = [e for e in able if e not in shown and e.ahead(_SOUGHT_GAIN)[1] >= least]
    return shown + others[: max(_NUM_SHOWN - len(shown), 0)]


def in_full(
    request: PlanRequest, run: Run, found: Sequence[Trials]
) -> tuple[list[SimulatedCandidate], list[SimulatedCandidate]]:
    """Full-precision results that meet the limits, the best first; and those that miss them.

    The best has as many sequences as the limits allow, the others nearly as many.
    """
    all_trials = [each.again(USUAL) for each in found]
    for trials in all_trials:
        trials.settle(_SHOWN_GAIN)
    while all_trials:
        ahead = [each.ahead(_GAIN, boldly=True) for each in all_trials]
        place = max(range(len(ahead)), key=lambda place: ahead[place][1])
        if ahead[place][0] is None:
            break
        all_trials[place].advance(_GAIN, boldly=True)
    simulated = [best for each in all_trials if (best := each.best) is not None]
    kept = [each for each in simulated if each.keeps(request.goals)]
    missed = [each for each in simulated if not each.keeps(request.goals)]
    return sorted(kept, key=lambda each: -each.tps), missed


def too_many_ranks(request: PlanRequest) -> str:
    """The error text where every replica has too many ranks to be simulated."""
    return (
        f"{request.model.name} fits {request.cluster} with replicas of more than {_MOST_RANKS:,} "
        f"ranks alone, and those are not simulated; take float8, shorter sequences or devices with "
        "more memory"
    )


def nearest_simulated(
    options: Sequence[ScreenedCandidate], request: PlanRequest, run: Run
) -> list[Trials]:
    """Simulated trials of the screened options nearest to the limits, one of each layout."""
    goals = request.goals
    breaches = [float(each.served.breach(goals).min()) for each in options]
    nearest: dict[object, ScreenedCandidate] = {}
    for number in sorted(range(len(options)), key=breaches.__getitem__):
        option = options[number]
        if option.candidate.layout.replica_size <= _MOST_RANKS:
            nearest.setdefault(option.candidate.layout, option.nearest(goals))
        if len(nearest) == _NUM_NEAREST:
            break
    found = [Trials(each, request, run, ROUGH, each.num_seqs) for each in nearest.values()]
    for trials in found:
        trials.advance(_GAIN)
    return [each for each in found if each.found]
