"""What a cluster model says of deployments: projected values, never beside measured ones."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from expertlane.errors import UserError
from expertlane.results.assumption import Assumption
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.strict import Strict
from expertlane.results.timeline import StepTimeline
from expertlane.spec.deployment import Options
from expertlane.spec.names import Phase

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate(Strict):
    """A projected value; low ≤ value ≤ high, whatever is better."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class StepProjection(Strict):
    """One kind of step of a deployment.

    Attributes:
        context: positions that each sequence has cached before the step.
        num_tokens: new tokens of the step, over the whole system.
        step_s: seconds; of a round in which every sequence goes one token on, where micro-batches
            rotate.
        tps: new tokens a second over the whole system.
        shares: of the step's time by cause; they add up to 1.
        floor_s: bytes of weights, keys and values over memory bandwidth or FLOPs over peak, the
            larger, of the busiest rank: no deployment of this layout is faster.
        flops_utilisation, read_utilisation: shares of peak FLOP/s and of memory bandwidth.
        basis_shares: of the step's time by what it rests on: measured, fitted, bound.
        extrapolated_share: of the step's time, what lies outside the sizes that were fitted.
        weight_bytes: that the rank which reads most of them reads.
        fits: whether so many sequences of this context fit into memory.
    """

    context: int
    num_tokens: int
    step_s: Estimate
    tps: Estimate
    shares: dict[str, float]
    floor_s: float
    flops_utilisation: float
    read_utilisation: float
    basis_shares: dict[str, float]
    extrapolated_share: float
    weight_bytes: int
    fits: bool


@dataclass(frozen=True)
class ProjectedMemory(Strict):
    """Bytes of the fullest rank.

    Attributes:
        weight_bytes, activation_bytes: held, and of the largest step.
        sequence_bytes: keys and values of one sequence at its full length.
        device_bytes: what there is, less what is kept free.
        num_resident: sequences of full length that fit at once, over the whole system; 0 where
            not even the weights fit.
    """

    weight_bytes: int
    activation_bytes: int
    sequence_bytes: int
    device_bytes: int
    num_resident: int


@dataclass(frozen=True)
class ProjectedDeployment(Strict):
    """One deployment's row.

    Attributes:
        top_k: experts of a token.
        execution: `graph`, `eager` or `serial`: how work gets onto the devices.
        routing: which experts tokens are taken to choose: `balanced` or `skewed`.
        prefill: None where it does not fit.
        decode: by context; of all sequences, and where they do not fit also of as many as do.
        by_batch: decode steps of fewer sequences, and of all, at the context that is spoken of;
            empty but under the usual conditions.
        timelines: of a prefill and of a decode step; empty but under the usual conditions.
    """

    name: str
    layout: LayoutSizes
    options: Options
    is_baseline: bool
    top_k: int
    execution: str
    routing: str
    memory: ProjectedMemory
    prefill: StepProjection | None
    decode: tuple[StepProjection, ...]
    by_batch: tuple[StepProjection, ...] = ()
    timelines: dict[Phase, StepTimeline] = field(default_factory=dict)

    @property
    def conditions(self) -> tuple[int, str, str]:
        """What deployments must share to be compared."""
        return self.top_k, self.execution, self.routing

    def decode_of(self, context: int, num_seqs: int) -> StepProjection | None:
        """The decode step of so many sequences, if there is one."""
        found = (
            step for step in self.decode if (step.context, step.num_tokens) == (context, num_seqs)
        )
        return next(found, None)


@dataclass(frozen=True)
class ProjectedScaling(Strict):
    """One size of a family of layouts.

    Attributes:
        num_slots_per_rank: experts of a layer, copies included, on a rank.
        same_work: a decode step of all sequences.
        same_share: one of as many sequences a rank as the experiment's largest deployment has.
        weight_bytes: held by the fullest rank.
    """

    name: str
    layout: LayoutSizes
    num_ranks: int
    num_slots_per_rank: int
    weight_bytes: int
    device_bytes: int
    same_work: StepProjection
    same_share: StepProjection


@dataclass(frozen=True)
class ServedDeployment(Strict):
    """A deployment under the whole workload, as much of it at once as fits.

    Attributes:
        num_seqs: running at once, over the whole system.
        tps: output tokens a second, with the time that prompts take.
        tpot_s: mean time of a running sequence's token, others' prompts included.
    """

    name: str
    layout: LayoutSizes
    options: Options
    num_seqs: int
    tps: Estimate
    tpot_s: Estimate


@dataclass(frozen=True)
class Planned(Strict):
    """What a planner finds for the same model, cluster and workload, balanced and with graphs.

    Attributes:
        num_candidates, num_too_large: deployments looked at, and those that do not fit.
        decode: the fastest decode step of all sequences at the projection's context; the
            experiment's own deployments take part. None where no deployment holds them all.
        served: the whole workload; the planner's best first, then the experiment's deployments
            that fit.
        pareto: of decoding alone around the projection's context, by TPOT; none has both more
            tokens a second and a lower TPOT.
    """

    top_k: int
    num_candidates: int
    num_too_large: int
    decode: ProjectedDeployment | None
    served: tuple[ServedDeployment, ...]
    pareto: tuple[ServedDeployment, ...] = ()


@dataclass(frozen=True)
class ModelledDevice(Strict):
    """The datasheet of a cluster's devices; `flops_per_s`: dense, in the type of weights."""

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Projection(Strict):
    """Deployments on one modelled cluster.

    Attributes:
        cluster: for example `h100x16`.
        types: of weights, and of keys and values.
        num_sequences: of the workload, as many as every decode step has if they fit.
        context: the one that is spoken of; the longest at which all sequences fit everywhere.
        skew: of the power law behind routing that is `skewed`.
        deployments: in the experiment's order; several of one name differ in their conditions.
        not_measured: why nothing was measured beside it, if so.

    Raises:
        UserError: no deployment.
    """

    cluster: str
    device: ModelledDevice
    types: str
    num_sequences: int
    context: int
    skew: float
    deployments: tuple[ProjectedDeployment, ...]
    scaling: tuple[ProjectedScaling, ...]
    planned: tuple[Planned, ...]
    assumptions: tuple[Assumption, ...]
    not_measured: str | None = None

    def __post_init__(self) -> None:
        if not self.deployments:
            raise UserError("a projection without a deployment")

    @property
    def top_ks(self) -> tuple[int, ...]:
        """The model's own first."""
        return _each_once(row.top_k for row in self.deployments)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Those of decode steps, ascending."""
        return tuple(sorted({step.context for step in self.deployments[0].decode}))

    @property
    def conditions(self) -> tuple[tuple[int, str, str], ...]:
        """All there are, the usual ones first."""
        return _each_once(row.conditions for row in self.deployments)

    def rows(self, conditions: tuple[int, str, str]) -> tuple[ProjectedDeployment, ...]:
        """The deployments under the same conditions."""
        return tuple(row for row in self.deployments if row.conditions == conditions)

    def usual(self, top_k: int) -> tuple[ProjectedDeployment, ...]:
        """The deployments under the first conditions with so many experts of a token."""
        first = next(each for each in self.conditions if each[0] == top_k)
        return self.rows(first)


def _each_once(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))
