"""What a projection was asked for beside a workload, as options have it."""

from dataclasses import dataclass

from expertlane.spec.ranges import Strict


@dataclass(frozen=True, kw_only=True)
class ProjectionAsked(Strict):
    """Options of a projection.

    Attributes:
        skew: None for the usual one with its bounds.
        routing_trace: the file.
        mtp: drafts of a step.
    """

    cluster: str
    framework: str | None = None
    skew: float | None = None
    routing_trace: str | None = None
    execution: str = "graph"
    mtp: int = 0
    mtp_acceptance: float | None = None
