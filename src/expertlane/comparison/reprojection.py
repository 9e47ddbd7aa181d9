"""Project measured deployments again, under changed assumptions, for the fit of corrections.

These numbers of a deployment are compared, as logarithms:

- the time of its decode steps and of its prefill steps;
- the parts of these times by cause, if ranks' clocks have them;
- TPOT, TTFT and tokens/s of a load. They are simulated without changes, and for some changes of
  the admission of requests. The effect of other changes is estimated from the times of the load's
  steps, since a simulation is a thousand times as expensive. Corrections are checked by another
  simulation, and then fitted again;
- the load of the fullest expert over the mean, if ranks counted it.

Standard deviations are those of a measured number's interval, if it has one; else the spread of
repeated runs of servers. A small part of a step has the noise of the step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import exp, hypot, log
from typing import Any, NamedTuple

import numpy as np

from expertlane.comparison.fit import Floats, Measurements
from expertlane.comparison.points import (
    EXPERTS_LOAD,
    NUM_SAMPLED_LAYERS,
    TIME,
    TPOT,
    TPS,
    TTFT,
    WAITING,
    WHOLE,
    Point,
    StepPoint,
    Subject,
    by_measured_cause,
)
from expertlane.cost.laws.corrections import (
    KERNELS,
    Correction,
    LawKind,
    scaled,
)
from expertlane.cost.laws.profile import ModelledCluster, Profile
from expertlane.cost.memory import RANK_STEP_TOKENS, STEP_TOKENS
from expertlane.cost.projector import Projector, Setting, StepByStage, StepSize
from expertlane.cost.routing import LoadedRouting
from expertlane.cost.step.operation import Operation
from expertlane.results.estimate import NORMAL, Estimate
from expertlane.results.serving_record import ServingRecord
from expertlane.simulator.results import serving_of
from expertlane.simulator.simulator import ServingSetup, Simulator, scheduling_of
from expertlane.spec.deployment import DispatchMode
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase
from expertlane.spec.ranges import RANGES
from expertlane.spec.workload import Load

# Standard deviations of logarithms for numbers without an interval, and the least for all.
_OF_STEP, _OF_TERM, _OF_WAITING = 0.03, 0.06, 0.25
_OF_TPOT, _OF_TTFT, _OF_TPS, _OF_LOAD = 0.04, 0.08, 0.06, 0.1
_LEAST_SIGMA = 0.01
_SMALL = 0.002  # share of a step, added to measured and projected terms, since one may be 0
_NOISE_OF_STEP = 0.004  # share of a step: standard deviation of every term, however small
_SEED = 0  # of requests, and which experts they choose
_SKEW_STEP = 0.5  # change of the exponent for a change of the parameter by one
_ROUTED_TOKENS = 4096
_ARRIVALS = -2.5, -1.0, 0.0, 0.2, 0.8, 1.6, 2.5  # changes for which loads are simulated


class Number(NamedTuple):
    """One measured number.

    Attributes:
        place: index of its deployment.
        where: phase of a step, or the load.
        metric: one of `WHOLE`, a cause of a step's time, or `EXPERTS_LOAD`.
        measured, sigma: its logarithm, and the standard deviation of the logarithm.
    """

    place: int
    where: str
    metric: str
    measured: float
    sigma: float


class _LoadMetrics(NamedTuple):
    """A simulated load.

    Attributes:
        by_metric: mean TPOT and TTFT in seconds, and output tokens/s.
        wall_s: seconds of the whole load, at these tokens/s.
        decode, prefill: sizes of typical steps.
        num_rounds: number of decode steps, if each has all concurrent sequences.
    """

    by_metric: Mapping[str, float]
    wall_s: float
    decode: StepSize
    prefill: StepSize
    num_rounds: float


def _metrics(serving: ServingRecord) -> list[tuple[str, Estimate, float]]:
    """The client's numbers: metric, value, and standard deviation of its logarithm."""
    tpot = None if serving.tpot_s is None else serving.tpot_s.mean
    ttft = None if serving.ttft_s is None else serving.ttft_s.mean
    tps = serving.output_tps if serving.rate is None else None  # at a rate it is what arrives
    known = ((TPOT, tpot, _OF_TPOT), (TTFT, ttft, _OF_TTFT), (TPS, tps, _OF_TPS))
    return [
        (name, each, _sigma(each, usual))
        for name, each, usual in known
        if each is not None and each.value > 0
    ]


class Reprojection:
    """Projects all measured deployments under changed assumptions.

    A call with changes by name (logarithms of factors) gives logarithms of projected numbers, [N].

    Attributes:
        names: assumptions that may be changed.
        numbers: the measured numbers, [N].
        offsets: [N]; added to logarithms of projected numbers; None for 0.
    """

    def __init__(self, subject: Subject, points: Sequence[Point]) -> None:
        self.subject = subject
        self.points = points
        self._profile: tuple[tuple[float, ...], Profile] | None = None  # the last one
        self._projectors: dict[tuple[int, float], Projector] = {}
        self._modes: dict[tuple[int, StepSize], DispatchMode] = {}
        self._served: dict[tuple[int, int, float], _LoadMetrics] = {}
        # Of each step as assumed, and as changed last, with the changes.
        self._steps: dict[tuple[int, StepSize, bool], tuple[tuple[float, ...], StepByStage]] = {}
        self.names = [each for each in LawKind if each is not LawKind.SKEW or self._has_skew]
        self.offsets: Floats | None = None
        self.numbers = list(self._numbers())

    @property
    def _has_skew(self) -> bool:
        return self.subject.alpha is not None and self.subject.model.num_experts > 1

    @property
    def least(self) -> dict[str, float]:
        """Lower bound of the change of routing skew: down to uniform routing."""
        alpha = self.subject.alpha
        return {} if alpha is None else {LawKind.SKEW: -alpha / _SKEW_STEP}

    def alpha(self, changes: Mapping[str, float]) -> float:
        """The exponent of experts' popularity under changes, in its valid range."""
        alpha = (self.subject.alpha or 0.0) + _SKEW_STEP * changes.get(LawKind.SKEW, 0.0)
        return min(max(round(alpha, 3), 0.0), float(RANGES["skew"].high))

    def profile(self, changes: Mapping[str, float]) -> Profile:
        """The cluster's profile under changes; routing skew is not part of it."""
        key = tuple(changes.get(name, 0.0) for name in LawKind if name is not LawKind.SKEW)
        if self._profile is None or self._profile[0] != key:
            factors: dict[LawKind, Correction] = {
                name: Correction.exactly(exp(changes[name]))
                for name in LawKind
                if name is not LawKind.SKEW and changes.get(name, 0.0)
            }
            self._profile = key, scaled(self.subject.cluster.profile, factors)
        return self._profile[1]

    def step(self, place: int, size: StepSize, changes: Mapping[str, float]) -> StepByStage:
        """One projected step of a deployment under changes.

        Args:
            place: index of the deployment.
        """
        key = tuple(changes.get(name, 0.0) for name in LawKind if name is not LawKind.ARRIVAL)
        is_changed = any(key)
        known, found = self._steps.get((place, size, is_changed), (None, None))
        if found is None or known != key:
            projector = self._projector(place, self.alpha(changes))
            mode = self._modes.get((place, size))
            if mode is None:
                mode = self._modes[place, size] = projector.fastest_mode(size)
            found = projector.repriced(self.profile(changes)).by_stage(size, mode)
            self._steps[place, size, is_changed] = key, found
        return found

    def _projector(self, place: int, alpha: float) -> Projector:
        key = place, alpha
        if key not in self._projectors:
            record, subject = self.points[place].record, self.subject
            layout, options = record.known_layout, record.served_with or record.known_options
            devices = max(subject.cluster.num_devices, layout.world_size)
            setting = Setting(
                subject.types.of_deployment(options),
                subject.execution,
                subject.routing_at(alpha),
                step_tokens=STEP_TOKENS,
            )
            cluster = ModelledCluster(subject.cluster.profile, devices)
            self._projectors[key] = Projector(subject.model, layout, options, cluster, setting)
        return self._projectors[key]

    @cached_property
    def measured(self) -> Measurements:
        """All measured numbers, for the fit."""
        return Measurements(
            np.array([each.measured for each in self.numbers]),
            np.array([each.sigma for each in self.numbers]),
            np.array([self._group(each.place) for each in self.numbers]),
        )

    def _group(self, place: int) -> int:
        """Index of the first deployment that is the same under the same load: measured again."""
        keys = [_same(point) for point in self.points]
        return keys.index(keys[place])

    def _numbers(self) -> Iterator[Number]:
        for place, point in enumerate(self.points):
            for step in point.steps:
                where = step.where
                if step.is_whole:
                    sigma = _sigma(step.seconds, _OF_STEP)
                    yield Number(place, where, TIME, log(step.seconds.value), sigma)
                for name, seconds in step.terms_s.items():
                    value = log(seconds + self._small(step))
                    usual = _OF_WAITING if name == WAITING else _OF_TERM
                    of_step = _sigma(step.seconds, 0.0) if step.is_whole else 0.0
                    small = _NOISE_OF_STEP * step.seconds.value / exp(value)
                    sigma = hypot(usual, of_step, small)
                    yield Number(place, where, name, value, sigma)
            for serving, load in point.loads:
                for metric, seen, sigma in _metrics(serving):
                    yield Number(place, _where(load), metric, log(seen.value), sigma)
            if point.imbalance is not None and self._has_skew:
                yield Number(place, "experts", EXPERTS_LOAD, log(point.imbalance), _OF_LOAD)

    @staticmethod
    def _small(step: StepPoint) -> float:
        return _SMALL * step.seconds.value

    def __call__(self, changes: Mapping[str, float]) -> Floats:
        """Logarithms of the projected numbers, [N], in the order of `numbers`."""
        values = np.array(list(self._projected(changes)))
        return values if self.offsets is None else values + self.offsets

    def _projected(self, changes: Mapping[str, float]) -> Iterator[float]:
        for place, point in enumerate(self.points):
            for step in point.steps:
                projected = self.step(place, step.size, changes)
                if step.is_whole:
                    yield log(projected.seconds)
                terms = by_measured_cause(projected.causes_s)
                for name in step.terms_s:
                    yield log(terms.get(name, 0.0) + self._small(step))
            for number, (serving, _) in enumerate(point.loads):
                found = self._of_load(place, number, changes)
                yield from (log(found[metric]) for metric, *_ in _metrics(serving))
            if point.imbalance is not None and self._has_skew:
                yield log(self._imbalance(place, self.alpha(changes)))

    def _imbalance(self, place: int, alpha: float) -> float:
        model, record = self.subject.model, self.points[place].record
        counted = np.array(record.num_tokens_per_expert).sum(axis=1)
        num = int(min(max(counted.max(initial=0) // model.num_experts_per_tok, 1), _ROUTED_TOKENS))
        return _fullest(self.subject.routing_at(alpha), model, num)

    @property
    def _loads(self) -> dict[tuple[int, int], Load]:
        return {
            (place, number): load
            for place, point in enumerate(self.points)
            for number, (_, load) in enumerate(point.loads)
        }

    def _simulated(self, place: int, number: int, arrival: float) -> _LoadMetrics:
        """A simulated load with a change of the admission of requests, and no other."""
        key = place, number, arrival
        if key not in self._served:
            load = self._loads[place, number]
            self._served[key] = self._simulate(place, load, {LawKind.ARRIVAL: arrival})
        return self._served[key]

    def _simulate(self, place: int, load: Load, changes: Mapping[str, float]) -> _LoadMetrics:
        """Simulate a whole load on a deployment under changes.

        Args:
            place: index of the deployment.
        """
        subject, record = self.subject, self.points[place].record
        layout, options = record.known_layout, record.served_with or record.known_options
        num_caches = layout.replicas * layout.dp
        most = -(-(load.batch or load.num_requests) // num_caches)
        options = replace(
            options,
            dispatch="all_to_all" if options.dispatch == "auto" else options.dispatch,
            overlap=False if options.overlap == "auto" else options.overlap,
        )
        setup = ServingSetup(
            layout,
            None,
            options,
            subject.types.of_deployment(options),
            subject.execution,
            subject.routing_at(self.alpha(changes)),
            max_num_seqs=max(most, 1),
            **scheduling_of(subject.framework, None, max(most, 1)),
        )
        cluster = ModelledCluster(self.profile(changes), layout.world_size)
        simulator = Simulator(subject.model, cluster, setup, load)
        outcome = simulator.run(_SEED)
        serving = serving_of(simulator, outcome)
        seen = {metric: each.value for metric, each, _ in _metrics(replace(serving, rate=None))}
        prompt_len, output_len = load.prompt_len.low, load.output_len.low
        at_once = load.batch or load.num_requests
        if load.rate is not None:  # by Little's law
            stay_s = seen.get(TTFT, 0.0) + output_len * seen.get(TPOT, 0.0)
            at_once = max(round(load.rate * stay_s), 1)
        num_new = min(prompt_len, RANK_STEP_TOKENS)
        num_prompts = min(at_once, max(RANK_STEP_TOKENS // num_new, 1) * num_caches)
        wall_s = load.num_requests * output_len / seen[TPS]
        return _LoadMetrics(
            {TPOT: wall_s, TTFT: wall_s} | seen,
            wall_s,
            StepSize(at_once, 1, prompt_len + output_len // 2),
            StepSize(num_prompts, num_new, 0, phase=Phase.PREFILL),
            output_len * max(load.num_requests / at_once, 1),
        )

    def _of_load(self, place: int, number: int, changes: Mapping[str, float]) -> dict[str, float]:
        """Metrics of a load: as simulated without changes, scaled like the times of its steps."""
        known = self._simulated(place, number, 0.0)
        decode, prefill = (
            self.step(place, size, changes).seconds / self.step(place, size, {}).seconds
            for size in (known.decode, known.prefill)
        )
        decode_s = self.step(place, known.decode, {}).seconds
        of_tpot = min(decode_s / known.by_metric[TPOT], 1.0)
        of_wall = min(decode_s * known.num_rounds / known.wall_s, 1.0)
        later = self._later(place, number, changes.get(LawKind.ARRIVAL, 0.0))
        return {
            TPOT: later[TPOT] * (of_tpot * decode + (1 - of_tpot) * prefill),
            TTFT: later[TTFT] * prefill,
            TPS: later[TPS] / (of_wall * decode + (1 - of_wall) * prefill),
        }

    def _later(self, place: int, number: int, change: float) -> dict[str, float]:
        """Metrics of a load with a change of admission, interpolated between simulations."""
        right = min(max(int(np.searchsorted(_ARRIVALS, change)), 1), len(_ARRIVALS) - 1)
        ends = _ARRIVALS[right - 1], _ARRIVALS[right]
        share = min(max((change - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0)
        used = [(end, of) for end, of in zip(ends, (1 - share, share), strict=True) if of]
        found = [(self._simulated(place, number, end).by_metric, of) for end, of in used]
        return {
            metric: exp(sum(of * log(each[metric]) for each, of in found))
            for metric in (TPOT, TTFT, TPS)
        }

    def simulated_offsets(self, changes: Mapping[str, float]) -> Floats:
        """Simulated minus estimated logarithms of the loads' numbers under changes, [N]."""
        self.offsets = None
        offsets = np.zeros(len(self.numbers))
        for (place, number), load in self._loads.items():
            exact = self._simulate(place, load, changes).by_metric
            estimated = self._of_load(place, number, changes)
            for at, each in enumerate(self.numbers):
                if (each.place, each.where) == (place, _where(load)):
                    offsets[at] = log(exact[each.metric] / estimated[each.metric])
        return offsets

    def shown(self, number: Number, value: float) -> float:
        """The value of a logarithm, in the number's unit; the offset `_SMALL` of terms removed."""
        if number.metric in (*WHOLE, EXPERTS_LOAD):
            return exp(value)
        steps = self.points[number.place].steps
        (step,) = (each for each in steps if number.where == each.where)
        return max(exp(value) - self._small(step), 0.0)

    @property
    def sizes(self) -> list[tuple[int, StepSize]]:
        """The projected steps: index of the deployment, and size."""
        return list(self._modes)

    def spans(self, changes: Mapping[str, float]) -> dict[LawKind, tuple[float, float]]:
        """Seconds of the shortest and the longest operation of each kind, under changes."""
        found: dict[LawKind, list[float]] = {}
        for place, size in self.sizes:
            for step, times in self.step(place, size, changes).timed():
                name = _assumed_of(step)
                taken = times.seconds[times.seconds > 0]
                if name is not None and len(taken):
                    found.setdefault(name, []).extend((float(taken.min()), float(taken.max())))
        return {name: (min(each), max(each)) for name, each in found.items()}


def _assumed_of(step: Any) -> LawKind | None:
    if step is None:
        return None
    if isinstance(step, Operation):
        return KERNELS.get(step.kind)
    is_far = bool((step.load.num_nodes > 1).any())
    return LawKind.INTER_NODE if is_far else LawKind.INTRA_NODE


def _fullest(routing: LoadedRouting, model: ModelConfig, num: int) -> float:
    owned, none = np.array([num]), np.zeros(1, dtype=np.int64)
    ratios = []
    for layer in model.moe_layers[:NUM_SAMPLED_LAYERS]:
        ids = routing.topk_ids(layer, 0, none, owned)
        counts = np.bincount(ids.ravel(), minlength=model.num_experts)
        ratios.append(float(counts.max() / max(counts.mean(), 1e-9)))
    return sum(ratios) / max(len(ratios), 1) if ratios else 1.0


def _same(point: Point) -> tuple[object, ...]:
    return (
        point.record.name,
        *(step.size for step in point.steps),
        *(_where(load) for _, load in point.loads),
    )


def _where(load: Load) -> str:
    of = f"of {load.prompt_len}+{load.output_len}"
    return f"{load.batch} at once {of}" if load.rate is None else f"{load.rate:g}/s {of}"


def _sigma(measured: Estimate, usual: float) -> float:
    """Standard deviation of a number's logarithm: from its interval, else `usual`."""
    low, _, high = measured.bounds
    if measured.low is None or low <= 0:
        return usual
    return max((log(high) - log(low)) / (2 * NORMAL), _LEAST_SIGMA, usual / 2)
