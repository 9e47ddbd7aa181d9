"""A whole plan: search, rank what was found, and make records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from expertlane.cost.laws.execution import LIKELY, Execution, kernels_of
from expertlane.cost.laws.frameworks import find_framework
from expertlane.cost.memory import FREE_SHARE, RANK_STEP_TOKENS
from expertlane.cost.multi_token import ACCEPTANCE_UNSURE, MultiToken
from expertlane.cost.records import cluster_record, conditions_of, with_known_errors
from expertlane.cost.routing import RoutingChoice
from expertlane.cost.step.kernel_sets import GPU_LIBRARIES
from expertlane.cost.step.operation import Floats
from expertlane.planner.break_even import break_even
from expertlane.planner.by_engine import EngineChoice, of_each_engine
from expertlane.planner.candidates import Candidate, PlanRequest
from expertlane.planner.commands import ServedPool, ServeTarget, engine_commands, longest_request
from expertlane.planner.engines import Pool
from expertlane.planner.experiment_text import experiment_text
from expertlane.planner.explanation import best_of_families, gap_to, pareto
from expertlane.planner.screen import Known, ScreenedCandidate, fitting
from expertlane.planner.search import Finalist, OnePool, Search
from expertlane.planner.simulated import NUM_SIMULATED, serve_at_rate, simulated_pool
from expertlane.planner.throughput import ThroughputCurve
from expertlane.planner.ties import Contender, Ranking, contender, pools_tps, pools_win, ranked
from expertlane.planner.two_pools import TwoPools, TwoPoolSearch
from expertlane.progress import Progress
from expertlane.results.break_even import BreakEven
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import (
    BEST,
    DECODE_POOL,
    FAMILY,
    PARETO,
    PREFILL_POOL,
    TWO_POOLS,
    Conditions,
    DeploymentRecord,
    PoolRole,
)
from expertlane.results.results import (
    Assumption,
    EngineBest,
    NoPools,
    PlanSummary,
    Results,
    ServedLoad,
)
from expertlane.results.serving_record import ServingRecord, is_served, with_places
from expertlane.spec.experiment import Projection, ProjectionAsked
from expertlane.spec.names import Phase

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
        projection: ProjectionAsked | None = None,
        fewer: ServedLoad | None = None,
        load: Mapping[str, Any] | None = None,
    ) -> Results:
        """The records and summary of the plan.

        Args:
            loaded: the model that other systems load.
            experiment: the path of the file with `experiment`.
            projection: options beside request and routing; None where nobody simulates a row again.
            load: the lengths that were asked for.
            fewer: the next smaller cluster, where this is the smallest that serves all.
        """
        found, request = self.found, self.request
        workload, types = request.workload, request.setting.types
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
            fewer_devices=fewer,
        )
        asked = {
            "model": request.model,
            "workload": asdict(workload),
            "load": load,
            "projection": projection,
        }
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
            cluster=cluster_record(
                request.model,
                request.cluster,
                types,
                has_two_pools=self._faster_pools is not None,
                has_drafts=self.ranking.chosen.finalist.candidate.num_drafts > 0,
                num_ranks=self._most_ranks,
            ),
            assumptions=_assumptions(request, self.routing),
            cautions=self.cautions,
            plans=(summary,),
        )
        return with_known_errors(results, request.model, request.cluster.profile)

    def _engine(self, choice: EngineChoice, loaded: ServeTarget) -> EngineBest:
        """An engine's best, with commands for the better of its server and its pools."""
        engine, request = choice.engine, self.request
        aggregated = pools = None
        started: list[tuple[ScreenedCandidate, PoolRole]] = []
        if (server := choice.aggregated) is not None:
            record = self._record(server.finalist, BEST)
            aggregated = self._ranked(record, server)
            started = [(server.finalist, "both")]
        own = choice.pools
        if own is not None and (server is None or pools_win(own, server, request.workload)):
            pools = self._two(own)
            started = [(own.prefill, "prefill"), (own.decode, "decode")]
        commands = engine_commands(
            engine,
            [self._served(option, role) for option, role in started],
            loaded,
            request.setting.types,
            longest_request(request.load_at(1), request.model),
        )
        row = choice.broken
        return EngineBest(
            engine.name,
            engine.title,
            engine.version,
            aggregated,
            tuple(pools or ()),
            "" if row is None else row.says,
            "" if row is None else row.source,
            tuple(commands),
        )

    def _served(self, option: ScreenedCandidate, role: PoolRole) -> ServedPool:
        """A screened pool with the sizes to start it with."""
        profile = self.request.cluster.profile
        tokens = self.request.setting.step_tokens or RANK_STEP_TOKENS
        if profile.framework:
            tokens = find_framework(profile.framework).max_num_batched_tokens
        return ServedPool(
            Pool(option.candidate, self.request.model, role),
            option.candidate.layout.places_of_rank(option.num_seqs, self.request.num_asked),
            tokens,
            profile.devices_per_host or profile.ranks_per_node,
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
        serving = _with_wait(serving_at(found.served, 0), self.request)
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
    known: Known | None = None,
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


def pareto_records(
    options: Sequence[ScreenedCandidate], num: int, conditions: Conditions, request: PlanRequest
) -> list[DeploymentRecord]:
    """Up to `num` points of the Pareto front, spread over TPOT, as screened."""
    front = pareto(options)
    places = np.unique(np.linspace(0, len(front) - 1, num).round().astype(int))
    return [
        candidate_record(option, place, PARETO, conditions, request)
        for option, place in (front[each] for each in places)
    ]


def candidate_record(
    candidate: ScreenedCandidate,
    place: int,
    role: str,
    conditions: Conditions,
    request: PlanRequest,
) -> DeploymentRecord:
    """The record at one of the numbers of sequences that were screened, or projected in full."""
    layout, options, num_drafts = candidate.candidate
    serving = _serving_of(candidate, place, role, request)
    memory = replace(candidate.capacity.record(), num_resident=candidate.capacity.num_resident)
    prefill_tps = Estimate.between(candidate.steps.prefill_tps)
    return DeploymentRecord(
        name=str(candidate.candidate),
        layout=layout,
        options=options,
        source="projected",
        roles=(role,),
        conditions=conditions,
        pools=(memory,),
        serving=(replace(serving, prefill_tps=prefill_tps),),
        num_drafts=num_drafts,
    )


def _serving_of(
    candidate: ScreenedCandidate, place: int, role: str, request: PlanRequest
) -> ServingRecord:
    """Serving record with the wait for a place; one of two pools has places of its own."""
    serving = serving_at(candidate.served, place)
    if role in (PREFILL_POOL, DECODE_POOL):
        return serving
    return _with_wait(serving, request)


def _with_wait(serving: ServingRecord, request: PlanRequest) -> ServingRecord:
    """The record of a closed load with the wait for a place."""
    if serving.num_running is None or request.rate is not None:
        return serving
    requests_per_s = serving.output_tps / request.workload.output_len
    num_asked = request.workload.num_sequences
    return with_places(serving, serving.num_running, num_asked, requests_per_s)


def serving_at(served: ThroughputCurve, place: int) -> ServingRecord:
    """Throughput and latency at one number of sequences; times are means."""

    def mean(bounds: Floats) -> Summary | None:
        return Summary(mean=Estimate.between(bounds)) if np.isfinite(bounds).all() else None

    return ServingRecord(
        output_tps=Estimate.between(served.tps[:, place]),
        num_running=int(served.num_seqs[place]),
        ttft_s=mean(served.ttft_s[:, place]),
        tpot_s=mean(served.tpot_s[:, place]),
    )


_Row = tuple[str, str, str]  # assumption, its value, the options that change it

_OF_LIBRARIES: tuple[_Row, ...] = (
    ("kernels", "fused as in GPU libraries; flat dispatch without an exchange of counts", ""),
    (
        "data-parallel ranks",
        "each has a scheduler, which agree before every step; idle ones compute a dummy batch",
        "",
    ),
)
_OF_LATENCY: tuple[_Row, ...] = (
    (
        "TPOT",
        "mean; aggregated: other requests' prefills between decode steps included; "
        "disaggregated: decoding alone",
        "",
    ),
    (
        "TTFT",
        "mean, with waits; aggregated: to the end of the prompt's last step; disaggregated: to "
        "the first decode step, KV transfer included",
        "",
    ),
)
_OF_BOUNDS: _Row = (
    "bounds",
    "all laws low together or high together: wider than independent errors; of ratios, "
    "what is left once shared errors cancel, the rest independent",
    "",
)


def _assumptions(request: PlanRequest, routing: RoutingChoice) -> tuple[Assumption, ...]:
    """The assumptions, the weightiest first."""
    workload, profile, setting = request.workload, request.cluster.profile, request.setting
    num, is_graph = workload.num_sequences, setting.execution is Execution.GRAPH
    kernels = kernels_of(profile)
    rows = (
        (
            "workload",
            f"steady state at concurrency {num:,}, as far as memory allows: "
            f"{workload.prompt_len:,} prompt + {workload.output_len:,} output tokens",
            "--batch, --prompt-len, --output-len",
        ),
        *_of_prefixes(request),
        (
            "ranking",
            "the few that may be the best are simulated request by request on one replica; a "
            "static formula screens all, and gives the Pareto front",
            "",
        ),
        ("outputs", request.load_at(num).outputs, "--output-len"),
        ("routing", routing.words, "--routing-trace, --skew"),
        (
            "placement of experts",
            "by the load of earlier tokens, in each layer; judged by later ones",
            "",
        ),
        ("types", f"weights in {setting.types}", "--dtype, --kv-dtype"),
        (
            "execution",
            "steps captured as CUDA graphs" if is_graph else "kernels launched one by one",
            "--execution",
        ),
        *(_OF_LIBRARIES if kernels is GPU_LIBRARIES else [("kernels", kernels.assumed, "")]),
        *_of_drafts(setting.multi_token),
        *_OF_LATENCY,
        (
            "memory",
            f"{FREE_SHARE:.0%} of a device's {profile.device.memory_bytes / 1e9:.0f} "
            "GB; full-length sequences in the KV cache",
            "",
        ),
        ("profile", f"{profile.name}: {profile.device.origin}", "--cluster"),
        _OF_BOUNDS,
    )
    return tuple(Assumption(name, value, change=change) for name, value, change in rows)


def _of_prefixes(request: PlanRequest) -> list[_Row]:
    load, prefixes = request.load, request.prefixes
    if load is None or not prefixes.num:
        return []
    return [
        (
            "shared prefixes",
            f"{load.num_prefixes:,} of {load.prefix_len:,} tokens, equally likely; each "
            f"data-parallel rank caches {prefixes.num_tokens:,} tokens of each, in whole blocks, "
            "and evicts the least recently used first; a decode pool gets the keys and values of "
            "whole prompts",
            "--prefix-len, --num-prefixes",
        )
    ]


def _of_drafts(drafts: MultiToken) -> list[_Row]:
    if not drafts.num_drafts:
        return []
    fewest, _, most = sorted(drafts.tokens_bounds.tolist())
    return [
        (
            "multi-token prediction",
            f"each deployment with {drafts.num_drafts} drafts and without; "
            f"{drafts.acceptance:g} ± {ACCEPTANCE_UNSURE:g} accepted: "
            f"{drafts.tokens_per_step:.3g} tokens per step ({fewest:.3g} to {most:.3g})",
            "--mtp, --mtp-acceptance",
        )
    ]
