"""The one record of a deployment, whether it was measured, projected or reported.

Every number is of the record's one `source`. What a source cannot say is None or empty.
Dictionaries are keyed by the words of `spec.names`: causes, the labels of stages and of links.
Two deployments that were measured in turns have a `PairRecord`, two servers a `RatioRecord`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np

from expertlane.results.drill_record import DrillRecord
from expertlane.results.estimate import Above0, Estimate, Summary, SummaryAbove0, is_told_apart
from expertlane.results.serving_record import ServingRecord, best_load
from expertlane.results.timeline import StepTimeline
from expertlane.results.traffic import TrafficRecord
from expertlane.results.verified_record import VerifiedRecord
from expertlane.spec.deployment import DispatchTable, Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Phase, ProjectedCause
from expertlane.spec.ranges import Counted, Strict, Valid

# virtual: computing measured, transfers modelled.
Source = Literal["measured", "virtual", "projected", "reported"]
# Of records of real ranks: their numbers are of the same kind.
RUN: tuple[Source, ...] = ("measured", "virtual")
PoolRole = Literal["both", "prefill", "decode"]

# Why a record is there; one may have several.
EXPERIMENT = "experiment"  # it is one of an experiment's deployments
SCALING = "scaling"  # one size of a family
FASTEST = "fastest"  # a comparison's plan: the fastest decode step of all sequences
BEST = "best"  # a plan's best of one pool, projected in full; the first wins
FAMILY = "family"  # a plan's best of a kind of deployment, as simulated; its name is the kind's
PARETO = "pareto"  # as screened: none has both more tokens a second and a lower TPOT
TWO_POOLS = "disaggregated"  # a plan's best, both pools together
PREFILL_POOL = "prefill pool"  # and each of the two by itself
DECODE_POOL = "decode pool"

# What decided among the plans of a tie.
TieBreak = Literal["most tokens", "farther from the limit"]


_CAUSES = {*Cause, *ProjectedCause}
_Causes = Annotated[dict[str, float], Valid(_CAUSES.issuperset, "seconds by known causes")]
_Counts = Annotated[
    tuple[tuple[int, ...], ...],
    Valid(lambda rows: len({*map(len, rows)} or {1}) == 1 and all(rows), "rows of one length"),
]


@dataclass(frozen=True)
class CriticalPath(Strict):
    """CPU time on the critical path: what one core a rank would cost, transfers left out.

    Attributes:
        total_s: the whole phase; of the slowest replica.
        tps: the phase's tokens over `total_s`; 0 where no CPU time was counted.
        step_s: median of a step, from when the last tokens of its sequences were ready.
    """

    total_s: float
    tps: float
    step_s: float


@dataclass(frozen=True)
class StepsRecord(Strict):
    """The steps of one phase: all that were measured or simulated, or one that was projected.

    Counts are sums over ranks and steps, of all repetitions; `traffic` is of the first. A simulated
    step with any prompt in it is a prefill.

    Attributes:
        pool: the ranks that ran them: all, or those of one of its pools.
        context: positions that each sequence has cached before the step; None where it varies.
        num_steps: steps of all replicas; a rotating micro-batch's counts as one.
        num_rounds: decode steps of all sequences; None where steps mix freely.
        num_tokens: computed, drafts among them.
        num_seqs: sequences that took part, added up over steps.
        wall_s: measured: of the phase. Projected: of the one step, or round where micro-batches
            rotate, in the steady state. Simulated: of all steps; where they overlap, more than
            the time that passed.
        tps: of the whole system. In virtual time, projected and simulated: `num_tokens` over
            `wall_s`; measured: the median of `tps_of_runs`.
        tps_of_runs: of each repetition by itself, in virtual time too.
        step_s: of a step, from its submission (modelled: from when the first rank turns to it) to
            its finish; with steps in flight together it holds their queueing.
        token_s: of a prefill TTFT, from the phase's start; of a decode TPOT, over the intervals
            between a sequence's tokens.
        breakdown_s: by cause, `Cause` where measured, else `ProjectedCause`; seconds of a round, of
            a simulated step; mean over ranks.
        exposed_s: seconds a round blocked in dispatch and combine, mean over the ranks of a
            pipeline stage, added up over stages.
        hidden_share: in virtual time, the share of the time of dispatch and combine in flight that
            no rank waits for; None where there is none.
        floor_s: of a round or simulated step (mean): bytes of weights, keys and values over memory
            bandwidth or FLOPs over peak, the larger, of the busiest rank: no deployment of this
            layout is faster.
        flops_utilisation, read_utilisation: shares of peak FLOP/s and of memory bandwidth.
        flops, weight_bytes, num_collectives: by stage; those where anything was counted.
        kv_bytes: keys and values read.
        most_weight_bytes: bytes of weights read in a round by the rank that reads most.
        active_expert_share: share of a layer's experts with a token in a step; mean.
        stage_s: by stage; [num_ranks]; without waiting and bubbles.
        waiting_s, bubble_s: [num_ranks]; for other ranks, and for other pipeline stages.
        basis_shares: of the time of operations and transfers by what it rests on: measured,
            fitted, bound.
        extrapolated_share: of that time, what lies outside the sizes that were fitted.
        fits: whether so many sequences of this context fit into memory.
        timeline: of one step: measured, from a short run by itself; simulated, the median.
    """

    phase: Phase
    num_steps: Counted
    num_tokens: Counted
    num_seqs: int
    wall_s: Above0
    tps: Estimate
    pool: PoolRole = "both"
    context: int | None = None
    num_rounds: int | None = None
    tps_of_runs: tuple[float, ...] = ()
    step_s: SummaryAbove0 | None = None
    token_s: Summary | None = None
    breakdown_s: _Causes = field(default_factory=dict)
    exposed_s: float | None = None
    hidden_share: float | None = None
    floor_s: float | None = None
    flops_utilisation: float | None = None
    read_utilisation: float | None = None
    flops: dict[str, int] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    num_collectives: dict[str, int] = field(default_factory=dict)
    kv_bytes: int | None = None
    most_weight_bytes: int | None = None
    active_expert_share: float | None = None
    cpu_s_per_token: float | None = None
    critical_path: CriticalPath | None = None
    stage_s: dict[str, tuple[float, ...]] = field(default_factory=dict)
    waiting_s: tuple[float, ...] = ()
    bubble_s: tuple[float, ...] = ()
    traffic: TrafficRecord | None = field(default=None, repr=False)
    basis_shares: dict[str, float] = field(default_factory=dict)
    extrapolated_share: float | None = None
    fits: bool = True
    timeline: StepTimeline | None = field(default=None, repr=False)

    @property
    def round_s(self) -> Estimate:
        """Mean time of a decode step of all sequences; of any step where none is counted."""
        return self.wall_s / (self.num_rounds or self.num_steps)

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the time by cause; they add up to 1."""
        total = sum(self.breakdown_s.values()) or 1.0
        return {cause: seconds / total for cause, seconds in self.breakdown_s.items()}

    @property
    def largest(self) -> tuple[str, float]:
        """The cause with the largest share."""
        return max(self.shares.items(), key=lambda item: item[1])


@dataclass(frozen=True)
class PoolRecord(Strict):
    """Ranks that serve together: bytes of the fullest, and what they had room for.

    Attributes:
        kv_bytes: bytes of the whole cache as it is laid out.
        activation_bytes: activations of the largest step.
        sequence_bytes: keys and values of one sequence at its full length.
        allowed_bytes: bytes of `device_bytes` that a rank may take.
        num_resident: sequences of full length that fit at once, over the whole pool; 0 where not
            even the weights fit.
        num_slots_per_rank: experts of a layer, copies included, on a rank.
        most_running: sequences that held memory at once.
    """

    role: PoolRole = "both"
    weight_bytes: int | None = None
    kv_bytes: int | None = None
    activation_bytes: int | None = None
    sequence_bytes: int | None = None
    allowed_bytes: int | None = None
    device_bytes: int | None = None
    num_resident: int | None = None
    num_slots_per_rank: int | None = None
    most_running: int | None = None
    num_preemptions: int | None = None


@dataclass(frozen=True)
class HeldRecord(Strict):
    """Memory held by one rank.

    Attributes:
        num_experts_per_layer: [num_layers]; experts of which it holds all or a part.
    """

    rank: int
    num_experts_per_layer: tuple[int, ...]
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class Bottleneck(Strict):
    """The largest part of a step, and the rank the others wait for, if one stands out.

    Attributes:
        share: share of the wall time, mean over ranks.
        sentence: cause, share and straggler in words.
    """

    phase: Phase
    cause: Cause
    share: float
    straggler: int | None
    sentence: str


@dataclass(frozen=True)
class RebalanceRecord(Strict):
    """A decision to move experts: what was predicted, what was done, and what was seen.

    Loads are those of the fullest rank over the mean, summed over layers; seconds those of the
    experts of the rank that spent most in a step. Before: the steps that the decision was taken by;
    after: as many steps after the switch, or as many as there were.

    Attributes:
        step: before which it was taken.
        switched: the step before which experts were in their new places; None where they stayed,
            or the work ended first.
        gain_s, cost_s: predicted, over as many steps as the decision was taken by.
        num_bytes: bytes of weights to move.
        paid_s: seconds by which the moves held steps up; None where they did not end.
        predicted_before, predicted_after: load, if all ranks sent tokens evenly.
        load_before, load_after: counted loads; after is None where nothing was switched.
        experts_s_before, experts_s_after: seconds a step.
    """

    replica: int
    step: int
    switched: int | None
    gain_s: float
    cost_s: float
    num_bytes: int
    predicted_before: float
    predicted_after: float
    load_before: float
    load_after: float | None
    experts_s_before: float
    experts_s_after: float | None
    paid_s: float | None = None


@dataclass(frozen=True)
class Conditions(Strict):
    """Conditions of a projection, which compared deployments must share.

    Attributes:
        top_k: experts of a token.
        execution: `graph`, `eager` or `serial`: how kernels are launched.
        routing: which experts tokens are taken to choose: `balanced`, `skewed`, or as a user asks
            for it, `--skew 0.8`.
        dtype, kv_dtype: number types of weights, and of keys and values.
    """

    top_k: int
    execution: str
    routing: str
    dtype: str
    kv_dtype: str


@dataclass(frozen=True)
class ServerRecord(Strict):
    """The server that a deployment was measured on, from outside.

    Attributes:
        engine: the engine as its makers write it; empty for a server that ran already.
        software: software and version by the server's own account; may be empty.
        deployment: the experiment's name of the deployment; empty for a server of another layout.
        command: the command that started it, for a shell; empty where it ran already.
        files: files that the command reads, by name.
        url: empty where it never answered.
        start_s: seconds from its start until it was ready, of each start.
        failure: why it was not measured, or not to the end, with its last words; may be empty.
        log: file with its output; empty where it ran already.
        kv_tokens: tokens that its KV caches hold together, by its metrics; None if unknown.
        settings: settings by its own account, of SGLang that ran already.
    """

    engine: str
    software: str = ""
    deployment: str = ""
    command: str = ""
    files: dict[str, str] = field(default_factory=dict)
    url: str = ""
    start_s: tuple[float, ...] = ()
    failure: str = ""
    log: str = ""
    kv_tokens: int | None = None
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class DeploymentRecord(Strict):
    """One deployment.

    Attributes:
        layout: of the pool that decodes, where two serve; None of a server that was measured from
            outside, which does not tell it, nor its options.
        prefill_layout: layout of the pool that computes prompts; None where `layout` does both.
        is_baseline: whether it stands for what an experiment compares against.
        roles: why it is there, of the words above.
        conditions: None unless it was projected.
        pools: one, or the one that prefills and the one that decodes.
        serving: one for each load, or for the one that was asked for. Of several simulated loads,
            `pools`, `steps` and `num_tokens_per_expert` are of `best_load`.
        held: [num_ranks].
        num_tokens_per_expert: [num_layers][num_experts]; token-expert pairs of all steps, of the
            first repetition where there are several.
        rebalances: decisions about moving experts, in its last run.
        dispatch_table: table that chose `dispatch` or `overlap`, where it is `auto`.
        tokens_sha256: hash of all generated tokens, to compare runs.
        why: reason that it is slower than the best of a plan; empty where it ties with that.
        num_drafts: planned draft tokens of multi-token prediction.
        served_with: options of a projected workload, with `auto` resolved.
        over_best: its output tokens a second over those of the best of a plan, with the bounds that
            are left when the errors that both share have cancelled; None for that.
        server: of a comparison of servers, or a drill, the one that it was measured on.
        verified: of a server that was verified, what was found.
        drill: a fault, and what came of it; `serving` is then of before.
    """

    name: str
    layout: Layout | None
    options: Options | None
    source: Source
    prefill_layout: Layout | None = None
    is_baseline: bool = False
    roles: tuple[str, ...] = ()
    conditions: Conditions | None = None
    pools: tuple[PoolRecord, ...] = ()
    steps: tuple[StepsRecord, ...] = ()
    serving: tuple[ServingRecord, ...] = ()
    held: tuple[HeldRecord, ...] = ()
    num_tokens_per_expert: _Counts = ()
    bottleneck: Bottleneck | None = None
    rebalances: tuple[RebalanceRecord, ...] = ()
    dispatch_table: DispatchTable | None = None
    tokens_sha256: str | None = None
    why: str = ""
    over_best: Estimate | None = None
    num_drafts: int = 0
    served_with: Options | None = None
    server: ServerRecord | None = None
    verified: VerifiedRecord | None = None
    drill: DrillRecord | None = None

    def __repr__(self) -> str:
        """A line: its parts have thousands of numbers."""
        roles = f", {', '.join(self.roles)}" if self.roles else ""
        return f"<DeploymentRecord {self.name!r}: {self.layout}, {self.source}{roles}>"

    @property
    def num_ranks(self) -> int:
        """Ranks of all pools; 0 where they are not known."""
        layouts = filter(None, (self.layout, self.prefill_layout))
        return sum(each.world_size for each in layouts)

    @property
    def known_layout(self) -> Layout:
        """`layout` of a deployment that is not a server seen from outside."""
        assert self.layout is not None, "only such a server has none"
        return self.layout

    @property
    def known_options(self) -> Options:
        """`options` of a deployment that is not a server seen from outside."""
        assert self.options is not None, "only such a server has none"
        return self.options

    @property
    def best_load(self) -> ServingRecord:
        """The load that `best_load` picks of `serving`."""
        return best_load(self.serving)

    @property
    def prefill(self) -> StepsRecord | None:
        """The first of prefill, if there is any."""
        return next(iter(self.steps_of(Phase.PREFILL)), None)

    @property
    def decode(self) -> StepsRecord | None:
        """The first of decoding, if there is any."""
        return next(iter(self.steps_of(Phase.DECODE)), None)

    def steps_of(self, phase: Phase) -> tuple[StepsRecord, ...]:
        """Projected: by context, of all sequences, then of as many as fit; then of fewer.

        Measured: of all sequences; of a scaling size, then of as many a rank as the largest has.
        """
        return tuple(each for each in self.steps if each.phase is phase)

    def decode_of(self, context: int, num_seqs: int) -> StepsRecord | None:
        """The projected decode step of so many sequences, if there is one."""
        found = (
            step
            for step in self.steps_of(Phase.DECODE)
            if (step.context, step.num_seqs) == (context, num_seqs)
        )
        return next(found, None)

    @property
    def expert_max_over_mean(self) -> tuple[float, ...]:
        """[num_layers]; the fullest expert's pairs over the mean, 1 is even, 0 where none came."""
        if not self.num_tokens_per_expert:
            return ()
        of_layers = np.array(self.num_tokens_per_expert, dtype=np.float64)
        mean = of_layers.mean(axis=-1)
        ratio = np.divide(of_layers.max(axis=-1), mean, out=np.zeros_like(mean), where=mean > 0)
        return tuple(ratio.tolist())


@dataclass(frozen=True)
class PairRecord(Strict):
    """Difference of two deployments that were measured in turns.

    Estimates have 90 % intervals, or none of too few repetitions.

    Attributes:
        source: source of the numbers; the pair is the same for all sources.
        name: the deployment that the first sentence is about.
        other: the deployment that it is compared with.
        num_runs: repetitions of each.
        ratio: TPS of `name` over that of `other`.
        step_s, other_step_s: seconds of a step of each.
        causes_s: by cause, the seconds of a step of `name` less those of `other`.
    """

    source: Source
    name: str
    other: str
    phase: Phase
    num_runs: int
    ratio: Estimate
    step_s: float
    other_step_s: float
    causes_s: dict[str, Estimate] = field(default_factory=dict)

    @property
    def is_significant(self) -> bool:
        """True if the interval of the ratio leaves out 1."""
        return is_told_apart(self.ratio, 1.0)


def choose_compared(records: Sequence[DeploymentRecord], tps: Sequence[float]) -> tuple[int, ...]:
    """Indices of the best proposal, the best baseline, and the first deployment if it is neither.

    Where all are of one kind: of the fastest, the next fastest, and the first.

    Args:
        records: in the experiment's order.
        tps: tokens/s of each record.

    Returns:
        Empty for a single deployment.
    """
    if len(records) < 2:
        return ()
    by_tps = sorted(range(len(records)), key=lambda place: -tps[place])
    proposals = [place for place in by_tps if not records[place].is_baseline]
    baselines = [place for place in by_tps if records[place].is_baseline]
    best = (proposals or baselines)[0]
    rival = (baselines if proposals and baselines else by_tps[1:])[0]
    return tuple(dict.fromkeys((best, rival, *([0] if best else []))))


HIGHER_IS_BETTER = frozenset({"output tokens/s", "goodput"})


@dataclass(frozen=True)
class RatioRecord(Strict):
    """One metric of one server over another's.

    Attributes:
        name, other: names of the deployments.
        load: the load, as in reports.
        metric: name of the metric and its statistic.
        num_rounds: pairs of rounds.
        ratio: the median over pairs, with its 90 % interval where there are enough.
    """

    name: str
    other: str
    load: str
    metric: str
    num_rounds: int
    ratio: Estimate

    @property
    def is_significant(self) -> bool:
        """True if the interval leaves out 1."""
        return is_told_apart(self.ratio, 1.0)

    @property
    def is_better(self) -> bool:
        """True if the first server's metric is the better one."""
        return (self.ratio.value > 1) == (self.metric in HIGHER_IS_BETTER)
