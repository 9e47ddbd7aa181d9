"""Run an experiment's deployments in turn on the same ranks, and collect what was measured.

Below: the machine, how fast it is at best, and whether its memory holds an experiment.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from expertlane.balance.holding import check_experiment
from expertlane.comparison.assumptions import measured_assumptions
from expertlane.comparison.deployed import DeploymentRun, Setting
from expertlane.comparison.journal import Journal
from expertlane.comparison.records import pair_record
from expertlane.comparison.turns import Repeats, measure_in_turns
from expertlane.comparison.virtual import VirtualRuns, VirtualSettings
from expertlane.cost.memory import workload_limits
from expertlane.engine.launch import LoadPlan, describe_ranks
from expertlane.engine.ops import host
from expertlane.engine.ops.host import ForeignLoad
from expertlane.engine.ranks.commands import MeasureRates, RankMachine
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import CapacityError, UserError, naming
from expertlane.progress import Progress
from expertlane.results.hardware import Machine, MachinePeak, VirtualTime
from expertlane.results.record import (
    EXPERIMENT,
    SCALING,
    DeploymentRecord,
    PairRecord,
    choose_compared,
)
from expertlane.results.results import Results
from expertlane.results.step_record import StepRecord
from expertlane.schedule.request import Limits
from expertlane.spec.experiment import Experiment
from expertlane.spec.names import Phase

_NO_VIRTUAL_TIME = "No virtual time: it is built from CPU times, and these ranks compute on GPUs."
_OWN_LINKS = (
    "No virtual time: these ranks are on {} hosts with links of their own, so wall time counts. "
    "--clock virtual models links all the same."
)


def run_comparison(
    experiment: Experiment,
    pool: RankPool,
    progress: Progress,
    *,
    command: str,
    virtual: VirtualSettings | None = None,
    repeats: Repeats | None = None,
    folder: Path | None = None,
    resume: bool = False,
    on_trace: Callable[[str, list[StepRecord]], None] | None = None,
) -> Results:
    """Measure every deployment of the experiment on the ranks of `pool`.

    Every one twice, the second time in the opposite order; then, in turns, those that the first
    sentence is about (`choose_compared`); then those of scaling, once.

    Args:
        command: command line that repeats it; kept in the results.
        virtual: also replay what was measured in virtual time; None leaves that out, and lets
            ranks compute whenever the system lets them.
        repeats: None for the default.
        folder: where measurements are kept until all are made.
        resume: go on with those that are kept there.
        on_trace: gets each deployment's name, and a prefill and a decode step of it with events;
            the same in virtual time under the name with "virtual" after it.

    Raises:
        RankError: a rank died, hung or failed.
        ModelError: the logits of a sequence are not finite.
        UserError: what is kept in the folder is not this comparison's.
    """
    seen = describe_ranks(pool)
    virtual, cautions = _virtual_on(seen, virtual)
    peak = _peak(pool, seen, progress)
    ranks_per_node = experiment.cluster.ranks_per_node or seen[0].ranks_per_node
    limits = experiment_limits(experiment, seen)
    foreign, journal = ForeignLoad(), None
    if folder is not None:
        journal = Journal.of(folder, experiment, seen, peak, resume=resume)
        peak = journal.peak  # so that links are scaled as before
        _tell_kept(journal, progress)
    setting = Setting(experiment, pool, seen[0].dtype, ranks_per_node, progress, virtual, journal)
    measured = _Measurement.of(setting, peak, limits)
    with journal or nullcontext():
        measured.measure(repeats or Repeats())
    if on_trace is not None:
        for name, steps in measured.traces():
            on_trace(name, steps)
    return measured.results(command, seen, cautions, foreign.share())


def _peak(pool: RankPool, seen: Sequence[RankMachine], progress: Progress) -> MachinePeak:
    progress.task("measuring this machine's peak", 1)
    peak = measure_peak(pool, seen)
    progress.advance()
    progress.done()
    return peak


def _tell_kept(journal: Journal, progress: Progress) -> None:
    if journal.num_kept:
        progress.task(f"{journal.num_kept} measurements of the interrupted run", 1)
        progress.advance()
        progress.done()


def _virtual_on(
    seen: Sequence[RankMachine], virtual: VirtualSettings | None
) -> tuple[VirtualSettings | None, tuple[str, ...]]:
    """The assumptions of virtual time on such ranks, if it has any, and cautions for a reader."""
    num_hosts = len({each.host for each in seen})
    if virtual is None:
        return None, ()
    if seen[0].on_gpu:
        return None, (_NO_VIRTUAL_TIME,)
    if num_hosts > 1 and not virtual.is_asked:
        return None, (_OWN_LINKS.format(num_hosts),)
    return virtual, ()


@dataclass(eq=False)
class _Measurement:
    """An experiment's deployments on the ranks, and their records.

    Attributes:
        own: the experiment's deployments, in order.
        scaling: the layouts of growing size.
        runs: replays in virtual time; None without it.
        records: all records, those in wall time first.
        pairs: the one that the first sentence is about with each of the others, on each clock.
    """

    setting: Setting
    peak: MachinePeak
    own: list[DeploymentRun]
    scaling: list[DeploymentRun]
    runs: VirtualRuns | None = None
    records: tuple[DeploymentRecord, ...] = ()
    pairs: tuple[PairRecord, ...] = ()

    @classmethod
    def of(cls, setting: Setting, peak: MachinePeak, limits: Mapping[str, Limits]) -> Self:
        """The deployments, with nothing measured yet.

        Args:
            limits: by the deployment's name.
        """
        experiment = setting.experiment
        own, scaling = (
            [DeploymentRun(each, setting, limits[each.name], role) for each in deployments]
            for deployments, role in (
                (experiment.deployments, EXPERIMENT),
                (experiment.scaling, SCALING),
            )
        )
        return cls(setting, peak, own, scaling)

    def measure(self, repeats: Repeats) -> None:
        """Run everything, then make the records."""
        own = self.own
        first: dict[str, DeploymentRecord] = {}

        def choose() -> list[DeploymentRun]:
            self.runs = self._virtual_runs()
            first.update({each.name: self._record(each) for each in own})
            return self._compared(list(first.values()))

        compared = measure_in_turns(own, repeats, choose)
        for each in self.scaling:
            each.measure()
            each.measure_share()
        wall = {each.name: each.record(self.peak) for each in own}
        virtual = first if self.runs else {}
        for each in own if self.runs else ():
            if each.num_runs > repeats.num_of_others:
                virtual[each.name] = self._record(each)
        self.pairs = tuple(self._pairs(compared, virtual))
        self.records = (
            *wall.values(),
            *(each.record(self.peak) for each in self.scaling),
            *virtual.values(),
            *(self._record(each) for each in self.scaling if self.runs),
        )

    def traces(self) -> Iterator[tuple[str, list[StepRecord]]]:
        """Traced steps of each of the experiment's deployments, by its name."""
        for each in self.own:
            yield from each.traces.items()

    def results(
        self,
        command: str,
        seen: Sequence[RankMachine],
        cautions: tuple[str, ...],
        foreign_cpu_share: float,
    ) -> Results:
        """The results, for the report; once all is measured."""
        experiment, peak = self.setting.experiment, self.peak
        limits = {each.name: each.limits for each in (*self.own, *self.scaling)}
        machine = machine_record(seen, experiment.num_ranks, self.setting.ranks_per_node, peak)
        return Results.now(
            "comparison",
            command,
            {"experiment": experiment.question},
            self.records,
            torch_version=seen[0].torch_version,
            machine=machine,
            pairs=self.pairs,
            virtual_time=self._virtual_time(),
            assumptions=(
                *measured_assumptions(experiment, machine, limits),
                *(self.runs.assumptions() if self.runs else ()),
            ),
            cautions=cautions,
            foreign_cpu_share=foreign_cpu_share,
        )

    def _virtual_time(self) -> VirtualTime | None:
        """Virtual time's assumptions about links; None without virtual time."""
        if self.runs is None:
            return None
        return self.runs.summary([each.link_tps for each in self.own if each.link_tps])

    def _virtual_runs(self) -> VirtualRuns | None:
        setting = self.setting
        if setting.virtual is None:
            return None
        decodes, prefills = (
            [step for each in self.own for step in each.steps_of(phase)]
            for phase in (Phase.DECODE, Phase.PREFILL)
        )
        return VirtualRuns.of(
            setting.virtual,
            setting.experiment,
            decodes or prefills,
            setting.ranks_per_node,
            self.peak,
        )

    def _record(self, deployed: DeploymentRun) -> DeploymentRecord:
        """The record that the verdict uses: in virtual time if there is any."""
        if self.runs is None:
            return deployed.record(self.peak)
        return deployed.virtual_record(self.runs)

    def _compared(self, records: Sequence[DeploymentRecord]) -> list[DeploymentRun]:
        """The deployments that the first sentence is about; empty for a single deployment."""
        phase = self.own[0].phase
        tps = [each.steps_of(phase)[0].tps.value for each in records]
        return [self.own[place] for place in choose_compared(records, tps)]

    def _pairs(
        self, compared: Sequence[DeploymentRun], virtual: Mapping[str, DeploymentRecord]
    ) -> Iterator[PairRecord]:
        """The pairs of the first with each of the others, on each clock.

        Args:
            virtual: records in virtual time by name; empty without it.
        """
        if not compared:
            return
        one, *others = compared
        alone = one.without_each(self.runs) if self.runs else None
        for other in others:
            names, phase = (one.name, other.name), one.phase
            yield pair_record(names, phase, (one.wall_time(), other.wall_time()))
            if self.runs and alone:
                first, second = (virtual[name].steps_of(phase)[0] for name in names)
                repeated = alone, other.without_each(self.runs)
                yield pair_record(names, phase, repeated, (first, second))


_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd")


def machine_record(
    seen: Sequence[RankMachine],
    num_ranks: int,
    ranks_per_node: int,
    peak: MachinePeak | None = None,
) -> Machine:
    """The machine that ranks run on.

    Args:
        seen: what each rank reports of its machine.
        num_ranks: ranks of the largest deployment.
        ranks_per_node: consecutive ranks that count as on one node.
    """
    hosts = {each.host: each for each in seen}.values()
    return Machine(
        cpu_name=seen[0].cpu_name,
        device=seen[0].device,
        num_cores=sum(each.num_cores for each in hosts),
        num_idle_gpus=sum(each.num_idle_gpus for each in hosts),
        memory_bytes=sum(seen[rank].memory_bytes for rank in _first_on_gpus(seen))
        if seen[0].on_gpu
        else sum(each.memory_bytes for each in hosts),
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        backend=seen[0].backend,
        dtype=seen[0].dtype,
        kernels=seen[0].kernels,
        peak=peak,
    )


def check_memory(experiment: Experiment, pool: RankPool) -> None:
    """Compare what every deployment needs with what is free, before anything is allocated.

    Raises:
        CapacityError: the first deployment that does not fit, with both numbers.
    """
    experiment_limits(experiment, describe_ranks(pool))


def experiment_limits(experiment: Experiment, seen: Sequence[RankMachine]) -> dict[str, Limits]:
    """The scheduler's sizes of each deployment, by its name.

    A cache holds the whole workload, or else what memory there is.

    Args:
        seen: [num_ranks].

    Raises:
        UserError: experts of a deployment cannot be placed or reached so, or ranks cannot have its
            options; the text begins with its name.
        CapacityError: not even one sequence fits, with both numbers.
    """
    model, limits = experiment.model, {}
    checkpoint = Path(experiment.checkpoint) if experiment.checkpoint else None
    all_placements = check_experiment(experiment, seen[0].ranks_per_node)
    deployments = experiment.deployments + experiment.scaling
    for each, placements in zip(deployments, all_placements, strict=True):
        wanted = workload_limits(experiment.workload, model, each.layout)
        with naming(f"deployment {each.name!r}"):
            try:
                plan = LoadPlan(model, each.layout, each.options, placements, checkpoint)
                limits[each.name] = plan.fit(wanted, seen)
            except CapacityError as error:
                raise CapacityError(f"{error}; use a smaller model or shorter sequences") from None
    return limits


def measure_peak(pool: RankPool, seen: Sequence[RankMachine]) -> MachinePeak:
    """Measure at once on as many ranks as have a core or a device of their own."""
    measuring = _first_on_gpus(seen) or [
        rank for rank, each in enumerate(seen) if rank % each.ranks_per_node < each.num_cores
    ]
    rates = pool.call(MeasureRates(), ranks=measuring)
    on_gpu = seen[0].on_gpu
    return MachinePeak(
        gemm_flops_per_s=sum(each.gemm_flops_per_s for each in rates),
        read_bytes_per_s=sum(each.read_bytes_per_s for each in rates),
        num_units=len(rates) if on_gpu else sum(each.num_threads for each in rates),
        unit="GPU" if on_gpu else "core",
        dtype=seen[0].dtype,
    )


def _first_on_gpus(seen: Sequence[RankMachine]) -> list[int]:
    """One rank of each GPU; none on CPUs. The first ranks of a node have GPUs of their own."""
    found = []
    for node in {each.host for each in seen}:
        ranks = [rank for rank, each in enumerate(seen) if each.host == node and each.on_gpu]
        found += ranks[: round(sum(1 / seen[rank].ranks_on_device for rank in ranks))]
    return sorted(found)


def why_not_here(experiment: Experiment, dtype: str | None) -> str | None:
    """Why an experiment can't run on this machine's CPU, as far as is known before ranks start.

    Args:
        dtype: number type of weights and activations; None for a CPU's own choice.

    Returns:
        With both numbers where memory is short; None where nothing stands against it, and where
        ranks may run elsewhere: on GPUs, or started by torchrun.
    """
    if "WORLD_SIZE" in os.environ or any(map(os.path.exists, _ACCELERATORS)):
        return None
    free_bytes, memory_bytes = host.memory_bytes()
    rank = RankMachine(
        host="",
        num_cores=host.num_cores(),
        cpus=[],
        cpu_name="",
        device="cpu",
        backend="gloo",
        dtype=dtype or "float32",
        kernels="torch",
        torch_version="",
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        ranks_per_node=experiment.num_ranks,
        num_idle_gpus=0,
    )
    try:
        experiment_limits(experiment, [rank] * experiment.num_ranks)
    except UserError as error:
        return str(error)
    return None
