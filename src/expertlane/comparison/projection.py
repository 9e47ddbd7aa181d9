"""An experiment's deployments on a modelled cluster, and better layouts: `compare --project`."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from expertlane.balance.holding import Placements
from expertlane.comparison.assumptions import projected_assumptions
from expertlane.cost.laws.frameworks import (
    ServingKind,
    cluster_record,
    conditions_of,
    with_known_errors,
)
from expertlane.cost.laws.profile import OVERHEAD_S, Execution, ModelledCluster, Profile
from expertlane.cost.memory import STEP_TOKENS, Capacity, PlacedModel, prefill_step_tokens
from expertlane.cost.projector import Projector, Setting, StepSize
from expertlane.cost.routing import (
    LoadedRouting,
    PowerLawRouting,
    RoutingChoice,
    choose_routing,
    placed,
)
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.throughput import Goals
from expertlane.errors import CapacityError, UserError
from expertlane.planner.candidates import PlanRequest, candidates_like
from expertlane.planner.ranking import Contender, contender, time_by_cause
from expertlane.planner.records import candidate_record, pareto_records
from expertlane.planner.screen import ScreenedCandidate, fitting
from expertlane.planner.search import OnePool, Search
from expertlane.planner.simulated import evaluated, simulated_pool
from expertlane.progress import Progress, each_of
from expertlane.results.record import (
    BEST,
    EXPERIMENT,
    FASTEST,
    SCALING,
    Conditions,
    DeploymentRecord,
    PoolRecord,
    StepsRecord,
    choose_compared,
)
from expertlane.results.results import PlanSummary, Results, WorkloadVerdict
from expertlane.results.serving_record import KEPT
from expertlane.spec.deployment import Deployment
from expertlane.spec.experiment import Experiment, ProjectionSetup
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase
from expertlane.spec.workload import Load, Workload

_NUM_PARETO = 24
_NUM_IN_FULL = 4  # finalists whose decode steps are projected at every context


class _Candidates:
    """Candidates that fit, and the search that projects them in full."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.options = fitting(search.screen())


CONTEXTS = (1, 128, 1024)  # and the prompt's length
PREFILL_TOKENS = 512  # tokens of a prompt in a prefill step
_MOST_SCALED = 64
_BATCH_FACTOR = 4  # from one batch size to the next

_MOST_PLANNED = 96  # devices, up to which a planner's best is shown beside an experiment's


def usual_number_type(profile: Profile) -> str:
    """The number type of the engine's ranks by default: float16 on GPUs."""
    return "float32" if OVERHEAD_S in profile.terms else "float16"


def check_has_law(deployment: Deployment) -> None:
    """Refuse weights in a type for which no profile has a law of products.

    Raises:
        UserError: they are rounded to one byte.
    """
    if deployment.options.weights != "model":
        raise UserError(
            f"deployment {deployment.name!r} has {deployment.options.weights} weights, for which "
            "no profile has a law; it can be measured, and not projected"
        )


@dataclass(frozen=True)
class ServingConditions:
    """Routing, limits and lengths with which deployments serve the whole workload.

    Attributes:
        goals: limits; each deployment runs as many sequences as they allow.
        load: lengths and shared prefixes in place of the workload's; None for the workload's.
        num_running: by deployment, sequences to run at once; fewer where they miss a limit.
    """

    routing: RoutingChoice
    goals: Goals = field(default_factory=Goals)
    load: Load | None = None
    execution: Execution = Execution.GRAPH
    num_running: Mapping[str, int] = field(default_factory=dict)


class ExperimentProjector:
    """Projects all deployments of an experiment.

    Args:
        types: number types of a deployment that does not say otherwise.
        skew: of the power law for skewed routing, the usual one; uniform routing, the best case, is
            projected too. 0 for uniform alone.
        asked: options of the projection; None where nobody simulates a deployment again.
        served: for the whole workload; None for routing by `skew`, without limits. Its execution
            comes first for single steps too, and so does recorded routing.

    Raises:
        CapacityError: the cluster has too few devices, with both numbers.
    """

    def __init__(
        self,
        experiment: Experiment,
        cluster: ModelledCluster,
        types: NumberTypes,
        skew: float,
        asked: ProjectionSetup | None = None,
        served: ServingConditions | None = None,
    ) -> None:
        self._experiment = experiment
        self._model = experiment.model
        self._cluster = cluster
        self._types = types
        self._skew = skew
        self._asked = asked
        seed = experiment.workload.seed
        self._served = served or ServingConditions(
            choose_routing(experiment.model, None, skew, seed)
        )
        self._sources: dict[str, LoadedRouting] = {}
        is_cpu = OVERHEAD_S in cluster.profile.terms
        gpu = [Execution.GRAPH, Execution.EAGER]
        gpu.sort(key=lambda each: each is not self._served.execution)
        self._executions = [Execution.SERIAL] if is_cpu else gpu
        self._routings = ("skewed", "balanced") if skew else ("balanced",)
        if not isinstance(self._served.routing.source, PowerLawRouting):
            self._routings = ("recorded", "balanced")
            self._sources["recorded"] = self._served.routing.source
        self._usual = self._conditions(self._executions[0], self._routings[0])  # in sentences
        prompt_len = experiment.workload.prompt_len
        self._contexts = sorted({each for each in CONTEXTS if each < prompt_len} | {prompt_len})
        self._check()

    def _check(self) -> None:
        for deployment in self._experiment.deployments:
            check_has_law(deployment)
            needed = deployment.layout.world_size
            if needed > self._cluster.num_devices:
                name = self._cluster.profile.name
                raise CapacityError(
                    f"deployment {deployment.name!r} needs {needed} devices but cluster "
                    f"{self._cluster} has {self._cluster.num_devices}; take {name}x{needed} or more"
                )

    def run(self, progress: Progress, command: str) -> Results:
        """All records, as results of a projection alone.

        Args:
            command: command line that repeats it.
        """
        experiment, cluster = self._experiment, self._cluster
        rows = self._rows(progress)
        context = self._context(rows)
        self._look_closer(rows, context, progress)
        scaling = self._scaling(context, progress)
        plans = self._plan(rows, context, progress)
        workload = self._serve(rows, progress)
        num_ranks = max(each.layout.replica_size for each in experiment.deployments)
        served = ServingKind(self._model, self._types.weights, num_ranks=num_ranks)
        results = Results.now(
            "comparison",
            command,
            {"experiment": experiment.question, "skew": self._skew, "projection": self._asked}
            | self._question,
            [*rows, *scaling],
            cluster=cluster_record(cluster, served),
            assumptions=projected_assumptions(
                experiment,
                cluster,
                self._types,
                self._routing_words,
                self._executions,
                self._prefill_size,
                self._request(self._types).load_at(experiment.workload.num_sequences).outputs,
            ),
            plans=plans,
            context=context,
            workload=workload,
        )
        return with_known_errors(results, self._model, cluster.profile)

    @property
    def _question(self) -> dict[str, Any]:
        """Limits and lengths that differ from the workload's, as results record them."""
        goals, load, asked = self._served.goals, self._served.load, self._experiment.projection
        found: dict[str, Any] = {} if goals == Goals() else asdict(goals)
        if load is not None:
            found["load"] = {
                "prompt_len": str(load.prompt_len),
                "output_len": str(load.output_len),
                "requests": None if asked is None else asked.requests,
            }
            if load.prefix_len:
                found["load"] |= {"prefix_len": load.prefix_len, "num_prefixes": load.num_prefixes}
        return found

    @property
    def _routing_words(self) -> str:
        """Routing, in words."""
        if self._routings[0] == "recorded":
            return f"{self._served.routing.words}; balanced: uniform"
        if not self._skew:
            return "uniform"
        return f"skewed: Zipf's law, exponent {self._skew:g}; balanced: uniform"

    @property
    def _prefill_size(self) -> StepSize:
        """A prefill step with as many tokens as a comparison's, of prompts half computed."""
        workload = self._experiment.workload
        num_new = min(PREFILL_TOKENS, workload.prompt_len)
        num_seqs = min(workload.num_sequences, max(1, STEP_TOKENS // num_new))
        cached = (workload.prompt_len - num_new) // 2
        return StepSize(num_seqs, num_new, cached, phase=Phase.PREFILL)

    def _conditions(self, execution: Execution, routing: str) -> Conditions:
        return conditions_of(self._model.num_experts_per_tok, execution, routing, self._types)

    def _setting(self, types: NumberTypes, conditions: Conditions) -> Setting:
        routing = conditions.routing
        if routing not in self._sources:
            skew = 0.0 if routing == "balanced" else self._skew
            self._sources[routing] = PowerLawRouting.of(self._model, skew)
        execution = Execution(conditions.execution)
        return Setting(types, execution, self._sources[routing], step_tokens=STEP_TOKENS)

    def _steps(
        self, deployment: Deployment, at: Conditions, cluster: ModelledCluster | None = None
    ) -> Projector:
        return Projector(
            self._model,
            deployment.layout,
            deployment.options,
            cluster or self._cluster,
            self._setting(self._types.of_deployment(deployment.options), at),
        )

    def _rows(self, progress: Progress) -> list[DeploymentRecord]:
        """Every deployment under all conditions, the usual ones first."""
        deployments = self._experiment.deployments
        cases = list(product(self._executions, self._routings, deployments))
        rows: list[DeploymentRecord] = []
        for case in each_of(cases, progress, f"projecting on {self._cluster}"):
            execution, routing, deployment = case
            conditions = self._conditions(execution, routing)
            if routing != self._routings[0] and deployment.layout.ep == 1:
                # Every rank has a part of every expert: as under skewed routing, before.
                row = replace(rows[-len(deployments)], conditions=conditions)
            else:
                row = replace(self._row(deployment, conditions), roles=(EXPERIMENT,))
            rows.append(row)
        return rows

    def _look_closer(self, rows: list[DeploymentRecord], context: int, progress: Progress) -> None:
        """Add steps of other batch sizes and timelines, under the usual conditions."""
        deployments = list(enumerate(self._experiment.deployments))
        for place, deployment in each_of(deployments, progress, "batch sizes and timelines"):
            steps, row = self._steps(deployment, self._usual), rows[place]
            assert row.name == deployment.name, "usual conditions come first"
            *fewer, all_seqs = self._decode_sizes(deployment, context)
            of_all = row.decode_of(context, all_seqs.num_seqs)
            seen = []
            for step in row.steps:
                size = self._prefill_size if step.phase is Phase.PREFILL else all_seqs
                if step.phase is Phase.PREFILL or step is of_all:
                    step = replace(step, timeline=steps.timeline(size))
                seen.append(step)
            rows[place] = replace(row, steps=(*seen, *map(steps.step, fewer)))

    def _decode_sizes(self, deployment: Deployment, context: int) -> list[StepSize]:
        """Steps of 1, 4, 16 … sequences, then of all."""
        num_all = self._experiment.workload.num_sequences
        batches = [1]
        while batches[-1] * _BATCH_FACTOR < num_all:
            batches.append(batches[-1] * _BATCH_FACTOR)
        return self._sizes(deployment, context, [*batches, num_all] if num_all > 1 else batches)

    def _sizes(
        self, deployment: Deployment, context: int, nums_seqs: Iterable[int]
    ) -> list[StepSize]:
        resident = self._resident(deployment, context)
        return [StepSize(num, 1, context, fits=resident >= num) for num in nums_seqs]

    def _row(self, deployment: Deployment, at: Conditions) -> DeploymentRecord:
        num_seqs = self._experiment.workload.num_sequences
        capacity = self._capacity(deployment)
        projector = self._steps(deployment, at)
        sizes = [self._prefill_size] if capacity.max_seqs else []
        for context in self._contexts:
            resident = self._resident(deployment, context)
            sizes.append(StepSize(num_seqs, 1, context, fits=resident >= num_seqs))
            if 0 < resident < num_seqs:
                sizes.append(StepSize(resident, 1, context))
        pool = replace(capacity.record(), num_resident=capacity.num_resident)
        steps = map(projector.step, sizes)
        return replace(_record(deployment, at, pool, steps), is_baseline=deployment.is_baseline)

    def _resident(self, deployment: Deployment, context: int) -> int:
        return self._capacity(deployment, context + 1).num_resident

    def _capacity(self, deployment: Deployment, full_len: int | None = None) -> Capacity:
        model, layout, workload = self._model, deployment.layout, self._experiment.workload
        placements = self._placed(deployment)
        return PlacedModel(
            model, layout, self._types.of_deployment(deployment.options), placements
        ).capacity(
            self._cluster.profile.device.memory_bytes,
            full_len or workload.max_len,
            prefill_step_tokens(workload, layout),
        )

    def _placed(self, deployment: Deployment) -> Placements:
        """[num_hidden_layers]; placed by the usual routing; other routings have as many slots."""
        routing = self._setting(self._types, self._usual).routing
        per_node = self._cluster.profile.ranks_per_node
        return placed(self._model, deployment.layout, deployment.options, routing, per_node)

    def _context(self, rows: list[DeploymentRecord]) -> int:
        """The longest context at which all sequences fit everywhere; else the shortest."""
        fitting = [
            context
            for context in self._contexts
            if all(step.fits for row in rows for step in row.steps if step.context == context)
        ]
        return max(fitting, default=self._contexts[0])

    def _scaling(self, context: int, progress: Progress) -> list[DeploymentRecord]:
        """Decode steps of the experiment's scaling sizes, and of doublings beyond its ranks."""
        family = each_of(_scaling_family(self._experiment), progress, "scaling")
        return [self._scaled(deployment, context) for deployment in family]

    def _scaled(self, deployment: Deployment, context: int) -> DeploymentRecord:
        layout = deployment.layout
        cluster = ModelledCluster(self._cluster.profile, layout.world_size)
        projector = self._steps(deployment, self._usual, cluster)
        num_all = self._experiment.workload.num_sequences
        share = self._experiment.num_sequences_alike(layout)
        capacity = self._capacity(deployment, context + 1)
        of_layer = next(filter(None, self._placed(deployment)), None)
        sizes = self._sizes(deployment, context, dict.fromkeys((num_all, share)))  # once if alike
        pool = PoolRecord(
            weight_bytes=capacity.memory.weight_bytes,
            allowed_bytes=int(capacity.free_bytes),
            num_slots_per_rank=max(map(len, of_layer.experts_of_rank)) if of_layer else 0,
        )
        steps = map(projector.step, sizes)
        return replace(_record(deployment, self._usual, pool, steps), roles=(SCALING,))

    def _request(self, types: NumberTypes) -> PlanRequest:
        """The whole workload under the usual conditions."""
        routing, execution = self._served.routing.source, Execution(self._usual.execution)
        setting = Setting(types, execution, routing, step_tokens=STEP_TOKENS)
        workload, load = self._experiment.workload, self._served.load
        return PlanRequest(self._model, self._cluster, workload, Goals(), setting, load=load)

    def _serve(self, rows: list[DeploymentRecord], progress: Progress) -> WorkloadVerdict | None:
        """Simulate the whole workload on each deployment; add it to the rows, and compare.

        Those that miss a limit are compared only where all do.
        """
        deployments, served = self._experiment.deployments, self._served
        goals, per_node = served.goals, self._cluster.profile.ranks_per_node
        contenders: dict[int, Contender] = {}
        missing: dict[int, Contender] = {}
        for place, each in each_of(list(enumerate(deployments)), progress, "the whole workload"):
            request = self._request(self._types.of_deployment(each.options))
            setting = replace(request.setting, step_tokens=None)
            request = replace(request, setting=setting, goals=goals)
            candidates = candidates_like(each.layout, each.options, per_node)
            found = evaluated(request, candidates, served.num_running.get(each.name))
            if found is None:
                continue
            is_kept = found.served.breach(goals)[0] <= KEPT
            (contenders if is_kept else missing)[place] = contender(found, request.workload)
            record = candidate_record(found, 0, EXPERIMENT, self._usual, request)
            (serving,) = record.serving
            rows[place] = replace(
                rows[place],
                serving=(replace(serving, slos=found.served.slos or ()),),
                served_with=record.options,
            )
        return _verdict(rows, contenders or missing, self._experiment.workload)

    def _plan(
        self, rows: list[DeploymentRecord], context: int, progress: Progress
    ) -> tuple[PlanSummary, ...]:
        """Add what a planner finds under the usual conditions; gives the search's summary.

        It searches for the fastest decode step at the context, and for the most output of the
        workload. An own deployment with the fastest step gets that role.

        Args:
            rows: those of the usual conditions come first.
        """
        if self._cluster.num_devices > _MOST_PLANNED:
            return ()
        request = self._request(self._types)
        progress.task("looking for better layouts", 2)
        # Prompts of one token and outputs around the context: next to nothing but decode steps.
        around = replace(request.workload, prompt_len=1, output_len=2 * context - 1)
        of_decode = replace(request, workload=around)
        options = fitting(Search(of_decode).screen())
        progress.advance()
        search = Search(replace(request, setting=replace(request.setting, step_tokens=None)))
        found: OnePool | None = None
        with suppress(UserError):  # nothing fits
            found = simulated_pool(search, search.screen(), lambda _: None, with_families=False)
        progress.advance()
        place, fastest = self._fastest(options, context, rows)
        if fastest is not None:
            rows[place : place + 1] = [replace(fastest, roles=(*fastest.roles, FASTEST))]
        if found is not None:
            rows.append(candidate_record(found.finalists[0], 0, BEST, self._usual, request))
        if options:
            rows += pareto_records(options, _NUM_PARETO, self._usual, of_decode)
        progress.done()
        summary = PlanSummary(
            top_k=request.model.num_experts_per_tok,
            num_candidates=found.num_candidates if found else 0,
            num_too_large=found.num_too_large if found else 0,
            num_simulated=found.num_simulated if found else 0,
        )
        return (summary,)

    def _fastest(
        self, options: Sequence[ScreenedCandidate], context: int, rows: Sequence[DeploymentRecord]
    ) -> tuple[int, DeploymentRecord | None]:
        """The fastest decode step of all sequences, own or a candidate's, and its place in rows."""
        num_seqs = self._experiment.workload.num_sequences
        found = list(enumerate(rows[: len(self._experiment.deployments)]))
        known = {(row.layout, row.options) for _, row in found}
        able = [each for each in options if each.num_seqs >= num_seqs]
        able.sort(key=lambda each: -each.tps)
        of_layout = {each.candidate.layout: each for each in reversed(able)}
        best = sorted(of_layout.values(), key=lambda each: -each.tps)[:_NUM_IN_FULL]
        for candidate in (each.candidate for each in best):
            if (candidate.layout, candidate.options) not in known:
                deployment = Deployment(str(candidate), candidate.layout, candidate.options)
                found.append((len(rows), self._row(deployment, self._usual)))
        timed = [
            (step.round_s.value, number, place, row)
            for number, (place, row) in enumerate(found)
            if (step := row.decode_of(context, num_seqs)) is not None and step.fits
        ]
        return min(timed)[2:] if timed else (0, None)


def _verdict(
    rows: Sequence[DeploymentRecord], contenders: Mapping[int, Contender], workload: Workload
) -> WorkloadVerdict | None:
    """The comparison of those that serve the workload; None without any."""
    places = list(contenders)
    tps = [contenders[place].tps.value for place in places]
    compared = [places[each] for each in choose_compared([rows[p] for p in places], tps)]
    if not compared:
        return WorkloadVerdict(rows[places[0]].name) if places else None
    one, *others = (contenders[place] for place in compared)
    mine, rivals = (time_by_cause(each.finalist, workload) for each in (one, others[0]))
    return WorkloadVerdict(
        rows[compared[0]].name,
        {
            rows[place].name: one.tps.over(other.tps)
            for place, other in zip(compared[1:], others, strict=True)
        },
        {
            cause: mine.get(cause, 0.0) - rivals.get(cause, 0.0)
            for cause in dict.fromkeys([*mine, *rivals])
        },
    )


def _record(
    deployment: Deployment, at: Conditions, pool: PoolRecord, steps: Iterable[StepsRecord]
) -> DeploymentRecord:
    return DeploymentRecord(
        name=deployment.name,
        layout=deployment.layout,
        options=deployment.options,
        source="projected",
        conditions=at,
        pools=(pool,),
        steps=tuple(steps),
    )


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
