"""Which processes are the ranks of a layout, and where its experts are: one holder for all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from expertlane.balance.placement_file import Placements
from expertlane.schedule.plan import StepPlan
from expertlane.spec.layout import Layout
from expertlane.spec.members import Members


@dataclass(frozen=True)
class Arrangement:
    """The processes of a layout, and where its experts are.

    Attributes:
        placements: [replicas][num_hidden_layers].
        ranks_per_node: consecutive processes whose traffic counts as inside a node.
    """

    members: Members
    placements: tuple[Placements, ...]
    ranks_per_node: int

    @classmethod
    def alike(cls, members: Members, placements: Placements, ranks_per_node: int) -> "Arrangement":
        """Experts at the same places in all replicas."""
        return cls(members, (placements,) * members.layout.replicas, ranks_per_node)

    @property
    def layout(self) -> Layout:
        """Of the members."""
        return self.members.layout


class Follower(Protocol):
    """Who keeps something that depends on the arrangement."""

    def abandon(self, plans: Sequence[StepPlan]) -> None:
        """Give up what is decided for steps to come: ranks go on in a new epoch.

        Args:
            plans: of all steps that are not committed; ranks will undo them.
        """
        ...

    def reshape(self, arrangement: Arrangement) -> None:
        """Go on in another arrangement, which ranks take with the next `Redeploy`."""
        ...


class Arranged:
    """The one owner of the arrangement. Methods belong to the thread that has the pool.

    `engine.elastic.recovery` decides when it changes, and nobody else changes it.

    Attributes:
        now: that serves, or is about to.
        whole: when no rank is missing; `now` unless some are, or the layout is being changed.
    """

    def __init__(self, whole: Arrangement) -> None:
        self.now = self.whole = whole
        self._followers: list[Follower] = []

    def follow(self, follower: Follower) -> None:
        """Tell it of each change to come, after those that follow already."""
        self._followers.append(follower)

    def begin(self, whole: Arrangement) -> None:
        """Set what the first ranks are to load; nobody follows any more."""
        self.now = self.whole = whole
        self._followers.clear()

    def move(self, replica: int, placements: Placements) -> None:
        """Note that the experts of a replica have moved."""
        of_replicas = list(self.now.placements)
        of_replicas[replica] = placements
        now, is_whole = replace(self.now, placements=tuple(of_replicas)), self.now is self.whole
        self.now = now
        if is_whole:
            self.whole = now

    def want(self, whole: Arrangement) -> None:
        """Set what is to serve when no rank is missing; `change` has to follow."""
        self.whole = whole

    def abandon(self, plans: Sequence[StepPlan]) -> None:
        """As of `Follower`, to all; experts are then where they were before these steps."""
        for follower in self._followers:
            follower.abandon(plans)

    def change(self, now: Arrangement) -> None:
        """Hand on another arrangement to all that follow, after `abandon`."""
        self.now = now
        for follower in self._followers:
            follower.reshape(now)
