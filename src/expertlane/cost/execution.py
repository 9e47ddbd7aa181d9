"""How work gets onto a device, and what each launch and each step costs."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from expertlane.cost.profile import Profile, Term
from expertlane.errors import UserError

Floats = npt.NDArray[np.float64]

BOUNDS = ("low", "seconds", "high")  # the first axis of every clock
LIKELY = BOUNDS.index("seconds")

DRIVER_S = "driver_s"
GRAPH_LAUNCH_S = "graph_launch_s"
LAUNCH_S = "launch_s"
OVERHEAD_S = "overhead_s"


class Execution(StrEnum):
    """What the host does for each operation."""

    EAGER = "eager"  # launches every kernel, ahead of the device
    GRAPH = "graph"  # launches a micro-batch's kernels at once
    SERIAL = "serial"  # is the device: a CPU's calls and its work take turns


@dataclass(frozen=True, eq=False)
class Terms:
    """The single numbers that a timeline needs, each [3]: low, likely, high.

    Attributes:
        launch_s: of a kernel, of a whole graph, or of a call in series, by `execution`.
        driver_s: between steps: scheduling a step and sending it to the ranks.
    """

    execution: Execution
    launch_s: Floats
    driver_s: Floats

    @classmethod
    def of(cls, profile: Profile, execution: Execution) -> "Terms":
        """From a profile; one that has `overhead_s` is a CPU's, where all is in series.

        Raises:
            UserError: the profile lacks one of them.
        """
        if OVERHEAD_S in profile.terms:
            execution = Execution.SERIAL
        name = {
            Execution.EAGER: LAUNCH_S,
            Execution.GRAPH: GRAPH_LAUNCH_S,
            Execution.SERIAL: OVERHEAD_S,
        }[execution]
        return cls(
            execution=execution,
            launch_s=_bounds(_term(profile, name)),
            driver_s=_bounds(_term(profile, DRIVER_S)),
        )

    @classmethod
    def free(cls) -> "Terms":
        """Launches and driver that take no time."""
        none = np.zeros(len(BOUNDS))
        return cls(Execution.SERIAL, none, none)


def _term(profile: Profile, name: str) -> Term:
    if name not in profile.terms:
        raise UserError(
            f"profile {profile.name} has no term {name!r}; it has: "
            f"{', '.join(sorted(profile.terms)) or 'none'}"
        )
    return profile.terms[name]


def _bounds(term: Term) -> Floats:
    return np.array([term.low, term.value, term.high])
