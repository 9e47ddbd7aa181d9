"""An experiment's deployments on a modelled cluster: what `compare --project` adds."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from expertlane.balance.placement_file import placements_of
from expertlane.compare.assumptions import projected_assumptions
from expertlane.compare.best_layout import plan_beside
from expertlane.cost.laws.execution import OVERHEAD_S, Execution
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import PowerLawRouting, RoutingSource
from expertlane.errors import CapacityError
from expertlane.memory import FREE_SHARE, STEP_TOKENS, Capacity, PlacedModel, prefill_step_tokens
from expertlane.plan.candidates import MOST_DEVICES
from expertlane.plan.project import (
    Projector,
    Setting,
    StepSize,
    cluster_record,
    conditions_of,
)
from expertlane.progress import Progress
from expertlane.results.record import (
    EXPERIMENT,
    SCALING,
    Conditions,
    DeploymentRecord,
    PoolRecord,
    StepsRecord,
)
from expertlane.results.results import PlanSummary, Results
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Experiment
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase

CONTEXTS = (1, 128, 1024)  # and the prompt's length
PREFILL_TOKENS = 512  # of a prompt in a prefill step
_MOST_SCALED = 64
_BATCH_FACTOR = 4  # from one batch size to the next


def usual_number_type(cluster: ModelledCluster) -> str:
    """What the engine's ranks compute in if nobody says otherwise: float16 on GPUs."""
    return "float32" if OVERHEAD_S in cluster.profile.terms else "float16"


class ExperimentProjector:
    """Projects all deployments of an experiment.

    Args:
        number_type: of weights, hidden states, keys and values.
        skew: of the power law for routing that is skewed.
    """

    def __init__(
        self, experiment: Experiment, cluster: ModelledCluster, number_type: str, skew: float
    ) -> None:
        self._experiment = experiment
        self._cluster = cluster
        self._types = NumberTypes.all_of(number_type)
        self._skew = skew
        self._sources: dict[str, RoutingSource] = {}
        prompt_len = experiment.workload.prompt_len
        self._contexts = sorted({each for each in CONTEXTS if each < prompt_len} | {prompt_len})
        self.check()

    def check(self) -> None:
        """Compare the cluster with what the experiment asks for.

        Raises:
            CapacityError: it has too few devices, with both numbers.
        """
        for deployment in self._experiment.deployments:
            needed = deployment.layout.world_size
            if needed > self._cluster.num_devices:
                name = self._cluster.profile.name
                raise CapacityError(
                    f"deployment {deployment.name!r} needs {needed} devices but cluster "
                    f"{self._cluster} has {self._cluster.num_devices}; take {name}x{needed} or more"
                )

    def run(self, progress: Progress, command: str) -> Results:
        """Everything, as results of a projection alone.

        Args:
            command: how a user repeats it.
        """
        experiment, cluster = self._experiment, self._cluster
        rows = self._rows(progress)
        context = self._context(rows)
        rows = self._seen_closer(rows, context, progress)
        scaling = self._scaling(context, progress)
        rows, plans = self._planned(rows, context, progress)
        return Results.now(
            "comparison",
            command,
            {"experiment": experiment, "skew": self._skew},
            [*rows, *scaling],
            cluster=cluster_record(cluster, self._types),
            assumptions=projected_assumptions(
                experiment, cluster, self._types, self._skew, self._executions, self._prefill_size
            ),
            plans=plans,
            context=context,
        )

    @property
    def _executions(self) -> tuple[Execution, ...]:
        if OVERHEAD_S in self._cluster.profile.terms:
            return (Execution.SERIAL,)
        return (Execution.GRAPH, Execution.EAGER)

    @property
    def _prefill_size(self) -> StepSize:
        """As many tokens as a comparison's steps have, of prompts half way."""
        workload = self._experiment.workload
        num_new = min(PREFILL_TOKENS, workload.prompt_len)
        num_seqs = min(workload.num_sequences, max(1, STEP_TOKENS // num_new))
        cached = (workload.prompt_len - num_new) // 2
        return StepSize(num_seqs, num_new, cached, phase=Phase.PREFILL)

    def _conditions(self, execution: Execution, routing: str) -> Conditions:
        top_k = self._experiment.model.num_experts_per_tok
        return conditions_of(top_k, execution, routing, self._types)

    @property
    def _usual(self) -> Conditions:
        """Those that are spoken of."""
        return self._conditions(self._executions[0], "balanced")

    def _setting(self, conditions: Conditions) -> Setting:
        routing = conditions.routing
        if routing not in self._sources:
            skew = 0.0 if routing == "balanced" else self._skew
            self._sources[routing] = PowerLawRouting.of(self._experiment.model, skew)
        source = self._sources[routing]
        execution = Execution(conditions.execution)
        return Setting(self._types, execution, source, step_tokens=STEP_TOKENS)

    def _rows(self, progress: Progress) -> list[DeploymentRecord]:
        deployments = self._experiment.deployments
        all_conditions = [
            self._conditions(*each) for each in product(self._executions, ("balanced", "skewed"))
        ]
        progress.task(f"projecting on {self._cluster}", len(all_conditions) * len(deployments))
        rows: list[DeploymentRecord] = []
        for conditions in all_conditions:
            for deployment in deployments:
                row = self._row(deployment, conditions, rows)
                rows.append(replace(row, roles=(EXPERIMENT,)))
                progress.advance()
        progress.done()
        return rows

    def _seen_closer(
        self, rows: list[DeploymentRecord], context: int, progress: Progress
    ) -> list[DeploymentRecord]:
        """With steps of other batch sizes and timelines, under the usual conditions."""
        usual = self._usual
        deployments = self._experiment.deployments
        progress.task("batch sizes and timelines", len(deployments))
        closer = list(rows)
        for place, deployment in enumerate(deployments):
            model = self._experiment.model
            layout, options = deployment.layout, deployment.options
            steps = Projector(model, layout, options, self._cluster, self._setting(usual))
            assert rows[place].name == deployment.name, "usual conditions come first"
            resident = self._resident(model, deployment, context)
            num_all = self._experiment.workload.num_sequences
            batches = [*_batches(num_all), num_all]
            sizes = [StepSize(num, 1, context, fits=resident >= num) for num in batches]
            of_all = rows[place].decode_of(context, num_all)
            seen = []
            for step in rows[place].steps:
                size = self._prefill_size if step.phase is Phase.PREFILL else sizes[-1]
                if step.phase is Phase.PREFILL or step is of_all:
                    step = replace(step, timeline=steps.timeline(size))
                seen.append(step)
            fewer = map(steps.step, sizes[:-1])
            closer[place] = replace(rows[place], steps=(*seen, *fewer))
            progress.advance()
        progress.done()
        return closer

    def _row(
        self, deployment: Deployment, at: Conditions, before: list[DeploymentRecord]
    ) -> DeploymentRecord:
        if deployment.layout.ep == 1:  # every rank has a part of every expert: routing is no matter
            for row in before:
                alike = row.conditions and replace(row.conditions, routing=at.routing)
                if (row.name, alike) == (deployment.name, at):
                    return replace(row, conditions=at)
        model, layout, options = self._experiment.model, deployment.layout, deployment.options
        room = self._room(model, layout, options)
        steps = Projector(model, layout, options, self._cluster, self._setting(at))
        prefill = (steps.step(self._prefill_size),) if room.max_seqs else ()
        return DeploymentRecord(
            name=deployment.name,
            layout=layout,
            options=options,
            source="projected",
            is_baseline=deployment.is_baseline,
            conditions=at,
            pools=(replace(room.record(), num_resident=room.num_resident),),
            steps=(*prefill, *self._decode(steps, model, deployment)),
        )

    def _decode(
        self, steps: Projector, model: ModelConfig, deployment: Deployment
    ) -> Iterator[StepsRecord]:
        num_seqs = self._experiment.workload.num_sequences
        for context in self._contexts:
            resident = self._resident(model, deployment, context)
            yield steps.step(StepSize(num_seqs, 1, context, fits=resident >= num_seqs))
            if 0 < resident < num_seqs:
                yield steps.step(StepSize(resident, 1, context))

    def _resident(self, model: ModelConfig, deployment: Deployment, context: int) -> int:
        room = self._room(model, deployment.layout, deployment.options, context + 1)
        return room.num_resident

    def _room(
        self, model: ModelConfig, layout: Layout, options: Options, full_len: int | None = None
    ) -> Capacity:
        workload = self._experiment.workload
        return PlacedModel(
            model, layout, self._types, placements_of(model, layout, options)
        ).capacity(
            self._cluster.profile.device.memory_bytes,
            full_len or workload.max_len,
            prefill_step_tokens(workload, layout, STEP_TOKENS),
        )

    def _context(self, rows: list[DeploymentRecord]) -> int:
        """The longest that all sequences fit with everywhere; else the shortest."""
        fitting = [
            context
            for context in self._contexts
            if all(step.fits for row in rows for step in row.steps if step.context == context)
        ]
        return max(fitting, default=self._contexts[0])

    def _scaling(self, context: int, progress: Progress) -> list[DeploymentRecord]:
        """The experiment's sizes, and doublings of them beyond its ranks."""
        family = _scaling_family(self._experiment)
        progress.task("scaling", len(family))
        found = []
        for deployment in family:
            found.append(self._scaled(deployment, context))
            progress.advance()
        progress.done()
        return found

    def _scaled(self, deployment: Deployment, context: int) -> DeploymentRecord:
        model, layout = self._experiment.model, deployment.layout
        cluster = ModelledCluster(self._cluster.profile, layout.world_size)
        usual = self._usual
        steps = Projector(model, layout, deployment.options, cluster, self._setting(usual))
        num_all = self._experiment.workload.num_sequences
        share = max(1, num_all // self._experiment.num_ranks) * layout.world_size
        resident = self._resident(model, deployment, context)
        room = self._room(model, layout, deployment.options, context + 1)
        placed = next(filter(None, placements_of(model, layout, deployment.options)), None)
        sizes = dict.fromkeys((num_all, share))  # once where they are alike
        return DeploymentRecord(
            name=deployment.name,
            layout=layout,
            options=deployment.options,
            source="projected",
            roles=(SCALING,),
            conditions=usual,
            pools=(
                PoolRecord(
                    weight_bytes=room.memory.weight_bytes,
                    allowed_bytes=int(FREE_SHARE * cluster.profile.device.memory_bytes),
                    num_slots_per_rank=max(map(len, placed.experts_of_rank)) if placed else 0,
                ),
            ),
            steps=tuple(
                steps.step(StepSize(num, 1, context, fits=resident >= num)) for num in sizes
            ),
        )

    def _planned(
        self, rows: Sequence[DeploymentRecord], context: int, progress: Progress
    ) -> tuple[list[DeploymentRecord], tuple[PlanSummary, ...]]:
        """The rows with what a planner finds under the usual conditions, which come first."""
        if self._cluster.num_devices > MOST_DEVICES:
            return list(rows), ()
        usual, num_own = self._usual, len(self._experiment.deployments)

        def row_of(deployment: Deployment) -> DeploymentRecord:
            return self._row(deployment, usual, [])

        progress.task("looking for better layouts", 2)
        summary, found = plan_beside(
            self._experiment.model,
            self._cluster,
            self._experiment.workload,
            self._setting(usual),
            usual,
            context,
            rows[:num_own],
            row_of,
            progress,
        )
        progress.done()
        return [*found[:num_own], *rows[num_own:], *found[num_own:]], (summary,)


def _batches(num_all: int) -> list[int]:
    """Fewer sequences than all: 1, 4, 16 …"""
    batches = [1]
    while batches[-1] * _BATCH_FACTOR < num_all:
        batches.append(batches[-1] * _BATCH_FACTOR)
    return [each for each in batches if each < num_all]


def _scaling_family(experiment: Experiment) -> list[Deployment]:
    if not experiment.scaling:
        return []
    first = experiment.scaling[0]
    by_size = {each.layout.ep: each for each in experiment.scaling}
    for deployment in experiment.deployments:
        layout = deployment.layout
        if _family(layout) == _family(first.layout) and deployment.options == first.options:
            by_size.setdefault(layout.ep, deployment)
    size = max(by_size)
    largest = by_size[size].layout
    while largest.dp == largest.ep and 2 * size <= _MOST_SCALED:
        size *= 2
        layout = replace(largest, dp=size, ep=size)
        by_size[size] = Deployment(f"EP {size}", layout, first.options)
    return [by_size[size] for size in sorted(by_size)]


def _family(layout: Layout) -> tuple[int, ...]:
    return layout.replicas, layout.pp, layout.tp, layout.etp
