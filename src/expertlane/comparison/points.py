"""The inputs of a fit of corrections: measured deployments, and the projection.

A step has its time, and its parts by cause if ranks' clocks have them. A load is that of a client
on a server. The projection has model, cluster, number types and routing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expertlane.cost.laws.frameworks import served_by
from expertlane.cost.laws.profile import OVERHEAD_S, Execution, ModelledCluster, parse_cluster
from expertlane.cost.projector import StepSize
from expertlane.cost.routing import LoadedRouting, PowerLawRouting, choose_routing
from expertlane.cost.step.operation import NumberTypes
from expertlane.errors import UserError, naming
from expertlane.results.estimate import NORMAL, Estimate
from expertlane.results.record import RUN, SCALING, DeploymentRecord, StepsRecord
from expertlane.results.results import Results
from expertlane.results.serving_record import ServingRecord
from expertlane.spec.experiment import ProjectionSetup
from expertlane.spec.files import build
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Cause, Phase, ProjectedCause
from expertlane.spec.workload import LengthRange, Load, Workload

TIME, TPOT, TTFT, TPS = "time", "TPOT", "TTFT", "tokens/s"
WHOLE = (TIME, TPOT, TTFT, TPS)
EXPERTS_LOAD = "fullest / mean"
WAITING = str(Cause.WAITING)
_TERMS = {
    str(ProjectedCause.DISPATCH_COMBINE): str(Cause.DISPATCH_COMBINE),
    str(ProjectedCause.IMBALANCE): WAITING,
}
# Causes without transfers.
_OF_RANKS = {Cause.ATTENTION, Cause.ROUTER, Cause.EXPERTS, Cause.HEAD, Cause.ENGINE}

_OF_MEDIAN = 1.25  # its deviation over the mean's, of normal noise: the root of pi / 2
_MOST_SIMULATED = 256  # requests of a load
NUM_SAMPLED_LAYERS = 2  # whose routing is drawn


class StepPoint(NamedTuple):
    """The measured steps of a phase, and the step that stands for them in a projection.

    Attributes:
        seconds: time of a step; of a decode round, if steps have several rounds.
        terms_s: parts of that time, by cause; empty if only the whole was measured.
        is_whole: True if the whole time can be compared; False if transfers were modelled.
    """

    phase: Phase
    size: StepSize
    seconds: Estimate
    terms_s: Mapping[str, float]
    is_whole: bool = True

    @property
    def where(self) -> str:
        """The phase, in words."""
        return f"{self.phase} step"


@dataclass(frozen=True, eq=False)
class Point:
    """A measured deployment.

    Attributes:
        engine: name of the engine that ran it.
        software: the engine with its version.
        loads: measured loads, and each as it is simulated.
        imbalance: tokens of the fullest expert over the mean, averaged over layers; None if ranks
            did not count them.
    """

    record: DeploymentRecord
    engine: str
    software: str
    steps: tuple[StepPoint, ...]
    loads: tuple[tuple[ServingRecord, Load], ...]
    imbalance: float | None


@dataclass(frozen=True, eq=False)
class Subject:
    """The projection to correct, without corrections.

    Attributes:
        alpha: exponent of the popularity of experts; None if routing is a recorded trace.
        framework: serving framework whose fitted factors the cluster has; None for none.
    """

    model: ModelConfig
    cluster: ModelledCluster
    types: NumberTypes
    execution: Execution
    routing: LoadedRouting
    alpha: float | None
    framework: str | None

    def routing_at(self, alpha: float) -> LoadedRouting:
        """Routing with another exponent of experts' popularity."""
        if self.alpha is None or alpha == self.alpha:
            return self.routing
        return PowerLawRouting.of(self.model, alpha, 0, NUM_SAMPLED_LAYERS)


def find_subject(measured: Results, projected: Results, cluster: str | None = None) -> Subject:
    """The projection to correct, from the settings in results.

    Args:
        projected: results with the projection; may be `measured` itself.
        cluster: the cluster to project on, as `--cluster` takes it; None for the projection's own.

    Raises:
        UserError: nothing is projected, or measured and projected devices differ.
    """
    question = _experiment(measured)
    with naming("question.experiment"):
        model = build(ModelConfig, question["model"])
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
        return Subject(model, there, types, execution, chosen.source, None, asked.framework)
    skew = projected.question.get("skew", asked.skew)
    alpha = model.usual_skew if skew is None else float(skew)
    source = PowerLawRouting.of(model, alpha, 0, NUM_SAMPLED_LAYERS)
    return Subject(model, there, types, execution, source, alpha, asked.framework)


def _experiment(measured: Results) -> dict[str, Any]:
    question = measured.question.get("experiment")
    if measured.is_of_servers and question is None:
        raise UserError(
            "servers were measured without an experiment, so their model and layouts are not "
            "known; corrections need expertlane compare EXPERIMENT --url"
        )
    if measured.kind != "comparison" or not isinstance(question, dict):
        raise UserError(
            f"the measured results are of kind {measured.kind}; corrections are fitted to results "
            "of expertlane compare"
        )
    return question


def _asked(projected: Results, cluster: str | None) -> ProjectionSetup:
    table = projected.question.get("projection")
    if table is not None:
        asked = build(ProjectionSetup, table, "question.projection")
        return asked if cluster is None else replace(asked, cluster=cluster)
    known = cluster or (projected.cluster.name if projected.cluster else None)
    if known is None:
        raise UserError(
            "nothing is projected: give results of compare --project, results of plan as a second "
            "argument, or --cluster PROFILExN"
        )
    return ProjectionSetup(cluster=known)


def _check_device(measured: Results, cluster: ModelledCluster) -> None:
    if measured.machine is None:
        return
    is_cpu, is_of_cpu = measured.machine.device == "cpu", OVERHEAD_S in cluster.profile.terms
    if is_cpu != is_of_cpu:
        own = "a CPU" if is_cpu else measured.machine.device
        raise UserError(
            f"measured on {own}, projected on {cluster.profile.device.name}: they must be the same "
            "device; give --cluster a profile of the measured one (expertlane calibrate writes one)"
        )


def points_of(measured: Results) -> list[Point]:
    """The measured deployments of results.

    Raises:
        UserError: there are none.
    """
    with naming("question.experiment"):
        workload = build(Workload, _experiment(measured)["workload"])
    by_name: dict[str, list[DeploymentRecord]] = {}
    for record in measured.deployments:
        if record.source in RUN and record.layout is not None and SCALING not in record.roles:
            by_name.setdefault(record.name, []).append(record)
    own = f"expertlane {measured.versions.expertlane}"
    if measured.machine is not None:
        own += f", {measured.machine.kernels}"
    kept = [_clock(records, measured) for records in by_name.values()]
    noise = _noise_of_runs(kept)
    points = [_point(record, workload, own, noise) for record in kept]
    points = [each for each in points if each.steps or each.loads]
    if not points:
        raise UserError("no deployment was measured; corrections are fitted to measured ones")
    return points


def _clock(records: Sequence[DeploymentRecord], measured: Results) -> DeploymentRecord:
    """A deployment's record in wall time; in virtual time if its ranks shared cores."""
    machine, layout = measured.machine, records[0].known_layout
    shared = machine is not None and machine.is_oversubscribed_by(layout.world_size)
    wanted = "virtual" if shared else "measured"
    return next((each for each in records if each.source == wanted), records[0])


def _noise_of_runs(records: Sequence[DeploymentRecord]) -> dict[Phase, float]:
    """By phase, the standard deviation of a repetition's logarithm, pooled over deployments.

    Two repetitions of one deployment say little of the noise; those of all deployments say enough.
    """
    found = {}
    for phase in Phase:
        runs = [
            np.log(step.tps_of_runs)
            for record in records
            for step in record.steps
            if step.phase is phase and len(step.tps_of_runs) > 1
        ]
        if num_free := sum(len(each) - 1 for each in runs):
            squares = sum(float(np.square(each - each.mean()).sum()) for each in runs)
            found[phase] = (squares / num_free) ** 0.5
    return found


def _point(
    record: DeploymentRecord, workload: Workload, own: str, noise: Mapping[Phase, float]
) -> Point:
    steps = tuple(_step_point(each, record, workload, noise) for each in record.steps)
    loads = tuple(
        (each, load) for each in record.serving if (load := _load(each, workload)) is not None
    )
    ratios = [each for each in record.expert_max_over_mean if each > 0]
    imbalance = sum(ratios) / len(ratios) if ratios else None
    engine, software = "expertlane", own
    if (server := record.server) is not None:
        engine = server.engine or server.software or "a server"
        software = server.software or engine
    return Point(record, engine, software, steps, loads, imbalance)


def _step_point(
    steps: StepsRecord, record: DeploymentRecord, workload: Workload, noise: Mapping[Phase, float]
) -> StepPoint:
    replicas = record.known_layout.replicas
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
    timed = _with_runs(seconds, steps, noise)
    terms = {name: share * timed.value for name, share in steps.shares.items()}
    is_virtual = record.source == "virtual"
    if is_virtual:
        terms = {name: each for name, each in terms.items() if name in _OF_RANKS}
    return StepPoint(steps.phase, size, timed, terms, is_whole=not is_virtual)


def _with_runs(seconds: Estimate, steps: StepsRecord, noise: Mapping[Phase, float]) -> Estimate:
    """The time with its own interval; else, of repetitions, their median with the pooled noise."""
    runs = steps.tps_of_runs
    if seconds.low is not None or not runs or steps.phase not in noise:
        return seconds
    spread = noise[steps.phase] * NORMAL * _OF_MEDIAN / len(runs) ** 0.5
    value = seconds.value * (steps.num_tokens / steps.wall_s.value) / float(np.median(runs))
    return Estimate(value, value * exp(-spread), value * exp(spread))


def by_measured_cause(terms: Mapping[str, float]) -> dict[str, float]:
    """The terms of a projected step, under the names of measured causes."""
    found: dict[str, float] = {}
    for cause, seconds in terms.items():
        name = _TERMS.get(str(cause), str(cause))
        found[name] = found.get(name, 0.0) + seconds
    return found


def _load(serving: ServingRecord, workload: Workload) -> Load | None:
    """The load as it is simulated, with at most `_MOST_SIMULATED` requests or two batches."""
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
