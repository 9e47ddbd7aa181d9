"""A deployment on real ranks, and what was measured of it, repetition by repetition."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expertlane.balance.holding import placements_of
from expertlane.comparison.journal import Journal, Measurement
from expertlane.comparison.projection import usual_number_type
from expertlane.comparison.records import (
    Repetitions,
    measured_record,
    rebalance_records,
    traced_steps,
)
from expertlane.comparison.virtual import VirtualRuns, VirtualSettings, without_scheduler
from expertlane.cost.recorded_program import PricedRecording
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.step.program import ProgramBuilder
from expertlane.cost.virtual import undisturbed, without_each
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.commands import HeldBytes
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import ModelError
from expertlane.progress import Progress
from expertlane.results.estimate import LEAST_RUNS, jackknife_interval, median_interval
from expertlane.results.hardware import MachinePeak
from expertlane.results.metrics import (
    first_run,
    latency,
    num_tokens_per_expert,
    phase_record,
    speed_of_runs,
)
from expertlane.results.record import (
    EXPERIMENT,
    DeploymentRecord,
    RebalanceRecord,
    Source,
    StepsRecord,
)
from expertlane.results.step_record import StepRecord
from expertlane.results.timeline import timelines_of
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler, FinishedStep, drive, step_records
from expertlane.spec.deployment import Deployment, DispatchTable
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.experiment import Experiment
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload

_SHARE = -1  # in a journal, the run with the same sequences a rank
_WARM_UP_LEN, _WARM_UP_PART, _WARM_UP_LEAST = 4, 4, 64  # of a prompt; of all sequences


@dataclass(frozen=True)
class Setting:
    """Conditions that all deployments of a comparison share.

    Attributes:
        virtual: assumptions of virtual time; None without virtual time.
        journal: keeps what is measured; None where nothing is written.
    """

    experiment: Experiment
    pool: RankPool
    dtype: str
    ranks_per_node: int
    progress: Progress
    virtual: VirtualSettings | None = None
    journal: Journal | None = None


@dataclass(eq=False)
class DeploymentRun:
    """A deployment, its measurements so far, and the records made of them.

    Attributes:
        role: why it runs: it is the experiment's own, or a size of scaling.
        traces: a prefill and a decode step, by the deployment's name and clock.
        link_tps: in virtual time, decode TPS by the scale of links.
        measured_s: seconds that steps took, of all repetitions.
    """

    deployment: Deployment
    setting: Setting
    limits: Limits
    role: str
    traces: dict[str, list[StepRecord]] = field(default_factory=dict, init=False)
    link_tps: dict[float, float] = field(default_factory=dict, init=False)
    measured_s: float = field(default=0.0, init=False)
    num_runs: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._steps: dict[Phase, list[StepRecord]] = {phase: [] for phase in Phase}
        self._plans: dict[StepRecord, StepPlan] = {}
        self._share_steps: list[StepRecord] = []
        self._dispatch: DispatchTable | None = None
        self._runner: ModelRunner | None = None  # where it is on the ranks
        self._held: Sequence[HeldBytes] = ()
        self._rebalances: Sequence[RebalanceRecord] = ()
        self._without_each: tuple[int, Repetitions] | None = None  # of how many repetitions

    @property
    def name(self) -> str:
        """The name that the experiment gives it."""
        return self.deployment.name

    @property
    def is_over(self) -> bool:
        """False: where it cannot run, the comparison ends."""
        return False

    @property
    def phase(self) -> Phase:
        """The phase that it is judged by: decode, or prefill where nothing is decoded."""
        return Phase.DECODE if self._steps[Phase.DECODE] else Phase.PREFILL

    def measure(self, *, deploy: bool = True) -> None:
        """Run the workload once more.

        Args:
            deploy: put it on the ranks, and warm up, before; needless where it ran last.
        """
        if self._restored(self.num_runs):
            self.num_runs += 1
            return
        workload, progress = self.setting.experiment.workload, self.setting.progress
        # Experts that moved go back to where they began.
        moves = bool(self.deployment.options.rebalance_steps)
        deploy = deploy or moves or self._runner is None
        again = f", run {self.num_runs + 1}" if self.num_runs else ""
        num_tokens = workload.num_sequences * workload.output_len
        progress.task(f"{self.name}{again}", int(deploy) + num_tokens)
        if deploy:
            self._deploy()
            progress.advance()
        # Ranks keep when they did what in the first repetition, which costs next to nothing.
        with_events = self.num_runs == 0 and self.role == EXPERIMENT
        self._tokens = self._run(workload, self._keep, run=self.num_runs, record_events=with_events)
        rebalancer = self._runner.rebalancer if self._runner else None
        self._rebalances = rebalance_records(rebalancer) if rebalancer else ()
        own = [step for step in chain(*self._steps.values()) if step.run == self.num_runs]
        self._note(self.num_runs, own)
        self.num_runs += 1
        progress.done()

    def _deploy(self) -> None:
        setting = self.setting
        experiment, workload = setting.experiment, setting.experiment.workload
        config = EngineConfig(
            layout=self.deployment.layout,
            options=self.deployment.options,
            seed=experiment.seed,
            ranks_per_node=setting.ranks_per_node,
        )
        self._runner = ModelRunner(
            *(setting.pool, experiment.model, config, self.limits),
            checkpoint=Path(experiment.checkpoint) if experiment.checkpoint else None,
            dispatch_table=self._dispatch,
        )
        self._held, self._dispatch = self._runner.held, self._runner.dispatch_table
        num_sequences = workload.num_sequences
        shorter = replace(
            workload,
            num_sequences=max(num_sequences // _WARM_UP_PART, min(num_sequences, _WARM_UP_LEAST)),
            prompt_len=min(_WARM_UP_LEN, workload.prompt_len),
            output_len=min(2, workload.output_len),  # a prefill and a decode step
        )
        self._run(shorter, record=False)

    def measure_share(self) -> None:
        """Run the workload once more with as many sequences a rank as the largest deployment."""
        experiment, progress = self.setting.experiment, self.setting.progress
        num_seqs = experiment.num_sequences_alike(self.deployment.layout)
        if num_seqs < experiment.workload.num_sequences and not self._restored(_SHARE):
            if self._runner is None:
                self._deploy()
            share = replace(experiment.workload, num_sequences=num_seqs)
            progress.task(f"{self.name}, same sequences per rank", num_seqs * share.output_len)
            self._run(share, self._keep_share)
            self._note(_SHARE, self._share_steps)
            progress.done()

    def _restored(self, run: int) -> bool:
        """Take the repetition's kept measurement, if an earlier process made it; return whether."""
        journal = self.setting.journal
        kept = journal and journal.take(self.role, self.name, run)
        if not kept:
            return False
        take = self._keep_share if run == _SHARE else self._keep
        for step in kept.steps:
            take(step)
        if run != _SHARE:
            self._tokens = kept.tokens
        self._held, self._dispatch = kept.held, kept.dispatch
        self._rebalances = kept.rebalances
        self._runner = None  # the ranks may hold another
        return True

    def _note(self, run: int, steps: Sequence[StepRecord]) -> None:
        if self.setting.journal is not None:
            self.setting.journal.add(
                Measurement(
                    *(self.role, self.name, run, list(steps), self._tokens),
                    *(list(self._held), self._dispatch),
                    list(self._rebalances),
                )
            )

    def _keep_share(self, step: StepRecord) -> None:
        if step.phase is Phase.DECODE:
            self._share_steps.append(step)
        self.setting.progress.advance(len(step.seq_ids))

    def _keep(self, step: StepRecord) -> None:
        self._steps[step.phase].append(step)
        self.measured_s += step.finished_s - step.submitted_s
        self.setting.progress.advance(len(step.seq_ids))

    def steps_of(self, phase: Phase) -> list[StepRecord]:
        """All measured steps of a phase."""
        return self._steps[phase]

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
        experiment, virtual = self.setting.experiment, self.setting.virtual
        has_laws = virtual is not None and virtual.compute is not None
        scheduler = ContinuousScheduler(
            self.deployment.layout,
            self.deployment.options,
            self.limits,
            record=record,
            record_events=record_events,
            record_operations=virtual is not None and record,
            record_routing=has_laws and record,
        )
        prompts = experiment.workload.prompt_token_ids(experiment.model.vocab_size)
        requests = [
            Request(str(number), prompt[: workload.prompt_len], max_tokens=workload.output_len)
            for number, prompt in enumerate(prompts[: workload.num_sequences])
        ]
        for request in requests:
            scheduler.add(request)
        plans: list[StepPlan] = []
        runner = self._runner
        assert runner is not None, "it is deployed"

        def noting_plans() -> Iterator[FinishedStep]:
            for finished in drive(scheduler, runner):
                plans.append(finished.plan)
                yield finished

        try:
            for step in step_records(noting_plans(), run):
                if has_laws:
                    self._plans[step] = plans[-1]
                take(step)
        except ModelError as error:
            raise ModelError(f"deployment {self.name!r}: {error}") from None
        return np.array([request.output_token_ids for request in requests])

    def wall_time(self) -> Repetitions:
        """The repetitions, each by itself, in wall time."""
        return Repetitions.of(speed_of_runs(self.deployment.layout, self._steps[self.phase]))

    def without_each(self, runs: VirtualRuns) -> Repetitions:
        """The repetitions in virtual time, without each in turn (`cost.virtual.without_each`).

        With laws of computing, all repetitions are alike. Kept until another one is measured.
        """
        if self._without_each is not None and self._without_each[0] == self.num_runs:
            return self._without_each[1]
        steps = self._steps[self.phase]
        if self._laws():
            found = Repetitions.of(self._replayed(runs, steps))
        else:
            own, around = (
                Repetitions.of(self._replayed(runs, each(steps)))
                for each in (undisturbed, without_each)
            )
            found = own.without_each(around)
        self._without_each = self.num_runs, found
        return found

    def _replayed(self, runs: VirtualRuns, steps: Sequence[StepRecord]) -> list[StepsRecord]:
        """Throughput of each run by itself, in virtual time."""
        layout, laws = self.deployment.layout, self._laws()
        found = speed_of_runs(layout, [each.step for each in runs.replay(layout, steps, laws)])
        return found if laws else [*map(without_scheduler, found)]

    def record(self, peak: MachinePeak) -> DeploymentRecord:
        """The record of all repetitions together, in wall time."""
        found = self._record("measured", peak, self._steps, self._share_steps)
        medians = (replace(each, tps=median_interval(each.tps_of_runs)) for each in found.steps)
        return replace(
            found,
            steps=tuple(medians),
            rebalances=tuple(self._rebalances),
        )

    def virtual_record(self, runs: VirtualRuns) -> DeploymentRecord:
        """The record of all repetitions together, in virtual time."""
        layout, laws = self.deployment.layout, self._laws()
        measured = [*chain(*self._steps.values())]
        steps = measured if laws else undisturbed(measured)
        replayed = runs.replay(layout, steps, laws)
        if self.role == EXPERIMENT and self._steps[Phase.DECODE]:
            at = [place for place, step in enumerate(steps) if step.phase is Phase.DECODE]
            decodes = [steps[place] for place in at]
            self.link_tps = runs.decode_tps(layout, decodes, laws, [replayed[p] for p in at])
        by_phase: dict[Phase, list[StepRecord]] = {phase: [] for phase in Phase}
        for each in replayed:
            by_phase[each.step.phase].append(each.step)
        share = [each.step for each in runs.replay(layout, self._share_steps, laws)]
        found = self._record("virtual", runs.peak_of(layout), by_phase, share)
        if laws or self.num_runs < 2:
            return found
        alone = [each.step for each in runs.replay(layout, measured, None)]
        phases = []
        for phase in found.steps:
            of_runs = latency([step for step in alone if step.phase is phase.phase]).tps_of_runs
            tps = phase.tps
            if phase.phase is self.phase and self.num_runs >= LEAST_RUNS:
                tps = jackknife_interval(tps.value, self.without_each(runs).tps)
            phases.append(replace(phase, tps=tps, tps_of_runs=of_runs))
        return replace(found, steps=tuple(phases))

    def _laws(self) -> PricedRecording | None:
        """The laws that give the time of computing; None where measured CPU time does."""
        setting, model = self.setting, self.setting.experiment.model
        virtual, deployment = setting.virtual, self.deployment
        if virtual is None or virtual.compute is None:
            return None
        layout, options = deployment.layout, deployment.options
        dispatch = options.fixed_table or self._dispatch
        assert dispatch is not None, "what is auto was timed"
        builder = ProgramBuilder(
            model,
            layout,
            placements_of(model, layout, options),
            types=NumberTypes.of_engine(setting.dtype, options),
            dispatch=dispatch,
            payload=options.payload,
            ranks_per_node=setting.ranks_per_node,
            block_size=self.limits.block_size,
        )
        types = NumberTypes.of_engine(usual_number_type(virtual.compute), options)
        return PricedRecording(builder, self._plans, virtual.compute, types)

    def _record(
        self,
        source: Source,
        peak: MachinePeak,
        steps: Mapping[Phase, Sequence[StepRecord]],
        share: Sequence[StepRecord],
    ) -> DeploymentRecord:
        layout, ranks_per_node = self.deployment.layout, self.setting.ranks_per_node
        kept = traced_steps(self.deployment.options, steps)
        self.traces[self.name if source == "measured" else f"{self.name} {source}"] = kept
        timelines = timelines_of(kept)
        phases = [
            replace(
                phase_record(layout, of_phase, peak, ranks_per_node), timeline=timelines.get(phase)
            )
            for phase, of_phase in steps.items()
            if of_phase
        ]
        if source == "virtual" and self._laws() is None:
            phases = [*map(without_scheduler, phases)]
        found = measured_record(
            self.deployment,
            self.setting.experiment.model,
            phases,
            self._held,
            self._tokens,
            source,
            roles=(self.role,),
            num_tokens_per_expert=num_tokens_per_expert(first_run([*chain(*steps.values())])),
            dispatch_table=self._dispatch,
        )
        if not share:
            return found
        alike = phase_record(layout, share, peak, ranks_per_node)
        return replace(found, steps=(*found.steps, alike))
