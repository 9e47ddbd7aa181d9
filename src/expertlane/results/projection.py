"""What a cluster model says of deployments: projected values, never beside measured ones."""

from dataclasses import dataclass
from typing import Literal

from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.strict import Strict
from expertlane.spec.deployment import Options

Fit = Literal["fits", "too large"]


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
        execution: `graph`, `eager` or `serial`: how work gets onto the devices.
        routing: which experts tokens are taken to choose.
        prefill: None where it does not fit.
        decode: by context.
    """

    name: str
    layout: LayoutSizes
    options: Options
    is_baseline: bool
    execution: str
    routing: str
    memory: ProjectedMemory
    prefill: StepProjection | None
    decode: tuple[StepProjection, ...]


@dataclass(frozen=True)
class Projection(Strict):
    """Deployments on one modelled cluster.

    Attributes:
        cluster: for example `h100x16`.
        device: its name.
        types: of weights, and of keys and values.
        deployments: in the experiment's order; several of one name differ in execution or routing.
    """

    cluster: str
    device: str
    types: str
    deployments: tuple[ProjectedDeployment, ...]
