"""The owner of a deployment's arrangement, and those whose state depends on it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from expertlane.balance.placement_file import Placements
from expertlane.balance.transition import Arrangement
from expertlane.schedule.plan import StepPlan


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
