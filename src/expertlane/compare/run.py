"""Run an experiment's deployments in turn on the same ranks, and collect what was measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.balance.placement_file import placements_of
from expertlane.compare.assumptions import measured_assumptions
from expertlane.compare.machine import experiment_limits, machine_record, measure_peak
from expertlane.compare.projection import usual_number_type
from expertlane.compare.records import measured_record, rebalance_records, typical
from expertlane.compare.virtual import VirtualRuns, VirtualSettings
from expertlane.cost.compute_laws import ComputeLaws
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.step.program import ProgramBuilder
from expertlane.cost.virtual import undisturbed
from expertlane.engine.launch import describe_ranks
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.pool import RankPool
from expertlane.errors import ModelError
from expertlane.ops.host import ForeignLoad
from expertlane.progress import Progress
from expertlane.results.metrics import latency, num_tokens_per_expert, phase_record
from expertlane.results.record import (
    EXPERIMENT,
    SCALING,
    DeploymentRecord,
    Source,
)
from expertlane.results.results import MachinePeak, Results
from expertlane.results.step_record import StepRecord
from expertlane.results.timeline import timelines_of
from expertlane.schedule.drive import FinishedStep, drive, step_records
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Deployment, DispatchTable
from expertlane.spec.experiment import Experiment
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload

_WARM_UP_LEN, _WARM_UP_PART, _WARM_UP_LEAST = 4, 4, 64  # of a prompt; of all sequences
_TRACED_LEN = 3
_NO_VIRTUAL_TIME = "No virtual time: it is built from CPU times, and these ranks compute on GPUs."


def run_comparison(
    experiment: Experiment,
    pool: RankPool,
    progress: Progress,
    *,
    command: str,
    virtual: VirtualSettings | None = None,
    on_trace: Callable[[str, list[StepRecord]], None] | None = None,
) -> Results:
    """Measure every deployment of the experiment on the ranks of `pool`.

    Args:
        command: how a user repeats it; kept in the results.
        virtual: also replay what was measured in virtual time; None leaves that out, and lets
            ranks compute whenever the system lets them.
        on_trace: gets each deployment's name, and a prefill and a decode step of it with events,
            from a short run that is not measured; the same in virtual time under the name with
            "virtual" after it.

    Raises:
        RankError: a rank died, hung or failed.
        ModelError: the logits of a sequence are not finite.
    """
    seen = describe_ranks(pool)
    cautions: tuple[str, ...] = ()
    if virtual is not None and seen[0].on_gpu:
        virtual, cautions = None, (_NO_VIRTUAL_TIME,)
    ranks_per_node = experiment.cluster.ranks_per_node or seen[0].ranks_per_node
    progress.task("measuring this machine's peak", 1)
    peak = measure_peak(pool, seen)
    progress.advance()
    progress.done()
    limits = experiment_limits(experiment, seen)
    foreign = ForeignLoad()
    deployed = [
        _Deployed(
            each,
            experiment,
            limits[each.name],
            seen[0].dtype,
            pool,
            ranks_per_node,
            progress,
            virtual,
        )
        for each in experiment.deployments + experiment.scaling
    ]
    num_own = len(experiment.deployments)
    own, scaling = deployed[:num_own], deployed[num_own:]
    _measure(own, scaling)
    machine = machine_record(seen, experiment.num_ranks, ranks_per_node, peak)
    roles = [*((each, EXPERIMENT) for each in own), *((each, SCALING) for each in scaling)]
    records = [each.record(role, peak) for each, role in roles]
    assumptions = measured_assumptions(experiment, machine, limits)
    virtual_time = None
    if virtual is not None:
        decodes, prefills = (
            [step for each in own for step in each.steps_of(phase)]
            for phase in (Phase.DECODE, Phase.PREFILL)
        )
        runs = VirtualRuns.of(virtual, experiment, decodes or prefills, ranks_per_node, peak)
        records += [each.virtual_record(role, runs) for each, role in roles]
        virtual_time = runs.summary([each.link_tps for each in own if each.link_tps])
        assumptions += runs.assumptions()
    if on_trace is not None:
        for each in own:
            for name, steps in each.traces.items():
                on_trace(name, steps)
    return Results.now(
        "comparison",
        command,
        {"experiment": experiment},
        records,
        torch_version=seen[0].torch_version,
        machine=machine,
        virtual_time=virtual_time,
        assumptions=assumptions,
        cautions=cautions,
        foreign_cpu_share=foreign.share(),
    )


def _measure(own: Sequence["_Deployed"], scaling: Sequence["_Deployed"]) -> None:
    """Twice, the second time backwards: what changes on the machine meanwhile hits all alike."""
    for each in own:
        each.measure()
        each.trace()
    for each in reversed(own):
        each.measure(run=1)
    for each in scaling:
        each.measure()
        each.measure_share()


@dataclass
class _Deployed:
    """A deployment on the ranks, and what was measured of it, repetition by repetition.

    Attributes:
        virtual: what virtual time is to assume; None where none is made.
        traces: steps of a short run, by the deployment's name and in which time they are.
        link_tps: in virtual time, decode TPS by the scale of links.
    """

    deployment: Deployment
    experiment: Experiment
    limits: Limits
    dtype: str
    pool: RankPool
    ranks_per_node: int
    progress: Progress
    virtual: VirtualSettings | None = None

    def __post_init__(self) -> None:
        self._steps: dict[Phase, list[StepRecord]] = {phase: [] for phase in Phase}
        self._plans: dict[StepRecord, StepPlan] = {}
        self._share_steps: list[StepRecord] = []
        self._traced: list[StepRecord] = []
        self.traces: dict[str, list[StepRecord]] = {}
        self.link_tps: dict[float, float] = {}
        self._dispatch: DispatchTable | None = None

    def measure(self, run: int = 0) -> None:
        """Deploy, warm up, and run the workload once."""
        experiment, name, progress = self.experiment, self.deployment.name, self.progress
        workload = experiment.workload
        num_tokens = workload.num_sequences * workload.output_len
        progress.task(f"{name}, again" if run else name, 1 + num_tokens)
        self._runner = ModelRunner(
            self.pool,
            experiment.model,
            self.deployment,
            self.limits,
            seed=experiment.seed,
            ranks_per_node=self.ranks_per_node,
            checkpoint=Path(experiment.checkpoint) if experiment.checkpoint else None,
        )
        if run == 0:
            self._dispatch = self._runner.dispatch_table
        num_sequences = workload.num_sequences
        shorter = replace(
            workload,
            num_sequences=max(num_sequences // _WARM_UP_PART, min(num_sequences, _WARM_UP_LEAST)),
            prompt_len=min(_WARM_UP_LEN, workload.prompt_len),
            output_len=min(2, workload.output_len),  # a prefill and a decode step
        )
        self._run(shorter, record=False)
        progress.advance()
        self._tokens = self._run(workload, self._keep, run=run)
        progress.done()

    def measure_share(self) -> None:
        """Run the workload once more with as many sequences a rank as the largest deployment."""
        workload = self.experiment.workload
        num_seqs = self.experiment.num_sequences_alike(self.deployment.layout)
        if num_seqs < workload.num_sequences:
            name = f"{self.deployment.name}, same sequences per rank"
            self.progress.task(name, num_seqs * workload.output_len)
            share = replace(workload, num_sequences=num_seqs)
            self._run(share, self._keep_share)
            self.progress.done()

    def _keep_share(self, step: StepRecord) -> None:
        if step.phase is Phase.DECODE:
            self._share_steps.append(step)
        self.progress.advance(len(step.seq_ids))

    def _keep(self, step: StepRecord) -> None:
        self._steps[step.phase].append(step)
        self.progress.advance(len(step.seq_ids))

    def steps_of(self, phase: Phase) -> list[StepRecord]:
        """All that were measured."""
        return self._steps[phase]

    def trace(self) -> None:
        """Run the workload with short outputs, and keep when each rank did what."""
        workload = self.experiment.workload
        short = replace(workload, output_len=min(_TRACED_LEN, workload.output_len))
        self._run(short, self._traced.append, record_events=True)

    def _typical(
        self, measured: Mapping[Phase, Sequence[StepRecord]], traced: Sequence[StepRecord]
    ) -> list[StepRecord]:
        """A prefill and a decode step of those traced.

        Of those with most tokens the one that takes about as long as most did when measured; of
        micro-batches that rotate, as many steps of each as make a round.
        """
        options = self.deployment.options
        is_rotating = options.micro_batch_schedule == "rotating"
        num_kept = options.num_micro_batches if is_rotating else 1
        kept: list[StepRecord] = []
        for phase, of_phase in measured.items():
            kept += typical([step for step in traced if step.phase is phase], of_phase, num_kept)
        return kept

    def _run(
        self,
        workload: Workload,
        take: Callable[[StepRecord], None] = lambda step: None,
        *,
        run: int = 0,
        record: bool = True,
        record_events: bool = False,
    ) -> npt.NDArray[np.int64]:
        """Generate the whole workload; gives its tokens, [num_sequences, output_len]."""
        deployment, experiment, virtual = self.deployment, self.experiment, self.virtual
        scheduler = ContinuousScheduler(
            deployment.layout,
            deployment.options,
            self.limits,
            record=record,
            record_events=record_events,
            record_operations=virtual is not None and record,
            record_routing=virtual is not None and virtual.compute is not None and record,
        )
        prompts = experiment.workload.prompt_token_ids(experiment.model.vocab_size)
        requests = [
            Request(str(number), prompt[: workload.prompt_len], max_tokens=workload.output_len)
            for number, prompt in enumerate(prompts[: workload.num_sequences])
        ]
        for request in requests:
            scheduler.add(request)
        plans: list[StepPlan] = []

        def noting_plans() -> Iterator[FinishedStep]:
            for finished in drive(scheduler, self._runner):
                plans.append(finished.plan)
                yield finished

        try:
            for step in step_records(noting_plans(), run):
                if virtual is not None and virtual.compute is not None:
                    self._plans[step] = plans[-1]
                take(step)
        except ModelError as error:
            raise ModelError(f"deployment {deployment.name!r}: {error}") from None
        return np.array([request.output_token_ids for request in requests])

    def record(self, role: str, peak: MachinePeak) -> DeploymentRecord:
        """The record of all runs together."""
        rebalancer = self._runner.rebalancer
        return self._record(
            "measured",
            role,
            peak,
            self._steps,
            self._share_steps,
            self._traced,
            rebalances=rebalance_records(rebalancer) if rebalancer else (),
        )

    def virtual_record(self, role: str, runs: VirtualRuns) -> DeploymentRecord:
        """The same in virtual time."""
        layout = self.deployment.layout
        measured = [*chain(*self._steps.values())]
        laws = self._laws()
        steps = measured if laws else undisturbed(measured)
        replayed = runs.replay(layout, steps, laws)
        if role == EXPERIMENT and self._steps[Phase.DECODE]:
            at = [place for place, step in enumerate(steps) if step.phase is Phase.DECODE]
            decodes = [steps[place] for place in at]
            self.link_tps = runs.decode_tps(layout, decodes, laws, [replayed[p] for p in at])
        by_phase: dict[Phase, list[StepRecord]] = {phase: [] for phase in Phase}
        for each in replayed:
            by_phase[each.step.phase].append(each.step)
        share, traced = (
            [each.step for each in runs.replay(layout, of_kind, laws)]
            for of_kind in (self._share_steps, self._traced)
        )
        found = self._record("virtual", role, runs.peak_of(layout), by_phase, share, traced)
        if laws or not any(step.run for step in measured):
            return found
        # The repetitions as they were, beside the figure that takes the least time of both.
        each_run = [each.step for each in runs.replay(layout, measured, None)]
        phases = []
        for phase in found.steps:
            of_phase = [step for step in each_run if step.phase is phase.phase]
            of_runs = latency(of_phase).tps_of_runs
            phases.append(replace(phase, tps_of_runs=(*of_runs, phase.tps.value)))
        return replace(found, steps=tuple(phases))

    def _laws(self) -> ComputeLaws | None:
        """What is to say how long computing takes; None for what was measured."""
        virtual, model = self.virtual, self.experiment.model
        if virtual is None or virtual.compute is None:
            return None
        layout, options, dispatch = self.deployment.layout, self.deployment.options, self._dispatch
        if options.dispatch != "auto" and options.overlap != "auto":
            dispatch = DispatchTable.fixed(options.dispatch, options.overlap)
        assert dispatch is not None, "what is auto was timed"
        builder = ProgramBuilder(
            model,
            layout,
            placements_of(model, layout, options),
            types=NumberTypes.all_of(self.dtype),
            dispatch=dispatch,
            payload=options.payload,
            ranks_per_node=self.ranks_per_node,
            block_size=self.limits.block_size,
        )
        types = NumberTypes.all_of(usual_number_type(virtual.compute))
        return ComputeLaws(builder, self._plans, virtual.compute, types)

    def _record(
        self,
        source: Source,
        role: str,
        peak: MachinePeak,
        steps: Mapping[Phase, Sequence[StepRecord]],
        share: Sequence[StepRecord],
        traced: Sequence[StepRecord],
        **parts: Any,
    ) -> DeploymentRecord:
        kept = self._typical(steps, traced) if traced else []
        name = self.deployment.name if source == "measured" else f"{self.deployment.name} {source}"
        self.traces[name] = kept
        timelines = timelines_of(kept)
        phases = [
            replace(
                phase_record(self.deployment.layout, of_phase, peak, self.ranks_per_node),
                timeline=timelines.get(phase),
            )
            for phase, of_phase in steps.items()
            if of_phase
        ]
        found = measured_record(
            self.deployment,
            self.experiment.model,
            phases,
            self._runner.held,
            self._tokens,
            source,
            roles=(role,),
            num_tokens_per_expert=num_tokens_per_expert([*chain(*steps.values())]),
            dispatch_table=self._dispatch,
            **parts,
        )
        if not share:
            return found
        alike = phase_record(self.deployment.layout, share, peak, self.ranks_per_node)
        return replace(found, steps=(*found.steps, alike))
