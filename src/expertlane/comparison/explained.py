"""The statistics of `judge`: which changed assumption explains the measured numbers, how surely.

A projection under changed assumptions is a function of a few parameters, the logarithms of factors.
Measured and projected numbers are compared as logarithms, so that a factor of two counts the same
on a millisecond and on a second. Each difference is divided by its standard deviation: from the
measured number's interval, and at least the spread of repeated runs.

**One assumption at a time.** For each assumption the change is sought that minimises the sum of
squared residuals. The share of that sum that the change removes is what the assumption *explains*.
The loss is Huber's (*Robust Statistics*, 1981), linear beyond `_HUBER` standard deviations, so that
one disturbed measurement does not decide. An assumption that changes no number is left out.

**Confidence.** All single-assumption models have one free parameter, so their likelihoods compare
without a penalty. A projection errs by more than noise, so the residual variance is unknown, and
the profile likelihood is used: -n/2 log(S/n) where S/n is above 1, with S the sum of squares and n
the number of independent residuals (Burnham and Anderson, *Model Selection and Multimodel
Inference*, 2002, section 2.2). Errors are correlated within a deployment, so at most
`_MOST_OF_GROUP` of each deployment's numbers count as independent. A normal prior on a change makes
a factor of two likelier than one of ten. Weights of all assumptions sum to 1. One
assumption stands out if it is likelier than all others together and `_STANDS_OUT` times as likely
as the next. Otherwise the likeliest ones that together reach `_ENOUGH` are not distinguishable by
these numbers, and all of them are named.

**All together**, for corrections: regularised least squares (Gauss-Newton with Broyden's updates),
from the best single assumption, with a normal prior at no change. The prior's width is chosen by
leave-one-deployment-out cross-validation (linearised): of those that predict about equally well,
the narrowest. The inverse of the normal matrix at the optimum gives each factor's standard error.
Changes below `_SURE` standard errors are dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Project = Callable[[Mapping[str, float]], Floats]

_HUBER = 2.0  # deviations
_FIRST = 0.4  # the first change that is tried, as a logarithm
MOST_CHANGED = 2.5  # the largest change: a factor of twelve
_NO_EFFECT = 2e-3  # largest change of a number's logarithm that counts as no effect
_ROUNDS = 3  # iterations of the search for one change; twice as many for all together
_NUM_SOUGHT = 5  # assumptions whose best change is searched; for others a linear estimate is enough
_STANDS_OUT = 4.0  # times as likely as the next
_ENOUGH = 0.8  # odds of four to one
_MOST_OF_GROUP = 8
_USUAL = 0.7  # standard deviation of the prior on a change: a factor of two
_PRIORS = 0.2, 0.4, _USUAL
_FEWEST_GROUPS = 3  # deployments that cross-validation of the prior needs
_ABOUT_EQUAL = 1.05
_ALIKE = 0.95  # cosine of two assumptions' effects, from which on they are not identifiable
_GRID = 241
_CONVERGED = 0.01  # change of a logarithm
_NOISE = 1.5  # mean squared residual, in standard deviations, up to which it is noise
_SURE = 1.5  # standard errors, from which on a change is kept
_CHANCE = 9.0  # reduction of the sum of squares that the best of ten has by chance in 1 of 40 cases


@dataclass(frozen=True, eq=False)
class Measured:
    """Logarithms of measured numbers.

    Attributes:
        values: [N].
        sigma: [N]; standard deviations of `values`.
        groups: [N]; index of each number's deployment.
    """

    values: Floats
    sigma: Floats
    groups: npt.NDArray[np.int64]

    @property
    def num_independent(self) -> float:
        """Number of independent residuals: at most `_MOST_OF_GROUP` of each deployment."""
        _, counts = np.unique(self.groups, return_counts=True)
        return float(np.minimum(counts, _MOST_OF_GROUP).sum())

    def badness(self, projected: Floats) -> float:
        """Huber loss of the residuals, in squared standard deviations.

        Args:
            projected: [N]; logarithms.
        """
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
    """One assumption changed by itself.

    Attributes:
        change: the best change: the logarithm of a factor.
        explained: share of the sum of squares that it removes.
        weight: confidence; those of all assumptions sum to 1.
    """

    name: str
    change: float
    explained: float
    weight: float


@dataclass(frozen=True, eq=False)
class Together:
    """A fit of several assumptions at once; only significant changes are kept.

    Attributes:
        changes: logarithms of factors, by assumption.
        deviation: standard error of each change, by assumption.
        confounded: pairs of assumptions that the measurements do not tell apart, kept or not.
    """

    changes: Mapping[str, float]
    deviation: Mapping[str, float]
    confounded: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Explained:
    """Assumptions that explain the difference of measured and projected numbers.

    Attributes:
        singles: each assumption by itself, the likeliest first; those without effect left out.
        together: the fit of all of them, for corrections.
        without_effect: assumptions that change no number.
        badness: Huber loss without any change.
        num: number of measured numbers.
    """

    singles: tuple[Single, ...]
    together: Together
    without_effect: tuple[str, ...]
    badness: float
    num: int

    @property
    def is_noise(self) -> bool:
        """True if the loss is about that of noise, and no assumption reduces it beyond chance."""
        most = max((each.explained for each in self.singles), default=0.0) * self.badness
        return self.badness <= _NOISE * self.num and most < _CHANCE

    @property
    def likeliest(self) -> tuple[Single, ...]:
        """The assumption that stands out; else the likeliest that reach `_ENOUGH` together."""
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
        names: assumptions that may be changed.
        project: gives logarithms of projected numbers, [N], for changes by name; expensive.
        least: lower bound of a change by name; else `-MOST_CHANGED`.
    """

    measured: Measured
    names: Sequence[str]
    project: Project
    least: Mapping[str, float] = field(default_factory=dict)
    _known: dict[tuple[float, ...], Floats] = field(default_factory=dict)

    def at(self, changes: Mapping[str, float]) -> Floats:
        """Logarithms of projected numbers under changes, [N]; computed once for each."""
        key = tuple(round(changes.get(name, 0.0), 6) for name in self.names)
        if key not in self._known:
            self._known[key] = self.project(dict(zip(self.names, key, strict=True)))
        return self._known[key]

    def explain(self, advance: Callable[[], None] = lambda: None) -> Explained:
        """Fit each assumption by itself, then all together.

        Args:
            advance: called after each assumption, and once at the end.
        """
        none = self.at({})
        badness = self.measured.badness(none)
        found: dict[str, tuple[float, float]] = {}
        without = []
        for name in self.names:
            if np.abs(self.at({name: _FIRST}) - none).max(initial=0.0) < _NO_EFFECT:
                without.append(name)
            else:
                found[name] = self._single(name, 0)
            advance()
        for name in sorted(found, key=lambda each: found[each][1])[:_NUM_SOUGHT]:
            found[name] = self._single(name, _ROUNDS)
        singles = self._weighed(found, badness)
        together = self.together(singles)
        advance()
        num = len(self.measured.values)
        return Explained(tuple(singles), together, tuple(without), badness, num)

    def _single(self, name: str, num_rounds: int) -> tuple[float, float]:
        """The best change of one assumption, and the loss that remains.

        Args:
            num_rounds: iterations of the search, a projection each; 0: a linear estimate.
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
        """Loss on a grid of changes, [grid], by linear interpolation between projections."""
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
        """Drop cached projections, after `project` has changed."""
        self._known.clear()

    def together(self, singles: Sequence[Single]) -> Together:
        """Fit all assumptions of `singles` at once, starting from the first one's change."""
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
        confounded = _confounded(names, slopes, sigma)
        wanted = self.measured.values - self._of(names, changes) + slopes @ changes
        kept = _sure(wanted, slopes, sigma, prior)
        names = [names[place] for place in kept]
        if not kept:
            return Together({}, {}, confounded)
        changes, slopes = self._newton(names, changes[kept], prior, slopes[:, kept])
        _, deviation = _linear(slopes @ changes, slopes, sigma, prior)
        return Together(
            dict(zip(names, changes.tolist(), strict=True)),
            dict(zip(names, deviation.tolist(), strict=True)),
            confounded,
        )

    def _of(self, names: Sequence[str], changes: Floats) -> Floats:
        return self.at(dict(zip(names, changes.tolist(), strict=True)))

    def _newton(
        self, names: Sequence[str], start: Floats, prior: float, slopes: Floats
    ) -> tuple[Floats, Floats]:
        """Minimise the loss and the prior by Gauss-Newton steps.

        Args:
            start: [K]; changes to start from.
            prior: standard deviation of the prior.
            slopes: [N, K]; derivatives of the projection near the start.

        Returns:
            Changes [K], and derivatives there by Broyden's updates [N, K].
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
        """The narrowest prior that predicts left-out deployments about as well as the best."""
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
    """Ridge regression: changes [K] for wanted differences [N], and their standard errors [K]."""
    normal = (slopes.T / sigma**2) @ slopes + np.eye(slopes.shape[1]) / prior**2
    covariance = np.linalg.inv(normal)
    return covariance @ (slopes.T @ (wanted / sigma**2)), np.sqrt(np.diag(covariance))


def _sure(wanted: Floats, slopes: Floats, sigma: Floats, prior: float) -> list[int]:
    """Indices of significant changes, by backward elimination.

    The least significant change is dropped first: another may become significant without it.
    """
    kept = list(range(slopes.shape[1]))
    while kept:
        found, deviation = _linear(wanted, slopes[:, kept], sigma, prior)
        sure = np.abs(found) / deviation
        if sure.min() >= _SURE:
            break
        del kept[int(np.argmin(sure))]
    return kept


def _confounded(names: Sequence[str], slopes: Floats, sigma: Floats) -> tuple[tuple[str, str], ...]:
    """Pairs whose changes have nearly proportional effects on all numbers."""
    scaled = slopes / sigma[:, None]
    sizes = np.maximum(np.linalg.norm(scaled, axis=0), 1e-12)
    cosine = np.abs((scaled / sizes).T @ (scaled / sizes))
    return tuple(
        (names[one], names[other])
        for one in range(len(names))
        for other in range(one + 1, len(names))
        if cosine[one, other] >= _ALIKE and min(sizes[one], sizes[other]) > 1
    )
