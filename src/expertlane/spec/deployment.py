"""A deployment: a name, a layout, and the options it runs with."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from expertlane.errors import SpecError
from expertlane.spec.layout import Layout

MicroBatchSchedule = Literal["drained", "rotating"]


@dataclass(frozen=True)
class Options:
    """How a deployment runs.

    Attributes:
        overlap: two-batch overlap: a rank's batch is split in two, and one half computes while
            the other half's tokens travel.
        num_micro_batches: parts a step's batch is cut into for the pipeline.
        micro_batch_schedule: `drained`: a step's micro-batches all finish before the next step
            begins; `rotating`: each micro-batch starts its next token as soon as it has the
            last one, so the pipeline never runs empty.

    Raises:
        SpecError: a value is not valid.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    overlap: bool = False
    num_micro_batches: int = 1
    micro_batch_schedule: MicroBatchSchedule = "drained"

    def __post_init__(self) -> None:
        if self.num_micro_batches < 1:
            raise SpecError(f"num_micro_batches is {self.num_micro_batches}; it must be 1 or more")
        if self.micro_batch_schedule not in get_args(MicroBatchSchedule):
            raise SpecError(
                f"micro_batch_schedule is {self.micro_batch_schedule!r}; valid: "
                f"{', '.join(get_args(MicroBatchSchedule))}"
            )
        if not isinstance(self.overlap, bool):
            raise SpecError(f"overlap is {self.overlap!r}; it must be true or false")

    def __str__(self) -> str:
        parts = []
        if self.num_micro_batches > 1:
            parts.append(f"{self.num_micro_batches} micro-batches {self.micro_batch_schedule}")
        if self.overlap:
            parts.append("overlap")
        return ", ".join(parts) or "plain"


@dataclass(frozen=True)
class Deployment:
    """One way to run the experiment's model.

    Attributes:
        is_baseline: one of those the proposal is held against; factors are given against the
            best of them too.

    Raises:
        SpecError: the name is blank or not one line of text.
    """

    name: str
    layout: Layout
    options: Options = field(default_factory=Options)
    is_baseline: bool = False

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable():
            raise SpecError(f"a deployment's name is {self.name!r}; it must be one line of text")
