"""Laws of transfer times over the bytes that each rank's links carry.

A rank's time is that of its own load; the slowest of a group decides when it ends. Over each kind
of link counts the larger of what the rank sends and receives, so a hot receiver is slow.

Surfaces that are looked for, on the axes `bytes` and `ranks` (of the group) or `nodes`:

- `all_gather.intra_node`, `reduce_scatter.intra_node`, `all_reduce.intra_node`,
  `all_to_all.intra_node`: groups inside a node; and a serving engine's own kernels,
  `all_reduce.custom.intra_node` (one-shot and two-shot) and `all_reduce.multicast.intra_node`
  (NVLink's switches add up). `send.intra_node`, `send.inter_node`: point to point (an all-to-all
  of two ranks stands in for the first).
- `dispatch.low_latency.intra_node`, `combine.low_latency.intra_node` and `….inter_node`: every
  copy goes straight to the rank of its expert: the form `all_to_all`.
- `dispatch.two_sided.intra_node`, `dispatch.one_sided.intra_node` and those of `combine`: the same
  over an NVLink domain of many hosts, by kernels that write into other ranks' memory.
- `dispatch.forwarded.intra_node`, `combine.forwarded.intra_node` and `….inter_node`: a copy for
  every node reached, forwarded inside it while others still arrive: both hops of hierarchical
  dispatch in one, see `LinkModel.forwarded`.
- `all_gather.inter_node` and so on: groups that span nodes.
- `<kind>.all_links`: of a machine whose "nodes" share one memory; stands before all others of the
  kind, with the bytes over both kinds of link together.

Where several hold, the fastest does: a deployment picks its library. Where none does, times are
bounds: assumed floors, and shares of the datasheet. `bytes` is what the rank's busiest direction
has to carry over the link that the surface is named for: (g − 1)/g of the gathered or scattered
total in a group of g, twice that for an all-reduce, what leaves or enters the rank for an
all-to-all. Over nodes, collectives use all NICs of a node at once: a rank's share is what enters
its node for the group, over the group's ranks there. The roofline of a surface is its law's floor
and bytes over the link's bandwidth; the floor is the sum of the terms `floor_s.<surface>`,
`floor_per_peer_s.<surface>` (of each other rank) and `floor_per_doubling_s.<surface>` (of nodes),
all optional. Below the first knot of `bytes` its time holds: that is what an empty message takes.
The term `forwarding_bytes_per_s.dispatch` (or `.combine`) is the rate inside a node while
forwarding.

The terms `contention.<kind of transfer>` and `contention.low_latency` are shares by which compute
slows while such a transfer runs beside it.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial

import numpy as np

from expertlane.cost.laws.profile import Profile, Term
from expertlane.cost.laws.times import Basis, Times, no_time, where
from expertlane.cost.step.operation import Floats, HandOver, Ints, LinkLoad, Transfer, TransferKind
from expertlane.spec.names import Link, Stage


def _assumed(value: float, low: float, high: float, why: str) -> Term:
    return Term(value, low, high, Basis.BOUND, f"assumption: {why}")


ASSUMED_TERMS = {
    "floor_s.collective.intra_node": _assumed(5e-6, 3e-6, 10e-6, "launch and one exchange"),
    "floor_per_peer_s.collective.intra_node": _assumed(1e-6, 0.1e-6, 2e-6, "a flag per peer"),
    "efficiency.collective.intra_node": _assumed(0.65, 0.45, 0.85, "headers, copies, few SMs"),
    "floor_s.collective.inter_node": _assumed(10e-6, 5e-6, 20e-6, "launch and one message"),
    "floor_per_doubling_s.collective.inter_node": _assumed(20e-6, 8e-6, 40e-6, "messages in turn"),
    "efficiency.collective.inter_node": _assumed(0.85, 0.6, 0.95, "headers, congestion"),
    "floor_s.send.intra_node": _assumed(6e-6, 3e-6, 12e-6, "launch and one exchange"),
    "efficiency.send.intra_node": _assumed(0.6, 0.4, 0.85, "few SMs copy"),
    "floor_s.send.inter_node": _assumed(10e-6, 5e-6, 20e-6, "launch and one message"),
    "efficiency.send.inter_node": _assumed(0.85, 0.6, 0.95, "headers, congestion"),
    "contention.all_to_all": _assumed(0.15, 0.1, 0.25, "20 of 132 SMs, some memory traffic"),
    "contention.all_gather": _assumed(0.15, 0.05, 0.25, "16 to 24 channels of 132 SMs"),
    "contention.reduce_scatter": _assumed(0.15, 0.05, 0.25, "16 to 24 channels of 132 SMs"),
    "contention.all_reduce": _assumed(0.15, 0.05, 0.25, "16 to 24 channels of 132 SMs"),
    "contention.send": _assumed(0.03, 0.0, 0.1, "2 to 8 channels of 132 SMs"),
    "contention.low_latency": _assumed(0.0, 0.0, 0.05, "receive hooks occupy no SM"),
}


def term_of(profile: Profile, name: str) -> Term | None:
    """The profile's term, else the assumed one; None where there is neither."""
    return profile.terms.get(name) or ASSUMED_TERMS.get(name)


def bound_times(
    profile: Profile, law: str, link_bytes: Floats, num_peers: Floats, num_nodes: Floats
) -> Times:
    """Seconds of a law that was not measured: floors, and bytes over the slower kind of link.

    Args:
        law: `collective.intra_node` and the like; the floor's.
        link_bytes: [2, R]; by `Link`.
        num_peers, num_nodes: [R].
    """
    kind = law.split(".")[0]
    values, bases = [], [Basis.MEASURED]
    for pick, opposite in (("low", "high"), ("value", "value"), ("high", "low")):

        def read(quantity: str, of_law: str, pick: str = pick) -> float:
            term = term_of(profile, f"{quantity}.{of_law}")
            if term is None:
                return 0.0
            bases.append(term.basis)
            return float(getattr(term, pick))

        seconds = np.zeros(link_bytes.shape[1])
        for link in Link:
            if link_bytes[link].any():
                efficiency = read("efficiency", f"{kind}.{link.name.lower()}", opposite)
                rate = profile.link_rate(link) * efficiency
                seconds = np.maximum(seconds, link_bytes[link] / rate)
        floor = read("floor_s", law) + read("floor_per_peer_s", law) * num_peers
        doublings = np.log2(np.maximum(num_nodes, 1))
        values.append(seconds + floor + read("floor_per_doubling_s", law) * doublings)
    is_extrapolated = np.zeros(link_bytes.shape[1], dtype=np.bool_)
    return Times(np.array(values), max(bases), is_extrapolated)


_WIDER_FOR_TWICE_THE_NODES = 1.6
_INSIDE_NODES = ("low_latency", "forwarded", "two_sided", "one_sided")
_OF_ENGINES = ("custom", "multicast")
_DISPATCHING = {Stage.DISPATCH: "dispatch", Stage.COMBINE: "combine"}


class LinkModel:
    """Prices transfers by a profile."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._law_times = partial(law_times, profile)

    def times(self, transfer: Transfer) -> Times:
        """Seconds of every rank for its own load; 0 in groups of one."""
        return self._times(transfer.kind, transfer.stage, transfer.load)

    def times_of(self, transfers: Sequence[Transfer]) -> list[Times]:
        """The times of many transfers, in their order; far cheaper than one by one."""
        alike: dict[tuple[TransferKind, Stage, bool], list[int]] = {}
        for index, each in enumerate(transfers):
            key = each.kind, each.stage, bool((each.load.num_nodes > 1).any())
            alike.setdefault(key, []).append(index)
        found: dict[int, Times] = {}
        for (kind, stage, _), indices in alike.items():
            loads = [transfers[index].load for index in indices]
            ends = np.cumsum([len(load.group_size) for load in loads])
            whole = self._times(kind, stage, _joined(loads))
            for index, begin, end in zip(indices, [0, *ends[:-1]], ends, strict=True):
                found[index] = whole.part(slice(begin, end))
        return [found[index] for index in range(len(transfers))]

    def _times(self, kind: TransferKind, stage: Stage, load: LinkLoad) -> Times:
        carried = np.maximum(load.out_bytes, load.in_bytes)
        if kind is TransferKind.SEND:
            is_sending = carried.sum(axis=0) > 0
            return where(is_sending, self._send(carried), no_time(len(is_sending)))
        in_group = load.group_size > 1
        if not in_group.any():
            return no_time(len(in_group))
        together = self._law_times(
            f"{kind}.all_links", carried.sum(axis=0), load.group_size, load.num_nodes
        )
        if together is None:
            spans = load.num_nodes > 1
            if not spans.any():
                together = self._inside(kind, stage, load, carried)
            elif spans[in_group].all():
                together = self._across(kind, stage, load, carried)
            else:
                inside = self._inside(kind, stage, load, carried)
                across = self._across(kind, stage, load, carried)
                together = where(spans, across, inside)
        return where(in_group, together, no_time(len(in_group)))

    def forwarded(self, between: Transfer, inside: Transfer) -> tuple[Times, Times]:
        """Both hops of a hierarchical dispatch or combine, if forwarding begins as copies arrive.

        Args:
            between: the hop over ranks at the same place of each node.
            inside: the hop inside each node.

        Returns:
            All of the time of `between`; of `inside` what is left exposed: their sum is the whole.
            Where no law of it was measured, or one hop has groups of one, each hop on its own.
        """
        first, second = between.load, inside.load
        name = _DISPATCHING.get(between.stage)
        surface = f"{name}.forwarded.inter_node"
        has_both = np.asarray((first.num_nodes > 1) & (second.group_size > 1))
        apart = self.times(between), self.times(inside)
        if surface not in self._profile.surfaces or not has_both.any():
            return apart
        nic = np.maximum(first.out_bytes, first.in_bytes)[Link.INTER_NODE]
        near = np.maximum(second.out_bytes, second.in_bytes)[Link.INTRA_NODE]
        rate = term_of(self._profile, f"forwarding_bytes_per_s.{name}")
        share = 0.0 if rate is None else self._profile.link_rate(Link.INTER_NODE) / rate.value
        whole = self._law_times(
            surface, np.maximum(nic, near * share), first.group_size, first.num_nodes
        )
        alone = self._law_times(surface, nic, first.group_size, first.num_nodes)
        if whole is None or alone is None:
            return apart
        low, likely, high = np.maximum(whole.bounds - alone.bounds, 0)
        bounds = np.array([np.minimum(low, likely), likely, np.maximum(high, likely)])
        rest = replace(whole, bounds=bounds)
        return where(has_both, alone, apart[0]), where(has_both, rest, apart[1])

    def hand_over(self, hand_over: HandOver) -> Times:
        """Seconds of every rank's message to the next pipeline stage; 0 where it has none."""
        sent = hand_over.sent_bytes.astype(np.float64)
        carried = np.where([~hand_over.is_remote, hand_over.is_remote], sent, 0.0)
        return where(sent > 0, self._send(carried), no_time(len(sent)))

    def kv_transfer(self, sent_bytes: Floats, received_bytes: Floats, remote: bool = True) -> Times:
        """Keys and values from one pool's ranks to another's, all at once, as one message each.

        Args:
            sent_bytes: [ranks that have prefilled].
            received_bytes: [ranks that will decode].
            remote: over NICs; else over NVLink.

        Returns:
            [1]; the busiest rank's.
        """
        carried = np.zeros((len(Link), 1))
        link = Link.INTER_NODE if remote else Link.INTRA_NODE
        carried[link] = max(sent_bytes.max(initial=0), received_bytes.max(initial=0))
        return where(carried.sum(axis=0) > 0, self._send(carried), no_time(1))

    def contention(self, transfer: Transfer, num_ranks: int) -> Floats | float:
        """Share by which compute slows beside the transfer: [A], or one number for all.

        Low-latency kernels, of all-to-alls over nodes among all ranks of a stage, have their own.

        Args:
            num_ranks: ranks of the stage.
        """
        plain = self._contention(transfer.kind)
        name = f"{_DISPATCHING.get(transfer.stage)}.low_latency.inter_node"
        law, load = self._profile.surfaces.get(name), transfer.load
        if transfer.kind is not TransferKind.ALL_TO_ALL or law is None:
            return plain
        if not ((load.num_nodes > 1).any() and (load.group_size == num_ranks).all()):
            return plain
        nic = np.maximum(load.out_bytes, load.in_bytes)[Link.INTER_NODE]
        is_low_latency = nic <= law.axes["bytes"][-1]
        return np.where(is_low_latency, self._contention("low_latency"), plain)

    def _contention(self, name: str) -> float:
        term = term_of(self._profile, f"contention.{name}")
        assert term is not None
        return term.value

    def _inside(self, kind: TransferKind, stage: Stage, load: LinkLoad, carried: Floats) -> Times:
        """Groups inside one node."""
        names = [f"{kind}.intra_node", *(f"{kind}.{each}.intra_node" for each in _OF_ENGINES)]
        if kind is TransferKind.ALL_TO_ALL and stage in _DISPATCHING:
            name = _DISPATCHING[stage]
            names += [f"{name}.{variant}.intra_node" for variant in _INSIDE_NODES]
        near = carried[Link.INTRA_NODE]
        found = [self._law_times(name, near, load.group_size, load.num_nodes) for name in names]
        known = [each for each in found if each is not None]
        if not known:
            peers = load.num_peers[Link.INTRA_NODE].astype(np.float64)
            return bound_times(
                self._profile, "collective.intra_node", carried, peers, np.ones_like(peers)
            )
        fastest = known[0]
        for other in known[1:]:
            fastest = where(other.seconds < fastest.seconds, other, fastest)
        return fastest

    def _across(self, kind: TransferKind, stage: Stage, load: LinkLoad, carried: Floats) -> Times:
        """Groups that span nodes."""
        if kind is not TransferKind.ALL_TO_ALL:
            carried = _over_all_nics(carried, load)
        law = f"{kind}.inter_node"
        if kind is TransferKind.ALL_TO_ALL and stage in _DISPATCHING:
            law = f"{_DISPATCHING[stage]}.low_latency.inter_node"
        nic, near = carried[Link.INTER_NODE], carried[Link.INTRA_NODE]
        over_nics = self._law_times(law, nic, load.group_size, load.num_nodes)
        if over_nics is None:
            return bound_times(
                self._profile,
                "collective.inter_node",
                carried,
                (load.group_size - 1).astype(np.float64),
                load.num_nodes.astype(np.float64),
            )
        inside = self._law_times(
            law.replace("inter_node", "intra_node"),
            near,
            load.num_peers[Link.INTRA_NODE] + 1,
            np.ones_like(load.num_nodes),
        )
        if inside is None:
            return over_nics
        return where((inside.seconds > over_nics.seconds) & (near > 0), inside, over_nics)

    def _send(self, carried: Floats) -> Times:
        """Times of point-to-point messages; `carried`: [2, R] by link."""
        ranks = np.full(carried.shape[1], 2)
        found = []
        for link, stand_in in ((Link.INTRA_NODE, "all_to_all"), (Link.INTER_NODE, None)):
            suffix = link.name.lower()
            names = ["send.all_links", f"send.{suffix}"]
            names += [f"{stand_in}.{suffix}"] if stand_in else []
            known = (self._law_times(name, carried[link], ranks, ranks) for name in names)
            times = next((each for each in known if each is not None), None)
            if times is None:
                only = np.zeros_like(carried)
                only[link] = carried[link]
                ones = np.ones(carried.shape[1])
                times = bound_times(self._profile, f"send.{suffix}", only, ones, ones)
            found.append(times)
        over_nic = found[1].seconds * (carried[Link.INTER_NODE] > 0)
        inside = found[0].seconds * (carried[Link.INTRA_NODE] > 0)
        return where(over_nic > inside, found[1], found[0])


def roofline_s(
    profile: Profile,
    name: str,
    link: Link,
    link_bytes: Floats,
    ranks: Floats,
    nodes: Floats,
) -> Floats:
    """[R]; a law's floor plus bytes over the link's bandwidth."""
    terms = profile.terms
    seconds = link_bytes / profile.link_rate(link)
    for quantity, amount in (
        ("floor_s", 1),
        ("floor_per_peer_s", ranks - 1),
        ("floor_per_doubling_s", np.log2(nodes)),
    ):
        term = terms.get(f"{quantity}.{name}")
        if term is not None:
            seconds = seconds + term.value * amount
    return seconds


def law_times(
    profile: Profile,
    name: str,
    link_bytes: Floats,
    ranks: Ints | Floats,
    nodes: Ints | Floats,
) -> Times | None:
    """[R]; the times of one surface; None where the profile has no such."""
    surface = profile.surfaces.get(name)
    if surface is None:
        return None
    link = Link.INTER_NODE if name.endswith("inter_node") else Link.INTRA_NODE
    link_bytes = np.maximum(link_bytes, surface.axes["bytes"][0])
    at = {
        "bytes": link_bytes,
        "ranks": np.maximum(ranks, 2).astype(np.float64),  # groups of one take no time anyhow
        "nodes": np.maximum(nodes, 1).astype(np.float64),
    }
    roofline = roofline_s(profile, name, link, link_bytes, at["ranks"], at["nodes"])
    times = surface.times(roofline, at)
    if ".forwarded." in name and "nodes" in surface.axes:
        # Twice the nodes fitted took 1.5 to 1.6 times as long as said (docs/validation.md).
        beyond = np.maximum(np.log2(at["nodes"] / surface.axes["nodes"][-1]), 0)
        high = times.high * _WIDER_FOR_TWICE_THE_NODES**beyond
        times = replace(times, bounds=np.array([times.low, times.seconds, high]))
    return times


def _over_all_nics(carried: Floats, load: LinkLoad) -> Floats:
    """[2, R]; each rank's NIC brings its share of the far data, and it is passed on in the node."""
    num_near = load.num_peers[Link.INTRA_NODE] + 1
    nic = carried[Link.INTER_NODE] / num_near
    return np.stack([carried[Link.INTRA_NODE] + nic * (num_near - 1), nic])


def _joined(loads: Sequence[LinkLoad]) -> LinkLoad:
    """Loads of several transfers as one, ranks after ranks."""
    parts = ([getattr(load, each.name) for load in loads] for each in fields(LinkLoad))
    return LinkLoad(*(np.concatenate(part, axis=-1) for part in parts))
