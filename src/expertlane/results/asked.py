"""Options of a projection beside its workload."""

from dataclasses import dataclass

from expertlane.spec.ranges import Strict


@dataclass(frozen=True, kw_only=True)
class ProjectionAsked(Strict):
    """Options of a projection, as on the command line.

    Attributes:
        skew: None for the default with its bounds.
        routing_trace: path of the file.
        mtp: draft tokens per step.
    """

    cluster: str
    framework: str | None = None
    skew: float | None = None
    routing_trace: str | None = None
    execution: str = "graph"
    mtp: int = 0
    mtp_acceptance: float | None = None
