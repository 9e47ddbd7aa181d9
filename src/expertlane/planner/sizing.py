"""Sizing: the smallest cluster whose plan serves all of a load.

The screened throughput of one pool proposes a number, and plans around it settle it by bisection:
more devices never serve less.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from expertlane.cost.routing import RoutingChoice
from expertlane.errors import UserError
from expertlane.planner.candidates import MOST_DEVICES, PlanRequest
from expertlane.planner.results import Plan, make_plan
from expertlane.planner.screen import ScreenCache, fitting
from expertlane.planner.search import Search
from expertlane.progress import Progress
from expertlane.results.results import ServedLoad

_MOST_STEP = 4  # largest step, times as many devices, after a plan that does not serve all
_MOST_USELESS = 4  # doublings in a row on which no request meets the limits, before giving up


@dataclass(frozen=True, eq=False)
class SizedPlan:
    """The smallest cluster's plan.

    Attributes:
        fewer: the next smaller cluster, with the part of the load it serves; 0 devices for none.
    """

    plan: Plan
    fewer: ServedLoad


def cluster_sizes(ranks_per_node: int) -> list[int]:
    """Sizes to consider: powers of two in a node, then whole nodes."""
    within = [2**power for power in range((ranks_per_node - 1).bit_length())]
    return within + list(range(ranks_per_node, MOST_DEVICES + 1, ranks_per_node))


def smallest_plan(
    request: PlanRequest,
    routing: RoutingChoice,
    progress: Progress,
    cautions: tuple[str, ...] = (),
) -> SizedPlan:
    """The plan on the fewest devices that serve all of a load at once within the limits.

    Args:
        request: on a cluster of any size.

    Raises:
        UserError: there are no such devices, or too many for a plan.
    """
    known = ScreenCache()

    def plan_of(request: PlanRequest) -> Plan:
        return make_plan(request, routing, progress, cautions, known)

    return _Sizing(request, plan_of, known).run()


class _Sizing:
    def __init__(
        self, request: PlanRequest, plan_of: Callable[[PlanRequest], Plan], known: ScreenCache
    ) -> None:
        self._request, self._plan_of, self._known = request, plan_of, known
        self._sizes = cluster_sizes(request.cluster.profile.ranks_per_node)
        self._num_in_node = self._sizes.index(request.cluster.profile.ranks_per_node)
        self._wanted = request.rate or request.workload.num_sequences
        self._plans: dict[int, Plan | UserError] = {}

    def run(self) -> SizedPlan:
        """Bracket the smallest size that serves all, from the one that the formula proposes."""
        place = self._proposed()
        sizes = self._sizes
        low, high, step = -1, len(sizes), 1  # indices: too few, and enough
        while high - low > 1:
            served = self._served(place)
            if not self._is_enough(served):
                low = place
                place = self._next(place, served, high)
            else:
                high = place
                below = step if high > self._num_in_node else 1
                place = (low + high) // 2 if low >= 0 else max(0, high - below)
                step *= 2
        if high == len(sizes):
            raise UserError(self._too_many())
        plan = self._plans[sizes[high]]
        assert isinstance(plan, Plan), "a size that serves all has a plan"
        return SizedPlan(plan, ServedLoad(0, 0) if high == 0 else self._served(high - 1))

    def _proposed(self) -> int:
        """Index of the first size that serves all as screened; of the last where none does.

        Doubles, then bisects; stops where several in a row miss the limits with one request.
        """
        low, high, num_useless = -1, 0, 0
        while high < len(self._sizes) - 1 and (found := self._screened(high)) < self._wanted:
            num_useless = num_useless + 1 if found == 0 else 0
            if num_useless == _MOST_USELESS:
                self._sizes = self._sizes[: high + 1]
                return high
            low, high = high, min(2 * high + 1, len(self._sizes) - 1)
        while high - low > 1:
            middle = (low + high) // 2
            is_enough = self._screened(middle) >= self._wanted
            low, high = (low, middle) if is_enough else (middle, high)
        return high

    def _screened(self, place: int) -> float:
        """Concurrent requests, or requests/s, within the limits as screened.

        -1 where the model does not fit.
        """
        request = self._request.on(self._sizes[place])
        search = Search(request, self._known)
        options = fitting(search.screen()) if search.candidates else []
        within = [each.within(request.goals) for each in options]
        if request.rate is None:
            return max((num for num, _ in within), default=-1)
        return max((tps / request.workload.output_len for _, tps in within), default=-1)

    def _is_enough(self, served: ServedLoad) -> bool:
        """True if all of the load is served within the limits."""
        if self._request.rate is not None:
            return served.is_served
        return served.num_served >= self._wanted

    def _served(self, place: int) -> ServedLoad:
        """The part of the load that the plan on a size serves within the limits."""
        num = self._sizes[place]
        if num not in self._plans:
            try:
                self._plans[num] = self._plan_of(self._request.on(num))
            except UserError as error:
                self._plans[num] = error
        plan = self._plans[num]
        if isinstance(plan, UserError):
            return ServedLoad(num, 0, is_served=False)
        return plan.served

    def _next(self, place: int, served: ServedLoad, high: int) -> int:
        """Index to try after a size that does not serve all, by what it serves."""
        amount = _amount(served)
        factor = min(self._wanted / amount, _MOST_STEP) if amount else _MOST_STEP
        further = bisect_left(self._sizes, self._sizes[place] * factor)
        return max(place + 1, min(further, high - 1))

    def _too_many(self) -> str:
        most, profile = self._sizes[-1], self._request.cluster.profile
        served = self._served(len(self._sizes) - 1)
        why = self._plans[most]
        rate = self._request.rate
        load, found = f"all {self._wanted:,} requests at once", f"{_amount(served):,}"
        if rate is not None:
            load, found = f"{rate:g} requests/s", f"at most {_amount(served):,.1f}"
        reason = f": {why}" if isinstance(why, UserError) else f", which serve {found}"
        return (
            f"no cluster of up to {most:,} {profile.name} serves {load} within the limits{reason}"
        )


def _amount(served: ServedLoad) -> float:
    """Concurrent requests; of an open load requests/s."""
    return served.num_served if served.requests_per_s is None else served.requests_per_s
