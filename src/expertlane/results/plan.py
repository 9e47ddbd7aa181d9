"""What `expertlane plan` found, as typed values: its `results.json`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.projection import Estimate, StepProjection
from expertlane.results.strict import Strict
from expertlane.results.timeline import StepTimeline
from expertlane.spec.deployment import Options
from expertlane.spec.names import Phase

SCHEMA_VERSION = 2
KIND = "plan"

NoPools = Literal["no split", "too large", "over limits"]


@dataclass(frozen=True)
class PlannedDeployment(Strict):
    """A deployment and what it serves; sequences and tokens are of the whole system.

    Attributes:
        num_sequences: that run at once, at its best.
        tps: output tokens a second.
        tpot_s, ttft_s: mean; None where a queue would grow without end.
        prefill_tps: prompt tokens a second while nothing is decoded.
        why: what makes it slower than the best, empty for that.
        decode, prefill: projected in full; None where it was screened only.
        weight_bytes, activation_bytes, sequence_bytes: of the fullest rank; a sequence at its full
            length.
        timelines: of the steps above, where they were kept.
    """

    layout: LayoutSizes
    options: Options
    num_sequences: int
    tps: Estimate
    tpot_s: Estimate
    ttft_s: Estimate | None
    prefill_tps: Estimate
    why: str
    decode: StepProjection | None
    prefill: StepProjection | None
    weight_bytes: int
    activation_bytes: int
    sequence_bytes: int
    timelines: dict[Phase, StepTimeline] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedPools(Strict):
    """Prefill and decode on disjoint devices.

    Attributes:
        transfer_s: of a prompt's keys and values from one pool to the other.
    """

    prefill: PlannedDeployment
    decode: PlannedDeployment
    num_prefill_devices: int
    num_decode_devices: int
    tps: Estimate
    tpot_s: Estimate
    ttft_s: Estimate | None
    transfer_s: Estimate


@dataclass(frozen=True)
class ServeCommandResult(Strict):
    """A command line of another system; `note` may be empty."""

    system: str
    command: str | None
    note: str


@dataclass(frozen=True)
class PlanAssumption(Strict):
    """What was taken for granted, and how to change it."""

    name: str
    value: str
    change: str


@dataclass(frozen=True)
class PlanResults(Strict):
    """All of one plan.

    Attributes:
        cluster: for example `h100x16`.
        best: projected in full, by tokens a second.
        families: the best of each kind of deployment, as screened, with why it loses.
        pareto: as screened, by TPOT: none has both more tokens a second and a lower TPOT.
        papers: the two deployments of the paper, by name, where the model is the paper's and they
            are among the candidates.
        two_pools: the best; None where there are none.
        no_two_pools: why there are none: the devices cannot be split for the model, nothing fits,
            or none keeps the limits.
        num_candidates, num_too_large, num_over_limits: deployments of one pool.
        num_pool_candidates: deployments tried for two pools.
        cautions: what a reader must know of the numbers, in sentences.
        experiment: the file for `expertlane compare` that was written; None if none was.
    """

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    kind: Literal["plan"] = field(default="plan", kw_only=True)
    command: str
    created: str
    version: str
    model: dict[str, Any]
    cluster: str
    device: str
    num_sequences: int
    prompt_len: int
    output_len: int
    max_tpot_s: float | None
    max_ttft_s: float | None
    best: tuple[PlannedDeployment, ...]
    families: dict[str, PlannedDeployment]
    pareto: tuple[PlannedDeployment, ...]
    papers: dict[str, PlannedDeployment]
    two_pools: PlannedPools | None
    num_candidates: int
    num_too_large: int
    num_over_limits: int
    num_pool_candidates: int
    commands: tuple[ServeCommandResult, ...]
    experiment: str | None
    assumptions: tuple[PlanAssumption, ...]
    cautions: tuple[str, ...] = ()
    no_two_pools: NoPools | None = None
