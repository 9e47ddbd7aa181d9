"""Measured against projected, deployment by deployment and term by term: `expertlane judge`.

Every measured deployment is projected anew, at the sizes of the steps that were measured and with
the load that a client put on it, first as a plan would, then under changed assumptions (`Assumed`).
`explained` says which change explains most of the difference, and fits all of them together.

What is compared of a deployment, each a logarithm:

- the time of its decode steps, and of its prefill steps;
- the parts of these by cause, where a rank's clock or a profiler's trace tells them, over the
  step's time: a part that is 2 % of a step counts as little as its noise;
- TPOT, TTFT and tokens/s of a load. They are simulated once as assumed. What a changed assumption
  does to them is taken from the steps that they are made of, since a simulation is a thousand
  times as expensive; corrections are checked by another simulation, and fitted once more by what
  it says;
- the load of the fullest expert over the mean, where ranks counted it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp, hypot, log
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from expertlane.comparison.explained import (
    MOST_CHANGED,
    Explained,
    Explainer,
    Floats,
    Measured,
    Single,
)
from expertlane.cost.laws.corrections import (
    KERNELS,
    Assumed,
    Correction,
    Corrections,
    FittedOn,
    scaled,
)
from expertlane.cost.laws.frameworks import served_by
from expertlane.cost.laws.profile import (
    OVERHEAD_S,
    Execution,
    ModelledCluster,
    Profile,
    parse_cluster,
)
from expertlane.cost.memory import STEP_TOKENS
from expertlane.cost.projector import Projector, Setting, StepByStage, StepSize
from expertlane.cost.routing import LoadedRouting, PowerLawRouting, choose_routing
from expertlane.cost.step.operation import NumberTypes, Operation
from expertlane.errors import CapacityError, UserError, naming
from expertlane.progress import Progress
from expertlane.results.estimate import NORMAL, Estimate
from expertlane.results.file import Row
from expertlane.results.record import RUN, SCALING, DeploymentRecord, StepsRecord
from expertlane.results.results import FOREIGN_LOAD, Results
from expertlane.results.serving_record import ServingRecord
from expertlane.simulator.results import serving_of
from expertlane.simulator.simulator import ServingSetup, Simulator, scheduling_of
from expertlane.spec.deployment import DispatchMode, Options
from expertlane.spec.experiment import ProjectionAsked
from expertlane.spec.files import build
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Cause, Phase, ProjectedCause
from expertlane.spec.ranges import RANGES
from expertlane.spec.workload import LengthRange, Load, Workload

TIME, TPOT, TTFT, TPS = "time", "TPOT", "TTFT", "tokens/s"
EXPERTS_LOAD = "fullest / mean"
HOST_GAPS = "host gaps"  # between kernels: the device waits for launches
UNKNOWN = "unknown kernels"
COMPUTING = "computing"  # where a record does not tell its parts
WAITING = str(Cause.WAITING)
_TERMS = {
    str(ProjectedCause.DISPATCH_COMBINE): str(Cause.DISPATCH_COMBINE),
    str(ProjectedCause.IMBALANCE): WAITING,
    str(ProjectedCause.LAUNCH): HOST_GAPS,
}
_OF_COMPUTING = {str(each) for each in (Cause.ATTENTION, Cause.ROUTER, Cause.EXPERTS, Cause.HEAD)}
_BY_BOUND = {
    str(each)
    for each in (
        ProjectedCause.EXPERT_COMPUTE,
        ProjectedCause.OTHER_COMPUTE,
        ProjectedCause.WEIGHT_READS,
        ProjectedCause.KV_READS,
        ProjectedCause.CONTENTION,
    )
}
_OF_RANKS = {*_OF_COMPUTING, HOST_GAPS, str(Cause.ENGINE)}  # no transfer in them

# Standard deviations of logarithms, where a measured number has no interval, and at least.
_OF_STEP, _OF_TERM, _OF_WAITING = 0.03, 0.08, 0.25
_OF_TPOT, _OF_TTFT, _OF_TPS, _OF_LOAD = 0.03, 0.1, 0.05, 0.1
_LEAST_SIGMA = 0.01
_SMALL = 0.02  # of a step: what is added to a term on both sides, so that small ones count little
_MOST_SIMULATED = 256  # requests of a load
_SKEW_STEP = 0.5  # of the exponent, for a change by one
_ROUTED_TOKENS = 4096
_NUM_SAMPLED_LAYERS = 2
_TOLD = 0.01  # a factor nearer to one is none
_MUCH = 0.05  # of a step


class _StepPoint(NamedTuple):
    """A measured phase, and the step that it is projected as.

    Attributes:
        seconds: of a step, or round.
        terms_s: by name, of the same; empty where only the whole was measured.
        is_whole: whether the whole can be compared: not where transfers were modelled.
    """

    phase: Phase
    size: StepSize
    seconds: Estimate
    terms_s: Mapping[str, float]
    is_whole: bool = True


@dataclass(frozen=True, eq=False)
class _Point:
    """A measured deployment.

    Attributes:
        imbalance: the fullest expert's tokens over the mean, mean over layers; None where no rank
            counted them.
    """

    record: DeploymentRecord
    steps: tuple[_StepPoint, ...]
    loads: tuple[tuple[ServingRecord, Load], ...]
    imbalance: float | None


@dataclass(frozen=True, eq=False)
class Subject:
    """What is projected, as a plan would, before any correction.

    Attributes:
        alpha: exponent of the popularity of experts; None where routing was recorded.
        framework: whose corrections the cluster has; None for none.
    """

    model: ModelConfig
    workload: Workload
    cluster: ModelledCluster
    types: NumberTypes
    execution: Execution
    routing: LoadedRouting
    alpha: float | None
    framework: str | None

    def routing_at(self, alpha: float) -> LoadedRouting:
        """The routing at another exponent."""
        if self.alpha is None or alpha == self.alpha:
            return self.routing
        return PowerLawRouting.of(self.model, alpha, 0, _NUM_SAMPLED_LAYERS)

    def types_of(self, options: Options) -> NumberTypes:
        """Number types of a deployment."""
        types = NumberTypes.of_engine(self.types.weights, options)
        return replace(types, kv=self.types.kv) if options.kv_dtype == "model" else types


def find_subject(measured: Results, projected: Results, cluster: str | None = None) -> Subject:
    """The projection's settings, as the results have them.

    Args:
        projected: has the projection; may be the same.
        cluster: in place of the one that was projected on, as `--cluster` takes it.

    Raises:
        UserError: something is missing, or they are of different devices.
    """
    question = measured.question.get("experiment")
    if measured.kind != "comparison" or not isinstance(question, dict):
        raise UserError(
            f"measured deployments are of a {measured.kind}; judge takes those of expertlane "
            "compare"
        )
    with naming("question.experiment"):
        model = build(ModelConfig, question["model"])
        workload = build(Workload, question["workload"])
    asked = _asked(projected, cluster)
    with naming("the projection's cluster"):
        there = parse_cluster(asked.cluster)
    _check_device(measured, there)
    record = next(iter(projected.select("projected")), None)
    conditions = None if record is None else record.conditions
    weights = conditions.dtype if conditions else None
    if weights is None and measured.machine is not None:
        weights = measured.machine.dtype
    types = NumberTypes.asked(weights or "bfloat16", conditions.kv_dtype if conditions else "model")
    if types.weights not in there.profile.device.flops_per_s:
        raise UserError(f"{there.profile.device.name} does not compute in {types.weights}")
    there = served_by(there, asked.framework, model, types.weights)
    execution = Execution(conditions.execution if conditions else asked.execution)
    if asked.routing_trace is not None:
        chosen = choose_routing(model, Path(asked.routing_trace), None)
        return Subject(
            model, workload, there, types, execution, chosen.source, None, asked.framework
        )
    skew = projected.question.get("skew", asked.skew)
    alpha = model.usual_skew if skew is None else float(skew)
    source = PowerLawRouting.of(model, alpha, 0, _NUM_SAMPLED_LAYERS)
    return Subject(model, workload, there, types, execution, source, alpha, asked.framework)


def _asked(projected: Results, cluster: str | None) -> ProjectionAsked:
    table = projected.question.get("projection")
    if table is not None:
        asked = build(ProjectionAsked, table, "question.projection")
        return asked if cluster is None else replace(asked, cluster=cluster)
    known = cluster or (projected.cluster.name if projected.cluster else None)
    if known is None:
        raise UserError(
            "nothing is projected: give results of compare --project, those of a plan beside the "
            "measured ones, or --cluster PROFILExN"
        )
    return ProjectionAsked(cluster=known)


def _check_device(measured: Results, cluster: ModelledCluster) -> None:
    if measured.machine is None:
        return
    is_cpu, is_of_cpu = measured.machine.device == "cpu", OVERHEAD_S in cluster.profile.terms
    if is_cpu != is_of_cpu:
        own = "a CPU" if is_cpu else measured.machine.device
        raise UserError(
            f"measured on {own}, projected on {cluster.profile.device.name}: of two devices there "
            "is nothing to judge; give --cluster with a profile of the first (expertlane calibrate "
            "writes one)"
        )


def points_of(measured: Results, subject: Subject) -> list[_Point]:
    """The deployments that can be judged.

    Raises:
        UserError: there are none.
    """
    by_name: dict[str, list[DeploymentRecord]] = {}
    for record in measured.deployments:
        if record.source in RUN and record.layout is not None and SCALING not in record.roles:
            by_name.setdefault(record.name, []).append(record)
    points = [_point(_clock(records, measured), subject) for records in by_name.values()]
    points = [each for each in points if each.steps or each.loads]
    if not points:
        raise UserError("no deployment was measured; judge takes results of expertlane compare")
    return points


def _clock(records: Sequence[DeploymentRecord], measured: Results) -> DeploymentRecord:
    """Of one deployment, wall time; virtual time where ranks had to share cores."""
    machine, layout = measured.machine, records[0].known_layout
    shared = machine is not None and machine.is_oversubscribed_by(layout.world_size)
    wanted = "virtual" if shared else "measured"
    return next((each for each in records if each.source == wanted), records[0])


def _point(record: DeploymentRecord, subject: Subject) -> _Point:
    steps = tuple(_step_point(each, record, subject) for each in record.steps)
    loads = tuple(
        (each, load)
        for each in record.serving
        if (load := _load(each, subject.workload)) is not None
    )
    ratios = [each for each in record.expert_max_over_mean if each > 0]
    imbalance = sum(ratios) / len(ratios) if ratios else None
    return _Point(record, steps, loads, imbalance)


def _step_point(steps: StepsRecord, record: DeploymentRecord, subject: Subject) -> _StepPoint:
    workload, replicas = subject.workload, record.known_layout.replicas
    num_steps = max(steps.num_steps / replicas, 1)
    rounds = steps.num_rounds or num_steps
    is_decode = steps.phase is Phase.DECODE
    if is_decode:
        num_seqs = max(round(steps.num_tokens / rounds), 1)
        seconds, num_new = steps.wall_s / rounds, 1
        cached = workload.mean_context if steps.context is None else steps.context
    else:
        num_seqs = max(round(steps.num_seqs / num_steps), 1)
        seconds = steps.wall_s / num_steps
        num_new = max(round(steps.num_tokens / max(steps.num_seqs, 1)), 1)
        cached = max(workload.prompt_len - num_new, 0) // 2
        cached = cached if steps.context is None else steps.context
    size = StepSize(num_seqs, num_new, cached, phase=steps.phase)
    # Shares: a pass with a profiler is slower than the one that the time is of.
    terms = {name: share * seconds.value for name, share in _joined(steps.shares).items()}
    is_virtual = record.source == "virtual"
    if is_virtual:
        terms = {name: each for name, each in terms.items() if name in _OF_RANKS}
    return _StepPoint(steps.phase, size, _with_runs(seconds, steps), terms, not is_virtual)


def _with_runs(seconds: Estimate, steps: StepsRecord) -> Estimate:
    """The time with the spread of its repetitions, if it has no interval of its own."""
    runs = steps.tps_of_runs
    if seconds.low is not None or len(runs) < 3:
        return seconds
    spread = float(np.std(np.log(runs), ddof=1)) * NORMAL / len(runs) ** 0.5
    return Estimate(seconds.value, seconds.value * exp(-spread), seconds.value * exp(spread))


def _joined(terms: Mapping[str, float]) -> dict[str, float]:
    """Terms under common names; those by what bounds an operation are one, computing."""
    found: dict[str, float] = {}
    is_by_bound = bool(_BY_BOUND & {*terms})
    for cause, seconds in terms.items():
        name = _TERMS.get(str(cause), str(cause))
        if is_by_bound and (name in _OF_COMPUTING or name in _BY_BOUND):
            name = COMPUTING
        found[name] = found.get(name, 0.0) + seconds
    return found


def _load(serving: ServingRecord, workload: Workload) -> Load | None:
    """The load as it is simulated; a long one is cut. None where it is not known."""
    num = serving.num_requests or workload.num_sequences
    prompt_len, output_len = workload.prompt_len, workload.output_len
    if serving.num_prompt_tokens and serving.num_requests:
        prompt_len = max(round(serving.num_prompt_tokens / num), 1)
    if serving.num_output_tokens and serving.num_requests:
        output_len = max(round(serving.num_output_tokens / num), 1)
    if serving.client is not None and serving.client.num_rounds > 1:
        num = max(num // serving.client.num_rounds, 1)
    batch = serving.batch
    if batch is None and serving.rate is None:
        batch = num
    num = min(num, max(_MOST_SIMULATED, 2 * (batch or 0)))
    prompt, output = (LengthRange(each, each) for each in (prompt_len, output_len))
    return Load(num, prompt, output, None if batch is None else min(batch, num), serving.rate)


class _Numbers(NamedTuple):
    """Compared numbers of one kind of a deployment, in the order of `Measured`."""

    place: int  # of the point
    where: str
    metric: str
    measured: float
    sigma: float


class _Served(NamedTuple):
    """A load as simulated.

    Attributes:
        wall_s: from the first request to the last token.
        decode, prefill: sizes of its steps.
        num_rounds: decode steps of all sequences, were there no others.
    """

    tpot_s: float
    ttft_s: float
    tps: float
    wall_s: float
    decode: StepSize
    prefill: StepSize
    num_rounds: float

    @property
    def by_metric(self) -> dict[str, float]:
        """What a client sees."""
        return {TPOT: self.tpot_s, TTFT: self.ttft_s, TPS: self.tps}


def _metrics(serving: ServingRecord) -> list[tuple[str, Estimate, float]]:
    """What a client measured: metric, value and its standard deviation."""
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

    Attributes:
        names: assumptions that may be changed.
        numbers: what is compared, in order.
        offsets: [N]; added to logarithms of projected numbers; None for nothing.
    """

    def __init__(self, subject: Subject, points: Sequence[_Point]) -> None:
        self.subject = subject
        self.points = points
        self._profiles: dict[tuple[float, ...], Profile] = {}
        self._projectors: dict[tuple[int, float], Projector] = {}
        self._modes: dict[tuple[int, StepSize], DispatchMode] = {}
        self._steps: dict[tuple[int, StepSize, tuple[float, ...]], StepByStage] = {}
        self.names = [each for each in Assumed if each is not Assumed.SKEW or self._has_skew]
        self.offsets: Floats | None = None
        self.numbers = list(self._numbers())

    @property
    def _has_skew(self) -> bool:
        return self.subject.alpha is not None and self.subject.model.num_experts > 1

    @property
    def least(self) -> dict[str, float]:
        """The least change of routing skew: down to none at all."""
        alpha = self.subject.alpha
        return {} if alpha is None else {Assumed.SKEW: -alpha / _SKEW_STEP}

    def alpha(self, changes: Mapping[str, float]) -> float:
        """The exponent of experts' popularity under changes."""
        alpha = (self.subject.alpha or 0.0) + _SKEW_STEP * changes.get(Assumed.SKEW, 0.0)
        return min(max(round(alpha, 3), 0.0), float(RANGES["skew"].high))

    def profile(self, changes: Mapping[str, float]) -> Profile:
        """The profile under changes of all but skew."""
        key = tuple(changes.get(name, 0.0) for name in Assumed if name is not Assumed.SKEW)
        if key not in self._profiles:
            factors = {
                name: Correction.exactly(exp(changes[name]))
                for name in Assumed
                if name is not Assumed.SKEW and changes.get(name, 0.0)
            }
            self._profiles[key] = scaled(self.subject.cluster.profile, factors)
        return self._profiles[key]

    def step(self, place: int, size: StepSize, changes: Mapping[str, float]) -> StepByStage:
        """One step of a deployment under changes."""
        key = tuple(changes.get(name, 0.0) for name in Assumed)
        found = self._steps.get((place, size, key))
        if found is None:
            projector = self._projector(place, self.alpha(changes))
            mode = self._modes.get((place, size))
            if mode is None:
                mode = self._modes[place, size] = projector.fastest_mode(size)
            found = projector.repriced(self.profile(changes)).by_stage(size, mode)
            self._steps[place, size, key] = found
        return found

    def _projector(self, place: int, alpha: float) -> Projector:
        key = place, alpha
        if key not in self._projectors:
            record, subject = self.points[place].record, self.subject
            layout, options = record.known_layout, record.served_with or record.known_options
            devices = max(subject.cluster.num_devices, layout.world_size)
            setting = Setting(
                subject.types_of(options),
                subject.execution,
                subject.routing_at(alpha),
                step_tokens=STEP_TOKENS,
            )
            cluster = ModelledCluster(subject.cluster.profile, devices)
            self._projectors[key] = Projector(subject.model, layout, options, cluster, setting)
        return self._projectors[key]

    @cached_property
    def measured(self) -> Measured:
        """All measured numbers."""
        return Measured(
            np.array([each.measured for each in self.numbers]),
            np.array([each.sigma for each in self.numbers]),
            np.array([each.place for each in self.numbers]),
        )

    def _numbers(self) -> Iterator[_Numbers]:
        for place, point in enumerate(self.points):
            for step in point.steps:
                where = f"{step.phase.value} step"
                if step.is_whole:
                    sigma = _sigma(step.seconds, _OF_STEP)
                    yield _Numbers(place, where, TIME, log(step.seconds.value), sigma)
                for name in self._compared(step):
                    value = log(step.terms_s[name] + self._small(step))
                    sigma = _OF_WAITING if name == WAITING else _OF_TERM
                    yield _Numbers(place, where, name, value, sigma)
            for serving, load in point.loads:
                for metric, seen, sigma in _metrics(serving):
                    yield _Numbers(place, _where(load), metric, log(seen.value), sigma)
            if point.imbalance is not None and self._has_skew:
                yield _Numbers(place, "experts", EXPERTS_LOAD, log(point.imbalance), _OF_LOAD)

    @staticmethod
    def _compared(step: _StepPoint) -> list[str]:
        known = {*map(str, Cause), COMPUTING, HOST_GAPS}
        return [name for name in step.terms_s if name in known]

    @staticmethod
    def _small(step: _StepPoint) -> float:
        return _SMALL * step.seconds.value

    def terms(self, place: int, step: _StepPoint, changes: Mapping[str, float]) -> dict[str, float]:
        """Projected seconds of a step by the terms that were measured of it."""
        causes = dict(self.step(place, step.size, changes).causes_s)
        launch = str(ProjectedCause.LAUNCH)
        if HOST_GAPS not in step.terms_s and launch in causes:
            of_launch = causes.pop(launch)  # a rank's own clock has it in what follows
            causes[Cause.HEAD] = causes.get(Cause.HEAD, 0.0) + of_launch
        found = _joined(causes)
        if COMPUTING in step.terms_s:
            parts = [found.pop(name, 0.0) for name in _OF_COMPUTING]
            found[COMPUTING] = found.get(COMPUTING, 0.0) + sum(parts)
        return found

    def __call__(self, changes: Mapping[str, float]) -> Floats:
        """[N]; logarithms of the projected numbers, in the order of `numbers`."""
        values = np.array(list(self._projected(changes)))
        return values if self.offsets is None else values + self.offsets

    def _projected(self, changes: Mapping[str, float]) -> Iterator[float]:
        for place, point in enumerate(self.points):
            for step in point.steps:
                if step.is_whole:
                    yield log(self.step(place, step.size, changes).seconds)
                terms = self.terms(place, step, changes)
                for name in self._compared(step):
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

    @cached_property
    def _simulated(self) -> dict[tuple[int, int], _Served]:
        return {key: self.simulate(key[0], load, {}) for key, load in self._loads.items()}

    def simulate(self, place: int, load: Load, changes: Mapping[str, float]) -> _Served:
        """A load on a deployment under changes, from the first request to the last."""
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
            subject.types_of(options),
            subject.execution,
            subject.routing_at(self.alpha(changes)),
            max_num_seqs=max(most, 1),
            **scheduling_of(subject.framework, None, max(most, 1)),
        )
        cluster = ModelledCluster(self.profile(changes), layout.world_size)
        simulator = Simulator(subject.model, cluster, setup, load)
        outcome = simulator.run(subject.workload.seed)
        serving = serving_of(simulator, outcome)
        seen = {metric: each.value for metric, each, _ in _metrics(replace(serving, rate=None))}
        prompt_len, output_len = load.prompt_len.low, load.output_len.low
        at_once = load.batch or load.num_requests
        if load.rate is not None:  # by Little's law
            stay_s = seen.get(TTFT, 0.0) + output_len * seen.get(TPOT, 0.0)
            at_once = max(round(load.rate * stay_s), 1)
        num_new = min(prompt_len, STEP_TOKENS)
        num_prompts = min(at_once, max(STEP_TOKENS // num_new, 1))
        wall_s = load.num_requests * output_len / seen[TPS]
        return _Served(
            seen.get(TPOT, wall_s),
            seen.get(TTFT, wall_s),
            seen[TPS],
            wall_s,
            StepSize(at_once, 1, prompt_len + output_len // 2),
            StepSize(num_prompts, num_new, 0, phase=Phase.PREFILL),
            output_len * max(load.num_requests / at_once, 1),
        )

    def _of_load(self, place: int, number: int, changes: Mapping[str, float]) -> dict[str, float]:
        """Numbers of a load: as simulated, times what changes do to its steps."""
        known = self._simulated[place, number]
        decode, prefill = (
            self.step(place, size, changes).seconds / self.step(place, size, {}).seconds
            for size in (known.decode, known.prefill)
        )
        decode_s = self.step(place, known.decode, {}).seconds
        of_tpot = min(decode_s / known.tpot_s, 1.0)
        of_wall = min(decode_s * known.num_rounds / known.wall_s, 1.0)
        return {
            TPOT: known.tpot_s * (of_tpot * decode + (1 - of_tpot) * prefill),
            TTFT: known.ttft_s * prefill,
            TPS: known.tps / (of_wall * decode + (1 - of_wall) * prefill),
        }

    def simulated_offsets(self, changes: Mapping[str, float]) -> Floats:
        """[N]; what simulations under changes say beyond the estimate by steps."""
        self.offsets = None
        offsets = np.zeros(len(self.numbers))
        for (place, number), load in self._loads.items():
            exact = self.simulate(place, load, changes).by_metric
            estimated = self._of_load(place, number, changes)
            for at, each in enumerate(self.numbers):
                if (each.place, each.where) == (place, _where(load)):
                    offsets[at] = log(exact[each.metric] / estimated[each.metric])
        return offsets

    @property
    def sizes(self) -> list[tuple[int, StepSize]]:
        """The steps that were projected: place of the deployment, and size."""
        return list(self._modes)

    def spans(self, changes: Mapping[str, float]) -> dict[Assumed, tuple[float, float]]:
        """The shortest and the longest operation of each kind in all steps, corrected."""
        found: dict[Assumed, list[float]] = {}
        for place, size in self.sizes:
            for step, times in self.step(place, size, changes).timed():
                name = _assumed_of(step)
                taken = times.seconds[times.seconds > 0]
                if name is not None and len(taken):
                    found.setdefault(name, []).extend((float(taken.min()), float(taken.max())))
        return {name: (min(each), max(each)) for name, each in found.items()}


def _assumed_of(step: Any) -> Assumed | None:
    if step is None:
        return None
    if isinstance(step, Operation):
        return KERNELS[step.kind]
    is_far = bool((step.load.num_nodes > 1).any())
    return Assumed.INTER_NODE if is_far else Assumed.INTRA_NODE


def _fullest(routing: LoadedRouting, model: ModelConfig, num: int) -> float:
    owned, none = np.array([num]), np.zeros(1, dtype=np.int64)
    ratios = []
    for layer in model.moe_layers[:_NUM_SAMPLED_LAYERS]:
        ids = routing.topk_ids(layer, 0, none, owned)
        counts = np.bincount(ids.ravel(), minlength=model.num_experts)
        ratios.append(float(counts.max() / max(counts.mean(), 1e-9)))
    return sum(ratios) / max(len(ratios), 1) if ratios else 1.0


def _where(load: Load) -> str:
    return f"rate {load.rate:g}/s" if load.rate is not None else f"{load.batch} requests at once"


def _sigma(measured: Estimate, usual: float) -> float:
    """The standard deviation of a logarithm: from its interval, else the usual."""
    low, _, high = measured.bounds
    if measured.low is None or low <= 0:
        return usual
    return max((log(high) - log(low)) / (2 * NORMAL), _LEAST_SIGMA, usual / 2)


@dataclass(frozen=True)
class JudgedNumber:
    """A number of a deployment.

    Attributes:
        where: phase of a step, or the load.
        metric: one of `WHOLE`, a cause of a step's time, or `EXPERTS_LOAD`.
        measured, projected, corrected: in seconds, tokens a second, or as such a ratio.
    """

    deployment: str
    where: str
    metric: str
    measured: float
    projected: float
    corrected: float

    @property
    def ratio(self) -> float:
        """Measured over projected."""
        return self.measured / self.projected

    @property
    def is_whole(self) -> bool:
        """True of a step's time, and of what a client sees."""
        return self.metric in WHOLE


WHOLE = (TIME, TPOT, TTFT, TPS)


class Term(NamedTuple):
    """A part of a step's time, in seconds.

    Attributes:
        where: phase of the step.
    """

    name: str
    where: str
    measured_s: float
    projected_s: float
    corrected_s: float


@dataclass(frozen=True)
class Rival:
    """An assumption, and how much of the difference it explains by itself.

    Attributes:
        factor: of the time that it stands for; of routing skew, the exponent.
        was: factor or exponent as projected.
        explained: share of the squared logarithms.
        confidence: among all assumptions.
    """

    name: str
    label: str
    factor: float
    was: float
    explained: float
    confidence: float


@dataclass(frozen=True)
class Judgement:
    """Measured against projected.

    Attributes:
        source: `measured`, `virtual` or both: clocks of the measured numbers.
        numbers: every number that was compared.
        rivals: assumptions that change any of them, the likeliest first.
        likely: names of those that cannot be told apart, or of the one.
        is_noise: whether the difference is no larger than that of two measurements.
        without_effect: labels of assumptions that these deployments do not depend on.
        alike: pairs of labels that change all numbers alike.
        corrections: what all of them together come to.
        cautions: in sentences.
    """

    model: str
    cluster: str
    engine: str
    source: str
    numbers: tuple[JudgedNumber, ...]
    rivals: tuple[Rival, ...]
    likely: tuple[str, ...]
    is_noise: bool
    without_effect: tuple[str, ...]
    alike: tuple[tuple[str, str], ...]
    corrections: Corrections
    cautions: tuple[str, ...] = ()
    has_terms: bool = field(default=False)

    @property
    def whole(self) -> tuple[JudgedNumber, ...]:
        """Times of whole steps, and what a client sees."""
        return tuple(each for each in self.numbers if each.is_whole)

    @property
    def terms(self) -> tuple["Term", ...]:
        """Terms of a step, means over the deployments that tell them."""
        found: dict[tuple[str, str], list[JudgedNumber]] = {}
        for each in self.numbers:
            if not each.is_whole and each.metric != EXPERTS_LOAD:
                found.setdefault((each.metric, each.where), []).append(each)
        return tuple(
            Term(
                name,
                where,
                *(
                    sum(getattr(each, of) for each in numbers) / len(numbers)
                    for of in ("measured", "projected", "corrected")
                ),
            )
            for (name, where), numbers in found.items()
        )

    @property
    def ratio(self) -> float:
        """Median of measured over projected time, of all whole numbers."""
        return exp(
            median(
                (-1 if each.metric == TPS else 1) * log(each.ratio)
                for each in self.whole or self.numbers
            )
        )


def judge(results: Sequence[Results], progress: Progress, cluster: str | None = None) -> Judgement:
    """Judge a projection by what was measured.

    Args:
        results: one with measured and projected deployments, or some of either kind.
        cluster: in place of the one that was projected on, as `--cluster` takes it.

    Raises:
        UserError: nothing is measured, or nothing projected; they are of different models or
            devices.
    """
    measured = [each for each in results if any(each.select(source) for source in RUN)]
    projected = [each for each in results if each.select("projected")] or measured
    if not measured:
        raise UserError("nothing is measured in these results; give those of expertlane compare")
    names = {each.model_name for each in (*measured, *projected)}
    if len(names) > 1:
        raise UserError(f"results are of different models: {', '.join(sorted(names))}")
    subject = find_subject(measured[0], projected[0], cluster)
    points = [point for each in measured for point in points_of(each, subject)]
    reprojection = Reprojection(subject, points)
    progress.task("projecting under changed assumptions", len(reprojection.names) + 2)
    explainer = Explainer(
        reprojection.measured, reprojection.names, reprojection, reprojection.least
    )
    try:
        found = explainer.explain(progress.advance)
    except CapacityError as error:
        raise UserError(
            f"a measured deployment does not fit where it is projected: {error}"
        ) from None
    if any(point.loads for point in points) and found.singles:
        found = _fitted_again(explainer, reprojection, found)
    progress.advance()
    progress.done()
    return _judgement(measured, reprojection, explainer, found)


def _fitted_again(explainer: Explainer, reprojection: Reprojection, found: Explained) -> Explained:
    """The fit of all together, by what simulations at its first result say."""
    reprojection.offsets = reprojection.simulated_offsets(found.together.changes)
    explainer.forget()
    return replace(found, together=explainer.together(found.singles))


def _judgement(
    measured: Sequence[Results],
    reprojection: Reprojection,
    explainer: Explainer,
    found: Explained,
) -> Judgement:
    after = explainer.at(found.together.changes)
    reprojection.offsets = None
    before = reprojection({})
    numbers = tuple(
        JudgedNumber(
            reprojection.points[each.place].record.name,
            each.where,
            each.metric,
            *_shown(reprojection, each, float(before[at]), float(after[at])),
        )
        for at, each in enumerate(reprojection.numbers)
    )
    subject = reprojection.subject
    points = reprojection.points
    sources = dict.fromkeys(point.record.source for point in points)
    corrections = _corrections(measured, reprojection, found, numbers)
    return Judgement(
        model=subject.model.name,
        cluster=str(subject.cluster),
        engine=corrections.fitted_on.engine,
        source=" and ".join(sources),
        numbers=numbers,
        rivals=tuple(_rival(each, reprojection) for each in found.singles),
        likely=tuple(each.name for each in found.likely),
        is_noise=found.is_noise,
        without_effect=tuple(Assumed(each).label for each in found.without_effect),
        alike=tuple(
            (Assumed(one).label, Assumed(other).label) for one, other in found.together.alike
        ),
        corrections=corrections,
        cautions=tuple(_cautions(measured, points)),
        has_terms=any(step.terms_s for point in points for step in point.steps),
    )


def _shown(
    reprojection: Reprojection, number: _Numbers, before: float, after: float
) -> tuple[float, float, float]:
    """Measured, projected and corrected; terms without what was added to both sides."""
    small = 0.0
    if number.metric not in (*WHOLE, EXPERTS_LOAD):
        steps = reprojection.points[number.place].steps
        (step,) = (each for each in steps if number.where == f"{each.phase.value} step")
        small = _SMALL * step.seconds.value
    measured, projected, corrected = (
        max(exp(each) - small, 0.0) for each in (number.measured, before, after)
    )
    return measured, projected, corrected


def _rival(single: Single, reprojection: Reprojection) -> Rival:
    changes = {single.name: single.change}
    is_skew = single.name == Assumed.SKEW
    return Rival(
        single.name,
        Assumed(single.name).label,
        reprojection.alpha(changes) if is_skew else exp(single.change),
        reprojection.alpha({}) if is_skew else 1.0,
        single.explained,
        single.weight,
    )


def _corrections(
    measured: Sequence[Results],
    reprojection: Reprojection,
    found: Explained,
    numbers: Sequence[JudgedNumber],
) -> Corrections:
    subject, points, fit = reprojection.subject, reprojection.points, found.together
    whole = [each for each in numbers if each.is_whole] or list(numbers)
    left = float(np.sqrt(np.mean([log(each.measured / each.corrected) ** 2 for each in whole])))
    spans = reprojection.spans(fit.changes)
    factors: dict[str, Correction] = {}
    for name, change in fit.changes.items():
        if abs(change) < _TOLD:
            continue
        away = NORMAL * hypot(fit.deviation[name], left)
        if name == Assumed.SKEW:
            ends = (reprojection.alpha({name: change + each}) for each in (0.0, -away, away))
            factors[name] = Correction(*ends)
            continue
        low, high = exp(max(change - away, -MOST_CHANGED)), exp(min(change + away, MOST_CHANGED))
        factors[name] = Correction(exp(change), low, high, *spans.get(Assumed(name), (None, None)))
    layouts = [point.record.known_layout.world_size for point in points]
    sizes = [each for place, each in reprojection.sizes if each.phase is Phase.DECODE]
    sizes = sizes or [each for _, each in reprojection.sizes]
    on = FittedOn(
        model=subject.model.name,
        cluster=subject.cluster.profile.name,
        engine=_engine(measured),
        deployments=tuple(dict.fromkeys(point.record.name for point in points)),
        num_points=len(numbers),
        num_ranks=_ends(layouts),
        num_seqs=_ends([each.num_seqs for each in sizes]),
        context=_ends([each.num_cached for each in sizes]),
        error_before=_error(whole, lambda each: each.projected),
        error_after=_error(whole, lambda each: each.corrected),
        framework=subject.framework or "",
        created=measured[0].created,
    )
    return Corrections(on, factors)


def _ends(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)


def _error(numbers: Sequence[JudgedNumber], of: Callable[[JudgedNumber], float]) -> float:
    """Median size of measured over another, less one."""
    return median(abs(each.measured / of(each) - 1) for each in numbers)


def _engine(measured: Sequence[Results]) -> str:
    names = []
    for results in measured:
        kernels = "" if results.machine is None else f", {results.machine.kernels}"
        names.append(f"expertlane {results.versions.expertlane}{kernels}")
    return "; ".join(dict.fromkeys(names))


def _cautions(measured: Sequence[Results], points: Sequence[_Point]) -> Iterator[str]:
    if any(point.record.source == "virtual" for point in points):
        yield (
            "In virtual time transfers are modelled, so nothing is said of links: ranks shared "
            "cores, and only what they computed was measured."
        )
    busy = max(each.foreign_cpu_share for each in measured)
    if busy >= FOREIGN_LOAD:
        yield f"Other processes used {busy:.0%} of the cores while it was measured."
    for point in points:
        for step in point.steps:
            unknown = step.terms_s.get(UNKNOWN, 0.0) / step.seconds.value
            if unknown >= _MUCH:
                yield (
                    f"{unknown:.0%} of the {step.phase.value} step of {point.record.name} is in "
                    "unknown kernels, which no assumption is judged by."
                )


def row_of(number: JudgedNumber) -> Row:
    """The number as cells of a table."""
    return {**vars(number), "ratio": number.ratio if number.projected else None}
