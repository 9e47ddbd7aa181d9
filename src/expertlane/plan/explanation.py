"""A whole plan: search, explain, and put it into records."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np

from expertlane.cost.laws.execution import Execution
from expertlane.cost.routing import RoutingChoice
from expertlane.cost.step.operation import Floats
from expertlane.memory import FREE_SHARE
from expertlane.plan.candidates import Candidate
from expertlane.plan.experiment_text import experiment_text
from expertlane.plan.families import best_of_families, pareto
from expertlane.plan.losing import why_it_loses
from expertlane.plan.option import Finalist, Option
from expertlane.plan.project import cluster_record, conditions_of
from expertlane.plan.search import OnePool, Search
from expertlane.plan.serve_commands import Served as Loaded
from expertlane.plan.serve_commands import serve_commands
from expertlane.plan.setting import Question
from expertlane.plan.structure import Screened
from expertlane.plan.throughput import Served, Steps
from expertlane.plan.two_pools import TwoPools, TwoPoolSearch
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
    PoolRecord,
    ServingRecord,
)
from expertlane.results.results import Assumption, NoPools, PlanSummary, Results

_NUM_BEST = 8
_NUM_TIMELINES = 3
_NUM_PARETO = 12


class Plan:
    """The question, and what is found of it step by step.

    Args:
        cautions: what a reader must know of the numbers, in sentences.
    """

    def __init__(
        self,
        question: Question,
        routing: RoutingChoice,
        cautions: tuple[str, ...] = (),
    ) -> None:
        self._cautions = cautions
        self._question = question
        self._routing = routing
        self._search = Search(question)
        self._pool_search = TwoPoolSearch(question)
        self._screened: list[Screened] = []
        self._found: OnePool | None = None
        self._pools: TwoPools | NoPools = "over limits"

    @property
    def num_candidates(self) -> int:
        """Deployments of one pool."""
        return len(self._search.candidates)

    @property
    def num_pool_candidates(self) -> int:
        """Deployments tried for two pools."""
        return self._pool_search.num_candidates

    def screen(self, advance: Callable[[int], None]) -> None:
        """First, one pool of all devices.

        Args:
            advance: called with a number of candidates that are done.

        Raises:
            UserError: no layout is valid.
        """
        self._screened = self._search.screen(advance)

    def search(self, advance: Callable[[int], None]) -> None:
        """Then, the best of them in full.

        Args:
            advance: called with 1 for each of at most `NUM_FINALISTS`.

        Raises:
            UserError: nothing fits, or nothing keeps the limits.
        """
        self._found = self._search.in_full(self._screened, advance)

    def search_pools(self, advance: Callable[[int], None]) -> None:
        """Last, two pools.

        Args:
            advance: called with a number of candidates that are done.
        """
        self._pools = self._pool_search.run(advance)

    @property
    def found(self) -> OnePool:
        """Of one pool; after `search`."""
        assert self._found is not None, "searched before"
        return self._found

    def results(self, *, command: str, loaded: Loaded, experiment: str | None) -> Results:
        """All that is shown.

        Args:
            loaded: what other systems are to load.
            experiment: the path of the file with `experiment`.
        """
        found, question, pools = self.found, self._question, self._pools
        traffic, goals, setting = question.traffic, question.goals, question.setting
        per_node = question.cluster.profile.ranks_per_node
        winner = found.finalists[0].option.candidate
        commands = serve_commands(
            winner,
            loaded,
            setting.types,
            traffic.full_len + 1,
            -(-winner.layout.replica_size // per_node),
        )
        summary = PlanSummary(
            top_k=question.model.num_experts_per_tok,
            num_candidates=found.num_candidates,
            num_too_large=found.num_too_large,
            num_over_limits=sum(option.place is None for option in found.options),
            num_pool_candidates=self.num_pool_candidates,
            no_two_pools=None if isinstance(pools, TwoPools) else pools,
            commands=tuple(commands),
            experiment=experiment,
        )
        asked = {
            "model": question.model,
            "workload": {
                key: getattr(traffic, key) for key in ("num_sequences", "prompt_len", "output_len")
            },
        }
        return Results.now(
            "plan",
            command,
            asked | asdict(goals),
            [
                *self._best(),
                *self._families(),
                *pareto_records(found.options, _NUM_PARETO, self._conditions),
                *self._two(),
            ],
            cluster=cluster_record(question.cluster, setting.types),
            assumptions=_assumptions(question, self._routing),
            cautions=self._cautions,
            plans=(summary,),
        )

    def experiment(self, name: str, checkpoint: str | None, comment: str) -> str:
        """The winner and what it is to be held against, as TOML.

        Args:
            checkpoint: the model's folder, if it has one.
        """
        return experiment_text(
            name,
            self._question.model,
            checkpoint,
            self._question.traffic,
            self._question.cluster.profile.ranks_per_node,
            self._compared(),
            comment,
        )

    def _compared(self) -> Sequence[tuple[str, Candidate]]:
        """The best without expert parallelism as the baseline, then the winner."""
        winner = self.found.finalists[0].option.candidate
        kinds = best_of_families(self.found.options).values()
        plain = [option.candidate for option in kinds if option.candidate.layout.ep == 1]
        others = [each for each in plain if each != winner]
        baseline = [("best without EP", others[0])] if others else []
        return [*baseline, ("planned", winner)]

    @property
    def _conditions(self) -> Conditions:
        setting = self._question.setting
        return conditions_of(
            self._question.model.num_experts_per_tok,
            setting.execution,
            self._routing.option,
            setting.types,
        )

    def _why(self, option: Option) -> str:
        return why_it_loses(self.found.finalists[0].option, option, self._question.traffic)

    def _in_full(
        self, finalist: Finalist, role: str, *, name: str | None = None, timelines: bool = False
    ) -> DeploymentRecord:
        record = finalist_record(finalist, role, self._conditions)
        steps = [finalist.prefill, finalist.decode]
        if timelines:
            of_phases = self._search.timelines(finalist)
            steps = [replace(each, timeline=of_phases[each.phase]) for each in steps]
        return replace(record, name=name or record.name, steps=tuple(steps))

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
                option_record(option, option.place or 0, FAMILY, self._conditions),
                name=family,
                why=self._why(option),
            )
            for family, option in best_of_families(self.found.options).items()
        ]

    def _two(self) -> list[DeploymentRecord]:
        """Two pools as they serve together, and each by itself."""
        found = self._pools
        if not isinstance(found, TwoPools):
            return []
        prefill = self._in_full(found.prefill, PREFILL_POOL)
        decode = self._in_full(found.decode, DECODE_POOL)
        serving = serving_record(found.served, 0)
        together = DeploymentRecord(
            name=f"{prefill.layout} prefills, {decode.layout} decodes",
            layout=decode.layout,
            options=decode.options,
            source="projected",
            prefill_layout=prefill.layout,
            roles=(TWO_POOLS,),
            conditions=self._conditions,
            serving=(replace(serving, transfer_s=Estimate.between(found.transfer_s)),),
        )
        return [together, prefill, decode]


def pareto_records(
    options: Sequence[Option], num: int, conditions: Conditions
) -> list[DeploymentRecord]:
    """At most so many points of the front, spread over TPOT, as screened."""
    front = pareto(options)
    places = np.unique(np.linspace(0, len(front) - 1, num).round().astype(int))
    return [
        option_record(option, place, PARETO, conditions)
        for option, place in (front[each] for each in places)
    ]


def option_record(
    option: Option, place: int, role: str, conditions: Conditions
) -> DeploymentRecord:
    """A deployment as screened, at one of the numbers of sequences that it was tried with."""
    return _record(option, option.steps, serving_record(option.served, place), role, conditions)


def finalist_record(finalist: Finalist, role: str, conditions: Conditions) -> DeploymentRecord:
    """A deployment in full, without its steps."""
    serving = serving_record(finalist.served, 0)
    return _record(finalist.option, finalist.steps, serving, role, conditions)


def _record(
    option: Option, steps: Steps, serving: ServingRecord, role: str, conditions: Conditions
) -> DeploymentRecord:
    capacity, (layout, options) = option.screened.capacity, option.candidate
    memory = capacity.memory
    return DeploymentRecord(
        name=str(option.candidate),
        layout=layout,
        options=options,
        source="projected",
        roles=(role,),
        conditions=conditions,
        pools=(
            PoolRecord(
                weight_bytes=memory.weight_bytes,
                activation_bytes=memory.activation_bytes,
                sequence_bytes=memory.kv_bytes,
                allowed_bytes=int(capacity.free_bytes),
            ),
        ),
        serving=(replace(serving, prefill_tps=Estimate.between(steps.prefill_tps)),),
    )


def serving_record(served: Served, place: int) -> ServingRecord:
    """What requests would feel, at one number of sequences; times are means."""

    def mean(bounds: Floats) -> Summary | None:
        is_finite = np.isfinite(bounds).all()
        return Summary(mean=Estimate.between(bounds.tolist())) if is_finite else None

    return ServingRecord(
        output_tps=Estimate.between(served.tps[:, place].tolist()),
        num_running=int(served.num_seqs[place]),
        ttft_s=mean(served.ttft_s[:, place]),
        tpot_s=mean(served.tpot_s[:, place]),
    )


def _assumptions(question: Question, routing: RoutingChoice) -> tuple[Assumption, ...]:
    """In the order of their weight."""
    traffic, profile = question.traffic, question.cluster.profile
    num = traffic.num_sequences
    graph = question.setting.execution is Execution.GRAPH
    rows = (
        (
            "workload",
            f"served without end, {num:,} sequence{'' if num == 1 else 's'} at once where "
            f"they fit: {traffic.prompt_len:,} prompt + {traffic.output_len:,} output tokens",
            "--workload",
        ),
        ("routing", routing.words, "--routing-trace, --skew"),
        ("types", f"weights in {question.setting.types}", "--dtype, --kv-dtype"),
        (
            "execution",
            "a step is captured as a CUDA graph" if graph else "launched kernel by kernel",
            "--execution",
        ),
        (
            "kernels",
            "as fused as libraries have them; flat dispatch without an exchange of counts",
            "",
        ),
        (
            "TPOT",
            "mean; of one pool, others' prefills between decode steps included; of two, the "
            "transfer of keys and values",
            "one pool or two",
        ),
        (
            "TTFT",
            "to the end of a prompt's last step, which computes the first token; its mean wait "
            "in the queue (M/D/1) included",
            "",
        ),
        (
            "memory",
            f"{FREE_SHARE:.0%} of a device's {profile.device.memory_bytes / 1e9:.0f} "
            "GB; whole sequences in the cache",
            "",
        ),
        ("profile", f"{profile.name}: {profile.device.origin}", "--cluster"),
        (
            "bounds",
            "all terms low together, all high together: wider than independent errors",
            "",
        ),
    )
    return tuple(Assumption(name, value, change=change) for name, value, change in rows)
