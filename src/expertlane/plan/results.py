"""A whole plan: search, say why one deployment serves less than another, and make records."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from expertlane.cost.laws.execution import LIKELY, Execution
from expertlane.cost.routing import RoutingChoice
from expertlane.cost.step.operation import Floats
from expertlane.memory import FREE_SHARE
from expertlane.plan.candidates import PlanRequest
from expertlane.plan.commands import ServeTarget, experiment_text, serve_commands, sizes_of
from expertlane.plan.project import cluster_record, conditions_of
from expertlane.plan.screen import ScreenedCandidate
from expertlane.plan.search import NUM_FINALISTS, Finalist, OnePool, Search
from expertlane.plan.throughput import ThroughputCurve
from expertlane.plan.two_pools import TwoPools, TwoPoolSearch
from expertlane.progress import Progress
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
    ServingRecord,
)
from expertlane.results.results import Assumption, NoPools, PlanSummary, Results
from expertlane.spec.layout import Layout
from expertlane.spec.names import ProjectedCause
from expertlane.spec.workload import Workload


def family_of(layout: Layout) -> str:
    """The family in a few words; how attention is cut is left to the layout."""
    parts = ["expert parallel" if layout.ep > 1 else "no expert parallelism"]
    if layout.pp > 1:
        parts.append("pipeline")
    if layout.replicas > 1:
        parts.append("replicas")
    return ", ".join(parts)


def best_of_families(options: Sequence[ScreenedCandidate]) -> dict[str, ScreenedCandidate]:
    """Each family's candidate with most tokens a second that keeps the limits; best first."""
    best: dict[str, ScreenedCandidate] = {}
    for option in sorted(options, key=lambda each: -each.tps):
        if option.place is not None:
            best.setdefault(family_of(option.candidate.layout), option)
    return best


def pareto(options: Sequence[ScreenedCandidate]) -> list[tuple[ScreenedCandidate, int]]:
    """Options and numbers of sequences such that none has both more TPS and a lower TPOT."""
    points = [
        (float(option.served.tpot_s[1, place]), float(option.served.tps[1, place]), option, place)
        for option in options
        for place in range(len(option.steps.num_seqs))
    ]
    front: list[tuple[ScreenedCandidate, int]] = []
    most = 0.0
    for _, tps, option, place in sorted(points, key=lambda point: (point[0], -point[1])):
        if tps > most:
            most = tps
            front.append((option, place))
    return front


_CAUSES = [str(cause) for cause in ProjectedCause]
_NAMED = 2  # causes
_LEAST = 0.1  # of the difference, for a cause to be named


def time_by_cause(option: ScreenedCandidate, workload: Workload) -> dict[str, float]:
    """Seconds of the whole system for one output token, its part of prefill included."""
    assert option.place is not None, "it meets the limits"
    decode = option.decode_by_cause_s[:, option.place] / option.num_seqs
    shares = option.prefill_by_cause_s / option.prefill_by_cause_s.sum()
    per_token = workload.prompt_len / workload.output_len
    prefill = per_token / float(option.steps.prefill_tps[LIKELY]) * shares
    named = {f"{cause} in decode": float(s) for cause, s in zip(_CAUSES, decode, strict=True)}
    named |= {f"{cause} in prefill": float(s) for cause, s in zip(_CAUSES, prefill, strict=True)}
    return named


def why_it_loses(winner: ScreenedCandidate, loser: ScreenedCandidate, workload: Workload) -> str:
    """For example `µs per token: weight reads in decode +12; memory for 316 sequences`."""
    if winner is loser:
        return ""
    mine, best = (time_by_cause(each, workload) for each in (loser, winner))
    total, least = sum(mine.values()), sum(best.values())
    more = {cause: mine[cause] - best[cause] for cause in mine}
    growth = sum(value for value in more.values() if value > 0)
    named = sorted(more, key=lambda cause: -more[cause])[:_NAMED]
    parts = [
        f"{cause} +{1e6 * more[cause]:.3g}"
        for cause in named
        if growth > 0 and more[cause] > _LEAST * growth
    ]
    if total <= least:
        return "none by this estimate"
    text = f"µs per token: {', '.join(parts)}" if parts else "slightly more of every cost"
    most = np.minimum(workload.num_sequences, winner.steps.num_seqs.max())
    room = int(loser.steps.num_seqs.max())
    if room < most:
        text += f"; memory for {room:,} sequence{'' if room == 1 else 's'}"
    return text


_NUM_BEST = 8
_NUM_TIMELINES = 3
_NUM_PARETO = 12


@dataclass(frozen=True, eq=False)
class Plan:
    """What was found, and for what.

    Attributes:
        cautions: what a reader must know of the numbers, in sentences.
        search: of one pool.
        found: by it.
        pools: the best two pools, or why there are none.
        num_pool_candidates: deployments tried for two pools.
    """

    request: PlanRequest
    routing: RoutingChoice
    cautions: tuple[str, ...]
    search: Search
    found: OnePool
    pools: TwoPools | NoPools
    num_pool_candidates: int

    @property
    def winner(self) -> ScreenedCandidate:
        """The best of one pool, as screened."""
        return self.found.finalists[0].option

    def results(self, *, command: str, loaded: ServeTarget, experiment: str | None) -> Results:
        """All that is shown.

        Args:
            loaded: what other systems are to load.
            experiment: the path of the file with `experiment`.
        """
        found, request, winner = self.found, self.request, self.winner.candidate
        workload, types = request.workload, request.setting.types
        num_nodes = -(-winner.layout.replica_size // request.cluster.profile.ranks_per_node)
        commands = serve_commands(winner, loaded, types, workload.max_len + 1, num_nodes)
        summary = PlanSummary(
            top_k=request.model.num_experts_per_tok,
            num_candidates=found.num_candidates,
            num_too_large=found.num_too_large,
            num_over_limits=sum(option.place is None for option in found.options),
            num_pool_candidates=self.num_pool_candidates,
            no_two_pools=None if isinstance(self.pools, TwoPools) else self.pools,
            commands=tuple(commands),
            experiment=experiment,
        )
        asked = {"model": request.model, "workload": sizes_of(workload)}
        return Results.now(
            "plan",
            command,
            asked | asdict(request.goals),
            [
                *self._best(),
                *self._families(),
                *pareto_records(found.options, _NUM_PARETO, self._conditions),
                *self._two(),
            ],
            cluster=cluster_record(request.cluster, types),
            assumptions=_assumptions(request, self.routing),
            cautions=self.cautions,
            plans=(summary,),
        )

    def experiment(self, name: str, checkpoint: str | None, comment: str) -> str:
        """The winner and what it is to be held against, the best without experts apart, as TOML.

        Args:
            checkpoint: the model's folder, if it has one.
            comment: a line that begins the file.
        """
        winner = self.winner.candidate
        plain = [
            option.candidate
            for option in best_of_families(self.found.options).values()
            if option.candidate.layout.ep == 1 and option.candidate != winner
        ]
        compared = {"best without EP": plain[0]} if plain else {}
        compared["planned"] = winner
        return experiment_text(self.request, name, checkpoint, compared, comment)

    @property
    def _conditions(self) -> Conditions:
        setting, top_k = self.request.setting, self.request.model.num_experts_per_tok
        return conditions_of(top_k, setting.execution, self.routing.option, setting.types)

    def _why(self, option: ScreenedCandidate) -> str:
        return why_it_loses(self.winner, option, self.request.workload)

    def _in_full(
        self, finalist: Finalist, role: str, *, timelines: bool = False
    ) -> DeploymentRecord:
        record = candidate_record(finalist, 0, role, self._conditions)
        steps = [finalist.prefill, finalist.decode]
        if timelines:
            of_phases = self.search.timelines(finalist)
            steps = [replace(each, timeline=of_phases[each.phase]) for each in steps]
        return replace(record, steps=tuple(steps))

    def _best(self) -> list[DeploymentRecord]:
        """The finalists, the best first; the first few with their timelines."""
        return [
            replace(
                self._in_full(each, BEST, timelines=place < _NUM_TIMELINES),
                why=self._why(each.option) if place else "",
            )
            for place, each in enumerate(self.found.finalists[:_NUM_BEST])
        ]

    def _families(self) -> list[DeploymentRecord]:
        """The best of each kind of deployment, as screened."""
        return [
            replace(
                candidate_record(option, option.place or 0, FAMILY, self._conditions),
                name=family,
                why=self._why(option),
            )
            for family, option in best_of_families(self.found.options).items()
        ]

    def _two(self) -> list[DeploymentRecord]:
        """The disaggregated best: both pools together, and each by itself."""
        found = self.pools
        if not isinstance(found, TwoPools):
            return []
        prefill = self._in_full(found.prefill, PREFILL_POOL)
        decode = self._in_full(found.decode, DECODE_POOL)
        serving = serving_at(found.served, 0)
        together = DeploymentRecord(
            name=f"prefill {prefill.layout}, decode {decode.layout}",
            layout=decode.layout,
            options=decode.options,
            source="projected",
            prefill_layout=prefill.layout,
            roles=(TWO_POOLS,),
            conditions=self._conditions,
            serving=(replace(serving, transfer_s=Estimate.between(found.transfer_s)),),
        )
        return [together, prefill, decode]


def make_plan(
    request: PlanRequest,
    routing: RoutingChoice,
    progress: Progress,
    cautions: tuple[str, ...] = (),
) -> Plan:
    """Search one pool of all devices, then two.

    Raises:
        UserError: no layout is valid, nothing fits, or nothing keeps the limits.
    """
    search, of_pools = Search(request), TwoPoolSearch(request)
    progress.task("aggregated: all layouts and options", len(search.candidates))
    screened = search.screen(progress.advance)
    progress.done()
    progress.task("projecting the best in full", NUM_FINALISTS)
    found = search.in_full(screened, progress.advance)
    progress.done()
    progress.task("disaggregated: prefill and decode apart", of_pools.num_candidates)
    pools = of_pools.run(progress.advance)
    progress.done()
    return Plan(request, routing, cautions, search, found, pools, of_pools.num_candidates)


def pareto_records(
    options: Sequence[ScreenedCandidate], num: int, conditions: Conditions
) -> list[DeploymentRecord]:
    """At most so many points of the front, spread over TPOT, as screened."""
    front = pareto(options)
    places = np.unique(np.linspace(0, len(front) - 1, num).round().astype(int))
    return [
        candidate_record(option, place, PARETO, conditions)
        for option, place in (front[each] for each in places)
    ]


def candidate_record(
    candidate: ScreenedCandidate, place: int, role: str, conditions: Conditions
) -> DeploymentRecord:
    """The record at one of the numbers of sequences that were screened, or projected in full."""
    layout, options = candidate.candidate
    serving = serving_at(candidate.served, place)
    prefill_tps = Estimate.between(candidate.steps.prefill_tps)
    return DeploymentRecord(
        name=str(candidate.candidate),
        layout=layout,
        options=options,
        source="projected",
        roles=(role,),
        conditions=conditions,
        pools=(candidate.capacity.record(),),
        serving=(replace(serving, prefill_tps=prefill_tps),),
    )


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


def _assumptions(request: PlanRequest, routing: RoutingChoice) -> tuple[Assumption, ...]:
    """The assumptions, the weightiest first."""
    workload, profile = request.workload, request.cluster.profile
    num = workload.num_sequences
    graph = request.setting.execution is Execution.GRAPH
    rows = (
        (
            "workload",
            f"steady state at concurrency {num:,}, as far as memory allows: "
            f" {workload.prompt_len:,} prompt + {workload.output_len:,} output tokens",
            "--workload",
        ),
        ("routing", routing.words, "--routing-trace, --skew"),
        ("types", f"weights in {request.setting.types}", "--dtype, --kv-dtype"),
        (
            "execution",
            "steps captured as CUDA graphs" if graph else "kernels launched one by one",
            "--execution",
        ),
        (
            "kernels",
            "fused as in GPU libraries; flat dispatch without an exchange of counts",
            "",
        ),
        (
            "TPOT",
            "mean; aggregated: other requests' prefills between decode steps included; "
            "disaggregated: KV transfer included",
            "",
        ),
        (
            "TTFT",
            "to the end of the prompt's last step, which computes the first token; mean queueing "
            "time (M/D/1) included",
            "",
        ),
        (
            "memory",
            f"{FREE_SHARE:.0%} of a device's {profile.device.memory_bytes / 1e9:.0f} "
            "GB; full-length sequences in the KV cache",
            "",
        ),
        ("profile", f"{profile.name}: {profile.device.origin}", "--cluster"),
        (
            "bounds",
            "all terms low together or high together: wider than independent errors",
            "",
        ),
    )
    return tuple(Assumption(name, value, change=change) for name, value, change in rows)
