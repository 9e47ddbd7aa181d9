"""The arrangement of a deployment: the processes of its ranks, and placements of its experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from expertlane.balance.placement_file import Placements
from expertlane.schedule.plan import StepPlan
from expertlane.spec.layout import Layout, Members


@dataclass(frozen=True)
class Arrangement:
    """The processes of a layout's ranks, and the placements of its experts.

    Attributes:
        placements: [replicas][num_hidden_layers].
        ranks_per_node: consecutive processes whose traffic counts as inside a node.
    """

    members: Members
    placements: tuple[Placements, ...]
    ranks_per_node: int

    @classmethod
    def alike(cls, members: Members, placements: Placements, ranks_per_node: int) -> "Arrangement":
        """An arrangement with the same placements in all replicas."""
        return cls(members, (placements,) * members.layout.replicas, ranks_per_node)

    @property
    def layout(self) -> Layout:
        """The members' layout."""
        return self.members.layout


class Follower(Protocol):
    """An object whose state depends on the arrangement."""

    def abandon(self, plans: Sequence[StepPlan]) -> None:
        """Drop decisions about steps to come, since ranks go on in a new epoch.

        Args:
            plans: plans of all steps that are not committed; ranks will undo them.
        """
        ...

    def reshape(self, arrangement: Arrangement) -> None:
        """Change to another arrangement, which ranks get with the next `Redeploy`."""
        ...


class Arranged:
    """The owner of the arrangement. Methods belong to the thread that has the pool.

    Only `engine.elastic.recovery` changes it; rebalancing notes moves of experts.

    Attributes:
        now: the arrangement that serves, or is about to.
        whole: the arrangement when no rank is missing; `now`, unless ranks are missing or the
            layout is being changed.
    """

    def __init__(self, whole: Arrangement) -> None:
        self.now = self.whole = whole
        self._followers: list[Follower] = []

    def follow(self, follower: Follower) -> None:
        """Register a follower, which is told of changes after those that are registered."""
        self._followers.append(follower)

    def begin(self, whole: Arrangement) -> None:
        """Set the arrangement that the first ranks load, and remove all followers."""
        self.now = self.whole = whole
        self._followers.clear()

    def move(self, replica: int, placements: Placements) -> None:
        """Set the placements of a replica whose experts have moved."""
        of_replicas = list(self.now.placements)
        of_replicas[replica] = placements
        now, is_whole = replace(self.now, placements=tuple(of_replicas)), self.now is self.whole
        self.now = now
        if is_whole:
            self.whole = now

    def want(self, whole: Arrangement) -> None:
        """Set the arrangement that will serve when no rank is missing; `change` has to follow."""
        self.whole = whole

    def abandon(self, plans: Sequence[StepPlan]) -> None:
        """Call `Follower.abandon` of all; placements are then those before these steps."""
        for follower in self._followers:
            follower.abandon(plans)

    def change(self, now: Arrangement) -> None:
        """Set another arrangement, and call `Follower.reshape` of all; `abandon` comes before."""
        self.now = now
        for follower in self._followers:
            follower.reshape(now)
