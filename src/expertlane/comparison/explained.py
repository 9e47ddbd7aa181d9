"""Which changed assumption explains a difference, how much of it, and how surely: the statistics.

A projection under changed assumptions is a function of a few parameters, the logarithms of factors.
Measured and projected numbers are compared as logarithms, so that a factor of two counts the same
on a millisecond and on a second; each difference is over its standard deviation: what the measured
number's interval says, and no less than what repeated runs differ by.

**One assumption at a time.** For each the value is sought that leaves the least sum of squares;
what it takes off the sum without any change is the share that it explains. Squares are Huber's
(*Robust Statistics*, 1981): beyond `_HUBER` deviations a difference counts linearly, so that one
disturbed measurement does not choose. An assumption that cannot change any number is left out.

**Confidence.** The assumptions are rivals for the same numbers, each with one free value, so their
likelihoods compare as they are. No assumption fits all: a model errs by more than noise. The scale
of what is left is therefore unknown too, and the likelihood is that of the profile,
-n/2 log(S/n) where S/n is above 1 (as in Burnham and Anderson, *Model Selection and Multimodel
Inference*, 2002, section 2.2). Errors of a model are alike within a deployment, so n counts the
independent ones: as many numbers of each deployment as differ, at most `_MOST_OF_GROUP`. A factor
of two is likelier than one of ten before anything is measured: changes have a normal prior, as
below. Weights of all rivals sum to 1. One stands out if it is likelier than all others together,
and `_STANDS_OUT` times as likely as the next. Else those that together have `_ENOUGH` cannot be
told apart, and all of them are named.

**All together**, for corrections: regularised least squares by Gauss and Newton, from the best
single assumption, with a normal prior around no change. How strong that prior is, is found by
leaving out each deployment in turn (linearised), since a few points fit many factors in many ways:
of priors that predict about equally well the strongest is taken. The inverse of the matrix at the
optimum gives each factor's error; those that are smaller than it stay as assumed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Project = Callable[[Mapping[str, float]], Floats]

_HUBER = 2.0  # deviations
_FIRST = 0.4  # the first change that is tried, of a logarithm
MOST_CHANGED = 2.5  # the largest: twelve times as long, or as short
_NO_EFFECT = 2e-3  # of a logarithm: less is no effect
_ROUNDS = 3  # of looking for one value; twice as many for all together
_NUM_SOUGHT = 5  # assumptions whose best value is sought; of others a straight line says enough
_STANDS_OUT = 4.0  # times as likely as the next
_ENOUGH = 0.8
_MOST_OF_GROUP = 8
_USUAL = 0.7  # standard deviation of a logarithm before anything is measured: two times
_PRIORS = 0.2, 0.4, _USUAL
_FEWEST_GROUPS = 4  # to choose a prior by: with fewer one left out says little
_ABOUT_EQUAL = 1.05
_ALIKE = 0.95  # correlation of two factors' errors, from where on they are one
_GRID = 241
_CONVERGED = 0.01  # of a logarithm
_NOISE = 1.5  # squares in deviations, on average
_SURE = 1.5  # deviations, from where on a change is kept
_CHANCE = 9.0  # squares that the best of ten values takes off noise, 1 time of 40


@dataclass(frozen=True, eq=False)
class Measured:
    """Logarithms of measured numbers.

    Attributes:
        values: [N].
        sigma: [N]; standard deviations.
        groups: [N]; the deployment that each is of.
    """

    values: Floats
    sigma: Floats
    groups: npt.NDArray[np.int64]

    @property
    def num_independent(self) -> float:
        """Numbers that may err each by itself."""
        _, counts = np.unique(self.groups, return_counts=True)
        return float(np.minimum(counts, _MOST_OF_GROUP).sum())

    def badness(self, projected: Floats) -> float:
        """Huber's sum of squares, over that of one number a deviation off."""
        return float(_huber((self.values - projected) / self.sigma).sum())


def _huber(off: Floats) -> Floats:
    size = np.abs(off)
    loss: Floats = np.where(size <= _HUBER, size**2, 2 * _HUBER * size - _HUBER**2)
    return loss


def _weights(off: Floats) -> Floats:
    size = np.maximum(np.abs(off), 1e-12)
    weights: Floats = np.minimum(1.0, _HUBER / size)
    return weights


@dataclass(frozen=True)
class Single:
    """One assumption changed, all others as they were.

    Attributes:
        change: the logarithm of the factor that leaves the least.
        explained: share of the sum of squares that it takes off.
        weight: confidence among all; they sum to 1.
    """

    name: str
    change: float
    explained: float
    weight: float


@dataclass(frozen=True, eq=False)
class Together:
    """Several assumptions changed at once: those whose changes are larger than their errors.

    Attributes:
        changes: by name, logarithms of factors.
        deviation: by name, the standard deviation of each.
        alike: pairs whose factors the measurements do not tell apart, kept or not.
    """

    changes: Mapping[str, float]
    deviation: Mapping[str, float]
    alike: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Explained:
    """The whole answer.

    Attributes:
        singles: most likely first; only assumptions that change anything.
        without_effect: those that these deployments do not depend on.
        badness: sum of squares without any change, of `num` numbers.
    """

    singles: tuple[Single, ...]
    together: Together
    without_effect: tuple[str, ...]
    badness: float
    num: int

    @property
    def is_noise(self) -> bool:
        """True if the difference is about noise, and no assumption takes off more than chance."""
        most = max((each.explained for each in self.singles), default=0.0) * self.badness
        return self.badness <= _NOISE * self.num and most < _CHANCE

    @property
    def likely(self) -> tuple[Single, ...]:
        """The one that stands out; else the fewest assumptions that are together sure enough."""
        best, *others = self.singles or (None,)
        if best is None:
            return ()
        next_weight = others[0].weight if others else 0.0
        if best.weight >= max(_STANDS_OUT * next_weight, 1 - best.weight):
            return (best,)
        found: list[Single] = []
        for each in self.singles:
            found.append(each)
            if sum(one.weight for one in found) >= _ENOUGH:
                break
        return tuple(found)


@dataclass(eq=False)
class Explainer:
    """Explains measured numbers by a projection under changed assumptions.

    Attributes:
        project: [N] logarithms, of changes by name; expensive.
        least: by name, the least change that makes sense, where it is not the usual.
    """

    measured: Measured
    names: Sequence[str]
    project: Project
    least: Mapping[str, float] = field(default_factory=dict)
    _known: dict[tuple[float, ...], Floats] = field(default_factory=dict)

    def at(self, changes: Mapping[str, float]) -> Floats:
        """[N]; the projection under changes, computed once."""
        key = tuple(round(changes.get(name, 0.0), 6) for name in self.names)
        if key not in self._known:
            self._known[key] = self.project(dict(zip(self.names, key, strict=True)))
        return self._known[key]

    def explain(self, advance: Callable[[], None] = lambda: None) -> Explained:
        """Each assumption alone, then all together.

        Args:
            advance: called after each assumption, and once more.
        """
        none = self.at({})
        badness = self.measured.badness(none)
        found: dict[str, tuple[float, float]] = {}
        without = []
        for name in self.names:
            if np.abs(self.at({name: _FIRST}) - none).max(initial=0.0) < _NO_EFFECT:
                without.append(name)
            else:
                found[name] = self._alone(name, 0)
            advance()
        for name in sorted(found, key=lambda each: found[each][1])[:_NUM_SOUGHT]:
            found[name] = self._alone(name, _ROUNDS)
        singles = self._weighed(found, badness)
        together = self.together(singles)
        advance()
        num = len(self.measured.values)
        return Explained(tuple(singles), together, tuple(without), badness, num)

    def _alone(self, name: str, num_rounds: int) -> tuple[float, float]:
        """The best change of one assumption, and what it leaves.

        Args:
            num_rounds: projections to look for it; none: by a straight line.
        """
        nodes = [0.0, _FIRST]
        least = max(-MOST_CHANGED, self.least.get(name, -MOST_CHANGED))
        grid = np.linspace(least, MOST_CHANGED, _GRID)
        if not num_rounds:
            left = self._between(name, nodes, grid)
            return float(grid[np.argmin(left)]), float(left.min())
        for _ in range(num_rounds):
            best = float(grid[np.argmin(self._between(name, nodes, grid))])
            if min(abs(best - node) for node in nodes) < (grid[1] - grid[0]) / 2:
                break
            nodes = sorted([*nodes, best])
        exact = {node: self.measured.badness(self.at({name: node})) for node in nodes}
        change = min(exact, key=exact.__getitem__)
        return change, exact[change]

    def _between(self, name: str, nodes: Sequence[float], grid: Floats) -> Floats:
        """[grid]; badness, with projections between and beyond nodes by straight lines."""
        known = np.array([self.at({name: node}) for node in nodes])
        at = np.array(nodes)
        right = np.clip(np.searchsorted(at, grid), 1, len(at) - 1)
        share = (grid - at[right - 1]) / (at[right] - at[right - 1])
        lines = known[right - 1] + share[:, None] * (known[right] - known[right - 1])
        off = (self.measured.values - lines) / self.measured.sigma
        found: Floats = _huber(off).sum(axis=1)
        return found

    def _weighed(self, found: Mapping[str, tuple[float, float]], badness: float) -> list[Single]:
        num, independent = len(self.measured.values), self.measured.num_independent

        def log_likelihood(change: float, left: float) -> float:
            scale = max(left / num, 1.0)
            off = -independent / 2 * (log(scale) + left / num / scale)
            return off - (change / _USUAL) ** 2 / 2

        likely = {name: log_likelihood(*each) for name, each in found.items()}
        most = max(likely.values(), default=0.0)
        weights = {name: exp(each - most) for name, each in likely.items()}
        total = sum(weights.values())
        singles = [
            Single(name, change, 1 - left / max(badness, 1e-12), weights[name] / total)
            for name, (change, left) in found.items()
        ]
        return sorted(singles, key=lambda each: (-each.weight, -each.explained))

    def forget(self) -> None:
        """Drop what is known of projections, as they have changed."""
        self._known.clear()

    def together(self, singles: Sequence[Single]) -> Together:
        """All assumptions of `singles` at once, from the first of them on."""
        names = [each.name for each in singles]
        if not names:
            return Together({}, {})
        start = np.zeros(len(names))
        start[0] = singles[0].change
        none = self.at({})
        slopes = np.array([(self.at({name: _FIRST}) - none) / _FIRST for name in names]).T
        changes, slopes = self._newton(names, start, _USUAL, slopes)
        prior = self._prior(names, changes, slopes)
        off = (self.measured.values - self._of(names, changes)) / self.measured.sigma
        sigma = self.measured.sigma * max(float(np.sqrt(_huber(off).mean())), 1.0)
        alike = _alike(names, slopes, sigma)
        wanted = self.measured.values - self._of(names, changes) + slopes @ changes
        kept = _sure(wanted, slopes, sigma, prior)
        names = [names[place] for place in kept]
        if not kept:
            return Together({}, {}, alike)
        changes, slopes = self._newton(names, changes[kept], prior, slopes[:, kept])
        _, deviation = _linear(slopes @ changes, slopes, sigma, prior)
        return Together(
            dict(zip(names, changes.tolist(), strict=True)),
            dict(zip(names, deviation.tolist(), strict=True)),
            alike,
        )

    def _of(self, names: Sequence[str], changes: Floats) -> Floats:
        return self.at(dict(zip(names, changes.tolist(), strict=True)))

    def _newton(
        self, names: Sequence[str], start: Floats, prior: float, slopes: Floats
    ) -> tuple[Floats, Floats]:
        """Changes that leave least, with the prior, and slopes [N, K] there, by Broyden's updates.

        Args:
            slopes: anywhere near.
        """
        measured, changes = self.measured, start
        least = np.array(
            [max(-MOST_CHANGED, self.least.get(name, -MOST_CHANGED)) for name in names]
        )
        here = self._of(names, changes)

        def left(projected: Floats, at: Floats) -> float:
            return measured.badness(projected) + float((at**2).sum()) / prior**2

        best = left(here, changes)
        for _ in range(2 * _ROUNDS):
            off = (measured.values - here) / measured.sigma
            weights = _weights(off) / measured.sigma**2
            normal = (slopes.T * weights) @ slopes + np.eye(len(names)) / prior**2
            pull = slopes.T @ (weights * (measured.values - here)) - changes / prior**2
            step = np.linalg.solve(normal, pull)
            moved = np.clip(changes + step, least, MOST_CHANGED)
            there = self._of(names, moved)
            taken = moved - changes
            if float(np.abs(taken).max()) < _CONVERGED:
                break
            miss = there - here - slopes @ taken
            slopes = slopes + np.outer(miss, taken) / float(taken @ taken)
            now = left(there, moved)
            if now < best:
                changes, here, best = moved, there, now
        return changes, slopes

    def _prior(self, names: Sequence[str], changes: Floats, slopes: Floats) -> float:
        """The strongest prior that predicts a deployment left out about as well as any."""
        groups = np.unique(self.measured.groups)
        if len(groups) < _FEWEST_GROUPS:
            return _USUAL
        free = self.measured.values - self._of(names, changes) + slopes @ changes
        errors = []
        for prior in _PRIORS:
            total = 0.0
            for group in groups:
                kept = self.measured.groups != group
                sigma = self.measured.sigma[kept]
                found, _ = _linear(free[kept], slopes[kept], sigma, prior)
                off = (free - slopes @ found)[~kept] / self.measured.sigma[~kept]
                total += float(_huber(off).sum())
            errors.append(total)
        good = [
            prior
            for prior, error in zip(_PRIORS, errors, strict=True)
            if error <= _ABOUT_EQUAL * min(errors)
        ]
        return good[0]


def _linear(wanted: Floats, slopes: Floats, sigma: Floats, prior: float) -> tuple[Floats, Floats]:
    """Changes [K] that come nearest to what is wanted [N], by straight lines; their deviations."""
    normal = (slopes.T / sigma**2) @ slopes + np.eye(slopes.shape[1]) / prior**2
    covariance = np.linalg.inv(normal)
    return covariance @ (slopes.T @ (wanted / sigma**2)), np.sqrt(np.diag(covariance))


def _sure(wanted: Floats, slopes: Floats, sigma: Floats, prior: float) -> list[int]:
    """Places of changes that are larger than their errors, once others have made way.

    The least sure goes first, since another may be sure once it has made way.
    """
    kept = list(range(slopes.shape[1]))
    while kept:
        found, deviation = _linear(wanted, slopes[:, kept], sigma, prior)
        sure = np.abs(found) / deviation
        if sure.min() >= _SURE:
            break
        del kept[int(np.argmin(sure))]
    return kept


def _alike(names: Sequence[str], slopes: Floats, sigma: Floats) -> tuple[tuple[str, str], ...]:
    """Pairs that change all numbers by nearly the same proportions."""
    scaled = slopes / sigma[:, None]
    sizes = np.maximum(np.linalg.norm(scaled, axis=0), 1e-12)
    cosine = np.abs((scaled / sizes).T @ (scaled / sizes))
    return tuple(
        (names[one], names[other])
        for one in range(len(names))
        for other in range(one + 1, len(names))
        if cosine[one, other] >= _ALIKE and min(sizes[one], sizes[other]) > 1
    )
