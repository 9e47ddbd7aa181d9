"""Laws of transfers, fitted: floors, rates of forwarding, surfaces.

What the tables measure and which transfer of the engine they stand for:

- NCCL's collectives inside a node: the engine's own.
- DeepEP low-latency: the flat all-to-all over nodes, and one more candidate inside a node. It has
  no exchange of counts.
- TensorRT-LLM's all-to-all over NVLink: the flat all-to-all inside an NVLink domain.
- DeepEP normal, 20 SMs: both hops of the hierarchical form, forwarding as copies arrive. The time
  of its `notify` kernel before a dispatch is that of an exchange of counts over all ranks, and
  stands for the floor of a collective that spans nodes; before a combine it is part of that.

Between nodes, collectives other than these and point to point have no measurement: bounds.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from links_tables import COUNTS, Loads, Source, far_sources_of_laws, read_loads, sources_of_laws
from quality import Fitted, Quality
from sheet import Card
from tables import SOURCE, Array, Part

from expertlane.calibrate.fit import Rows, fit_surface, knots_of
from expertlane.cost.laws.links import ASSUMED_TERMS, law_times, roofline_s
from expertlane.cost.laws.profile import Profile, Term
from expertlane.cost.laws.times import Basis, Surface
from expertlane.spec.names import Link

_SMOOTHNESS = 0.03
_MOST_KNOTS = 12  # of a size
_NUM_SMALL = 3  # smallest sizes, whose median is the floor
_NUM_LARGE = 4  # largest sizes, where bytes over time is a rate
_STAND_IN = 0.5, 2.0  # bounds of a floor that was measured on another kind of exchange


def fit_links(card: Card, with_judging: bool) -> Fitted:
    """All laws of a card's tables."""
    sources = sources_of_laws(card)
    read = {law: read_loads(each, Part.FITTED) for law, each in sources.items()}
    origins = {law: f"{SOURCE}, {each[0].table.path}" for law, each in sources.items()}
    terms = {name: term for name, term in ASSUMED_TERMS.items() if name.startswith("contention")}
    if card.like is not None:  # as assumed of the other, and wider
        terms = {}
    for law, (loads, _) in read.items():
        terms |= _floor_terms(law, loads, origins[law])
    for stage in ("dispatch", "combine"):
        law = f"{stage}.forwarded.inter_node"
        if law not in read:
            continue
        terms[f"forwarding_bytes_per_s.{stage}"] = _forwarding_rate(read[law][0], origins[law])
    profile = replace(card.sheet, surfaces={}, terms=terms)
    surfaces, qualities = {}, []
    for law, (loads, num_spikes) in read.items():
        if law == COUNTS:
            continue
        rows, axes = _rows(law, loads, profile), _axes(law, loads, profile)
        surface, held_out = fit_surface(
            rows,
            axes,
            basis=Basis.FITTED,
            origin=f"{origins[law]}; {num_spikes} spikes left out",
            smoothness=_SMOOTHNESS,
        )
        surfaces[law] = _rising(law, surface, profile)
        judged = _judge(card, law, sources[law], surfaces[law], profile) if with_judging else {}
        qualities.append(
            Quality(
                name=law,
                source=sources[law][0].table.path,
                num_fitted=len(rows),
                num_cleaned=num_spikes,
                held_out=held_out,
                judged=judged,
            )
        )
    return Fitted(surfaces, terms, qualities)


def _judge(
    card: Card, law: str, sources: Sequence[Source], surface: Surface, profile: Profile
) -> dict[str, Array]:
    """Logarithms of measured over predicted of rows that no fit has seen, by what they are."""
    parts = {Part.LARGEST.value: [read_loads(sources, Part.LARGEST)[0]]}
    far = far_sources_of_laws(card).get(law)
    if far is not None:
        parts["8 nodes"] = [read_loads(far, part)[0] for part in (Part.FITTED, Part.LARGEST)]
    judged = {}
    with_law = replace(profile, surfaces={law: surface})
    for name, all_loads in parts.items():
        errors = []
        for loads in all_loads:
            at = _rows(law, loads, profile).at
            times = law_times(with_law, law, at["bytes"], at["ranks"], at["nodes"])
            assert times is not None
            errors.append(np.log(loads.seconds / times.seconds))
        judged[name] = np.concatenate(errors)
    return judged


def _link(law: str) -> Link:
    return Link.INTER_NODE if law.endswith("inter_node") else Link.INTRA_NODE


def _bytes(law: str, loads: Loads, profile: Profile) -> Array:
    """[N]; as `cost.laws.links` counts the axis `bytes`."""
    if _link(law) is Link.INTRA_NODE:
        return loads.near_bytes
    if "forwarded" not in law:
        return loads.nic_bytes
    rate = profile.terms[f"forwarding_bytes_per_s.{law.split('.')[0]}"].value
    share = profile.links[Link.INTER_NODE].bytes_per_s / rate
    return np.maximum(loads.nic_bytes, loads.near_bytes * share)


def _rows(law: str, loads: Loads, profile: Profile) -> Rows:
    sent = _bytes(law, loads, profile)
    return Rows(
        at={"bytes": sent, "ranks": loads.ranks, "nodes": loads.nodes},
        roofline_s=roofline_s(profile, law, _link(law), sent, loads.ranks, loads.nodes),
        seconds=loads.seconds,
        shape=loads.shape,
    )


def _axes(law: str, loads: Loads, profile: Profile) -> dict[str, tuple[float, ...]]:
    knots = knots_of(_bytes(law, loads, profile), _MOST_KNOTS)
    return {
        **(
            {"nodes": _distinct(loads.nodes)}
            if "inter" in law
            else {"ranks": _distinct(loads.ranks)}
        ),
        "bytes": tuple(float(f"{knot:.4g}") for knot in knots),
    }


def _distinct(values: Array) -> tuple[float, ...]:
    return tuple(np.unique(values).tolist())


def _floor_terms(law: str, loads: Loads, origin: str) -> dict[str, Term]:
    """The floor, from the smallest sizes: constant and per peer, or constant and per doubling."""
    over_nodes = _link(law) is Link.INTER_NODE
    variants = loads.nodes if over_nodes else loads.ranks
    floors, spread = {}, []
    for variant in np.unique(variants):
        those = variants == variant
        small = np.unique(loads.shape[those])[:_NUM_SMALL]
        seconds = loads.seconds[those & np.isin(loads.shape, small)]
        floors[variant] = float(np.median(seconds))
        spread.append(seconds / floors[variant])
    amounts = [np.log2(each) if over_nodes else each - 1 for each in floors]
    constant, slope = next(iter(floors.values())), 0.0
    if len(floors) > 1:
        slope, constant = np.polyfit(amounts, list(floors.values()), 1)
    low, high = np.percentile(np.concatenate(spread), [10, 90])
    basis, origin = Basis.FITTED, f"{origin}: the {_NUM_SMALL} smallest sizes"
    if law == COUNTS:
        law, basis, (low, high) = "collective.inter_node", Basis.BOUND, _STAND_IN
        origin = f"{origin}; an exchange of counts stands in"
    grows = "floor_per_doubling_s" if over_nodes else "floor_per_peer_s"
    return {
        f"{name}.{law}": Term(
            float(value), float(value * min(low, 1)), float(value * max(high, 1)), basis, origin
        )
        for name, value in (("floor_s", constant), (grows, slope))
        if value > 0
    }


def _forwarding_rate(loads: Loads, origin: str) -> Term:
    """Bytes per second inside a node while forwarding: of large messages over fewest nodes, where
    the node is slower than its NICs."""
    those = np.flatnonzero(loads.nodes == loads.nodes.min())
    large = those[np.argsort(loads.shape[those])][-_NUM_LARGE:]
    rates = loads.near_bytes[large] / loads.seconds[large]
    return Term(
        value=float(rates.max()),
        low=float(rates.min()),
        high=float(rates.max() * 1.1),
        basis=Basis.FITTED,
        origin=f"{origin}: {loads.nodes.min():g} nodes, the {_NUM_LARGE} largest sizes fitted",
    )


def _rising(law: str, surface: Surface, profile: Profile) -> Surface:
    """The surface with no time that falls as bytes grow, half by lifting and half by lowering."""
    variants, sizes = (np.array(knots) for knots in surface.axes.values())
    in_bytes = sizes / profile.links[_link(law)].bytes_per_s
    correction = np.empty_like(surface.correction)
    for row, variant in enumerate(variants):
        number = np.full(len(sizes), variant)
        roofline = roofline_s(profile, law, _link(law), sizes, number, number)
        # Between knots the logarithm of the roofline rises by at least this.
        rise = (in_bytes / roofline)[:-1] * np.diff(np.log(sizes))
        level = np.concatenate([[0], np.cumsum(rise)])
        values = surface.correction[row] + level
        lifted = np.maximum.accumulate(values)
        lowered = np.minimum.accumulate(values[::-1])[::-1]
        correction[row] = (lifted + lowered) / 2 - level
    return replace(surface, correction=correction)
