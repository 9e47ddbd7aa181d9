"""The few best deployments, simulated request by request; screening only says which those are.

Static formulas take the requests of all ranks to be alike. Served one by one, prompts meet decodes,
and data-parallel ranks wait for each other: here a scheduler plans every step. Outputs differ in
length around their mean, since requests of equal length would stay in step and hide that.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from expertlane.cost.laws.execution import LIKELY
from expertlane.cost.laws.frameworks import find_framework
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.multi_token import MultiToken
from expertlane.errors import CapacityError
from expertlane.memory import prefill_step_tokens
from expertlane.plan.candidates import Goals, PlanRequest
from expertlane.plan.explanation import family_of
from expertlane.plan.screen import ScreenedCandidate
from expertlane.plan.throughput import ThroughputCurve
from expertlane.simulate.simulator import ServingSetup, Simulator
from expertlane.simulate.steady import steady_rates
from expertlane.spec.workload import LengthRange, Load, Workload

LENGTHS = 0.8, 1.2  # of outputs, over their mean
NUM_SIMULATED = 12
_LEAST_STEPS = 24  # of a stretch
_MOST_OF_LAYOUT = 2
_LEAST_SHARE = 0.5  # of the most that was screened, for a family to be worth a look
_MOST_RANKS = 1024  # of a replica: a step tells what each pair of a stage's ranks exchanges
_NUM_NEAREST = 6  # of those that break a limit as screened


def simulate(option: ScreenedCandidate, request: PlanRequest) -> ThroughputCurve | None:
    """A closed load on one replica, the fullest, at the option's number of sequences.

    Replicas are independent, so the others serve as much for each of their sequences. None where
    not even one request of the longest output fits.
    """
    layout, options, num_drafts = option.candidate
    setting, workload = request.setting, request.workload
    replica, profile = replace(layout, replicas=1), request.cluster.profile
    batch = -(-option.num_seqs // layout.replicas)
    tokens, wait_steps = prefill_step_tokens(workload, layout, setting.step_tokens), 0
    if profile.framework:
        framework = find_framework(profile.framework)
        tokens, wait_steps = framework.max_num_batched_tokens, framework.prompt_wait_steps
    of_rank = -(-batch // layout.dp)
    setup = ServingSetup(
        replica,
        None,
        options,
        setting.types,
        setting.execution,
        setting.routing,
        setting.multi_token if num_drafts else MultiToken(),
        max_num_seqs=of_rank,
        max_num_batched_tokens=max(tokens, of_rank),
        prompt_wait_steps=wait_steps,
    )
    load = Load(
        batch,
        LengthRange(workload.prompt_len, workload.prompt_len),
        _output_lens(workload, request.model.max_position_embeddings),
        batch,
    )
    cluster = ModelledCluster(profile, replica.world_size)
    try:
        rates = steady_rates(Simulator(request.model, cluster, setup, load), 0, _LEAST_STEPS)
    except CapacityError:
        return None
    return ThroughputCurve(
        num_seqs=np.array([option.num_seqs]),
        tps=(rates.output_tps * (option.num_seqs / batch))[::-1, None],
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

    First the best of each family as screened, except where it is far from the most; then, as long
    as there is any, the one that was not simulated and has most tokens a second as screened, times
    the largest ratio of simulated to screened in its family, if that is more than the best has.

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
        self._queues: dict[str, _Queue] = {}
        for option in options:
            if option.place is not None and option.candidate.layout.replica_size <= _MOST_RANKS:
                family = family_of(option.candidate.layout)
                self._queues.setdefault(family, _Queue()).push(option)

    def result(self) -> Simulations:
        """All of it."""
        by_first = sorted(self._queues.values(), key=lambda each: -each.first_tps)
        most = by_first[0].first_tps if by_first else 0.0
        seen: set[bool] = set()
        for queue in by_first:
            has_experts = queue.has_experts
            if queue.first_tps >= _LEAST_SHARE * most or has_experts not in seen:
                self._take_best_of(queue)
                seen.add(has_experts)
        while self._num_done < self._most and (queue := self._likeliest()) is not None:
            self._take(queue)
        is_open = [
            each for queue in self._queues.values() for each in queue.above(self._best_tps)
        ]
        kept = sorted(self._kept, key=lambda each: -each.tps)
        return Simulations(kept, self._broke, len(is_open))

    @property
    def _num_done(self) -> int:
        return len(self._kept) + len(self._broke)

    @property
    def _best_tps(self) -> float:
        return max((each.tps for each in self._kept), default=0.0)

    def _likeliest(self) -> "_Queue | None":
        """The family of the one that may have most, if that is more than the best has."""
        known = [each.ratio for each in self._queues.values() if each.ratio is not None]
        usual = max(known, default=1.0)
        for queue in self._queues.values():
            queue.usual = usual
            queue.skip(lambda option: self._of_layout[option.candidate.layout] >= _MOST_OF_LAYOUT)
        rest = [each for each in self._queues.values() if each.first_tps]
        best = max(rest, key=lambda each: each.may_be, default=None)
        return best if best is not None and best.may_be > self._best_tps else None

    def _take_best_of(self, queue: "_Queue") -> None:
        """Simulate the first of a family that keeps the limits."""
        while queue.first_tps and self._num_done < self._most:
            if self._take(queue):
                return

    def _take(self, queue: "_Queue") -> bool:
        """Simulate a family's first; whether it keeps the limits."""
        option = queue.pop()
        served = self._run(option)
        if served is None:
            return False
        found = SimulatedCandidate.of(option, served)
        queue.learn(found.over_screened)
        self._of_layout[option.candidate.layout] += 1
        if served.best(self._goals) is not None:
            self._kept.append(found)
            self._advance(1)
            return True
        self._broke.append(found)
        lower = option.next_best(self._goals)
        if lower.place is not None:
            queue.push(lower)
        return False


@dataclass(eq=False)
class _Queue:
    """The options of a family that were not simulated, the best first.

    Attributes:
        ratio: the largest of simulated over screened; None before any.
        usual: in its place.
    """

    ratio: float | None = None
    usual: float = 1.0
    _heap: list[tuple[float, int, ScreenedCandidate]] = field(default_factory=list)
    _num: int = 0

    @property
    def first_tps(self) -> float:
        """As screened; 0 where there is none."""
        return -self._heap[0][0] if self._heap else 0.0

    @property
    def has_experts(self) -> bool:
        """Whether experts are spread over ranks."""
        return self._heap[0][2].candidate.layout.ep > 1

    @property
    def may_be(self) -> float:
        """What the first may have if it is simulated."""
        return self.first_tps * (self.usual if self.ratio is None else self.ratio)

    def push(self, option: ScreenedCandidate) -> None:
        heapq.heappush(self._heap, (-option.tps, self._num, option))
        self._num += 1

    def pop(self) -> ScreenedCandidate:
        return heapq.heappop(self._heap)[2]

    def skip(self, is_enough: Callable[[ScreenedCandidate], bool]) -> None:
        """Drop the first ones of which there are enough."""
        while self._heap and is_enough(self._heap[0][2]):
            self.pop()

    def learn(self, ratio: float) -> None:
        self.ratio = max(ratio, self.ratio or 0.0)

    def above(self, tps: float) -> list[ScreenedCandidate]:
        """Those that may have more than so many tokens a second."""
        ratio = self.usual if self.ratio is None else self.ratio
        return [each for value, _, each in self._heap if -value * ratio > tps]


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
