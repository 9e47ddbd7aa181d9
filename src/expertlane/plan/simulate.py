"""One deployment on a modelled cluster: a load through the scheduler on a virtual clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal

import numpy as np

from expertlane.balance.deployed import Placements, placements_of
from expertlane.cost.cluster import ModelledCluster
from expertlane.cost.execution import BOUNDS, LIKELY, OVERHEAD_S, Execution, Terms
from expertlane.cost.kv_transfer import ModelledKVTransfers
from expertlane.cost.launches import EAGER, FUSED
from expertlane.cost.links import LinkModel
from expertlane.cost.multi_token import MultiToken, Stretch, with_drafting_layer
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.pools import Pool, Served, serve, serve_apart
from expertlane.cost.pricing import Pricing
from expertlane.cost.program import ProgramBuilder
from expertlane.cost.routing import RoutingSource
from expertlane.cost.runner import CostRunner
from expertlane.errors import SpecError
from expertlane.plan.capacity import FREE_SHARE
from expertlane.plan.memory import RankMemory, fit_cache, rank_memory
from expertlane.plan.tally import Tally
from expertlane.schedule.limits import Limits
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Options
from expertlane.spec.dispatch_table import DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.load import Load, TimedRequest, draw_requests
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase
from expertlane.spec.record import StepRecord

_CONTEXTS_APART = 32  # a decode step's work is priced for so many different mean contexts
_MOST_POSITIONS_ALIKE = 64


@dataclass(frozen=True)
class ServingSetup:
    """How a model is served.

    Attributes:
        prefill_layout: of a pool for prompts alone, on devices of its own.
        routing: which experts tokens choose.
        max_num_seqs, max_num_batched_tokens: of a data-parallel rank.

    Raises:
        SpecError: one of the sizes is under 1.
    """

    layout: Layout
    prefill_layout: Layout | None
    options: Options
    types: NumberTypes
    execution: Execution
    routing: RoutingSource
    multi_token: MultiToken = field(default_factory=MultiToken)
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    @property
    def layouts(self) -> list[Layout]:
        """Of all pools, the one that prefills first."""
        first = [] if self.prefill_layout is None else [self.prefill_layout]
        return [*first, self.layout]


@dataclass(frozen=True, eq=False)
class SimulatedPool:
    """Ranks that serve together, and what they did.

    Attributes:
        memory: of the fullest rank, with the whole cache.
        limits: of the scheduler.
        num_resident: sequences of full length that the cache holds at once, over all ranks.
    """

    layout: Layout
    memory: RankMemory
    limits: Limits
    num_resident: int
    pool: Pool
    tally: Tally


@dataclass(frozen=True, eq=False)
class Outcome:
    """A load that was served.

    Attributes:
        requests: what was asked for.
        served: [num_requests]; a time for each step that gave a request tokens, one or, with
            multi-token prediction, more.
        pools: one, or the one that prefills and the one that decodes.
    """

    requests: list[TimedRequest]
    served: list[Served]
    pools: tuple[SimulatedPool, ...]


def roles(outcome: Outcome) -> tuple[Literal["both", "prefill", "decode"], ...]:
    """What each pool is for."""
    return ("both",) if len(outcome.pools) == 1 else ("prefill", "decode")


def _renumbered(step: StepRecord, first_rank: int) -> StepRecord:
    return replace(
        step,
        records=tuple(replace(each, rank=first_rank + each.rank) for each in step.records),
    )


class Simulator:
    """Simulates one deployment.

    Raises:
        UserError: the cluster is too small, or the model cannot be laid out or does not fit so.
    """

    def __init__(
        self, model: ModelConfig, cluster: ModelledCluster, setup: ServingSetup, load: Load
    ) -> None:
        check_devices(cluster, setup)
        self.model = model
        self.cluster = cluster
        self.setup = setup
        self.load = load
        self._terms = Terms.of(cluster.profile, setup.execution)
        self._pricing = Pricing(cluster.profile, setup.types)
        self._placements = [placements_of(model, each, setup.options) for each in setup.layouts]
        lengths = (
            [load.max_len] if len(setup.layouts) == 1 else [load.prompt_len.high, load.max_len]
        )
        self._limits = [
            self._fitted(layout, placements, length)
            for layout, placements, length in zip(
                setup.layouts, self._placements, lengths, strict=True
            )
        ]

    @property
    def execution(self) -> Execution:
        """How work gets onto the devices: a CPU's profile has one way alone."""
        return self._terms.execution

    @property
    def num_runs(self) -> int:
        """How often the load is served to know the bounds.

        Where requests arrive by themselves, slower steps have more of them wait and run together,
        so that each hand of the clock needs a schedule of its own.
        """
        return 1 if self.load.rate is None else len(BOUNDS)

    def run(self, seed: int, on_finished: Callable[[], None] = lambda: None) -> Outcome:
        """Serve the whole load, `num_runs` times.

        Args:
            on_finished: called for each request that is done.
        """
        outcome = self._run(seed, LIKELY, on_finished)
        if self.num_runs == 1:
            return outcome
        runs = [
            outcome if hand == LIKELY else self._run(seed, hand, on_finished)
            for hand in range(len(BOUNDS))
        ]
        served = [_merged(of_hands) for of_hands in zip(*(run.served for run in runs), strict=True)]
        return replace(outcome, served=served)

    def _run(self, seed: int, lead: int, on_finished: Callable[[], None]) -> Outcome:
        load, setup = self.load, self.setup
        requests = draw_requests(load, self.model.vocab_size, [seed], blank=True)
        shortened = [
            replace(each, output_len=setup.multi_token.num_steps(each.output_len))
            for each in requests
        ]
        pools = tuple(self._pool(place, lead) for place in range(len(setup.layouts)))
        if len(pools) == 1:
            served = serve(pools[0].pool, shortened, load.batch, on_finished=on_finished)
        else:
            prefill, decode = pools
            transfers = ModelledKVTransfers(
                self.model,
                setup.types,
                prefill.layout,
                decode.layout,
                LinkModel(self.cluster.profile),
                remote=are_apart(self.cluster, setup),
            )
            served = serve_apart(
                *(prefill.pool, decode.pool, transfers, shortened, load.batch),
                on_finished=on_finished,
            )
        for each in pools:
            each.tally.close()
        return Outcome(requests, served, pools)

    def trace(self, outcome: Outcome) -> list[StepRecord]:
        """The largest prefill and the largest decode step, each by itself, with events.

        Ranks are numbered over all pools.
        """
        steps: dict[Phase, StepRecord] = {}
        first_rank = 0
        for role, pool, of_pool in zip(
            roles(outcome), outcome.pools, self.largest_steps(outcome), strict=True
        ):
            for phase, step in of_pool.items():
                if role in ("both", phase.value):
                    steps[phase] = _renumbered(step, first_rank)
            first_rank += pool.layout.world_size
        return list(steps.values())

    def largest_steps(self, outcome: Outcome) -> list[dict[Phase, StepRecord]]:
        """By pool and phase, with events; ranks are the pool's."""
        return [
            {
                phase: self._traced(place, replace(tally.largest, phase=phase))
                for phase in Phase
                if (tally := pool.tally.phases.get(phase)) is not None and tally.largest is not None
            }
            for place, pool in enumerate(outcome.pools)
        ]

    def _traced(self, place: int, plan: StepPlan) -> StepRecord:
        runner = self._runner(place)
        done = runner.collect(runner.submit(replace(plan, record=True, record_events=True)))
        batches = [batch for part in plan.micro_batches for batch in part]
        return StepRecord(
            phase=plan.phase,
            replica=plan.replica,
            num_micro_batches=len(plan.micro_batches),
            seq_ids=tuple(seq for batch in batches for seq in batch.seq_ids.tolist()),
            num_tokens=sum(batch.num_tokens for batch in batches),
            submitted_s=done.submitted_s,
            finished_s=done.finished_s,
            records=done.records,
        )

    def _pool(self, place: int, lead: int) -> SimulatedPool:
        layout, limits = self.setup.layouts[place], self._limits[place]
        scheduler = ContinuousScheduler(
            layout, self.setup.options, self._scheduled(limits), record=False
        )
        num_drafts = self.setup.multi_token.num_drafts
        tally = Tally(self.model, self._pricing, lambda: scheduler.num_running, num_drafts)
        blocks = ceil(limits.max_model_len / limits.block_size)
        of_rank = min(limits.num_blocks // blocks, limits.max_num_seqs)
        return SimulatedPool(
            layout=layout,
            memory=self._memory(place),
            limits=limits,
            num_resident=of_rank * layout.dp * layout.replicas,
            pool=Pool(scheduler, self._runner(place, tally, lead)),
            tally=tally,
        )

    def _runner(self, place: int, tally: Tally | None = None, lead: int = LIKELY) -> CostRunner:
        """Of a pool; without a tally for single steps as they are planned."""
        setup, profile = self.setup, self.cluster.profile
        layout, drafts = setup.layouts[place], setup.multi_token.num_drafts
        form = setup.options.dispatch
        assert form != "auto", "checked before"
        builder = ProgramBuilder(
            self.model,
            layout,
            self._placements[place],
            types=setup.types,
            dispatch=DispatchTable.fixed(form, setup.options.overlap is True),
            payload=setup.options.payload,
            ranks_per_node=profile.ranks_per_node,
            block_size=setup.block_size,
            launches=EAGER if OVERHEAD_S in profile.terms else FUSED,
            num_drafts=drafts,
        )
        parts = self.model, layout, builder, setup.routing, self._pricing, self._terms
        if tally is None:
            return CostRunner(*parts)
        stretch = Stretch(setup.multi_token) if drafts else None
        context_step = min(max(self.load.max_len // _CONTEXTS_APART, 1), _MOST_POSITIONS_ALIKE)
        return CostRunner(
            *parts,
            context_step=context_step,
            observe=tally.observe if lead == LIKELY else None,
            stretch=stretch,
            lead=lead,
        )

    def _fitted(self, layout: Layout, placements: Placements, max_len: int) -> Limits:
        """Limits with the blocks that there is memory for, as many as the load could use."""
        setup = self.setup
        most_seqs = min(setup.max_num_seqs, self.load.num_requests)
        limits = Limits(
            vocab_size=self.model.vocab_size,
            max_model_len=max_len,
            num_blocks=most_seqs * (ceil(max_len / setup.block_size) + 1),
            block_size=setup.block_size,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_num_seqs=setup.max_num_seqs,
            prefix_caching=False,
        )
        free_bytes = FREE_SHARE * self.cluster.profile.device.memory_bytes
        return fit_cache(
            self._held,
            layout,
            limits,
            setup.types,
            free_bytes,
            placements=self._held_on(placements),
        )

    @property
    def _held(self) -> ModelConfig:
        """What ranks hold: the layer that guesses counts."""
        return with_drafting_layer(self.model, self.setup.multi_token)

    def _held_on(self, placements: Placements) -> Placements:
        return placements + placements[-1:] * bool(self.setup.multi_token.num_drafts)

    def _memory(self, place: int) -> RankMemory:
        """Of the fullest rank."""
        layout, limits = self.setup.layouts[place], self._limits[place]
        placements = self._held_on(self._placements[place])
        ranks = range(0, layout.replica_size, layout.stage_size)
        needs = [
            rank_memory(self._held, layout, limits, rank, self.setup.types, placements)
            for rank in ranks
        ]
        return max(needs, key=lambda need: need.total_bytes)

    def _scheduled(self, limits: Limits) -> Limits:
        """The scheduler counts a position a step; with more, a cache that is full as early."""
        load, multi_token = self.load, self.setup.multi_token
        if not multi_token.num_drafts:
            return limits
        prompt = (load.prompt_len.low + load.prompt_len.high) / 2
        output = (load.output_len.low + load.output_len.high) / 2
        share = (prompt + multi_token.num_steps(ceil(output))) / (prompt + output)
        longest = load.prompt_len.high + multi_token.num_steps(load.output_len.high)
        least = ceil(longest / limits.block_size) + 1
        return replace(limits, num_blocks=max(least, int(limits.num_blocks * share)))


def _merged(of_hands: Sequence[Served]) -> Served:
    """A request as each hand of the clock saw it in the run that it led."""
    likely = of_hands[LIKELY]
    hands = range(len(BOUNDS))
    times = zip(*(each.token_times_s for each in of_hands), strict=True)
    return replace(
        likely,
        due_s=np.array([of_hands[hand].due_s[hand] for hand in hands]),
        token_times_s=[
            np.array([of_hand[hand] for hand, of_hand in enumerate(each)]) for each in times
        ],
    )


def check_devices(cluster: ModelledCluster, setup: ServingSetup) -> None:
    """Check that a cluster has the devices, and the nodes that hierarchical dispatch is for.

    Raises:
        SpecError: it has too few.
    """
    needed = sum(layout.world_size for layout in setup.layouts)
    if needed > cluster.num_devices:
        if len(setup.layouts) == 1:
            need = f"layout {setup.layout} needs {needed} devices"
        else:
            each = " and ".join(f"{layout} with {layout.world_size}" for layout in setup.layouts)
            need = f"layouts {each} need {needed} devices"
        raise SpecError(f"{need} but {cluster} has {cluster.num_devices}")
    if setup.options.dispatch != "hierarchical":
        return
    per_node = cluster.profile.ranks_per_node
    for layout in setup.layouts:
        if layout.ep_ranks_per_node(per_node) == layout.ep:
            raise SpecError(
                f"layout {layout}: hierarchical dispatch is for experts on several nodes, but each "
                f"group of ep={layout.ep} is on one node of {per_node}; valid: all_to_all, "
                "all_gather"
            )


def are_apart(cluster: ModelledCluster, setup: ServingSetup) -> bool:
    """Whether two pools are on different nodes."""
    needed = sum(layout.world_size for layout in setup.layouts)
    return needed > cluster.profile.ranks_per_node
