"""Fits a `Surface` to measured rows: robust, and smooth where there are none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.cost.laws.times import Basis, Surface, corner_weights, interpolate, logs_of, places
from expertlane.cost.step.operation import Floats, Ints

_HUBER = 1.5  # of the residuals' robust deviation, from where on a row weighs less
_NUM_ROUNDS = 5
_FLATNESS = 0.1  # of the smoothness; without it empty cells would follow a slope for ever
_APART = 1.01  # knots are at least so far from the ends: files hold four digits
_NUM_FOLDS = 5
_HELD_OUT = 10, 90  # percentiles between which bounds lie
_UNKNOWN = 0.5, 2.0  # bounds where there is but one shape, so that none can be left out


@dataclass(frozen=True, eq=False)
class Rows:
    """Measured times of one kind of operation.

    Attributes:
        at: by axis, [N]; sizes, positive.
        roofline_s: [N]; the roofline that the correction multiplies.
        seconds: [N]; measured.
        shape: [N]; equal numbers are left out of a fit together.
    """

    at: Mapping[str, Floats]
    roofline_s: Floats
    seconds: Floats
    shape: Ints

    def __len__(self) -> int:
        return len(self.seconds)

    def where(self, chosen: npt.NDArray[np.bool_]) -> "Rows":
        """The chosen rows alone."""
        return Rows(
            at={axis: values[chosen] for axis, values in self.at.items()},
            roofline_s=self.roofline_s[chosen],
            seconds=self.seconds[chosen],
            shape=self.shape[chosen],
        )


def fit_correction(
    rows: Rows, axes: Mapping[str, Sequence[float]], smoothness: float = 0.3
) -> Floats:
    """The table of corrections that fits the rows.

    Minimises Huber's loss of the logarithms' residuals, plus `smoothness` times the squares of
    second differences over the logarithms of the knots.

    Args:
        axes: by name, rising knots.

    Returns:
        [knots of each axis].
    """
    shape = tuple(len(knots) for knots in axes.values())
    target = np.log(rows.seconds / rows.roofline_s)
    places_before, fractions, _ = places(logs_of(axes), rows.at)
    corners = corner_weights(shape, places_before, fractions)
    index = np.stack([np.broadcast_to(each, target.shape) for each, _ in corners])
    weight = np.stack([np.broadcast_to(each, target.shape) for _, each in corners])
    penalty = smoothness * _roughness(axes)
    importance = np.ones_like(target)
    flat: Floats = np.zeros(penalty.shape[0])
    for _ in range(_NUM_ROUNDS):
        equations = _normal_equations(index, weight, target, importance, penalty)
        flat = np.linalg.solve(*equations).astype(np.float64)
        residual = np.abs(target - (flat[index] * weight).sum(axis=0))
        deviation = max(1.4826 * float(np.median(residual)), 1e-3)
        importance = np.minimum(1, _HUBER * deviation / np.maximum(residual, 1e-12))
    # Where no row is near, a slope must not lead below the roofline.
    is_empty = np.bincount(index.ravel(), weight.ravel(), len(flat)) < 1
    return np.where(is_empty, np.maximum(flat, 0), flat).reshape(shape)


def fit_surface(
    rows: Rows,
    axes: Mapping[str, Sequence[float]],
    *,
    basis: Basis,
    origin: str,
    smoothness: float = 0.3,
) -> tuple[Surface, Floats]:
    """Fit all rows; bounds are those of rows left out by whole shapes.

    Args:
        axes: by name, rising knots; the first and last become the rows' extremes.
        origin: source of the rows; their number is added.

    Returns:
        The law, and the errors of rows left out, as `held_out_errors` has them.
    """
    knots = {axis: _stretched(each, rows.at[axis]) for axis, each in axes.items()}
    errors = held_out_errors(rows, knots, smoothness)
    low, high = np.exp(np.percentile(errors, _HELD_OUT)) if len(errors) else _UNKNOWN
    surface = Surface(
        axes=knots,
        correction=fit_correction(rows, knots, smoothness),
        low=min(float(low), 1.0),
        high=max(float(high), 1.0),
        basis=basis,
        origin=f"{origin}; {len(rows)} rows",
    )
    return surface, errors


def held_out_errors(
    rows: Rows, axes: Mapping[str, Sequence[float]], smoothness: float = 0.3
) -> Floats:
    """Logarithms of measured over predicted, [N], each row predicted without its shape.

    Empty where there are fewer than two shapes.
    """
    fold = _folds(rows.shape)
    errors = np.full(len(rows), np.nan)
    if len(np.unique(fold)) < 2:
        return errors[:0]
    for each in np.unique(fold):
        out = fold == each
        correction = fit_correction(rows.where(~out), axes, smoothness)
        errors[out] = residuals(rows.where(out), axes, correction)
    return errors


def residuals(rows: Rows, axes: Mapping[str, Sequence[float]], correction: Floats) -> Floats:
    """Logarithms of measured over predicted, [N]."""
    predicted, _ = interpolate(correction, logs_of(axes), rows.at)
    return np.log(rows.seconds / rows.roofline_s) - predicted


def knots_of(values: Floats, most: int) -> tuple[float, ...]:
    """At most `most` knots from the least to the largest value, each at a value that occurs."""
    distinct = np.unique(values)
    if len(distinct) <= most:
        return tuple(distinct.tolist())
    wanted = np.geomspace(distinct[0], distinct[-1], most)
    nearest = np.abs(np.log(distinct[:, None] / wanted)).argmin(axis=0)
    return tuple(distinct[np.unique(nearest)].tolist())


def _stretched(knots: Sequence[float], values: Floats) -> tuple[float, ...]:
    """Knots that end where the values do, so that a law knows where it has to guess."""
    least, most = float(values.min()), float(values.max())
    inner = [float(knot) for knot in knots if _APART * least < knot < most / _APART]
    return (least, *inner, most) if most > least else (least,)


def _folds(shape: Ints) -> Ints:
    """[N]; the fold of each row, the same on every run: a hash of its shape."""
    distinct, rank = np.unique(shape, return_inverse=True)
    if len(distinct) <= _NUM_FOLDS:
        return rank.astype(np.int64)
    mixed = (rank.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)
    return (mixed % np.uint64(_NUM_FOLDS)).astype(np.int64)


def _normal_equations(
    index: Ints, weight: Floats, target: Floats, importance: Floats, penalty: Floats
) -> tuple[Floats, Floats]:
    """Matrix and right side of the weighted least squares; index, weight: [corners, N]."""
    size = penalty.shape[0]
    matrix = penalty.copy()
    right = np.zeros(size)
    for i, w in zip(index, weight, strict=True):
        right += np.bincount(i, w * importance * target, size)
        for j, v in zip(index, weight, strict=True):
            cells = np.bincount(i * size + j, w * v * importance, size * size)
            matrix += cells.reshape(size, size)
    return matrix, right


def _roughness(axes: Mapping[str, Sequence[float]]) -> Floats:
    """The quadratic form of second (and, weakly, first) differences along every axis."""
    shape = [len(knots) for knots in axes.values()]
    total = np.zeros((int(np.prod(shape)),) * 2)
    for dimension, knots in enumerate(axes.values()):
        if len(knots) < 2:
            continue
        logs = np.log(np.asarray(knots, dtype=np.float64))
        slope = np.diff(np.eye(len(logs)), axis=0) / np.diff(logs)[:, None]
        form = _FLATNESS * slope.T @ slope
        if len(logs) > 2:
            bend = np.diff(slope, axis=0)
            form = form + bend.T @ bend
        before = np.eye(int(np.prod(shape[:dimension])))
        after = np.eye(int(np.prod(shape[dimension + 1 :])))
        total += np.kron(np.kron(before, form), after)
    # Keeps the system solvable where a table has no rows at all.
    return total + 1e-9 * np.eye(len(total))
