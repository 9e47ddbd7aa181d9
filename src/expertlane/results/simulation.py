"""What `expertlane simulate` found, as typed values: a `results.json` of its own kind.

One deployment on a modelled cluster; all numbers are projected, and none stands beside a measured
one. Dictionaries are keyed by the words of `spec.names`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.strict import Strict
from expertlane.results.timeline import StepTimeline
from expertlane.results.traffic import TrafficBytes
from expertlane.spec.deployment import Options

SCHEMA_VERSION = 2
KIND = "simulation"


@dataclass(frozen=True)
class Number(Strict):
    """A projected value.

    Attributes:
        low, high: low ≤ value ≤ high, whatever is better.
        basis: what most of it rests on: `measured`, `fitted` or `bound`.
    """

    value: float
    low: float
    high: float
    basis: str


@dataclass(frozen=True)
class Spread(Strict):
    """Of many requests or steps."""

    mean: Number
    median: Number
    p95: Number


@dataclass(frozen=True)
class SoftwareVersions(Strict):
    """Of what ran; no torch is among it."""

    expertlane: str
    python: str
    numpy: str


@dataclass(frozen=True)
class SimulationAssumption(Strict):
    """What the numbers take for granted.

    Attributes:
        option: what changes it; empty where nothing does.
    """

    name: str
    value: str
    option: str
    why: str


@dataclass(frozen=True)
class SimulatedCluster(Strict):
    """What was modelled.

    Attributes:
        name: as `--cluster` takes it.
        num_idle: devices that no rank of the deployment is on.
    """

    name: str
    device: str
    num_devices: int
    ranks_per_node: int
    num_idle: int


@dataclass(frozen=True)
class SimulatedDeployment(Strict):
    """How the model is served.

    Attributes:
        prefill_layout: of the pool that computes prompts; None where `layout` does both.
        execution: `graph`, `eager`, or `serial` on a CPU.
        routing: as a user asks for it, `--skew 0.8`.
        mtp, mtp_acceptance: drafts a step, and how often one is right.
    """

    layout: LayoutSizes
    prefill_layout: LayoutSizes | None
    options: Options
    dtype: str
    kv_dtype: str
    execution: str
    routing: str
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    mtp: int
    mtp_acceptance: float

    @property
    def num_ranks(self) -> int:
        """Of all pools."""
        prefill = self.prefill_layout
        more = 0 if prefill is None else prefill.layout.world_size
        return self.layout.layout.world_size + more


@dataclass(frozen=True)
class SimulatedLoad(Strict):
    """What was put on it.

    Attributes:
        batch: requests kept unfinished; None in an open loop.
        rate: requests that arrive a second; None in a closed one.
        prompt_len, output_len: `32`, or `32:512` for lengths drawn from a range.
    """

    batch: int | None
    rate: float | None
    num_requests: int
    prompt_len: str
    output_len: str
    seed: int
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True)
class RankMemoryResult(Strict):
    """Bytes of the fullest rank.

    Attributes:
        kv_bytes: of the whole cache as it is laid out.
        allowed_bytes: what a rank may take of `device_bytes`.
        num_resident: sequences of full length that the cache holds at once, over all ranks.
    """

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    allowed_bytes: int
    device_bytes: int
    num_resident: int


@dataclass(frozen=True)
class PhaseSimulation(Strict):
    """The steps of one phase in one pool; a step with any prompt in it counts as prefill.

    Attributes:
        num_tokens, num_seqs: that a step computes, and sequences that take part; means.
        seconds: of all steps; where they overlap, more than the time that passed.
        step_s: of a step, from when the first rank turns to it until the last is done.
        shares: of the time by cause; they add up to 1.
        floor_s: of a step; bytes of weights, keys and values over memory bandwidth or FLOPs over
            peak, of the busiest rank. Mean.
        flops_utilisation, read_utilisation: of peak FLOP/s and of memory bandwidth.
        basis_shares: of the time of operations and transfers by what it rests on.
        extrapolated_share: of that time, what lies outside the sizes that were fitted.
        traffic_bytes: to other ranks, of one step; by link.
        sent_bytes: payload to each rank, of one step; [source][destination], ranks of the pool.
        tokens_by_ranks_reached: [ep_size + 1]; of one step, tokens that reached 0, 1, 2 … ranks, a
            token counted once a layer; empty without expert parallelism.
        rank_pairs: token-expert pairs of a layer's busiest rank over the mean.
        timeline: of the largest step.
    """

    num_steps: int
    num_tokens: float
    num_seqs: float
    seconds: Number
    step_s: Spread
    shares: dict[str, float]
    floor_s: float
    flops_utilisation: float
    read_utilisation: float
    basis_shares: dict[str, float]
    extrapolated_share: float
    traffic_bytes: dict[str, TrafficBytes]
    sent_bytes: tuple[tuple[int, ...], ...]
    tokens_by_ranks_reached: tuple[int, ...]
    rank_pairs: float
    timeline: StepTimeline | None

    @property
    def largest(self) -> tuple[str, float]:
        """The cause with the largest share."""
        return max(self.shares.items(), key=lambda item: item[1])


@dataclass(frozen=True)
class PoolSimulation(Strict):
    """Ranks that serve together.

    Attributes:
        role: `prefill`, `decode`, or `both`.
        most_running: sequences that held memory at once.
    """

    role: Literal["both", "prefill", "decode"]
    layout: LayoutSizes
    memory: RankMemoryResult
    most_running: int
    num_preemptions: int
    prefill: PhaseSimulation | None
    decode: PhaseSimulation | None


@dataclass(frozen=True)
class Service(Strict):
    """What users would feel.

    Attributes:
        tpot_s: of a request, the mean time of a token after the first; None where none has two.
        e2e_s: from a request's due time to its last token.
        wall_s: from the first request's due time to the last token.
    """

    ttft_s: Spread
    tpot_s: Spread | None
    e2e_s: Spread
    output_tps: Number
    total_tps: Number
    requests_per_s: Number
    wall_s: Number


@dataclass(frozen=True)
class Simulation(Strict):
    """All of one file.

    Attributes:
        created: ISO 8601, UTC.
        model: its sizes under their own names.
        pools: one, or the one that prefills and the one that decodes.
        num_tokens_per_expert: [num_layers][num_experts]; token-expert pairs of all steps.
    """

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    kind: Literal["simulation"] = field(default="simulation", kw_only=True)
    command: str
    created: str
    versions: SoftwareVersions
    model: dict[str, Any]
    cluster: SimulatedCluster
    deployment: SimulatedDeployment
    workload: SimulatedLoad
    assumptions: tuple[SimulationAssumption, ...]
    service: Service
    pools: tuple[PoolSimulation, ...]
    num_tokens_per_expert: tuple[tuple[int, ...], ...]
