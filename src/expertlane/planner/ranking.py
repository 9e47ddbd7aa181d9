"""Ties of plans: those whose ratio may be 1, once what both share has cancelled.

The bounds of one plan have all laws low together, or all high, and most of that two plans share: a
slow driver is as slow for both. So each error of a law (`cost.projector`) is moved to its low and
to its high for both plans at once, and the ratio with it; likewise other experts are drawn for
both. Errors are taken as independent: the ratio's logarithm goes as far down as the root of the sum
of squares of all that lower it, and as far up likewise.

Beside the ranking stand the best of each kind of deployment, the Pareto front, the causes of gaps,
and break-even points: the skew, and the number of sequences, where #1 and its rival tie. The rival
is the best without EP where #1 has EP, or with EP where #1 has none. For these both are screened
again; what each one's simulation had beyond the formula is taken to be the same there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from math import exp, hypot, inf, isfinite, log

import numpy as np

from expertlane.cost.laws.profile import LIKELY
from expertlane.cost.projector import LawError
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.operation import Floats
from expertlane.cost.throughput import Goals, Steps, ThroughputCurve, one_pool, two_pools
from expertlane.planner.candidates import Candidate, PlanRequest, family_of
from expertlane.planner.screen import Screen, ScreenCache, ScreenedCandidate, fitting, prefilled_as
from expertlane.planner.search import Finalist, unseen
from expertlane.planner.two_pools import TwoPools
from expertlane.results.estimate import Estimate
from expertlane.results.record import TieBreak
from expertlane.results.results import BreakEven, Level, Varied
from expertlane.results.serving_record import ServingRecord, is_served
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload

_LEVEL = 0.995  # of the most tokens/s: closer ones are equal within the simulation's error
_NEAR = 0.5  # of a limit: with less of it used, it decides nothing
_KV_TRANSFER: LawError = ("KV transfer", ())
_ACCEPTANCE: LawError = ("acceptance of drafts", ())


@dataclass(frozen=True)
class Uncertain:
    """A positive number, and its values at the low and at the high of each error.

    An error that is not named leaves it as it is.
    """

    value: float
    by_error: Mapping[LawError, tuple[float, float]]

    def scaled(self, factor: float) -> "Uncertain":
        """The number times a factor, with the same errors."""
        by_error = {error: (a * factor, b * factor) for error, (a, b) in self.by_error.items()}
        return Uncertain(self.value * factor, by_error)

    def over(self, other: "Uncertain") -> Estimate:
        """The ratio, with the bounds that are left when what both share has cancelled."""
        if not (isfinite(self.value) and isfinite(other.value)):
            ratio = 1.0 if self.value == other.value else self.value / other.value
            return Estimate(ratio, ratio, ratio)
        down = up = 0.0
        for low, high in self._apart(other).values():
            down, up = hypot(down, low), hypot(up, high)
        ratio = self.value / other.value
        return Estimate(ratio, ratio * exp(-down), ratio * exp(up))

    def shares(self, other: "Uncertain") -> dict[str, float]:
        """Each law's share of the ratio's squared uncertainty, over all of its sizes."""
        squares: dict[str, float] = {}
        for (name, _), (low, high) in self._apart(other).items():
            squares[name] = squares.get(name, 0.0) + low**2 + high**2
        total = sum(squares.values())
        return {name: each / total for name, each in squares.items()} if 0 < total < inf else {}

    def _apart(self, other: "Uncertain") -> dict[LawError, tuple[float, float]]:
        """By error, how far it moves the ratio's logarithm down and up; 0 or more."""
        found = {}
        for error in {**self.by_error, **other.by_error}:
            mine, others = (each.by_error.get(error, (each.value,) * 2) for each in (self, other))
            moved = [
                _difference(_log_ratio(a, self.value), _log_ratio(b, other.value))
                for a, b in zip(mine, others, strict=True)
            ]
            found[error] = -min(*moved, 0.0), max(*moved, 0.0)
        return found


def _difference(mine: float, others: float) -> float:
    return 0.0 if mine == others else mine - others  # also where both are without end


def _log_ratio(moved: float, value: float) -> float:
    return log(moved / value) if isfinite(moved) else inf


@dataclass(frozen=True, eq=False)
class Contender:
    """A plan in the ranking.

    Attributes:
        at_rate: record of an open load served at its rate; None for a closed load.
    """

    finalist: Finalist
    tps: Uncertain
    at_rate: ServingRecord | None = None

    def taken(self, goals: Goals) -> float:
        """Share of the tightest limit that is used; 0 without limits."""
        return float(self.finalist.served.breach(goals)[0])


def contender(finalist: Finalist, workload: Workload) -> Contender:
    """A deployment of one pool: simulated tokens/s, moved by each error as the formula says."""
    errors = _errors_of(finalist)
    tps = _uncertain(one_pool(_moved(finalist, errors), workload), errors)
    simulated, formula = finalist.served, finalist.formula
    factor = float(simulated.tps[LIKELY, 0] / formula.tps[LIKELY, 0])
    return Contender(finalist, tps.scaled(factor))


def pools_tps(pools: TwoPools, workload: Workload) -> Uncertain:
    """Simulated tokens/s of disaggregated pools, moved by each error as the formula says."""
    prefill, decode = pools.prefill, pools.decode
    errors = list(dict.fromkeys([_KV_TRANSFER, *_errors_of(prefill), *_errors_of(decode)]))
    at = np.full(1 + 2 * len(errors), pools.transfer_s[LIKELY])
    at[1], at[2] = pools.transfer_s[0], pools.transfer_s[-1]
    served = two_pools(_moved(prefill, errors), _moved(decode, errors), at, workload)
    formula = _uncertain(served, errors)
    return formula.scaled(float(pools.served.tps[LIKELY, 0]) / formula.value)


def pools_win(pools: TwoPools, chosen: Contender, workload: Workload) -> bool:
    """True if disaggregated pools are better than the best of one pool.

    They have more tokens/s beyond the errors, or only they serve an open load at its rate.
    """
    if is_served(pools.at_rate) != is_served(chosen.at_rate):
        return is_served(pools.at_rate)
    return pools_tps(pools, workload).over(chosen.tps).bounds[0] > 1


def _errors_of(finalist: Finalist) -> list[LawError]:
    drafts = [_ACCEPTANCE] * (finalist.candidate.num_drafts > 0)
    of_phases = [finalist.by_error.get(phase, {}) for phase in (Phase.DECODE, Phase.PREFILL)]
    return list(dict.fromkeys([*drafts, *(error for each in of_phases for error in each)]))


def _moved(finalist: Finalist, errors: Sequence[LawError]) -> Steps:
    """The steps at their likely times, then at the low and the high of each error."""

    def times(phase: Phase, likely_s: float) -> Floats:
        of_phase = finalist.by_error.get(phase, {})
        moved = [each for error in errors for each in of_phase.get(error, (likely_s, likely_s))]
        return np.array([likely_s, *moved])

    steps = finalist.steps
    prefill_s = times(Phase.PREFILL, float(steps.prefill_s[LIKELY]))
    tokens = np.full(1 + 2 * len(errors), steps.tokens_per_step[LIKELY])
    if _ACCEPTANCE in errors:
        place = 1 + 2 * errors.index(_ACCEPTANCE)
        tokens[place], tokens[place + 1] = steps.tokens_per_step[[0, -1]]
    return replace(
        steps,
        tokens_per_step=tokens,
        decode_s=times(Phase.DECODE, float(steps.decode_s[LIKELY, 0]))[:, None],
        prefill_s=prefill_s,
        alone_s=prefill_s * (steps.alone_s[LIKELY] / steps.prefill_s[LIKELY]),
    )


def _uncertain(served: ThroughputCurve, errors: Sequence[LawError]) -> Uncertain:
    """Tokens/s of the steps of `_moved`."""
    value, *moved = served.tps[::-1, 0].tolist()  # throughput is in reverse order of times
    pairs = zip(moved[::2], moved[1::2], strict=True)
    return Uncertain(value, dict(zip(errors, pairs, strict=True)))


@dataclass(frozen=True, eq=False)
class Ranking:
    """Plans in order, the chosen one first.

    Attributes:
        num_tied: length of the tie for most tokens/s at the front.
        by: criterion that decided among them; None without a tie.
    """

    contenders: Sequence[Contender]
    num_tied: int
    by: TieBreak | None

    @property
    def chosen(self) -> Contender:
        """The first contender."""
        return self.contenders[0]

    @property
    def tied(self) -> Sequence[Contender]:
        """The plans that tie; the chosen one alone without a tie."""
        return self.contenders[: self.num_tied]

    @property
    def spread(self) -> float:
        """Gap of the least of those that tie to the most tokens/s; a share."""
        tps = [each.tps.value for each in self.tied]
        return 1 - min(tps) / max(tps)


def ranked(contenders: Sequence[Contender], goals: Goals) -> Ranking:
    """Plans that tie for most tokens/s, then the others; each group by tokens/s.

    A plan is in the tie if no other has significantly more: one with errors of its own may tie
    with the first and still be significantly slower than the second. Most tokens/s decide in the
    tie; where a limit is near, the plan farthest below it of those with as many. The chosen plan
    is never behind another in both.

    Plans that do not serve an open load at its rate come last.
    """
    serving = [each for each in contenders if is_served(each.at_rate)]
    if 0 < len(serving) < len(contenders):
        found = ranked(serving, goals)
        rest = sorted(set(contenders) - set(serving), key=lambda each: -each.tps.value)
        return replace(found, contenders=[*found.contenders, *rest])
    by_tps = sorted(contenders, key=lambda each: -each.tps.value)
    tied = [
        each for each in by_tps if all(other.tps.over(each.tps).bounds[0] <= 1 for other in by_tps)
    ]
    others = [each for each in by_tps if each not in tied]
    if len(tied) == 1:
        return Ranking([*tied, *others], 1, None)
    chosen = _chosen(tied, by_tps, goals)
    by: TieBreak = "most tokens" if chosen is tied[0] else "farther from the limit"
    tied.remove(chosen)
    return Ranking([chosen, *tied, *others], 1 + len(tied), by)


def _chosen(tied: Sequence[Contender], all_: Sequence[Contender], goals: Goals) -> Contender:
    """The plan to recommend of those that tie, which are in order of tokens/s."""
    first = tied[0]
    if first.taken(goals) < _NEAR:
        return first
    level = [
        each
        for each in tied
        if each.tps.value >= _LEVEL * first.tps.value
        and not any(
            other.tps.value > each.tps.value and other.taken(goals) < each.taken(goals)
            for other in all_
        )
    ]
    return min(level, key=lambda each: each.taken(goals))


def best_of_families(ranking: Ranking) -> dict[str, Contender]:
    """The best contender of each family."""
    best: dict[str, Contender] = {}
    for each in ranking.contenders:
        best.setdefault(family_of(each.finalist.candidate.layout), each)
    return best


def pareto(options: Sequence[ScreenedCandidate]) -> list[tuple[ScreenedCandidate, int]]:
    """Options and numbers of sequences such that none has both more TPS and a lower TPOT."""
    points = [
        (float(option.served.tpot_s[1, place]), float(option.served.tps[1, place]), option, place)
        for option in options
        for place in range(len(option.steps.num_seqs))
    ]
    front: list[tuple[ScreenedCandidate, int]] = []
    most = 0.0
    for _, tps, option, place in sorted(points, key=lambda point: (point[0], -point[1])):
        if tps > most:
            most = tps
            front.append((option, place))
    return front


_NAMED = 2  # causes
_MET = "decode delayed by prefill"
_LEAST = 0.1  # share of the growth that a cause needs to be named


def time_by_cause(finalist: Finalist, workload: Workload) -> dict[str, float]:
    """Seconds of the whole system for one output token, its part of prefill included.

    What is left of those simulated is how requests met, beside steps of decodes or prompts alone.
    """
    per_token = finalist.steps.prompts.length / workload.output_len
    of_phases = (
        (finalist.decode, 1 / (finalist.num_seqs * float(finalist.steps.tokens_per_step[LIKELY]))),
        (finalist.prefill, per_token / finalist.prefill.num_tokens),
    )
    seconds = {
        f"{cause} in {step.phase}": seconds * share
        for step, share in of_phases
        for cause, seconds in step.breakdown_s.items()
    }
    return seconds | {_MET: 1 / finalist.tps - sum(seconds.values())}


def gap_to(best: Contender, other: Contender, workload: Workload) -> str:
    """Causes of the gap to the best, of a plan that does not tie.

    For example `µs per token: weight reads in decode +12; memory for 316 sequences`.
    """
    mine, least = (time_by_cause(each.finalist, workload) for each in (other, best))
    more = {cause: seconds - least.get(cause, 0.0) for cause, seconds in mine.items()}
    growth = sum(value for value in more.values() if value > 0)
    named = sorted(more, key=lambda cause: -more[cause])[:_NAMED]
    parts = [
        f"{cause} +{1e6 * more[cause]:.3g}" for cause in named if more[cause] > _LEAST * growth
    ]
    text = f"µs per token: {', '.join(parts)}" if parts else "slightly more of every cost"
    most, of_best = (int(each.finalist.option.steps.num_seqs.max()) for each in (other, best))
    if most < min(workload.num_sequences, of_best):
        text += f"; memory for {most:,} sequence{'' if most == 1 else 's'}"
    return text


_SKEWS = 0.0, 0.4, 0.8, 1.2  # beside the one asked for; public traces have up to 1.3
_LOADS = 1 / 16, 1 / 4, 1, 4, 16  # times the sequences asked for
_EQUAL = 0.01  # largest logarithm of a ratio that counts as equal
_MOST_TRIALS = 5  # between two known points


@dataclass(frozen=True)
class Point:
    """A skew or number of sequences at which both were evaluated.

    Attributes:
        ahead: logarithm of the best's tokens/s over the rival's.
    """

    at: float
    ahead: float


def break_even(ranking: Ranking, request: PlanRequest, known: ScreenCache) -> BreakEven | None:
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

    def __init__(
        self, best: Finalist, rival: Finalist, request: PlanRequest, known: ScreenCache
    ) -> None:
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
        known = ScreenCache(slots=self._known.slots, capacities=self._known.capacities)
        return self._ahead(request, self._known if other is routing else known)

    def with_sequences(self, num: float) -> float:
        """Logarithm of that ratio at a number of concurrent sequences, or as many as fit."""
        workload = replace(self._request.workload, num_sequences=round(num))
        return self._ahead(replace(self._request, workload=workload), self._known)

    def _ahead(self, request: PlanRequest, known: ScreenCache) -> float:
        screened = screened_again([each.candidate for each in self._both], request, known)
        tps = [
            0.0 if option is None else each.tps * _within(each, option, request) / usual
            for each, option, usual in zip(self._both, screened, self._usual, strict=True)
        ]
        if not all(tps):
            return 0.0 if tps[0] == tps[1] else inf if tps[0] else -inf
        return log(tps[0] / tps[1])


def screened_again(
    candidates: Sequence[Candidate], request: PlanRequest, known: ScreenCache
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
        if abs(found.ahead) < _EQUAL:
            return found.at
        low, high = (found, high) if (found.ahead > 0) == (low.ahead > 0) else (low, found)
    return min(low, high, key=lambda each: abs(each.ahead)).at
