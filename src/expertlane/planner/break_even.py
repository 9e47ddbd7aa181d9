"""Break-even points of a plan: the skew, and the number of sequences, where #1 and its rival tie.

The rival is the best without EP where #1 has EP, or with EP where #1 has none.
Both are screened again under other skews and with other numbers of sequences; what each one's
simulation had beyond the formula is taken to be the same there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from math import exp, inf, isfinite, log

from expertlane.cost.routing import PowerLawRouting
from expertlane.planner.candidates import Candidate, PlanRequest, family_of
from expertlane.planner.ranking import Contender, Ranking
from expertlane.planner.screen import Known, Screen, ScreenedCandidate, fitting, prefilled_as
from expertlane.planner.search import Finalist, unseen
from expertlane.results.results import BreakEven, Level, Varied
from expertlane.spec.names import Phase

_SKEWS = 0.0, 0.4, 0.8, 1.2  # beside the one asked for; public traces have up to 1.3
_LOADS = 1 / 16, 1 / 4, 1, 4, 16  # times the sequences asked for
_LEVEL = 0.01  # largest logarithm of a ratio that counts as equal
_MOST_TRIALS = 5  # between two known points


@dataclass(frozen=True)
class Point:
    """A skew or number of sequences at which both were evaluated.

    Attributes:
        ahead: logarithm of the best's tokens/s over the rival's.
    """

    at: float
    ahead: float


def break_even(ranking: Ranking, request: PlanRequest, known: Known) -> BreakEven | None:
    """Break-even points of the chosen deployment and its rival; None without a rival."""
    best, rival = ranking.chosen, rival_of(ranking)
    if rival is None:
        return None
    pair = Pair(best.finalist, rival.finalist, request, known)
    shares = best.tps.shares(rival.tps)
    unsure = max(shares, key=shares.__getitem__, default="")
    num = request.workload.num_sequences
    loads = sorted({max(1, round(num * each)) for each in _LOADS})
    levels = []
    routing = request.setting.routing
    is_apart = any(each.finalist.candidate.layout.ep > 1 for each in (best, rival))
    if pair.is_known and isinstance(routing, PowerLawRouting) and is_apart:
        skews = sorted({*_SKEWS, routing.alpha})
        levels.append(_level("skew", pair.with_skew, skews, routing.alpha))
    if pair.is_known and request.rate is None:
        levels.append(_level("sequences", pair.with_sequences, loads, num))
    return BreakEven(str(rival.finalist.candidate), tuple(levels), unsure, shares.get(unsure, 0.0))


def rival_of(ranking: Ranking) -> Contender | None:
    """The best with EP where the chosen one has none, or without; else the best of another family.

    None without one.
    """
    first = ranking.chosen.finalist.candidate.layout
    others = [(each, each.finalist.candidate.layout) for each in ranking.contenders[1:]]
    for is_rival in (
        lambda layout: (layout.ep > 1) != (first.ep > 1),
        lambda layout: family_of(layout) != family_of(first),
    ):
        for each, layout in others:
            if is_rival(layout):
                return each
    return None


class Pair:
    """Two simulated deployments, under other conditions than those they were planned for."""

    def __init__(self, best: Finalist, rival: Finalist, request: PlanRequest, known: Known) -> None:
        self._both = best, rival
        self._request, self._known = request, known
        self._usual = [_within(each, each.option, request) for each in self._both]

    @property
    def is_known(self) -> bool:
        """True if both meet the limits by the formula too, as they do when simulated."""
        return all(self._usual)

    def with_skew(self, skew: float) -> float:
        """Logarithm of the first one's tokens/s over the second's, at a skew."""
        setting = self._request.setting
        routing = setting.routing
        assert isinstance(routing, PowerLawRouting), "a trace has no skew"
        # The bounds' routings are drawn, and experts placed by them, already.
        drawn = {each.alpha: each for each in (routing, *(routing.extremes or ()))}
        other = drawn.get(skew) or replace(routing, alpha=skew, bounds=None)
        request = replace(self._request, setting=replace(setting, routing=other))
        known = Known(slots=self._known.slots, rooms=self._known.rooms)
        return self._ahead(request, self._known if other is routing else known)

    def with_sequences(self, num: float) -> float:
        """Logarithm of that ratio at a number of concurrent sequences, or as many as fit."""
        workload = replace(self._request.workload, num_sequences=round(num))
        return self._ahead(replace(self._request, workload=workload), self._known)

    def _ahead(self, request: PlanRequest, known: Known) -> float:
        screened = screened_again([each.candidate for each in self._both], request, known)
        tps = [
            0.0 if option is None else each.tps * _within(each, option, request) / usual
            for each, option, usual in zip(self._both, screened, self._usual, strict=True)
        ]
        if not all(tps):
            return 0.0 if tps[0] == tps[1] else inf if tps[0] else -inf
        return log(tps[0] / tps[1])


def screened_again(
    candidates: Sequence[Candidate], request: PlanRequest, known: Known
) -> list[ScreenedCandidate | None]:
    """Candidates screened for another request on the same cluster; None for what does not fit."""
    forms = [  # each phase's, as if it were that of both
        [each._replace(options=each.options.of_phase(phase)) for each in candidates]
        for phase in (Phase.DECODE, Phase.PREFILL)
    ]
    screened = Screen(request, known).run(dict.fromkeys(chain(*forms)), unseen)
    of = {each.candidate: each for each in fitting(screened)}
    found: list[ScreenedCandidate | None] = []
    for decode, prompt in zip(*forms, strict=True):
        option, best = of.get(decode), of.get(prompt)
        if option is not None and best is not None and decode != prompt:
            option = prefilled_as(option, best, request, {})
        found.append(option)
    return found


def _within(finalist: Finalist, option: ScreenedCandidate, request: PlanRequest) -> float:
    """Screened tokens/s within the limits, corrected by simulated over screened use of a limit."""
    goals, place = request.goals, finalist.option.place
    screened = float(finalist.option.served.breach(goals)[place or 0])
    factor = float(finalist.served.breach(goals)[0]) / screened if screened else 1.0
    return option.within(goals, factor)[1]


def _level(
    varied: Varied, ahead: Callable[[float], float], tried: Sequence[float], asked: float
) -> Level:
    """Break-even point of one variable, and the rival's largest lead beyond it.

    Args:
        tried: ascending, with `asked` among them.
    """
    points = [Point(each, ahead(each)) for each in tried]
    at = level_of(points, asked, ahead, is_log=varied == "sequences")
    beyond = points
    if at is not None:
        beyond = [each for each in points if (each.at > at) == (asked < at)]
    least = min(beyond or points, key=lambda each: each.ahead)
    over = exp(-least.ahead) if least.ahead > -inf else None
    return Level(varied, asked, at, least.at, over, (tried[0], tried[-1]))


def level_of(
    points: Sequence[Point], asked: float, ahead: Callable[[float], float], *, is_log: bool = False
) -> float | None:
    """The value nearest to `asked` where the sign of `ahead` changes; None where it does not.

    Args:
        points: ascending, `asked` among them.
        ahead: evaluated a few times more, between the points on both sides of that value.
        is_log: interpolate over the logarithm of values, which are whole numbers.
    """
    to, back = (log, exp) if is_log else (float, float)
    pairs = [
        (one, other) for one, other in pairwise(points) if (one.ahead > 0) != (other.ahead > 0)
    ]
    if not pairs:
        return None
    low, high = min(pairs, key=lambda pair: min(abs(to(each.at) - to(asked)) for each in pair))
    for trial in range(_MOST_TRIALS):
        between = 0.5
        if trial % 3 < 2 and isfinite(low.ahead - high.ahead):
            between = low.ahead / (low.ahead - high.ahead)
        at = back(to(low.at) + between * (to(high.at) - to(low.at)))
        at = round(at) if is_log else at
        if at in (low.at, high.at):
            break
        found = Point(at, ahead(at))
        if abs(found.ahead) < _LEVEL:
            return found.at
        low, high = (found, high) if (found.ahead > 0) == (low.ahead > 0) else (low, found)
    return min(low, high, key=lambda each: abs(each.ahead)).at
