"""Fits the laws of transfers: floors, forwarding rates and surfaces.

What the tables measure and which transfer of the engine they stand for:

- NCCL's collectives inside a node: the engine's own.
- DeepEP low-latency: the flat all-to-all over nodes, and one more candidate inside a node. It has
  no exchange of counts.
- DeepEP normal, 20 SMs: both hops of the hierarchical form, forwarding as copies arrive. The time
  of its `notify` kernel before a dispatch is that of an exchange of counts over all ranks, and
  stands for the floor of a collective that spans nodes; before a combine it is part of that.

Between nodes, collectives other than these and point to point have no measurement: bounds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from calibration.links_tables import Sample, Split

from expertlane.cost.fitting import Rows, fit_surface, held_out_errors, knots_of
from expertlane.cost.link_bounds import ASSUMED_TERMS
from expertlane.cost.links import roofline_s
from expertlane.cost.profile import Profile, Term
from expertlane.cost.surface import Floats, Surface
from expertlane.cost.times import Basis
from expertlane.spec.names import Link

_SMOOTHNESS = 0.03
_MOST_KNOTS = 12  # of a size
_SMALL = 3  # smallest sizes of a series, whose median is its floor
_NUM_LARGE = 4  # largest sizes, where bytes over time is a rate
_COUNTS = "counts.inter_node"  # no surface; gives the floor of a collective over nodes
_STAND_IN = 0.5, 2.0  # bounds of a floor that was measured on another kind of exchange
_ORIGIN = "aiconfigurator-core 0.12.0, h100_sxm/comm"
_TABLES = {
    "custom": "sglang 0.5.6.post2 custom_allreduce",
    "low_latency": "sglang 0.5.6.post2 wideep_deepep_ll",
    "forwarded": "sglang 0.5.6.post2 wideep_deepep_normal, 20 SMs",
}


@dataclass(frozen=True, eq=False)
class LinkFit:
    """What was fitted, and the logarithms of measured over predicted on rows left out."""

    surfaces: Mapping[str, Surface]
    terms: Mapping[str, Term]
    errors: Mapping[str, Floats]


def fit_links(splits: Mapping[str, Split], profile: Profile) -> LinkFit:
    """All laws of the tables.

    Args:
        profile: has the datasheet's links; its surfaces and terms are not looked at.
    """
    terms = {name: term for name, term in ASSUMED_TERMS.items() if name.startswith("contention")}
    for law, split in splits.items():
        terms |= _floor_terms(law, split.fitted)
    terms |= _forwarding_terms(splits)
    with_terms = replace(profile, surfaces={}, terms=terms)
    surfaces, errors = {}, {}
    for law, split in splits.items():
        if law == _COUNTS:
            continue
        rows, axes = rows_of(law, split.fitted, with_terms), _axes(law, split.fitted, with_terms)
        errors[law] = held_out_errors(rows, axes, _SMOOTHNESS)
        surface = fit_surface(
            rows, axes, basis=Basis.FITTED, origin=_origin(law, split), smoothness=_SMOOTHNESS
        )
        surfaces[law] = _rising(law, surface, with_terms)
    return LinkFit(surfaces, terms, errors)


def _rising(law: str, surface: Surface, profile: Profile) -> Surface:
    """The surface with no time that falls as bytes grow, half by lifting and half by lowering."""
    sizes, variants = (np.array(knots) for knots in surface.axes.values())
    link = Link.INTER_NODE if law.endswith("inter_node") else Link.INTRA_NODE
    in_bytes = sizes / profile.links[link].bytes_per_s
    correction = np.empty_like(surface.correction)
    for column, variant in enumerate(variants):
        variant = np.full(len(sizes), variant)
        roofline = roofline_s(profile, law, link, sizes, variant, variant)
        # Between knots the logarithm of the roofline rises by at least this.
        rise = (in_bytes / roofline)[:-1] * np.diff(np.log(sizes))
        level = np.concatenate([[0], np.cumsum(rise)])
        values = surface.correction[:, column] + level
        lifted = np.maximum.accumulate(values)
        lowered = np.minimum.accumulate(values[::-1])[::-1]
        correction[:, column] = (lifted + lowered) / 2 - level
    return replace(surface, correction=correction)


def link_bytes(law: str, samples: Sequence[Sample], profile: Profile) -> Floats:
    """[N]; as `cost.links` counts the axis `bytes`."""
    near = np.array([each.near_bytes for each in samples])
    nic = np.array([each.nic_bytes for each in samples])
    if law.endswith("intra_node"):
        return near
    rate = profile.terms.get(f"forwarding_bytes_per_s.{law.split('.')[0]}")
    if "forwarded" in law and rate is not None:
        return np.maximum(nic, near * profile.links[Link.INTER_NODE].bytes_per_s / rate.value)
    return nic


def rows_of(law: str, samples: Sequence[Sample], profile: Profile) -> Rows:
    """Samples of one law; those of one size are left out of a fit together."""
    ranks = np.array([float(each.ranks) for each in samples])
    nodes = np.array([float(each.nodes) for each in samples])
    sent = link_bytes(law, samples, profile)
    link = Link.INTER_NODE if law.endswith("inter_node") else Link.INTRA_NODE
    return Rows(
        at={"bytes": sent, "ranks": ranks, "nodes": nodes},
        roofline_s=roofline_s(profile, law, link, sent, ranks, nodes),
        seconds=np.array([each.seconds for each in samples]),
        shape=np.array([_shape(each) for each in samples]),
    )


def _shape(sample: Sample) -> int:
    """The size in bytes where it is one: half as many elements of twice the width are the same."""
    return sample.size * (2 if "half" in sample.series or "bfloat16" in sample.series else 1)


def _axes(law: str, samples: Sequence[Sample], profile: Profile) -> dict[str, tuple[float, ...]]:
    variant = "nodes" if law.endswith("inter_node") else "ranks"
    knots = knots_of(link_bytes(law, samples, profile), _MOST_KNOTS)
    return {
        "bytes": tuple(float(f"{knot:.4g}") for knot in knots),
        variant: tuple(sorted({float(getattr(each, variant)) for each in samples})),
    }


def _floor_terms(law: str, samples: Sequence[Sample]) -> dict[str, Term]:
    """The floor, from the smallest sizes: constant and per peer, or constant and per doubling."""
    by_variant: dict[float, list[float]] = {}
    over_nodes = law.endswith("inter_node")
    for variant in {(each.nodes if over_nodes else each.ranks) for each in samples}:
        those = [e for e in samples if (e.nodes if over_nodes else e.ranks) == variant]
        sizes = sorted({_shape(each) for each in those})[:_SMALL]
        by_variant[variant] = [each.seconds for each in those if _shape(each) in sizes]
    amount = np.array([np.log2(v) if over_nodes else v - 1 for v in by_variant], dtype=np.float64)
    floors = np.array([np.median(each) for each in by_variant.values()])
    every = np.concatenate([np.array(each) / np.median(each) for each in by_variant.values()])
    low, high = np.percentile(every, [10, 90])
    slope, constant = np.polyfit(amount, floors, 1) if len(floors) > 1 else (0.0, floors[0])
    names = {"floor_s": constant}
    names["floor_per_doubling_s" if over_nodes else "floor_per_peer_s"] = slope
    origin, basis = f"{_origin_of(law)}: the {_SMALL} smallest sizes", Basis.FITTED
    if law == _COUNTS:
        law, basis, (low, high) = "collective.inter_node", Basis.BOUND, _STAND_IN
        origin = f"{origin}; the exchange of counts stands in"
    return {
        f"{name}.{law}": Term(
            float(value), float(value * min(low, 1)), float(value * max(high, 1)), basis, origin
        )
        for name, value in names.items()
        if value > 0
    }


def _forwarding_terms(splits: Mapping[str, Split]) -> dict[str, Term]:
    """Bytes per second inside a node while forwarding: of the large messages over fewest nodes."""
    terms = {}
    for stage in ("dispatch", "combine"):
        law = f"{stage}.forwarded.inter_node"
        samples = splits[law].fitted
        fewest = min(each.nodes for each in samples)
        those = sorted((e for e in samples if e.nodes == fewest), key=lambda each: each.size)
        rates = [each.near_bytes / each.seconds for each in those[-_NUM_LARGE:]]
        terms[f"forwarding_bytes_per_s.{stage}"] = Term(
            value=float(max(rates)),
            low=float(min(rates)),
            high=float(max(rates)) * 1.1,
            basis=Basis.FITTED,
            origin=f"{_origin_of(law)}: {fewest} nodes, the {_NUM_LARGE} largest sizes fitted",
        )
    return terms


def _origin_of(law: str) -> str:
    variant = law.split(".")[1] if law.count(".") > 1 else ""
    if law.startswith("counts"):
        variant = "forwarded"
    return f"{_ORIGIN}: {_TABLES.get(variant, 'nccl 2.29.2')}"


def _origin(law: str, split: Split) -> str:
    return f"{_origin_of(law)}; {split.num_spikes} spikes left out"
