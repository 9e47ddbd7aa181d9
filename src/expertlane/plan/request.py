"""What a plan is made for."""

from dataclasses import dataclass

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import RoutingSource
from expertlane.spec.deployment import PayloadType
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import take_fields


@dataclass(frozen=True)
class Traffic:
    """Sequences that are served without end, `num_sequences` of them at once where they fit.

    Raises:
        SpecError: a number is out of its range.
    """

    num_sequences: int
    prompt_len: int
    output_len: int

    def __post_init__(self) -> None:
        take_fields(self, "workload: {}".format)

    @property
    def full_len(self) -> int:
        """Positions a sequence takes in the end: its last output token is never fed back."""
        return self.prompt_len + self.output_len - 1

    @property
    def mean_context(self) -> int:
        """Positions cached before a decode step, on average."""
        return self.prompt_len + (self.output_len - 1) // 2


@dataclass(frozen=True)
class Goals:
    """Limits that a deployment must keep; None for no limit."""

    max_tpot_s: float | None = None
    max_ttft_s: float | None = None


@dataclass(frozen=True)
class Setting:
    """What all deployments of a plan share.

    Attributes:
        routing: which experts tokens choose.
        payload: in which hidden states are dispatched.
        step_tokens: of a prefill step, as for `capacity.prefill_step_tokens`.
    """

    types: NumberTypes
    execution: Execution
    routing: RoutingSource
    payload: PayloadType = "model"
    step_tokens: int | None = None


@dataclass(frozen=True)
class PlanRequest:
    """Which deployment of a model to choose on a cluster, for what."""

    model: ModelConfig
    cluster: ModelledCluster
    traffic: Traffic
    goals: Goals
    setting: Setting
