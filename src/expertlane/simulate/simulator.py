"""One deployment on a modelled cluster: a load through the scheduler on a virtual clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from expertlane.balance.placement_file import Placements, placements_of
from expertlane.cost.kv_transfer import ModelledKVTransfers
from expertlane.cost.laws.execution import BOUNDS, LIKELY, OVERHEAD_S, Execution, Terms
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.multi_token import MultiTokenAdapter, with_drafting_layer
from expertlane.cost.pricing import Pricing
from expertlane.cost.runner import CostRunner, StepSharing
from expertlane.cost.step.kernel_sets import ENGINE, GPU_LIBRARIES
from expertlane.cost.step.program import ProgramBuilder
from expertlane.memory import FREE_SHARE, RankMemory, fit_cache, rank_memory
from expertlane.results.record import PoolRole
from expertlane.results.step_record import StepRecord
from expertlane.schedule.drive import FinishedStep
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.request import Limits
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.simulate.pools import Pool, Served, serve, serve_apart
from expertlane.simulate.setup import ServingSetup, are_apart, check_devices
from expertlane.simulate.totals import PoolTotals
from expertlane.spec.deployment import DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase
from expertlane.spec.workload import Load, TimedRequest, draw_requests

_CONTEXTS_APART = 32  # a step's work is priced for so many different mean contexts
_MOST_POSITIONS_ALIKE = 64
_SHARE_ALIKE = 1 / 256  # of reading all weights: reading so many cached positions more is no matter


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
    totals: PoolTotals


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


def roles(outcome: Outcome) -> tuple[PoolRole, ...]:
    """What each pool is for."""
    return ("both",) if len(outcome.pools) == 1 else ("prefill", "decode")


def _moved(step: StepRecord, first_rank: int, begin_s: float) -> StepRecord:
    """The same step on other ranks, submitted at another time."""
    later_s = begin_s - step.submitted_s
    records = []
    for each in step.records:
        events = each.events
        assert events is not None, "asked for"
        events = replace(events, start_s=events.start_s + later_s)
        records.append(replace(each, rank=first_rank + each.rank, events=events))
    return replace(
        step,
        submitted_s=begin_s,
        finished_s=step.finished_s + later_s,
        records=tuple(records),
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

        self._sharing = [self._step_sharing(place) for place in range(len(setup.layouts))]

    @property
    def execution(self) -> Execution:
        """How work gets onto the devices: a CPU's profile has one way alone."""
        return self._terms.execution

    @property
    def num_runs(self) -> int:
        """How often the load is served to know the bounds.

        Where requests arrive by themselves, slower steps have more of them wait and run together,
        so that each bound needs a schedule of its own.
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
        served = [_merged(of_runs) for of_runs in zip(*(run.served for run in runs), strict=True)]
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
            each.totals.close()
        return Outcome(requests, served, pools)

    def trace(self, outcome: Outcome) -> list[StepRecord]:
        """The largest prefill and the largest decode step, one after the other, with events.

        Each was replayed by itself: it begins when the one before is done, with all ranks at rest.
        Ranks are numbered over all pools.
        """
        steps: list[StepRecord] = []
        first_rank, begin_s = 0, 0.0
        for role, pool, of_pool in zip(
            roles(outcome), outcome.pools, self.largest_steps(outcome), strict=True
        ):
            for phase, step in of_pool.items():
                if role in ("both", phase.value):
                    steps.append(_moved(step, first_rank, begin_s))
                    begin_s = steps[-1].finished_s
            first_rank += pool.layout.world_size
        return steps

    def largest_steps(self, outcome: Outcome) -> list[dict[Phase, StepRecord]]:
        """By pool and phase, with events; ranks are the pool's."""
        return [
            {
                phase: self._traced(place, replace(totals.largest, phase=phase))
                for phase in Phase
                if (totals := pool.totals.phases.get(phase)) is not None
                and totals.largest is not None
            }
            for place, pool in enumerate(outcome.pools)
        ]

    def _traced(self, place: int, plan: StepPlan) -> StepRecord:
        runner = self._runner(place)
        done = runner.collect(runner.submit(replace(plan, record=True, record_events=True)))
        seq_ids = tuple(seq for batch in plan.batches for seq in batch.seq_ids.tolist())
        return replace(FinishedStep(plan, done).record(), seq_ids=seq_ids)

    def _pool(self, place: int, lead: int) -> SimulatedPool:
        layout, limits = self.setup.layouts[place], self._limits[place]
        scheduler = ContinuousScheduler(
            layout, self.setup.options, self._scheduled(limits), record=False
        )
        num_drafts = self.setup.multi_token.num_drafts
        totals = PoolTotals(self.model, self._pricing, lambda: scheduler.num_running, num_drafts)
        blocks = ceil(limits.max_model_len / limits.block_size)
        of_rank = min(limits.num_blocks // blocks, limits.max_num_seqs)
        return SimulatedPool(
            layout=layout,
            memory=self._memory(place),
            limits=limits,
            num_resident=of_rank * layout.dp * layout.replicas,
            pool=Pool(scheduler, self._runner(place, totals, lead)),
            totals=totals,
        )

    def _runner(
        self, place: int, totals: PoolTotals | None = None, lead: int = LIKELY
    ) -> CostRunner:
        """Of a pool; without totals for single steps as they are planned."""
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
            kernels=ENGINE if OVERHEAD_S in profile.terms else GPU_LIBRARIES,
            num_drafts=drafts,
        )
        parts = self.model, layout, builder, setup.routing, self._pricing, self._terms
        if totals is None:
            return CostRunner(*parts)
        multi_token = MultiTokenAdapter(setup.multi_token) if drafts else None
        return CostRunner(
            *parts,
            sharing=self._sharing[place],
            observe=totals.observe if lead == LIKELY else None,
            multi_token=multi_token,
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

    def _step_sharing(self, place: int) -> StepSharing:
        context_step = min(max(self.load.max_len // _CONTEXTS_APART, 1), _MOST_POSITIONS_ALIKE)
        memory, limits = self._memory(place), self._limits[place]
        num_positions = limits.num_blocks * limits.block_size
        few = int(_SHARE_ALIKE * memory.weight_bytes * num_positions / memory.kv_bytes)
        return StepSharing(context_step, self.setup.layouts[place].replica_size, max(few, 1))

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


def _merged(of_runs: Sequence[Served]) -> Served:
    """A request with the times of each bound, from the run that this bound scheduled."""
    likely = of_runs[LIKELY]
    bounds = range(len(BOUNDS))
    times = zip(*(each.token_times_s for each in of_runs), strict=True)
    return replace(
        likely,
        due_s=np.array([of_runs[bound].due_s[bound] for bound in bounds]),
        token_times_s=[
            np.array([of_bound[bound] for bound, of_bound in enumerate(each)]) for each in times
        ],
    )
