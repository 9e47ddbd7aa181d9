"""A profile's figures, surfaces and floors, fitted to what ranks measured."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from expertlane.cost.laws.device import roofline
from expertlane.cost.laws.fitting import Rows, fit_surface, knots_of
from expertlane.cost.laws.links import roofline_s
from expertlane.cost.laws.profile import Device, LinkSheet, Profile, Term
from expertlane.cost.laws.times import Basis, Surface
from expertlane.cost.step.operation import ITEM_BYTES, OpKind, flops_of
from expertlane.engine.ranks.commands import Point, TransferPoint
from expertlane.spec.names import Link

Floats = npt.NDArray[np.float64]

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
    for kind, places in of_kind.items():
        least = min(places, key=lambda place: float(np.median(seconds[:, place])))
        terms[f"{kind}_floor_s"] = term_of(seconds[:, least], origin)
        for dtype in sorted({points[place].dtype for place in places}):
            chosen = [place for place in places if points[place].dtype == dtype]
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
    for name, places in of_kind.items():
        took = np.median(seconds[:, places], axis=0)
        ranks = np.array([points[place].num_ranks for place in places], dtype=np.float64)
        carried = np.array([_carried(points[place]) for place in places])
        floor = term_of(seconds[:, places[int(np.argmin(took))]], origin)
        terms[f"floor_s.{name}"] = floor
        with_floor = replace(sheet, terms={f"floor_s.{name}": floor})
        base = roofline_s(with_floor, name, Link.INTRA_NODE, carried, ranks, np.ones_like(ranks))
        rows = Rows(
            at={"bytes": carried, "ranks": ranks},
            roofline_s=base,
            seconds=took,
            shape=np.arange(len(places)),
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
