"""The few best deployments, simulated request by request; screening only says which those are.

Static formulas take the requests of all ranks to be alike. Served one by one, prompts meet decodes,
and data-parallel ranks wait for each other: here a scheduler plans every step. Outputs differ in
length around their mean, since requests of equal length would stay in step and hide that.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.execution import LIKELY
from expertlane.cost.laws.frameworks import find_framework
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.multi_token import MultiToken
from expertlane.errors import CapacityError, UserError
from expertlane.memory import RANK_STEP_TOKENS
from expertlane.plan.candidates import Goals, PlanRequest, family_of
from expertlane.plan.screen import Screened, ScreenedCandidate, TooLarge
from expertlane.plan.search import OnePool, Search
from expertlane.plan.throughput import ThroughputCurve
from expertlane.simulate.setup import ServingSetup
from expertlane.simulate.simulator import Simulator
from expertlane.simulate.steady import steady_rates
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.workload import LengthRange, Load, Workload

LENGTHS = 0.8, 1.2  # of outputs, over their mean
NUM_SIMULATED = 12
_LEAST_STEPS = 24  # of a stretch
_MOST_OF_LAYOUT = 2
_LEAST_SHARE = 0.5  # of the most that was screened, for a family to be worth a look
_MOST_RANKS = 1024  # of a replica: a step tells what each pair of a stage's ranks exchanges
_MOST_REPLICAS = 16  # of both pools
_NUM_NEAREST = 6  # of those that break a limit as screened


def simulate(option: ScreenedCandidate, request: PlanRequest) -> ThroughputCurve | None:
    """A closed load on one replica, the fullest, at the option's number of sequences.

    Replicas are independent, so the others serve as much for each of their sequences. None where
    not even one request of the longest output fits.
    """
    layout, options, num_drafts = option.candidate
    batch = -(-option.num_seqs // layout.replicas)
    setup = _Served(replace(layout, replicas=1), options, num_drafts, -(-batch // layout.dp))
    return _rates(request, setup, None, batch, option.num_seqs)


def simulate_pools(
    prefill: ScreenedCandidate, decode: ScreenedCandidate, request: PlanRequest
) -> ThroughputCurve | None:
    """A closed load on two pools; on a part of their replicas, where those divide alike.

    None where too many replicas are left, or not even one request fits.
    """
    (first, of_prompts, _), (second, options, num_drafts) = prefill.candidate, decode.candidate
    num_parts = gcd(first.replicas, second.replicas)
    layouts = [replace(each, replicas=each.replicas // num_parts) for each in (first, second)]
    if sum(each.replicas for each in layouts) > _MOST_REPLICAS:
        return None
    whole = request.workload.num_sequences
    of_rank = -(-decode.num_seqs // (second.replicas * second.dp))
    setup = _Served(layouts[1], options, num_drafts, of_rank)
    return _rates(request, setup, (layouts[0], of_prompts), -(-whole // num_parts), whole)


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
    num_seqs: int,
) -> ThroughputCurve | None:
    """What a load comes to, for so many sequences; of a part of the system, with `batch`."""
    setting, workload = request.setting, request.workload
    profile, layout = request.cluster.profile, served.layout
    tokens, wait_steps = setting.step_tokens or RANK_STEP_TOKENS, 0
    if profile.framework:
        framework = find_framework(profile.framework)
        tokens, wait_steps = framework.max_num_batched_tokens, framework.prompt_wait_steps
    setup = ServingSetup(
        layout,
        None if prefill is None else prefill[0],
        served.options,
        setting.types,
        setting.execution,
        setting.routing,
        setting.multi_token if served.num_drafts else MultiToken(),
        max_num_seqs=served.max_num_seqs,
        max_num_batched_tokens=max(tokens, served.max_num_seqs),
        prompt_wait_steps=wait_steps,
        prefill_options=None if prefill is None else prefill[1],
    )
    prompt_len = LengthRange(workload.prompt_len, workload.prompt_len)
    output_len = _output_lens(workload, request.model.max_position_embeddings)
    load = Load(batch, prompt_len, output_len, batch)
    cluster = ModelledCluster(profile, setup.num_devices)
    try:
        simulator = Simulator(request.model, cluster, setup, load)
        rates = steady_rates(simulator, 0, _LEAST_STEPS, with_skew=False)  # `Finalist.simulated`
    except CapacityError:
        return None
    return ThroughputCurve(
        num_seqs=np.array([num_seqs]),
        tps=(rates.output_tps * (num_seqs / batch))[::-1, None],
        tpot_s=rates.tpot_s[:, None],
        ttft_s=rates.ttft_s[:, None],
    )


def _output_lens(workload: Workload, num_positions: int) -> LengthRange:
    """Around the mean, as far as the model has positions."""
    mean = workload.output_len
    away = min(round((LENGTHS[1] - 1) * mean), num_positions - workload.prompt_len + 1 - mean)
    away = max(away, 0)
    return LengthRange(max(mean - away, 1), mean + away)


@dataclass(frozen=True, eq=False)
class SimulatedCandidate(ScreenedCandidate):
    """A candidate that was simulated, at one number of sequences; `place` is 0.

    Attributes:
        served: as simulated.
        option: as screened.
    """

    option: ScreenedCandidate

    @property
    def over_screened(self) -> float:
        """Tokens a second as simulated over those screened."""
        return float(self.served.tps[LIKELY, 0]) / self.option.tps

    @classmethod
    def of(cls, option: ScreenedCandidate, served: ThroughputCurve) -> "SimulatedCandidate":
        """An option with what its simulation gave."""
        return cls(**vars(option) | {"served": served, "place": 0, "option": option})


@dataclass(frozen=True, eq=False)
class Simulations:
    """What was simulated.

    Attributes:
        kept: those that keep the limits, by tokens a second.
        broke: those that do not.
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
        goals: Goals,
        run: Callable[[ScreenedCandidate], ThroughputCurve | None],
        advance: Callable[[int], None],
        most: int = NUM_SIMULATED,
    ) -> None:
        self._goals, self._run, self._advance, self._most = goals, run, advance, most
        self._kept: list[SimulatedCandidate] = []
        self._broke: list[SimulatedCandidate] = []
        self._of_layout = Counter[object]()
        self._ratios: dict[object, float] = {}
        able = [
            each
            for each in options
            if each.place is not None and each.candidate.layout.replica_size <= _MOST_RANKS
        ]
        self._waiting = sorted(able, key=lambda each: -each.tps)

    def result(self) -> Simulations:
        """All of it."""
        best: dict[str, ScreenedCandidate] = {}
        for option in self._waiting:
            best.setdefault(family_of(option.candidate.layout), option)
        seen: set[bool] = set()
        most = self._waiting[0].tps if self._waiting else 0.0
        for option in best.values():
            has_experts = option.candidate.layout.ep > 1
            if option.tps >= _LEAST_SHARE * most or has_experts not in seen:
                self._take_until_kept(option)
                seen.add(has_experts)
        while self._num_done < self._most and (may_win := self._may_win()):
            self._take(may_win[0])
        kept = sorted(self._kept, key=lambda each: -each.tps)
        return Simulations(kept, self._broke, len(self._may_win()))

    @property
    def _num_done(self) -> int:
        return len(self._kept) + len(self._broke)

    def _may_win(self) -> list[ScreenedCandidate]:
        """Those that may have more than the best, the likeliest first; few of one layout."""
        best_tps = max((each.tps for each in self._kept), default=0.0)
        usual = max(self._ratios.values(), default=1.0)
        may_be = [
            (tps, each)
            for each in self._waiting
            if (tps := each.tps * self._ratios.get(_kind_of(each), usual)) > best_tps
            and self._of_layout[each.candidate.layout] < _MOST_OF_LAYOUT
        ]
        return [each for _, each in sorted(may_be, key=lambda each: -each[0])]

    def _take_until_kept(self, option: ScreenedCandidate) -> None:
        """Simulate an option with ever fewer sequences, until it keeps the limits."""
        while self._num_done < self._most:
            lower = self._take(option)
            if lower is None:
                return
            option = lower

    def _take(self, option: ScreenedCandidate) -> ScreenedCandidate | None:
        """Simulate an option; the same with fewer sequences where it breaks a limit."""
        self._waiting = [each for each in self._waiting if each is not option]
        served = self._run(option)
        if served is None:
            return None
        found = SimulatedCandidate.of(option, served)
        kind = _kind_of(option)
        self._ratios[kind] = max(found.over_screened, self._ratios.get(kind, 0.0))
        if served.best(self._goals) is not None:
            self._of_layout[option.candidate.layout] += 1
            self._kept.append(found)
            self._advance(1)
            return None
        self._broke.append(found)
        lower = option.next_best(self._goals)
        if lower.place is None:
            return None
        self._waiting.append(lower)
        return lower


def _kind_of(option: ScreenedCandidate) -> object:
    """What the ratio of simulated to screened turns on most."""
    layout = option.candidate.layout
    return layout.dp, layout.pp, layout.ep > 1


def simulated_pool(
    search: Search, screened: Sequence[Screened], advance: Callable[[int], None]
) -> OnePool:
    """The best of those screened, simulated; each explained by its steps in full.

    Args:
        advance: called with 1 for each of the best.

    Raises:
        UserError: nothing fits, or nothing keeps the limits; with the nearest deployment.
    """
    request, options = search.request, search.options(screened)

    def run(option: ScreenedCandidate) -> ThroughputCurve | None:
        return simulate(option, request)

    found = BestFirst(options, request.goals, run, advance).result()
    kept, broke = list(found.kept), list(found.broke)
    if not kept:
        for each in nearest_simulated(options, request.goals, run):
            (broke if each.served.best(request.goals) is None else kept).append(each)
    if not kept:
        if not broke:
            raise UserError(too_many_ranks(request))
        nearest = min(broke, key=lambda each: float(each.served.breach(request.goals)[0]))
        raise UserError(search.missed(nearest.option, nearest.served))
    finalists = [
        search.finish(each.option).simulated(each.served)
        for each in sorted(kept, key=lambda each: -each.tps)
    ]
    num_too_large = sum(isinstance(each, TooLarge) for each in screened)
    num_simulated = len(kept) + len(broke)
    return OnePool(options, finalists, len(screened), num_too_large, num_simulated, found.num_open)


def too_many_ranks(request: PlanRequest) -> str:
    """Why none can be simulated."""
    return (
        f"{request.model.name} fits {request.cluster} with replicas of more than {_MOST_RANKS:,} "
        f"ranks alone, and those are not simulated; take float8, shorter sequences or devices with "
        "more memory"
    )


def nearest_simulated(
    options: Sequence[ScreenedCandidate],
    goals: Goals,
    run: Callable[[ScreenedCandidate], ThroughputCurve | None],
) -> list[SimulatedCandidate]:
    """Those that come nearest to the limits as screened, one of each layout, simulated."""
    breaches = [float(each.served.breach(goals).min()) for each in options]
    nearest: dict[object, ScreenedCandidate] = {}
    for number in sorted(range(len(options)), key=breaches.__getitem__):
        option = options[number]
        if option.candidate.layout.replica_size <= _MOST_RANKS:
            nearest.setdefault(option.candidate.layout, option.nearest(goals))
        if len(nearest) == _NUM_NEAREST:
            break
    served = [(option, run(option)) for option in nearest.values()]
    return [SimulatedCandidate.of(option, each) for option, each in served if each is not None]
