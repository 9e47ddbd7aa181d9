"""A profile's figures, surfaces and floors, fitted to what ranks measured.

`fit_surface` fits any rows, those of public tables too: robust, and smooth where there are none.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from expertlane.cost.laws.device import roofline
from expertlane.cost.laws.links import roofline_s
from expertlane.cost.laws.profile import Device, LinkSheet, Profile, Term
from expertlane.cost.laws.times import Basis, Surface, corner_weights, interpolate, logs_of, places
from expertlane.cost.step.operation import ITEM_BYTES, Floats, Ints, OpKind, flops_of
from expertlane.engine.ranks.commands import Point, TransferPoint
from expertlane.spec.names import Link

_SMOOTHNESS = 0.02  # rows lie on the knots and are medians
_MOST_KNOTS = 12
_SPREAD = 10, 90  # percentiles of a number's repetitions that are its bounds
_AXES = {
    OpKind.GEMM: ("m", "n", "k"),
    OpKind.EXPERTS: ("pairs_per_expert", "active", "hidden", "inner"),
    OpKind.PREFILL_ATTENTION: ("keys_per_query", "query_heads", "group", "head_dim"),
    OpKind.DECODE_ATTENTION: ("positions_per_seq", "seq_kv_heads", "group", "head_dim"),
    OpKind.LATENT_PREFILL: ("keys_per_query", "query_heads"),
    OpKind.LATENT_DECODE: ("positions_per_seq", "seqs", "heads"),
    OpKind.MEMORY: ("bytes",),
}


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


def peak_flops_per_s(points: Sequence[Point], seconds: Floats) -> dict[str, float]:
    """The highest FLOP/s of any product, by type.

    Args:
        seconds: [num_points].
    """
    peaks: dict[str, float] = defaultdict(float)
    for point, took in zip(points, seconds.tolist(), strict=True):
        if point.kind is OpKind.GEMM:
            peaks[point.dtype] = max(peaks[point.dtype], flops_of(point.kind, point.by_name) / took)
    return dict(peaks)


def operation_laws(
    points: Sequence[Point], seconds: Floats, device: Device, origin: str
) -> tuple[dict[str, Surface], dict[str, Term]]:
    """Surfaces by kind and type, and their floors.

    Args:
        seconds: [num_rounds, num_points].
        origin: when, where and with what it was measured.
    """
    surfaces, terms = {}, {}
    of_kind: dict[OpKind, list[int]] = defaultdict(list)
    for place, point in enumerate(points):
        of_kind[point.kind].append(place)
    for kind, numbers in of_kind.items():
        least = min(numbers, key=lambda place: float(np.median(seconds[:, place])))
        terms[f"{kind}_floor_s"] = term_of(seconds[:, least], origin)
        for dtype in sorted({points[place].dtype for place in numbers}):
            chosen = [place for place in numbers if points[place].dtype == dtype]
            rows = _rows(
                [points[p] for p in chosen],
                np.median(seconds[:, chosen], axis=0),
                device,
                terms[f"{kind}_floor_s"].value,
            )
            name = str(kind) if kind is OpKind.MEMORY else f"{kind}.{dtype}"
            surfaces[name] = _surface(rows, origin)
    return surfaces, terms


def _rows(points: Sequence[Point], seconds: Floats, device: Device, floor_s: float) -> Rows:
    kind, dtype = points[0].kind, points[0].dtype
    names = points[0].by_name
    sizes: Mapping[str, Floats] = {
        name: np.array([point.by_name[name] for point in points], dtype=np.float64)
        for name in names
    }
    base = roofline(device, kind, dtype, sizes, floor_s)
    at = {axis: np.broadcast_to(base.at[axis], seconds.shape) for axis in _AXES[kind]}
    first = np.round(np.log(at[_AXES[kind][0]]), 6)
    _, shape = np.unique(first, return_inverse=True)
    return Rows(
        at, base.seconds, seconds, np.arange(len(points)) if kind is OpKind.MEMORY else shape
    )


def _surface(rows: Rows, origin: str) -> Surface:
    axes = {axis: knots_of(np.round(values, 6), _MOST_KNOTS) for axis, values in rows.at.items()}
    surface, _ = fit_surface(
        rows, axes, basis=Basis.MEASURED, origin=origin, smoothness=_SMOOTHNESS
    )
    return surface


def transfer_laws(
    points: Sequence[TransferPoint], seconds: Floats, sheet: Profile, origin: str
) -> tuple[dict[str, Surface], dict[str, Term]]:
    """Surfaces of collectives and sends, and their floors.

    Args:
        seconds: [num_rounds, num_points].
        sheet: has the links.
    """
    surfaces, terms = {}, {}
    of_kind: dict[str, list[int]] = defaultdict(list)
    for place, point in enumerate(points):
        of_kind[f"{point.kind}.all_links"].append(place)
    for name, numbers in of_kind.items():
        took = np.median(seconds[:, numbers], axis=0)
        ranks = np.array([points[place].num_ranks for place in numbers], dtype=np.float64)
        carried = np.array([_carried(points[place]) for place in numbers])
        floor = term_of(seconds[:, numbers[int(np.argmin(took))]], origin)
        terms[f"floor_s.{name}"] = floor
        with_floor = replace(sheet, terms={f"floor_s.{name}": floor})
        base = roofline_s(with_floor, name, Link.INTRA_NODE, carried, ranks, np.ones_like(ranks))
        rows = Rows(
            at={"bytes": carried, "ranks": ranks},
            roofline_s=base,
            seconds=took,
            shape=np.arange(len(numbers)),
        )
        surfaces[name] = _surface(rows, origin)
    return surfaces, terms


def _carried(point: TransferPoint) -> float:
    """Bytes that a rank sends, and receives, over all links."""
    return float(point.num_bytes * (point.num_ranks - 1))


def link_sheets(
    points: Sequence[TransferPoint], seconds: Floats, origin: str
) -> dict[Link, LinkSheet]:
    """The highest rate of any transfer; where "nodes" share a machine, for either kind of link.

    Args:
        seconds: [num_points].
    """
    rates = [_carried(point) / took for point, took in zip(points, seconds.tolist(), strict=True)]
    return {link: LinkSheet(max(rates), origin) for link in Link} if rates else {}


def term_of(seconds: Floats, origin: str) -> Term:
    """The median of a number's repetitions [num_rounds]; bounds are where most of them lie."""
    low, value, high = np.percentile(seconds, (_SPREAD[0], 50, _SPREAD[1])).tolist()
    return Term(value, low, high, Basis.MEASURED, origin)


def read_bytes_per_s(points: Sequence[Point], seconds: Floats) -> float:
    """The highest rate at which a product of one row read its weights."""
    rates = [
        point.by_name["n"] * point.by_name["k"] * ITEM_BYTES[point.dtype] / took
        for point, took in zip(points, seconds.tolist(), strict=True)
        if point.kind is OpKind.GEMM
        and point.by_name["m"]
        == min(each.by_name["m"] for each in points if each.kind is OpKind.GEMM)
    ]
    return float(max(rates))
