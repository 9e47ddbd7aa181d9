"""The states of a recovery, and what is kept of each one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from expertlane.spec.layout import Layout


class State(StrEnum):
    """Where a recovery stands."""

    SERVING = "serving"  # no rank is missing
    FENCING = "fencing"  # lost ranks are killed, and a new epoch begins
    REPLACING = "replacing"  # new processes start in their places
    LOADING = "loading"  # these load weights; all ranks connect to each other
    SCALING = "scaling"  # another layout: ranks end, or more start; a new epoch begins
    REPLAYING = "replaying"  # steps run again; over with the first one that is committed
    STOPPED = "stopped"  # all ranks were ended


# From each state, those that may follow. The machine begins with LOADING.
NEXT: Mapping[State, frozenset[State]] = {
    State.SERVING: frozenset({State.FENCING, State.SCALING, State.STOPPED}),
    State.SCALING: frozenset({State.FENCING, State.LOADING, State.STOPPED}),
    State.FENCING: frozenset({State.FENCING, State.REPLACING, State.STOPPED}),
    State.REPLACING: frozenset({State.FENCING, State.LOADING, State.STOPPED}),
    State.LOADING: frozenset({State.FENCING, State.REPLAYING, State.SERVING, State.STOPPED}),
    State.REPLAYING: frozenset({State.FENCING, State.SERVING, State.STOPPED}),
    State.STOPPED: frozenset(),
}


@dataclass(frozen=True)
class Moment:
    """A state that begins.

    Attributes:
        time_s: on the monotonic clock.
        ranks: the loss that led to it; empty but for FENCING, and there if transfers broke without
            a rank that was the cause.
        cause: a line; empty likewise.
    """

    state: State
    time_s: float
    ranks: frozenset[int] = frozenset()
    cause: str = ""


@dataclass(eq=False)
class RecoveryRecord:
    """One recovery, from a loss until a step is committed again; further losses are part of it.

    Or one change of the layout, from its begin until then, losses in it included.

    Attributes:
        at: when it began, seconds since 1970.
        layouts: before and after; None of a recovery.
        moments: its states, in order; the last one, SERVING or STOPPED, ends it.
        num_requests: whose keys and values were lost.
    """

    at: float
    layouts: tuple[Layout, Layout] | None = None
    moments: list[Moment] = field(default_factory=list)
    num_requests: int = 0

    @property
    def ranks(self) -> list[int]:
        """All that were lost, sorted."""
        return sorted(frozenset().union(*(moment.ranks for moment in self.moments)))

    @property
    def causes(self) -> list[str]:
        """A line for each loss."""
        return [moment.cause for moment in self.moments if moment.cause]

    @property
    def is_over(self) -> bool:
        """Whether the ranks serve again, or were ended."""
        return bool(self.moments) and self.moments[-1].state in (State.SERVING, State.STOPPED)

    @property
    def total_s(self) -> float:
        """From its begin to its last moment."""
        return self.moments[-1].time_s - self.moments[0].time_s

    def seconds(self) -> dict[State, float]:
        """By state, in the order of their first moments."""
        found: dict[State, float] = {}
        for moment, then in pairwise(self.moments):
            found[moment.state] = found.get(moment.state, 0.0) + then.time_s - moment.time_s
        return found

    @property
    def outcome(self) -> str:
        """What came of it and how long it took, for people."""
        shares = ", ".join(f"{state} {seconds:.2f}" for state, seconds in self.seconds().items())
        how = "recovered in"
        if self.layouts is not None:
            how = "layout changed from {} to {} in".format(*self.layouts)
        if self.moments[-1].state is State.STOPPED:
            how = "given up after"
        num = self.num_requests
        return (
            f"{how} {self.total_s:.2f} s ({shares}); {num} request{'s' * (num != 1)} computed again"
        )

    @property
    def line(self) -> str:
        """All of it, for people."""
        return "; ".join([self.outcome, *self.causes])
