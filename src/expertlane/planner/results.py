"""A whole plan: search, rank what was found, and make records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from expertlane.cost.laws.frameworks import (
    ServingKind,
    cluster_record,
    conditions_of,
    find_framework,
    with_known_errors,
)
from expertlane.cost.laws.profile import LIKELY
from expertlane.cost.memory import RANK_STEP_TOKENS
from expertlane.cost.routing import RoutingChoice
from expertlane.planner.candidates import Candidate, PlanRequest
from expertlane.planner.commands import Serving, engine_commands
from expertlane.planner.engines import Row, ServedPool, ServingEngine, engines_on, longest_request
from expertlane.planner.ranking import (
    Contender,
    Ranking,
    best_of_families,
    break_even,
    contender,
    gap_to,
    pools_tps,
    pools_win,
    ranked,
)
from expertlane.planner.records import (
    candidate_record,
    experiment_text,
    pareto_records,
    plan_assumptions,
    serving_at,
    with_wait,
)
from expertlane.planner.screen import ScreenCache, ScreenedCandidate, fitting
from expertlane.planner.scripts import scripts_of
from expertlane.planner.search import Finalist, OnePool, Search
from expertlane.planner.server_start import ServeTarget
from expertlane.planner.simulated import NUM_SIMULATED, serve_at_rate, simulated_pool
from expertlane.planner.two_pools import TwoPools, TwoPoolSearch
from expertlane.progress import Progress
from expertlane.results.estimate import Estimate
from expertlane.results.record import (
    BEST,
    DECODE_POOL,
    FAMILY,
    PREFILL_POOL,
    TWO_POOLS,
    Conditions,
    DeploymentRecord,
    PoolRole,
)
from expertlane.results.results import (
    BreakEven,
    EngineBest,
    NoPools,
    PlanSummary,
    Results,
    ServedLoad,
)
from expertlane.results.serving_record import is_served
from expertlane.spec.experiment import Projection, ProjectionSetup
from expertlane.spec.names import Phase

_MOST_PAIRS = 2  # pairs of pools simulated for an engine


@dataclass(frozen=True, eq=False)
class EngineChoice:
    """The best deployment that an engine runs.

    Attributes:
        aggregated: None where it runs none that meets the limits.
        pools: disaggregated pools that may be better than `aggregated`.
        broken: the rule that excludes the plan's choice; None where the engine runs it.
    """

    engine: ServingEngine
    aggregated: Contender | None
    pools: TwoPools | None = None
    broken: Row | None = None


def of_each_engine(
    search: Search,
    ranking: Ranking,
    pools: TwoPools | NoPools,
    of_pools: TwoPoolSearch,
) -> list[EngineChoice]:
    """The best deployment of every engine, or of the one asked for.

    Args:
        search: the search of one pool that found `ranking`.
        of_pools: the search that found `pools`.
    """
    found = pools if isinstance(pools, TwoPools) else None
    workload = search.request.workload
    is_split = found is not None and pools_win(found, ranking.chosen, workload)
    engines = engines_on(search.request.cluster.profile)
    if search.request.engine is not None:
        return [EngineChoice(engines[search.request.engine], ranking.chosen, found)]
    choices = []
    for engine in engines.values():
        aggregated = _aggregated(engine, search, ranking)
        own_pools = None
        if found is not None and _may_win(found, aggregated):
            own_pools = _pools(engine, found, of_pools, search)
        if is_split and found is not None:
            row = engine.broken_by_pools(*_candidates(found), search.request.model)
        else:
            row = engine.broken(ranking.chosen.finalist.candidate, search.request.model)
        choices.append(EngineChoice(engine, aggregated, own_pools, row))
    return choices


def _candidates(pools: TwoPools) -> tuple[Candidate, Candidate]:
    return pools.prefill.candidate, pools.decode.candidate


def _may_win(pools: TwoPools, aggregated: Contender | None) -> bool:
    """True if the best pools have more tokens/s than an engine's best aggregated server."""
    tps = float(pools.served.tps[LIKELY, 0])
    return aggregated is None or tps > aggregated.tps.value


def _pools(
    engine: ServingEngine, found: TwoPools, of_pools: TwoPoolSearch, search: Search
) -> TwoPools | None:
    if engine.joins(*_candidates(found), search.request.model):
        return found
    own = of_pools.best(engine.name, _MOST_PAIRS)
    return own if isinstance(own, TwoPools) else None


def _aggregated(engine: ServingEngine, search: Search, ranking: Ranking) -> Contender | None:
    """The chosen one where the engine runs it; else the best of those that it runs."""
    model = search.request.model
    if engine.runs(ranking.chosen.finalist.candidate, model):
        return ranking.chosen
    contenders = [
        each for each in ranking.contenders if engine.runs(each.finalist.candidate, model)
    ]
    return ranked(contenders, search.request.goals).chosen if contenders else None


_NUM_BEST = 8
_NEARLY = 0.01  # share of tokens/s by which pools may be slower than the best
_NUM_TIMELINES = 3
_NUM_PARETO = 12


@dataclass(frozen=True, eq=False)
class Plan:
    """A plan and its question.

    Attributes:
        cautions: cautions for a reader, in sentences.
        search: the search for one pool.
        found: what `search` found.
        ranking: of the finalists, and of the best of other families.
        pools: the best disaggregated pools, or why there are none.
        num_pool_candidates: disaggregated deployments tried.
        engines: the best of each engine, or of the one that was asked for.
        break_even: break-even points of the best and its rival.
    """

    request: PlanRequest
    routing: RoutingChoice
    cautions: tuple[str, ...]
    search: Search
    found: OnePool
    ranking: Ranking
    pools: TwoPools | NoPools
    num_pool_candidates: int
    engines: Sequence[EngineChoice]
    break_even: BreakEven | None

    @property
    def best(self) -> Candidate:
        """The chosen deployment of one pool."""
        return self.ranking.chosen.finalist.candidate

    @property
    def served(self) -> ServedLoad:
        """Concurrent requests, or requests/s of an open load, on the recommended deployment."""
        chosen, pools = self.ranking.chosen, self._faster_pools
        curve, at_rate = chosen.finalist.served, chosen.at_rate
        if pools is not None:
            curve, at_rate = pools.served, pools.at_rate
        num_devices, rate = self.request.cluster.num_devices, self.request.rate
        if rate is None:
            return ServedLoad(num_devices, int(curve.num_seqs[0]))
        most = float(curve.tps[LIKELY, 0]) / self.request.workload.output_len
        return ServedLoad(num_devices, int(curve.num_seqs[0]), most, is_served(at_rate))

    @property
    def _most_ranks(self) -> int:
        """Ranks of the recommended deployment's largest replica."""
        pools = self._faster_pools
        if pools is None:
            return self.best.layout.replica_size
        return max(each.candidate.layout.replica_size for each in (pools.prefill, pools.decode))

    @property
    def _faster_pools(self) -> TwoPools | None:
        """Disaggregated pools, if the plan recommends them; else None."""
        pools, workload = self.pools, self.request.workload
        if not isinstance(pools, TwoPools):
            return None
        return pools if pools_win(pools, self.ranking.chosen, workload) else None

    def results(
        self,
        *,
        command: str,
        loaded: ServeTarget,
        experiment: str | None,
        scripts: str | None = None,
        projection: ProjectionSetup | None = None,
        fewer: ServedLoad | None = None,
        load: Mapping[str, Any] | None = None,
    ) -> Results:
        """The records and summary of the plan.

        Args:
            loaded: the model that other systems load.
            experiment: the path of the file with `experiment`.
            scripts: the folder with `scripts`.
            projection: options beside request and routing; None where nobody simulates a row again.
            load: the lengths that were asked for.
            fewer: the next smaller cluster, where this is the smallest that serves all.
        """
        found, request = self.found, self.request
        summary = PlanSummary(
            top_k=request.model.num_experts_per_tok,
            num_candidates=found.num_candidates,
            num_too_large=found.num_too_large,
            num_over_limits=sum(option.place is None for option in found.options),
            num_pool_candidates=self.num_pool_candidates,
            num_simulated=found.num_simulated,
            num_open=found.num_open,
            num_tied=self.ranking.num_tied,
            tie_spread=self.ranking.spread,
            tie_break=self.ranking.by,
            break_even=self.break_even,
            no_two_pools=None if isinstance(self.pools, TwoPools) else self.pools,
            engine=request.engine,
            engines=tuple(self._engine(each, loaded) for each in self.engines),
            experiment=experiment,
            scripts=scripts,
            fewer_devices=fewer,
        )
        asked = {
            "model": request.model,
            "workload": asdict(request.workload),
            "load": load,
            "projection": projection,
        }
        has_pools, has_drafts = self._faster_pools is not None, self.best.num_drafts > 0
        weights, num_ranks = request.setting.types.weights, self._most_ranks
        served = ServingKind(request.model, weights, has_pools, has_drafts, num_ranks)
        results = Results.now(
            "plan",
            command,
            asked | asdict(request.goals),
            [
                *self._best(),
                *self._families(),
                *pareto_records(found.options, _NUM_PARETO, self._conditions, request),
                *([] if isinstance(self.pools, str) else self._two(self.pools)),
            ],
            cluster=cluster_record(request.cluster, served),
            assumptions=plan_assumptions(request, self.routing),
            cautions=self.cautions,
            plans=(summary,),
        )
        return with_known_errors(results, request.model, request.cluster.profile)

    def _engine(self, choice: EngineChoice, loaded: ServeTarget) -> EngineBest:
        """An engine's best, with commands for the better of its server and its pools."""
        engine, server, own = choice.engine, choice.aggregated, self._own_pools(choice)
        aggregated = None
        if server is not None:
            aggregated = self._ranked(self._record(server.finalist, BEST), server)
        row = choice.broken
        return EngineBest(
            engine.name,
            engine.title,
            engine.version,
            aggregated,
            () if own is None else tuple(self._two(own)),
            "" if row is None else row.says,
            "" if row is None else row.source,
            tuple(engine_commands(self._serving(choice, loaded))),
        )

    def _own_pools(self, choice: EngineChoice) -> TwoPools | None:
        """An engine's disaggregated pools where they are better than its server; else None."""
        own, server = choice.pools, choice.aggregated
        if own is None or (server and not pools_win(own, server, self.request.workload)):
            return None
        return own

    def _serving(self, choice: EngineChoice, loaded: ServeTarget) -> Serving:
        """The better of an engine's server and its pools; no pools where it has neither."""
        request = self.request
        started: list[tuple[ScreenedCandidate, PoolRole]] = []
        if (own := self._own_pools(choice)) is not None:
            started = [(own.prefill, "prefill"), (own.decode, "decode")]
        elif choice.aggregated is not None:
            started = [(choice.aggregated.finalist, "both")]
        return Serving(
            choice.engine,
            [self._served(option, role) for option, role in started],
            loaded,
            request.setting.types,
            longest_request(request.load_at(1), request.model),
        )

    def scripts(self, loaded: ServeTarget) -> dict[str, str]:
        """Scripts that start the best of each engine that runs any, by the names of their files."""
        made: dict[str, str] = {}
        for choice in self.engines:
            serving = self._serving(choice, loaded)
            if serving.pools:
                made |= scripts_of(serving)
        return made

    def _served(self, option: ScreenedCandidate, role: PoolRole) -> ServedPool:
        """A screened pool with the sizes to start it with."""
        profile = self.request.cluster.profile
        tokens = self.request.setting.step_tokens or RANK_STEP_TOKENS
        if profile.framework:
            tokens = find_framework(profile.framework).max_num_batched_tokens
        return ServedPool(
            option.candidate,
            self.request.model,
            role,
            rank_seqs=option.candidate.layout.places_of_rank(
                option.num_seqs, self.request.num_asked
            ),
            step_tokens=tokens,
            devices_per_host=profile.devices_per_host or profile.ranks_per_node,
        )

    def experiment(
        self, name: str, checkpoint: str | None, comment: str, projection: Projection | None = None
    ) -> str:
        """#1 of one pool, and the best without EP that it is to be held against, as TOML.

        Args:
            checkpoint: the model's folder, if it has one.
            comment: a line that begins the file.
            projection: options beside the model and the workload.
        """
        winner = self.ranking.chosen.finalist
        ranked = [each.finalist for each in self.ranking.contenders]
        plain = [each for each in ranked if each.candidate.layout.ep == 1 and each is not winner]
        compared = [*plain[:1], winner]
        return experiment_text(self.request, name, checkpoint, compared, comment, projection)

    @property
    def _conditions(self) -> Conditions:
        setting, top_k = self.request.setting, self.request.model.num_experts_per_tok
        return conditions_of(top_k, setting.execution, self.routing.option, setting.types)

    def _in_full(
        self, finalist: Finalist, role: str, *, timelines: bool = False
    ) -> DeploymentRecord:
        record = self._record(finalist, role)
        steps = [finalist.in_full[phase] for phase in Phase if phase in finalist.in_full]
        if timelines:
            of_phases = self.search.timelines(finalist)
            steps = [replace(each, timeline=of_phases[each.phase]) for each in steps]
        return replace(record, steps=tuple(steps))

    def _best(self) -> list[DeploymentRecord]:
        """The finalists in order; the first few with their timelines."""
        return [
            self._ranked(self._in_full(each.finalist, BEST, timelines=place < _NUM_TIMELINES), each)
            for place, each in enumerate(self.ranking.contenders[:_NUM_BEST])
        ]

    def _families(self) -> list[DeploymentRecord]:
        """The best of each kind of deployment."""
        return [
            replace(
                self._ranked(self._record(each.finalist, FAMILY), each),
                name=family,
            )
            for family, each in best_of_families(self.ranking).items()
        ]

    def _ranked(self, record: DeploymentRecord, contender: Contender) -> DeploymentRecord:
        best = self.ranking.chosen
        if contender.at_rate is not None:
            record = replace(record, serving=(*record.serving, contender.at_rate))
        if contender is best:
            return record
        over = contender.tps.over(best.tps)
        is_tied = contender in self.ranking.tied
        if contender not in self.ranking.contenders:
            is_tied = over.bounds[-1] >= 1
        why = "" if is_tied else gap_to(best, contender, self.request.workload)
        return replace(record, why=why, over_best=over)

    def _record(self, finalist: Finalist, role: str) -> DeploymentRecord:
        return candidate_record(finalist, 0, role, self._conditions, self.request)

    def _two(self, found: TwoPools) -> list[DeploymentRecord]:
        """Disaggregated pools: both together, and each by itself."""
        prefill = self._in_full(found.prefill, PREFILL_POOL)
        decode = self._in_full(found.decode, DECODE_POOL)
        serving = with_wait(serving_at(found.served, 0), self.request)
        serving = replace(serving, transfer_s=Estimate.between(found.transfer_s))
        tps = pools_tps(found, self.request.workload)
        together = DeploymentRecord(
            name=f"prefill {prefill.layout}, decode {decode.layout}",
            layout=decode.layout,
            options=decode.options,
            source="projected",
            prefill_layout=prefill.layout,
            roles=(TWO_POOLS,),
            conditions=self._conditions,
            serving=(serving,) if found.at_rate is None else (serving, found.at_rate),
            over_best=tps.over(self.ranking.chosen.tps),
        )
        return [together, prefill, decode]


def make_plan(
    request: PlanRequest,
    routing: RoutingChoice,
    progress: Progress,
    cautions: tuple[str, ...] = (),
    known: ScreenCache | None = None,
) -> Plan:
    """Search one pool of all devices, then two.

    Args:
        known: prices from plans of the same model on other numbers of these devices.

    Raises:
        UserError: no layout is valid, nothing fits, or nothing keeps the limits.
    """
    search = Search(request, known)
    progress.task("aggregated: all layouts and options", len(search.candidates))
    screened = search.screen(progress.advance)
    progress.done()
    progress.task("simulating the best", NUM_SIMULATED)
    found = simulated_pool(search, screened, progress.advance)
    contenders = [contender(each, request.workload) for each in found.finalists]
    if request.rate is not None:
        contenders = [
            replace(each, at_rate=serve_at_rate(request, each.finalist)) for each in contenders
        ]
    ranking = ranked(contenders, request.goals)
    progress.done()
    of_pools = TwoPoolSearch(request, search.known, fitting(screened))
    progress.task("disaggregated: prefill and decode apart", of_pools.num_splits)
    pools = of_pools.run(progress.advance)
    progress.done()
    num_of_pools = of_pools.num_candidates
    progress.task("best of each engine", 1)
    engines = of_each_engine(search, ranking, pools, of_pools)
    best = _best_pools(pools, engines)
    if best is not pools:  # an engine's own search found better ones
        pools, engines = best, of_each_engine(search, ranking, best, of_pools)
    progress.done()
    return Plan(
        request,
        routing,
        cautions,
        search,
        found,
        ranking,
        pools,
        num_of_pools,
        engines,
        break_even(ranking, request, search.known),
    )


def _best_pools(pools: TwoPools | NoPools, engines: Sequence[EngineChoice]) -> TwoPools | NoPools:
    """The pools with most tokens/s; those that an engine runs if they have nearly as many."""
    of_engines = [each.pools for each in engines if isinstance(each.pools, TwoPools)]
    if not isinstance(pools, TwoPools) or not of_engines:
        return pools

    def tps(each: TwoPools) -> float:
        return float(each.served.tps[LIKELY, 0])

    run = max(of_engines, key=tps)
    return run if tps(run) >= (1 - _NEARLY) * tps(pools) else pools
