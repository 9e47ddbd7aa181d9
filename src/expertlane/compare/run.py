"""Run an experiment's deployments in turn on the same ranks, and collect what was measured."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.balance.placement_file import placements_of
from expertlane.compare.assumptions import measured_assumptions
from expertlane.compare.machine import deployment_limits, machine_record, measure_peak
from expertlane.engine.commands import HeldBytes, RankMachine
from expertlane.engine.launch import describe_ranks
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.pool import RankPool
from expertlane.engine.rebalancing import Rebalance, Rebalancer, StepLoad
from expertlane.errors import ModelError
from expertlane.ops.host import ForeignLoad
from expertlane.progress import Progress
from expertlane.results.metrics import num_tokens_per_expert, phase_record
from expertlane.results.record import (
    EXPERIMENT,
    SCALING,
    DeploymentRecord,
    HeldRecord,
    RebalanceRecord,
    StepsRecord,
)
from expertlane.results.results import MachinePeak, Results
from expertlane.results.step_record import StepRecord
from expertlane.results.time_shares import find_bottleneck
from expertlane.results.timeline import StepTimeline, timelines_of
from expertlane.schedule.drive import FinishedStep, drive, step_records
from expertlane.schedule.request import Request
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Deployment, DispatchTable
from expertlane.spec.experiment import Experiment
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload

_WARM_UP_LEN = 4
_TRACED_LEN = 5


def run_comparison(
    experiment: Experiment,
    pool: RankPool,
    progress: Progress,
    *,
    command: str,
    on_trace: Callable[[str, list[StepRecord]], None] | None = None,
) -> Results:
    """Measure every deployment of the experiment on the ranks of `pool`.

    Args:
        command: how a user repeats it; kept in the results.
        on_trace: gets each deployment's name, and a prefill and a decode step of it with events,
            from a short run that is not measured.

    Raises:
        RankError: a rank died, hung or failed.
        ModelError: the logits of a sequence are not finite.
    """
    seen = describe_ranks(pool)
    ranks_per_node = experiment.cluster.ranks_per_node or seen[0].ranks_per_node
    progress.task("measuring this machine's peak", 1)
    peak = measure_peak(pool, seen)
    progress.advance()
    progress.done()
    runs = _Runs(experiment, pool, seen, peak, ranks_per_node, progress)
    # Twice, the second time backwards: what changes on the machine meanwhile hits all alike.
    for run, order in enumerate((experiment.deployments, experiment.deployments[::-1])):
        for deployment in order:
            runner = runs.measure(deployment, run)
            if run == 0:
                traced = runs.trace(deployment, runner)
                if on_trace is not None:
                    on_trace(deployment.name, traced)
    for deployment in experiment.scaling:
        runs.measure(deployment, 0)
    machine = machine_record(seen, experiment.num_ranks, ranks_per_node, peak)
    return Results.now(
        "comparison",
        command,
        {"experiment": experiment},
        [
            *(runs.record(each, EXPERIMENT) for each in experiment.deployments),
            *(runs.record(each, SCALING) for each in experiment.scaling),
        ],
        torch_version=seen[0].torch_version,
        machine=machine,
        assumptions=measured_assumptions(experiment, machine, runs.limits),
        foreign_cpu_share=runs.foreign_cpu_share,
    )


def measured_record(
    deployment: Deployment,
    model: ModelConfig,
    phases: Sequence[StepsRecord],
    held: Sequence[HeldBytes],
    tokens: npt.NDArray[np.int64],
    **parts: Any,
) -> DeploymentRecord:
    """A deployment's record.

    Args:
        phases: prefill, and decode if there was any.
        held: [num_ranks]; what each rank has allocated.
        tokens: [num_sequences, output_len]; all generated tokens.
        parts: further fields of the record.

    Raises:
        ValueError: `held` is not of the layout's ranks.
    """
    layout = deployment.layout
    if len(held) != layout.world_size:
        raise ValueError(f"memory of {len(held)} ranks for layout {layout}")
    placements = placements_of(model, layout, deployment.options)

    def num_experts(rank: int) -> tuple[int, ...]:
        at = layout.coordinates(rank)
        own_layers = layout.layers_of_stage(model.num_hidden_layers, at.pp_rank)
        return tuple(
            len(placed.experts_of_rank[at.ep_rank]) if placed and layer in own_layers else 0
            for layer, placed in enumerate(placements)
        )

    return DeploymentRecord(
        name=deployment.name,
        layout=layout,
        options=deployment.options,
        source="measured",
        is_baseline=deployment.is_baseline,
        steps=tuple(phases),
        held=tuple(
            HeldRecord(rank, num_experts(rank), each.weight_bytes, each.kv_bytes)
            for rank, each in enumerate(held)
        ),
        bottleneck=find_bottleneck(layout, phases[-1]),
        tokens_sha256=hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(),
        **parts,
    )


def _typical(
    steps: Sequence[StepRecord], measured: Sequence[StepRecord], num_kept: int
) -> Sequence[StepRecord]:
    """Of so many steps in a row those with most tokens that take most nearly the usual time."""
    rows = [steps[first : first + num_kept] for first in range(len(steps) - num_kept + 1)]
    if not rows:
        return steps

    def num_tokens(row: Sequence[StepRecord]) -> int:
        return sum(step.num_tokens for step in row)

    def seconds(row: Sequence[StepRecord]) -> float:
        return row[-1].finished_s - row[0].submitted_s

    full = [row for row in rows if num_tokens(row) == max(map(num_tokens, rows))]
    usual = [measured[first : first + num_kept] for first in range(len(measured) - num_kept + 1)]
    alike = [row for row in usual if num_tokens(row) == num_tokens(full[0])] or full
    usual_s = median(map(seconds, alike))
    return min(full, key=lambda row: abs(seconds(row) - usual_s))


def _drive(
    deployment: Deployment,
    scheduler: ContinuousScheduler,
    runner: ModelRunner,
) -> Iterator[FinishedStep]:
    try:
        yield from drive(scheduler, runner)
    except ModelError as error:
        raise ModelError(f"deployment {deployment.name!r}: {error}") from None


class _Runs:
    """What was measured of every deployment, repetition by repetition.

    Attributes:
        limits: of each deployment's scheduler, by its name.
        foreign_cpu_share: of this host's cores, what other processes used meanwhile.
    """

    def __init__(
        self,
        experiment: Experiment,
        pool: RankPool,
        seen: Sequence[RankMachine],
        peak: MachinePeak,
        ranks_per_node: int,
        progress: Progress,
    ) -> None:
        self._experiment = experiment
        self._pool = pool
        self.limits = {
            each.name: deployment_limits(experiment, each, seen)
            for each in experiment.deployments + experiment.scaling
        }
        self._peak = peak
        self._ranks_per_node = ranks_per_node
        self._progress = progress
        self._prompts = experiment.workload.prompt_token_ids(experiment.model.vocab_size)
        self._prefill: dict[str, list[StepRecord]] = defaultdict(list)
        self._decode: dict[str, list[StepRecord]] = defaultdict(list)
        self._tokens: dict[str, npt.NDArray[np.int64]] = {}
        self._held: dict[str, list[HeldBytes]] = {}
        self._dispatch: dict[str, DispatchTable | None] = {}
        self._rebalances: dict[str, tuple[RebalanceRecord, ...]] = {}
        self._timelines: dict[str, dict[Phase, StepTimeline]] = {}
        self._foreign = ForeignLoad()

    @property
    def foreign_cpu_share(self) -> float:
        """Of this host's cores, since the first run."""
        return self._foreign.share()

    def measure(self, deployment: Deployment, run: int) -> ModelRunner:
        """Deploy, warm up, and run the workload once; gives what ran it."""
        experiment, name = self._experiment, deployment.name
        workload, progress, limits = experiment.workload, self._progress, self.limits[name]
        num_tokens = workload.num_sequences * workload.output_len
        progress.task(f"{name}, again" if run else name, 1 + num_tokens)
        runner = ModelRunner(
            self._pool,
            experiment.model,
            deployment,
            limits,
            seed=experiment.seed,
            ranks_per_node=self._ranks_per_node,
            checkpoint=Path(experiment.checkpoint) if experiment.checkpoint else None,
        )
        self._held[name] = runner.held
        self._dispatch.setdefault(name, runner.dispatch_table)
        self._warm_up(deployment, runner)
        progress.advance()
        scheduler, requests = self._schedule(deployment, workload)
        for record in step_records(_drive(deployment, scheduler, runner), run):
            steps = self._prefill if record.phase is Phase.PREFILL else self._decode
            steps[name].append(record)
            progress.advance(len(record.seq_ids))
        progress.done()
        if runner.rebalancer is not None:
            self._rebalances[name] = rebalance_records(runner.rebalancer)
        self._tokens[name] = np.array([request.output_token_ids for request in requests])
        return runner

    def trace(self, deployment: Deployment, runner: ModelRunner) -> list[StepRecord]:
        """A prefill and a decode step of the workload with short outputs.

        Of those with most tokens the one that takes about as long as most did when measured; of
        micro-batches that rotate, as many steps of each as make a round.
        """
        workload = self._experiment.workload
        short = replace(workload, output_len=min(_TRACED_LEN, workload.output_len))
        scheduler, _ = self._schedule(deployment, short, record_events=True)
        options = deployment.options
        is_rotating = options.micro_batch_schedule == "rotating"
        num_kept = options.num_micro_batches if is_rotating else 1
        steps = list(step_records(_drive(deployment, scheduler, runner)))
        kept: list[StepRecord] = []
        for phase, measured in (
            (Phase.PREFILL, self._prefill[deployment.name]),
            (Phase.DECODE, self._decode[deployment.name]),
        ):
            of_phase = [step for step in steps if step.phase is phase]
            kept += _typical(of_phase, measured, num_kept)
        self._timelines[deployment.name] = timelines_of(kept)
        return kept

    def _schedule(
        self,
        deployment: Deployment,
        workload: Workload,
        *,
        record: bool = True,
        record_events: bool = False,
    ) -> tuple[ContinuousScheduler, list[Request]]:
        """A scheduler with the whole workload queued."""
        limits = self.limits[deployment.name]
        scheduler = ContinuousScheduler(
            deployment.layout,
            deployment.options,
            limits,
            record=record,
            record_events=record_events,
        )
        prompts = self._prompts[:, : workload.prompt_len]
        requests = [
            Request(str(number), prompt, max_tokens=workload.output_len)
            for number, prompt in enumerate(prompts)
        ]
        for request in requests:
            scheduler.add(request)
        return scheduler, requests

    def _warm_up(self, deployment: Deployment, runner: ModelRunner) -> None:
        """Short prompts and one decode step, unrecorded."""
        workload = self._experiment.workload
        short = replace(
            workload,
            prompt_len=min(_WARM_UP_LEN, workload.prompt_len),
            output_len=min(2, workload.output_len),
        )
        scheduler, _ = self._schedule(deployment, short, record=False)
        for _ in _drive(deployment, scheduler, runner):
            pass

    def record(self, deployment: Deployment, role: str) -> DeploymentRecord:
        """All runs of a deployment together."""
        name, layout = deployment.name, deployment.layout
        timelines = self._timelines.get(name, {})
        prefill, decode = self._prefill[name], self._decode[name]
        phases = [
            replace(
                phase_record(layout, steps, self._peak, self._ranks_per_node),
                timeline=timelines.get(steps[0].phase),
            )
            for steps in (prefill, decode)
            if steps
        ]
        return measured_record(
            deployment,
            self._experiment.model,
            phases,
            self._held[name],
            self._tokens[name],
            roles=(role,),
            num_tokens_per_expert=num_tokens_per_expert(
                [*self._prefill[name], *self._decode[name]]
            ),
            rebalances=self._rebalances.get(name, ()),
            dispatch_table=self._dispatch[name],
        )


def rebalance_records(rebalancer: Rebalancer) -> tuple[RebalanceRecord, ...]:
    """All decisions of a run, with the loads seen before and after."""
    return tuple(_rebalance(each, rebalancer) for each in rebalancer.decisions)


def _rebalance(taken: Rebalance, rebalancer: Rebalancer) -> RebalanceRecord:
    num_steps = taken.decision.num_steps
    own = [each for each in rebalancer.loads if each.replica == taken.replica]
    before = [each for each in own if each.step < taken.step][-num_steps:]
    after: list[StepLoad] = []
    if taken.switched is not None:
        later = [each for each in rebalancer.decisions if each.replica == taken.replica]
        ends = [each.switched for each in later if (each.switched or 0) > taken.switched]
        until = min((end for end in ends if end is not None), default=own[-1].step + 1)
        after = [each for each in own if taken.switched <= each.step < until][:num_steps]
    return RebalanceRecord(
        replica=taken.replica,
        step=taken.step,
        switched=taken.switched,
        gain_s=taken.decision.gain_s,
        cost_s=taken.decision.cost_s,
        num_bytes=taken.decision.num_bytes,
        predicted_before=taken.predicted_before,
        predicted_after=taken.predicted_after,
        load_before=_load(before),
        load_after=_load(after) if after else None,
        experts_s_before=_experts_s(before),
        experts_s_after=_experts_s(after) if after else None,
    )


def _load(steps: Sequence[StepLoad]) -> float:
    return sum(each.most for each in steps) / sum(each.mean for each in steps)


def _experts_s(steps: Sequence[StepLoad]) -> float:
    return sum(each.experts_s for each in steps) / len(steps)
