"""Launching of kernels on a device, and the single terms of a step's time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from math import log2

import numpy as np

from expertlane.cost.laws.profile import Profile, Term
from expertlane.cost.laws.times import Basis
from expertlane.cost.step.kernel_sets import ENGINE, ENGINE_ON_GPUS, GPU_LIBRARIES, KernelSet
from expertlane.cost.step.operation import Floats, Operation, Transfer
from expertlane.errors import UserError
from expertlane.spec.layout import Layout

BOUNDS = ("low", "seconds", "high")  # the first axis of every clock
LIKELY = BOUNDS.index("seconds")

ARRIVAL_S = "arrival_s"
DRIVER_S = "driver_s"
DRIVER_PER_RANK_S = "driver_per_rank_s"
DP_SYNC_S = "dp_sync_s"
GRAPH_LAUNCH_S = "graph_launch_s"
LAUNCH_S = "launch_s"
OVERHEAD_S = "overhead_s"
OF_TRANSFERS = "transfer"  # in place of a stage, after `overhead_s.`

# Of serving engines, whose data-parallel ranks have a scheduler each: before every step they tell
# each other how many tokens they have, since all take part in its collectives.
_ASSUMED_DP_SYNC = Term(
    20e-6, 5e-6, 100e-6, Basis.BOUND, "assumption: a message between hosts or a small all-reduce"
)


class Execution(StrEnum):
    """The host's work for each operation."""

    EAGER = "eager"  # launches every kernel, ahead of the device
    GRAPH = "graph"  # launches a micro-batch's kernels at once
    SERIAL = "serial"  # is the device: a CPU's calls and its work take turns


@dataclass(frozen=True, eq=False)
class Terms:
    """The single numbers that a timeline needs, each [B]: of a profile, low, likely and high.

    Attributes:
        launch_s: to launch a kernel, a whole graph, or an operation in series, by `execution`.
        driver_s: between steps: scheduling a step and sending it to the ranks.
        in_series: where all is in series, of operations by stage and of transfers, in place of
            `launch_s`; from the profile's terms `overhead_s.<stage>` and `overhead_s.transfer`.
        driver_per_rank_s: for every rank of a replica after the first.
        dp_sync_s: between data-parallel ranks that have a scheduler each, for every doubling of
            them; nothing where all is in series: there one driver plans for all.
        arrival_s: time from when a request is sent until it can be scheduled.
        hiding: how well transfers are hidden by what computes beside them: perfectly (low), as is
            likely, not at all (high).
    """

    execution: Execution
    launch_s: Floats
    driver_s: Floats
    in_series: Mapping[str, Floats] = field(default_factory=dict)
    driver_per_rank_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)))
    dp_sync_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)))
    arrival_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)))
    hiding: Sequence[str] = BOUNDS

    @property
    def num_clocks(self) -> int:
        """B; those of `BOUNDS` come first."""
        return len(self.driver_s)

    def step_s(self, layout: Layout) -> Floats:
        """[B]; the driver's part of a step of a replica."""
        of_ranks = (layout.replica_size - 1) * self.driver_per_rank_s
        return self.driver_s + of_ranks + log2(layout.dp) * self.dp_sync_s

    def overhead_s(self, step: Operation | Transfer) -> Floats:
        """[3]; overhead of a step in series beyond its law: the engine's own work around it."""
        place = step.stage.label if isinstance(step, Operation) else OF_TRANSFERS
        return self.in_series.get(place, self.launch_s)

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
        known = {
            term: np.array([each.low, each.value, each.high])
            for term, each in profile.terms.items()
        }
        for term in (name, DRIVER_S):
            if term not in known:
                raise UserError(
                    f"profile {profile.name} has no term {term!r}; it has: "
                    f"{', '.join(sorted(known)) or 'none'}"
                )
        none = np.zeros(len(BOUNDS))
        sync = profile.terms.get(DP_SYNC_S, _ASSUMED_DP_SYNC)
        sync_s = np.array([sync.low, sync.value, sync.high])
        begin = f"{OVERHEAD_S}."
        return cls(
            execution=execution,
            launch_s=known[name],
            driver_s=known[DRIVER_S],
            in_series={
                term.removeprefix(begin): each
                for term, each in known.items()
                if term.startswith(begin)
            },
            driver_per_rank_s=known.get(DRIVER_PER_RANK_S, none),
            dp_sync_s=none if execution is Execution.SERIAL else sync_s,
            arrival_s=known.get(ARRIVAL_S, none),
        )

    def changed(self, change: Callable[[str, Floats], Floats], hiding: Sequence[str]) -> "Terms":
        """The terms on other clocks.

        Args:
            change: makes a term's seconds of those there are; by its name, or place in series.
        """
        names = [each.name for each in fields(self) if each.name.endswith("_s")]
        return Terms(
            execution=self.execution,
            in_series={place: change(place, each) for place, each in self.in_series.items()},
            hiding=hiding,
            **{name: change(name, getattr(self, name)) for name in names},
        )

    @property
    def only_likely(self) -> "Terms":
        """The terms with low and high replaced by the likely ones."""
        hiding = [BOUNDS[LIKELY]] * len(BOUNDS)
        return self.changed(lambda _, each: np.full(len(BOUNDS), each[LIKELY]), hiding)

    @classmethod
    def free(cls) -> "Terms":
        """Launches and driver that take no time."""
        none = np.zeros(len(BOUNDS))
        return cls(Execution.SERIAL, none, none)


def kernels_of(profile: Profile) -> KernelSet:
    """The kernels that a profile's laws are of: the engine's if `expertlane calibrate` made it.

    Only that measures what the engine launches; shipped profiles assume it.
    """
    if OVERHEAD_S in profile.terms:
        return ENGINE
    launch = profile.terms.get(LAUNCH_S)
    is_measured = launch is not None and launch.basis is Basis.MEASURED
    return ENGINE_ON_GPUS if is_measured else GPU_LIBRARIES
