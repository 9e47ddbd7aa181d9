"""One deployment on a modelled cluster: a load through the scheduler on a virtual clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, gcd
from typing import Any

import numpy as np

from expertlane.balance.holding import Placements
from expertlane.cost.laws.frameworks import find_framework
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import (
    BOUNDS,
    LIKELY,
    Execution,
    ModelledCluster,
    Terms,
    kernels_of,
)
from expertlane.cost.memory import (
    FREE_SHARE,
    RANK_STEP_TOKENS,
    KVTransfers,
    PlacedModel,
    RankMemory,
)
from expertlane.cost.pricing import Pricing
from expertlane.cost.routing import LoadedRouting, extremes_of, placed
from expertlane.cost.runner import CostRunner, PricedStep, StepSharing
from expertlane.cost.step.operation import Floats, NumberTypes
from expertlane.cost.step.program import ProgramBuilder
from expertlane.cost.throughput import MultiToken, MultiTokenAdapter
from expertlane.errors import SpecError
from expertlane.results.metrics import ServedRequest
from expertlane.results.record import PoolRole
from expertlane.results.step_record import StepRecord
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.request import Limits
from expertlane.schedule.scheduler import ContinuousScheduler, FinishedStep
from expertlane.simulator.pools import Pool, PoolTotals, run_load
from expertlane.spec.deployment import DISPATCH_FORMS, Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase
from expertlane.spec.ranges import RANGES, take_fields
from expertlane.spec.workload import NOTHING_SHARED, Load, SharedPrefixes, draw_requests


@dataclass(frozen=True)
class ServingSetup:
    """A model's pools and settings.

    Attributes:
        prefill_layout: layout of a prefill pool, on devices of its own; None without one.
        routing: source of the experts that tokens choose.
        max_num_seqs, max_num_batched_tokens: of a data-parallel rank. One of a pool for prompts
            alone holds as many more as a step has tokens for.
        prompt_wait_steps, phases_apart: see `Limits`.
        prefill_options: options of a prefill pool; None for `options`.

    Raises:
        SpecError: a size is out of its range.
    """

    layout: Layout
    prefill_layout: Layout | None
    options: Options
    types: NumberTypes
    execution: Execution
    routing: LoadedRouting
    multi_token: MultiToken = field(default_factory=MultiToken)
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    prompt_wait_steps: int = 0
    phases_apart: bool = False
    prefill_options: Options | None = None

    def __post_init__(self) -> None:
        take_fields(self)

    @property
    def pools(self) -> dict[PoolRole, Layout]:
        """The layout of each pool, the one that prefills first."""
        if self.prefill_layout is None:
            return {"both": self.layout}
        return {"prefill": self.prefill_layout, "decode": self.layout}

    def options_of(self, role: PoolRole) -> Options:
        """Options of a pool; one with a single phase has that phase's dispatch."""
        if role == "both":
            return self.options
        options = self.options
        if role == "prefill" and self.prefill_options is not None:
            options = self.prefill_options
        return options.of_phase(Phase(role))

    @property
    def num_devices(self) -> int:
        """Devices of all pools."""
        return sum(layout.world_size for layout in self.pools.values())

    @property
    def num_parts(self) -> int:
        """Parts that serve alike and apart: groups of replicas, with their share of each pool."""
        return gcd(*(layout.replicas for layout in self.pools.values()))

    def with_replicas(self, replicas: Callable[[Layout], int]) -> "ServingSetup":
        """The setup with other numbers of replicas of each pool."""

        def of(layout: Layout) -> Layout:
            return replace(layout, replicas=replicas(layout))

        prefill = None if self.prefill_layout is None else of(self.prefill_layout)
        return replace(self, layout=of(self.layout), prefill_layout=prefill)

    def are_pools_apart(self, ranks_per_node: int) -> bool:
        """True if the pools are on different nodes."""
        return self.num_devices > ranks_per_node


def scheduling_of(
    framework: str | None, step_tokens: int | None, max_num_seqs: int
) -> dict[str, Any]:
    """Limits of a scheduler's step, as fields of `ServingSetup`.

    Args:
        framework: framework whose defaults are taken; None for ours.
        step_tokens: tokens of a data-parallel rank's step; None for the default.
    """
    found = find_framework(framework) if framework else None
    tokens = step_tokens or (found.max_num_batched_tokens if found else RANK_STEP_TOKENS)
    return {
        "max_num_batched_tokens": max(tokens, max_num_seqs),
        "prompt_wait_steps": found.prompt_wait_steps if found else 0,
        "phases_apart": found.phases_apart if found else False,
    }


def check_fits_cluster(cluster: ModelledCluster, setup: ServingSetup) -> None:
    """Check that a cluster has the devices, and the nodes that hierarchical dispatch is for.

    Raises:
        SpecError: it has too few.
    """
    needed, layouts = setup.num_devices, setup.pools.values()
    if needed > cluster.num_devices:
        if len(layouts) == 1:
            need = f"layout {setup.layout} needs {needed} devices"
        else:
            each = " and ".join(f"{layout} with {layout.world_size}" for layout in layouts)
            need = f"layouts {each} need {needed} devices"
        raise SpecError(f"{need} but {cluster} has {cluster.num_devices}")
    per_node = cluster.profile.ranks_per_node
    for role, layout in setup.pools.items():
        options = setup.options_of(role)
        if options.is_by_node and layout.ep_ranks_per_node(per_node) == layout.ep:
            raise SpecError(
                f"layout {layout}: hierarchical dispatch is for experts on several "
                f"nodes, but each group of ep={layout.ep} is on one node of {per_node}; valid: "
                f"{', '.join(form for form, of in DISPATCH_FORMS.items() if not of.by_node)}"
            )


_CONTEXTS_APART = 32  # a step's work is priced for so many different mean contexts
_MOST_POSITIONS_ALIKE = 64
_NUM_SAMPLES = 2  # samples of the routing, drawn for steps that are alike
_SHARE_ALIKE = 1 / 256  # of reading all weights: so many more cached positions do not matter


@dataclass(frozen=True, eq=False)
class PoolRanks:
    """Ranks of a pool, with their limits, memory and shared steps.

    Attributes:
        limits: limits of the scheduler.
        memory: bytes of the fullest rank, with the whole cache.
        sharing: [B]; of the run that each bound leads; all the same where routing has no bounds.
        prefixes: that sequences share in the cache; none in a decode pool, which gets the keys and
            values of whole prompts.
    """

    role: PoolRole
    layout: Layout
    limits: Limits
    memory: RankMemory
    sharing: tuple[StepSharing, ...]
    prefixes: SharedPrefixes

    @property
    def num_resident(self) -> int:
        """Sequences of full length that the cache holds at once, over all ranks."""
        return self.num_held(ceil(self.limits.max_model_len / self.limits.block_size))

    @property
    def num_page_blocks(self) -> int:
        """Blocks of the cache beside the state that is kept with each shared prefix."""
        limits, of_seq = self.limits, self.limits.blocks_for(self.limits.max_model_len)
        of_prefixes = self.prefixes.num * limits.state_blocks
        return max(of_seq + 1 + limits.state_blocks, limits.num_blocks - of_prefixes)

    def num_held(self, blocks: float) -> int:
        """Sequences of `blocks` blocks each, shared ones included, that all ranks hold."""
        limits, prefixes = self.limits, self.prefixes
        of_each = blocks + limits.state_blocks - prefixes.num_blocks
        num = int(prefixes.num_sharing(self.num_page_blocks, of_each))
        return min(num, limits.max_num_seqs) * self.layout.dp * self.layout.replicas


@dataclass(frozen=True, eq=False)
class SimulatedPool:
    """The ranks of a simulated pool, the pool that serves, and totals of its steps."""

    ranks: PoolRanks
    pool: Pool
    totals: PoolTotals


@dataclass(frozen=True)
class Rates:
    """Rates and means of a load in its steady state; [3] each: low, likely and high.

    Attributes:
        requests_per_s, output_tps: rates of all requests together.
        ttft_s, tpot_s: means over requests; no TTFT where the queue grows without end.
        error: half of the 90 % interval of tokens a second that the window leaves, over them.
        num_decoding, num_waiting: likely requests past their first token, and before it.
    """

    requests_per_s: Floats
    output_tps: Floats
    ttft_s: Floats | None
    tpot_s: Floats
    error: float
    num_decoding: float
    num_waiting: float

    def times(self, factor: float) -> "Rates":
        """The rates of `factor` such parts together."""
        return replace(
            self,
            requests_per_s=self.requests_per_s * factor,
            output_tps=self.output_tps * factor,
            num_decoding=self.num_decoding * factor,
            num_waiting=self.num_waiting * factor,
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """A served load, or a window of one.

    Attributes:
        served: [num_requests]; with multi-token prediction, a step may give several tokens.
        pools: one, or the one that prefills and the one that decodes.
        rates: rates of a steady state; None for a load that begins and ends.
        num_parts: equal, independent parts of the deployment, of which one was simulated.
    """

    served: Sequence[ServedRequest[Floats]]
    pools: tuple[SimulatedPool, ...]
    rates: Rates | None = None
    num_parts: int = 1


class Simulator:
    """Simulates one deployment.

    Raises:
        UserError: the cluster is too small, or the model cannot be laid out or does not fit so.
    """

    def __init__(
        self, model: ModelConfig, cluster: ModelledCluster, setup: ServingSetup, load: Load
    ) -> None:
        check_fits_cluster(cluster, setup)
        self.model = model
        self.cluster = cluster
        self.setup = setup
        if 0 < load.prefix_len < setup.block_size:  # nothing is shared
            load = replace(load, prefix_len=0)
        self.load = load
        self._terms = Terms.of(cluster.profile, setup.execution)
        self._pricing = Pricing(cluster.profile, setup.types)
        self._routings = _by_bound(setup)
        self._pools = [self._ranks(role, layout) for role, layout in setup.pools.items()]

    def part(self, num_parts: int) -> "Simulator":
        """One of `num_parts` parts of the deployment, with the largest share of the load."""
        load = self.load
        if load.batch is not None:
            batch = ceil(load.batch / num_parts)
            load = replace(load, batch=batch, num_requests=max(load.num_requests, batch))
        if load.rate is not None:
            load = replace(load, rate=load.rate / num_parts)
        setup = self.setup.with_replicas(lambda layout: layout.replicas // num_parts)
        return Simulator(self.model, self.cluster, setup, load)

    def single(self) -> "Simulator":
        """One replica of each pool, with the whole load."""
        one = self.setup.with_replicas(lambda layout: 1)
        return self if one == self.setup else Simulator(self.model, self.cluster, one, self.load)

    @property
    def execution(self) -> Execution:
        """How kernels are launched; a CPU's profile has a single way."""
        return self._terms.execution

    @property
    def num_runs(self) -> int:
        """Number of runs of the load that its bounds need.

        Where requests arrive by themselves, slower steps have more of them wait and run together,
        so that each bound needs a schedule of its own; likewise where a bound has another number of
        steps, since other drafts are accepted, or its own routing.
        """
        is_one = self.load.is_closed and not self.setup.multi_token.num_drafts
        return 1 if is_one and len(set(self._routings)) == 1 else len(BOUNDS)

    def run(self, seed: int, on_finished: Callable[[], None] = lambda: None) -> Outcome:
        """Serve the whole load, `num_runs` times.

        Args:
            on_finished: called for each request that is done.
        """
        outcome = self._run(seed, LIKELY, on_finished)
        if self.num_runs == 1:
            return outcome
        runs = [
            outcome if bound == LIKELY else self._run(seed, bound, on_finished)
            for bound in range(len(BOUNDS))
        ]
        served = [merged(of_runs) for of_runs in zip(*(run.served for run in runs), strict=True)]
        return replace(outcome, served=served)

    def _run(self, seed: int, lead: int, on_finished: Callable[[], None]) -> Outcome:
        load, multi_token = self.load, self.setup.multi_token.at(lead)
        is_blank = not load.has_prefixes
        requests = draw_requests(load, self.model.vocab_size, [seed], blank=is_blank)
        shortened = [
            replace(each, output_len=multi_token.num_steps(each.output_len)) for each in requests
        ]
        pools, apart = self.start(lead, has_begun=lambda: lead == LIKELY)
        served = run_load(
            pools[0].pool, shortened, load.batch, apart=apart, on_finished=on_finished
        )
        for each in pools:
            each.totals.close()
        whole = [
            replace(each, output_len=wanted.output_len)
            for each, wanted in zip(served, requests, strict=True)
        ]
        return Outcome(whole, pools)

    def start(
        self,
        lead: int = LIKELY,
        *,
        is_snapshot: bool = False,
        observe: Callable[[PricedStep], None] | None = None,
        has_begun: Callable[[], bool] | None = None,
    ) -> tuple[tuple[SimulatedPool, ...], tuple[Pool, KVTransfers] | None]:
        """The pools before any request, and the second one as `run_load` takes it.

        Args:
            is_snapshot: running requests are at their true positions, not at one step a token.
            observe: called with the steps of the decode pool.
            has_begun: tells when to add up steps in the pools' totals; None for never.
        """

        def pool_of(ranks: PoolRanks) -> SimulatedPool:
            options, limits = self.setup.options_of(ranks.role), ranks.limits
            multi_token = self.setup.multi_token.at(lead)
            drafts = multi_token.num_drafts
            if not is_snapshot:
                limits = self._scheduled(limits, multi_token)
            scheduler = ContinuousScheduler(ranks.layout, options, limits, record=False)
            totals = PoolTotals(self.model, self._pricing, lambda: scheduler.num_running, drafts)

            def observe_all(step: PricedStep) -> None:
                if observe is not None and ranks is self._pools[-1]:
                    observe(step)
                if has_begun is not None and has_begun():
                    totals.observe(step)

            runner = self._runner(
                ranks,
                lead,
                sharing=ranks.sharing[lead],
                observe=observe_all,
                multi_token=MultiTokenAdapter(multi_token) if drafts else None,
                lead=lead,
                repeats=has_begun is None,
            )
            return SimulatedPool(ranks, Pool(scheduler, runner), totals)

        pools = tuple(map(pool_of, self._pools))
        if len(pools) == 1:
            return pools, None
        transfers = KVTransfers(
            self.model,
            self.setup.types,
            pools[0].ranks.layout,
            pools[1].ranks.layout,
            LinkModel(self.cluster.profile),
            remote=self.setup.are_pools_apart(self.cluster.profile.ranks_per_node),
        )
        return pools, (pools[1].pool, transfers)

    def trace(self, outcome: Outcome) -> list[StepRecord]:
        """The median prefill and the median decode step, one after the other, with events.

        Each was replayed by itself: it begins when the one before is done, with all ranks at rest.
        Ranks are numbered over all pools.
        """
        steps: list[StepRecord] = []
        first_rank, begin_s = 0, 0.0
        for pool, of_pool in zip(outcome.pools, self.median_steps(outcome), strict=True):
            for phase, step in of_pool.items():
                if pool.ranks.role in ("both", phase.value):
                    steps.append(moved(step, first_rank, begin_s))
                    begin_s = steps[-1].finished_s
            first_rank += pool.ranks.layout.world_size
        return steps

    def median_steps(self, outcome: Outcome) -> list[dict[Phase, StepRecord]]:
        """The median steps by pool and phase, with events; ranks are the pool's."""
        return [
            {
                phase: self._traced(
                    pool.ranks, replace(pool.totals.phases[phase].median, phase=phase)
                )
                for phase in Phase
                if phase in pool.totals.phases
            }
            for pool in outcome.pools
        ]

    def _traced(self, ranks: PoolRanks, plan: StepPlan) -> StepRecord:
        runner = self._runner(ranks)
        done = runner.collect(runner.submit(replace(plan, record=True, record_events=True)))
        seq_ids = tuple(seq for batch in plan.batches for seq in batch.seq_ids.tolist())
        return replace(FinishedStep(plan, done).record(), seq_ids=seq_ids)

    def _runner(self, ranks: PoolRanks, bound: int = LIKELY, **others: Any) -> CostRunner:
        """The runner of a pool; without `others` for single steps as they are planned."""
        setup, profile = self.setup, self.cluster.profile
        options, drafts = setup.options_of(ranks.role), setup.multi_token.num_drafts
        table = options.fixed_table
        assert table is not None, "checked before"
        builder = ProgramBuilder(
            self.model,
            ranks.layout,
            self._placed(ranks.role, ranks.layout, bound),
            types=setup.types,
            dispatch=table,
            payload=options.payload,
            ranks_per_node=profile.ranks_per_node,
            block_size=setup.block_size,
            kernels=kernels_of(profile),
            num_drafts=drafts,
        )
        return CostRunner(builder, self._routings[bound], self._pricing, self._terms, **others)

    def _placed(self, role: PoolRole, layout: Layout, bound: int) -> Placements:
        """[num_hidden_layers]; a placement by load is made for each bound's own routing."""
        options, per_node = self.setup.options_of(role), self.cluster.profile.ranks_per_node
        return placed(self.model, layout, options, self._routings[bound], per_node)

    def _ranks(self, role: PoolRole, layout: Layout) -> PoolRanks:
        """Ranks with as many blocks as memory has room for, at most what the load can use."""
        setup, load, num_drafts = self.setup, self.load, self.setup.multi_token.num_drafts
        placements = self._placed(role, layout, LIKELY)  # others have as many slots
        held = PlacedModel(self.model, layout, setup.types, placements).with_drafts(num_drafts)
        max_len = load.prompt_len.high if role == "prefill" else load.max_len
        max_num_seqs, prefixes = setup.max_num_seqs, load.shared(setup.block_size)
        shares = load.has_prefixes
        if role == "prefill":
            shortest = load.prompt_len.low - prefixes.num_tokens
            max_num_seqs = max(max_num_seqs, setup.max_num_batched_tokens // shortest + 2)
        if role == "decode":  # keys and values of whole prompts arrive
            prefixes, shares = NOTHING_SHARED, False
        most_seqs = max_num_seqs
        if load.batch is not None:
            most_seqs = min(max_num_seqs, load.batch)
        elif not load.is_endless:
            most_seqs = min(max_num_seqs, load.num_requests)
        of_seq, most_blocks = ceil(max_len / setup.block_size), int(RANGES["num_blocks"].high)
        num_blocks = most_seqs * (of_seq + 1)
        if prefixes.num:
            kept = prefixes.num_kept(of_seq - prefixes.num_blocks)
            num_blocks = min(num_blocks + kept, most_blocks)
        elif shares:  # by hash ids: all free memory keeps prefixes
            num_blocks = most_blocks
        wanted = Limits(
            vocab_size=self.model.vocab_size,
            max_model_len=max_len,
            num_blocks=num_blocks,
            block_size=setup.block_size,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            prompt_wait_steps=0 if role == "decode" else setup.prompt_wait_steps,
            phases_apart=setup.phases_apart,
            prefix_caching=shares,
        )
        limits = held.fit_cache(wanted, FREE_SHARE * self.cluster.profile.device.memory_bytes)
        memory = held.fullest(limits)
        num_positions = limits.num_blocks * limits.block_size
        few = int(_SHARE_ALIKE * memory.weight_bytes * num_positions / max(memory.kv_bytes, 1))
        context_step = min(max(load.max_len // _CONTEXTS_APART, 1), _MOST_POSITIONS_ALIKE)
        of_routing = {
            each: StepSharing(
                context_step,
                layout.replica_size,
                max(few, 1),
                nodes=_nodes_of_caches(layout, self.cluster.profile.ranks_per_node),
                num_samples=_NUM_SAMPLES if layout.ep > 1 else 1,
            )
            for each in self._routings
        }
        sharing = tuple(of_routing[each] for each in self._routings)
        return PoolRanks(role, layout, limits, memory, sharing, prefixes)

    def _scheduled(self, limits: Limits, multi_token: MultiToken) -> Limits:
        """Limits with fewer blocks for drafts: the scheduler counts one position a step."""
        load = self.load
        if not multi_token.num_drafts:
            return limits
        prompt, output = load.mean_lens
        share = (prompt + multi_token.num_steps(ceil(output))) / (prompt + output)
        longest = load.prompt_len.high + multi_token.num_steps(load.output_len.high)
        least = ceil(longest / limits.block_size) + 1 + limits.state_blocks
        return replace(limits, num_blocks=max(least, int(limits.num_blocks * share)))


def _by_bound(setup: ServingSetup) -> tuple[LoadedRouting, ...]:
    """[B]; routing of each bound; all the same if it has no bounds, or no layout has EP."""
    extremes = extremes_of(setup.routing)
    if extremes is None or all(layout.ep == 1 for layout in setup.pools.values()):
        return (setup.routing,) * len(BOUNDS)
    even, uneven = extremes
    return even, setup.routing, uneven


def _nodes_of_caches(layout: Layout, ranks_per_node: int) -> list[int] | None:
    """[dp]; the node that each data-parallel rank begins on; None where stages lie differently."""
    if ranks_per_node % layout.stage_size and layout.stage_size % ranks_per_node:
        return None
    return [rank * layout.tp // ranks_per_node for rank in range(layout.dp)]


def moved(step: StepRecord, first_rank: int, begin_s: float) -> StepRecord:
    """A step moved to other ranks and another time of submission."""
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


def merged(of_runs: Sequence[ServedRequest[Floats]]) -> ServedRequest[Floats]:
    """A request with the times of each bound, each from the run that this bound led."""
    likely = of_runs[LIKELY]
    bounds, num = range(len(BOUNDS)), len(likely.token_times_s)
    times = zip(*(_as_many(each.token_times_s, num) for each in of_runs), strict=True)
    return replace(
        likely,
        due_s=np.array([of_runs[bound].due_s[bound] for bound in bounds]),
        token_times_s=[
            np.array([of_bound[bound] for bound, of_bound in enumerate(each)]) for each in times
        ],
    )


def _as_many(times_s: Sequence[Floats], num: int) -> Sequence[Floats]:
    """`num` of the times, evenly spread, the first and the last included."""
    places = np.linspace(0, len(times_s) - 1, num).round().astype(int)
    return [times_s[place] for place in places.tolist()]
