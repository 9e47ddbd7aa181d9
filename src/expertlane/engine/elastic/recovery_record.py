"""The states of a recovery, and the records of recoveries."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from expertlane.spec.layout import Layout


class State(StrEnum):
    """The states of a recovery."""

    SERVING = "serving"  # no rank is missing
    SHRUNK = "shrunk"  # the others serve in a smaller layout; lost ranks start meanwhile
    FENCING = "fencing"  # lost ranks are killed, and a new epoch begins
    REPLACING = "replacing"  # new processes start in their places
    LOADING = "loading"  # ranks load what they lack; all connect to each other
    SCALING = "scaling"  # another layout: ranks end, or more start; a new epoch begins
    GROWING = "growing"  # lost ranks are up again; a new epoch begins
    REPLAYING = "replaying"  # steps run again; over with the first one that is committed
    STOPPED = "stopped"  # all ranks were ended


# The states that may follow each state. The machine begins with LOADING.
NEXT: Mapping[State, frozenset[State]] = {
    State.SERVING: frozenset({State.FENCING, State.SCALING, State.STOPPED}),
    State.SHRUNK: frozenset({State.FENCING, State.GROWING, State.STOPPED}),
    State.SCALING: frozenset({State.FENCING, State.LOADING, State.STOPPED}),
    State.GROWING: frozenset({State.FENCING, State.LOADING, State.STOPPED}),
    State.FENCING: frozenset({State.FENCING, State.REPLACING, State.LOADING, State.STOPPED}),
    State.REPLACING: frozenset({State.FENCING, State.LOADING, State.STOPPED}),
    State.LOADING: frozenset({State.FENCING, State.REPLAYING, State.SERVING, State.STOPPED}),
    State.REPLAYING: frozenset({State.FENCING, State.SERVING, State.SHRUNK, State.STOPPED}),
    State.STOPPED: frozenset(),
}
CHANGING = frozenset({State.SCALING, State.GROWING})  # no rank was lost; a new epoch begins
OVER = frozenset({State.SERVING, State.SHRUNK, State.STOPPED})  # in which a record ends


class RecoveryKind(StrEnum):
    """The reason of an interruption."""

    RECOVERY = "recovery"  # ranks were lost
    SCALING = "scaling"  # another layout was asked for
    GROWTH = "growth"  # lost ranks are up again


@dataclass(frozen=True)
class Moment:
    """The begin of a state.

    Attributes:
        time_s: time on the monotonic clock.
        ranks: lost ranks that led to it; empty except for FENCING, and there too if transfers broke
            and no rank was found to be the cause.
        cause: the loss in a line; empty except for FENCING.
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
        at: when it began, in seconds since 1970.
        layouts: the layouts before and after; None if the layout stays.
        moments: its states, in order; one of `OVER` ends it.
        num_requests: requests whose keys and values were lost.
    """

    at: float
    kind: RecoveryKind = RecoveryKind.RECOVERY
    layouts: tuple[Layout, Layout] | None = None
    moments: list[Moment] = field(default_factory=list)
    num_requests: int = 0

    @property
    def ranks(self) -> list[int]:
        """All lost ranks, sorted."""
        return sorted(frozenset().union(*(moment.ranks for moment in self.moments)))

    @property
    def causes(self) -> list[str]:
        """A line for each loss."""
        return [moment.cause for moment in self.moments if moment.cause]

    @property
    def is_over(self) -> bool:
        """Whether the ranks serve again, or were ended."""
        return bool(self.moments) and self.moments[-1].state in OVER

    @property
    def total_s(self) -> float:
        """Seconds from its begin to its last moment."""
        return self.moments[-1].time_s - self.moments[0].time_s

    def seconds(self) -> dict[State, float]:
        """Seconds by state, in the order in which states first began."""
        found: dict[State, float] = {}
        for moment, then in pairwise(self.moments):
            found[moment.state] = found.get(moment.state, 0.0) + then.time_s - moment.time_s
        return found

    @property
    def outcome(self) -> str:
        """The outcome and the seconds in each state, as a line for the log."""
        shares = ", ".join(f"{state} {seconds:.2f}" for state, seconds in self.seconds().items())
        how, state = "recovered in", self.moments[-1].state
        if self.kind is RecoveryKind.SCALING and self.layouts is not None:
            how = "layout changed from {} to {} in".format(*self.layouts)
        elif self.kind is RecoveryKind.GROWTH and state is State.SERVING:
            how = "grew back in"
        if state is State.STOPPED:
            how = "given up after"
        line, num = f"{how} {self.total_s:.2f} s ({shares})", self.num_requests
        if state is State.SHRUNK and self.layouts is not None:
            line += "; serving with {} of {} data-parallel ranks".format(*self.num_dp_ranks)
        return f"{line}; {num} request{'s' * (num != 1)} computed again"

    @property
    def num_dp_ranks(self) -> tuple[int, int]:
        """Data-parallel ranks of all replicas, after and before; (0, 0) where the layout stays."""
        if self.layouts is None:
            return 0, 0
        before, after = (each.replicas * each.dp for each in self.layouts)
        return after, before

    @property
    def line(self) -> str:
        """The outcome and all causes, as a line for the log."""
        return "; ".join([self.outcome, *self.causes])
