"""The fit of corrections: which factors on a projection's assumptions fit measured numbers best.

A projection under changed assumptions is a function of a few parameters, the logarithms of factors.
Measured and projected numbers are compared as logarithms, so that a factor of two counts the same
on a millisecond and on a second. Each difference is divided by its standard deviation: from the
measured number's interval, and at least the spread of repeated runs. The loss is Huber's (*Robust
Statistics*, 1981), linear beyond `_HUBER` standard deviations, so that one disturbed measurement
does not decide.

The fit is regularised least squares (Gauss-Newton with Broyden's updates), from the best single
change, with a normal prior at no change. The prior's width is chosen by leave-one-deployment-out
cross-validation (linearised): of those that predict about equally well, the narrowest. The inverse
of the normal matrix at the optimum gives each factor's standard error. Changes below `_SURE`
standard errors are dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Project = Callable[[Mapping[str, float]], Floats]

_HUBER = 2.0  # deviations
_FIRST = 0.4  # the first change that is tried, as a logarithm
MOST_CHANGED = 2.5  # the largest change: a factor of twelve
_NO_EFFECT = 2e-3  # largest change of a number's logarithm that counts as no effect
_ROUNDS = 6  # Gauss-Newton steps
_GRID = 241
_USUAL = 0.7  # standard deviation of the prior on a change: a factor of two
_PRIORS = 0.2, 0.4, _USUAL
_FEWEST_GROUPS = 3  # deployments that cross-validation of the prior needs
_ABOUT_EQUAL = 1.05
_CONVERGED = 0.01  # change of a logarithm
_SURE = 1.5  # standard errors, from which on a change is kept


@dataclass(frozen=True, eq=False)
class Measurements:
    """Logarithms of measured numbers.

    Attributes:
        values: [N].
        sigma: [N]; standard deviations of `values`.
        groups: [N]; index of each number's deployment.
    """

    values: Floats
    sigma: Floats
    groups: npt.NDArray[np.int64]

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


@dataclass(frozen=True, eq=False)
class Fit:
    """Changes of assumptions that fit the measured numbers best; only significant ones.

    Attributes:
        changes: logarithms of factors, by assumption.
        deviation: standard error of each change, by assumption.
    """

    changes: Mapping[str, float]
    deviation: Mapping[str, float]


@dataclass(eq=False)
class Fitter:
    """The fit of a projection's assumptions to measured numbers.

    Attributes:
        names: assumptions that may be changed.
        project: gives logarithms of projected numbers, [N], for changes by name; expensive.
        least: lower bound of a change by name; else `-MOST_CHANGED`.
    """

    measured: Measurements
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

    def fit(self, advance: Callable[[], None] = lambda: None) -> Fit:
        """The fit of all assumptions that change any number.

        Args:
            advance: called after the effect of each assumption is known, and once at the end.
        """
        none, slopes = self.at({}), {}
        for name in self.names:
            effect = self.at({name: _FIRST}) - none
            if np.abs(effect).max(initial=0.0) >= _NO_EFFECT:
                slopes[name] = effect / _FIRST
            advance()
        found = self._fit([*slopes], np.array([*slopes.values()]).T) if slopes else Fit({}, {})
        advance()
        return found

    def _fit(self, names: Sequence[str], slopes: Floats) -> Fit:
        """The fit, from the best change of one assumption alone.

        Args:
            slopes: [N, K]; derivatives of the projection by each assumption's change.
        """
        start = self._best_single(names, slopes)
        changes, slopes = self._newton(names, start, _USUAL, slopes)
        prior = self._prior(names, changes, slopes)
        off = (self.measured.values - self._of(names, changes)) / self.measured.sigma
        sigma = self.measured.sigma * max(float(np.sqrt(_huber(off).mean())), 1.0)
        wanted = self.measured.values - self._of(names, changes) + slopes @ changes
        kept = _sure(wanted, slopes, sigma, prior)
        names = [names[place] for place in kept]
        if not kept:
            return Fit({}, {})
        changes, slopes = self._newton(names, changes[kept], prior, slopes[:, kept])
        _, deviation = _linear(slopes @ changes, slopes, sigma, prior)
        return Fit(
            dict(zip(names, changes.tolist(), strict=True)),
            dict(zip(names, deviation.tolist(), strict=True)),
        )

    def _best_single(self, names: Sequence[str], slopes: Floats) -> Floats:
        """The change of one assumption with the least loss, by a linear estimate; [K]."""
        best = np.inf, 0, 0.0
        for place, name in enumerate(names):
            least = max(-MOST_CHANGED, self.least.get(name, -MOST_CHANGED))
            grid = np.linspace(least, MOST_CHANGED, _GRID)
            lines = self.at({}) + grid[:, None] * slopes[:, place]
            loss = _huber((self.measured.values - lines) / self.measured.sigma).sum(axis=1)
            loss += (grid / _USUAL) ** 2  # the prior
            best = min(best, (float(loss.min()), place, float(grid[np.argmin(loss)])))
        changes = np.zeros(len(names))
        changes[best[1]] = best[2]
        return changes

    def forget(self) -> None:
        """Drop cached projections, after `project` has changed."""
        self._known.clear()

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
        for _ in range(_ROUNDS):
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
