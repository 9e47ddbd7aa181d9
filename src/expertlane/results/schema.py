"""What a comparison found, as typed values: the schema of `results.json`.

Every number of a deployment is of its one `source`; a file holds deployments of one source only,
so that nothing measured can be set against something projected or reported. Dictionaries are
keyed by the words of `spec.names`: phases, causes, the labels of stages and of links.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from expertlane.errors import UserError
from expertlane.results.assumption import Assumption as Assumption
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.projection import Projection
from expertlane.results.rebalance import RebalanceResult
from expertlane.results.step_record import MachinePeak
from expertlane.results.strict import Strict
from expertlane.results.timeline import StepTimeline
from expertlane.results.traffic import TrafficBytes, TrafficResult
from expertlane.spec.deployment import DispatchTable, Options
from expertlane.spec.names import Cause, Phase

SCHEMA_VERSION = 5
KIND = "comparison"

Source = Literal["measured", "projected", "reported"]


@dataclass(frozen=True)
class Versions(Strict):
    """Of the software that ran."""

    expertlane: str
    python: str
    torch: str


@dataclass(frozen=True)
class Machine(Strict):
    """Where it ran.

    Attributes:
        device: `cpu`, or the name of the accelerator.
        num_cores: cores the ranks may use, of all hosts.
        num_idle_gpus: GPUs that were not used, because there are fewer than ranks.
        memory_bytes: of the machine.
        num_ranks: of the largest deployment.
        ranks_per_node: consecutive ranks whose traffic counts as inside a node.
        backend: of the collectives, for example `gloo`.
        dtype: of weights and activations.
    """

    cpu_name: str
    device: str
    num_cores: int
    num_idle_gpus: int
    memory_bytes: int
    num_ranks: int
    ranks_per_node: int
    backend: str
    dtype: str
    peak: MachinePeak

    @property
    def ranks_per_core(self) -> float:
        """Above 1, ranks take turns."""
        return self.num_ranks / self.num_cores

    @property
    def is_oversubscribed(self) -> bool:
        """Whether ranks share cores that each of them needs for its computations."""
        return self.device == "cpu" and self.num_ranks > self.num_cores


@dataclass(frozen=True)
class Quantiles(Strict):
    """Of many values."""

    median: float
    p95: float


@dataclass(frozen=True)
class CriticalPathResult(Strict):
    """CPU time on the critical path: what one core a rank would cost, transfers left out."""

    total_s: float
    tps: float
    step_s: float


@dataclass(frozen=True)
class UtilisationResult(Strict):
    """Shares of the machine's measured peak."""

    flops: float
    read_bytes: float


@dataclass(frozen=True)
class PhaseResult(Strict):
    """What prefill and decode both have; sums are over ranks and steps.

    Attributes:
        num_steps: steps; a rotating micro-batch's counts as one.
        num_rounds: times every sequence went one token on.
        tps_of_runs: of each repetition by itself.
        step_s: median, from a step's submission to its finish; with steps in flight together it
            holds their queueing.
        exposed_s: seconds a round blocked in dispatch and combine, mean over the ranks of a
            pipeline stage, added up over stages.
        active_expert_share: of the experts of a layer, those with a token in a step; mean.
        flops, weight_bytes, num_collectives: by stage.
        kv_bytes: keys and values read.
    """

    num_steps: int
    num_rounds: int
    num_tokens: int
    wall_s: float
    tps: float
    tps_of_runs: tuple[float, ...]
    step_s: float
    exposed_s: float
    active_expert_share: float
    cpu_s_per_token: float
    critical_path: CriticalPathResult
    flops: dict[str, int]
    weight_bytes: dict[str, int]
    kv_bytes: int
    num_collectives: dict[str, int]
    utilisation: UtilisationResult

    @property
    def round_s(self) -> float:
        """Mean wall time of a round."""
        return self.wall_s / self.num_rounds


@dataclass(frozen=True)
class PrefillResult(PhaseResult):
    """`ttft_s`: per sequence, from the phase's start."""

    ttft_s: Quantiles


@dataclass(frozen=True)
class DecodeResult(PhaseResult):
    """`tpot_s`: over the intervals between a sequence's tokens."""

    tpot_s: Quantiles


@dataclass(frozen=True)
class RankResult(Strict):
    """One rank.

    Attributes:
        num_experts_per_layer: [num_layers]; experts of which it holds all or a part.
        weight_bytes, kv_bytes: what it holds in memory.
        stage_s: by phase and stage; waiting and bubbles apart, by phase.
    """

    rank: int
    num_experts_per_layer: tuple[int, ...]
    weight_bytes: int
    kv_bytes: int
    stage_s: dict[Phase, dict[str, float]]
    waiting_s: dict[Phase, float]
    bubble_s: dict[Phase, float]


@dataclass(frozen=True)
class ExpertLoad(Strict):
    """Token-expert pairs of both phases.

    Attributes:
        num_tokens_per_expert: [num_layers][num_experts].
        max_over_mean: [num_layers]; 1 is even.
    """

    num_tokens_per_expert: tuple[tuple[int, ...], ...]
    max_over_mean: tuple[float, ...]


@dataclass(frozen=True)
class BottleneckResult(Strict):
    """The largest part of a step, and the rank the others wait for, if one stands out."""

    phase: Phase
    cause: Cause
    share: float
    straggler: int | None
    sentence: str


@dataclass(frozen=True)
class DeploymentResult(Strict):
    """One deployment's row.

    Attributes:
        is_baseline: whether it stands for what the experiment compares against.
        decode: None where nothing was decoded.
        breakdown_s: by phase and cause; seconds a round, mean over ranks.
        traffic_bytes: by phase and link.
        traffic: by phase.
        dispatch_table: by which `dispatch` or `overlap` was chosen, where it is `auto`.
        rebalances: decisions about moving experts, in its last run.
        timelines: one step of each phase, from a short run that was not measured.
        tokens_sha256: of all generated tokens, to compare runs by.
    """

    name: str
    layout: LayoutSizes
    options: Options
    source: Source
    is_baseline: bool
    prefill: PrefillResult
    decode: DecodeResult | None
    breakdown_s: dict[Phase, dict[Cause, float]]
    bottleneck: BottleneckResult
    expert_load: ExpertLoad
    traffic_bytes: dict[Phase, dict[str, TrafficBytes]]
    traffic: dict[Phase, TrafficResult]
    rebalances: tuple[RebalanceResult, ...]
    dispatch_table: DispatchTable | None
    per_rank: tuple[RankResult, ...]
    timelines: dict[Phase, StepTimeline]
    tokens_sha256: str

    @property
    def num_ranks(self) -> int:
        """Ranks it ran on."""
        return self.layout.layout.world_size

    def cause_shares(self, phase: Phase) -> dict[Cause, float]:
        """The shares of a phase's wall time by cause; they add up to 1."""
        total = sum(self.breakdown_s[phase].values())
        return {cause: seconds / total for cause, seconds in self.breakdown_s[phase].items()}


@dataclass(frozen=True)
class HiddenCommunication(Strict):
    """Two deployments that differ in overlap alone.

    Attributes:
        off, on: their names.
        step_off_s, step_on_s: their mean decode steps (rounds, where micro-batches rotate).
        exposed_s: seconds of such a step blocked in dispatch and combine without overlap.
        hidden: (step_off_s - step_on_s) / exposed_s; negative where overlap costs time; None
            where nothing was exposed.
    """

    off: str
    on: str
    step_off_s: float
    step_on_s: float
    exposed_s: float
    hidden: float | None


@dataclass(frozen=True)
class ScalingPoint(Strict):
    """Decoding at one expert-parallel size; `relative_…`: to the first point's."""

    name: str
    ep_size: int
    num_ranks: int
    tps: float
    tps_per_rank: float
    relative_tps_per_rank: float
    critical_path_tps_per_rank: float
    relative_critical_path_tps_per_rank: float


@dataclass(frozen=True)
class Results(Strict):
    """All of one file.

    Attributes:
        created: ISO 8601, UTC.
        machine: where it was measured; None where nothing was.
        experiment: model, workload, seed, cluster and deployments as asked for.
        projection: what a cluster model says of the same deployments, if that was asked for.
        foreign_cpu_share: of the host's cores, what other processes used while it ran.

    Raises:
        UserError: no deployment and no projection, deployments without a machine, one name twice,
            or sources mixed.
    """

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    kind: Literal["comparison"] = field(default="comparison", kw_only=True)
    command: str
    created: str
    versions: Versions
    machine: Machine | None
    experiment: dict[str, Any]
    assumptions: tuple[Assumption, ...]
    deployments: tuple[DeploymentResult, ...]
    hidden_communication: tuple[HiddenCommunication, ...]
    scaling: tuple[ScalingPoint, ...]
    foreign_cpu_share: float = 0.0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        if not self.deployments and self.projection is None:
            raise UserError("results without a deployment")
        if self.deployments and self.machine is None:
            raise UserError("results that were measured, without the machine")
        names = [deployment.name for deployment in self.deployments]
        if len(set(names)) < len(names):
            raise UserError(f"results with one deployment twice: {', '.join(names)}")
        sources = sorted({deployment.source for deployment in self.deployments})
        if len(sources) > 1:
            raise UserError(f"results that mix sources: {', '.join(sources)}; only one may stand")
