"""What a transfer takes where nothing was measured: assumed floors, and shares of the datasheet.

A law is `floor_s + floor_per_peer_s · peers + floor_per_doubling_s · log2(nodes) + bytes over
(bandwidth · efficiency)`. Its numbers are terms named `<quantity>.<law>`, for the laws `collective`
and `send`, `intra_node` and `inter_node`; a profile may give better ones.
"""

import numpy as np

from expertlane.cost.laws.profile import Profile, Term
from expertlane.cost.laws.times import Basis, Times
from expertlane.cost.step.operation import Floats
from expertlane.spec.names import Link


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
    """A law's seconds, as slow as the slower kind of link.

    Args:
        law: `collective.intra_node` and the like; the floor's.
        link_bytes: [2, R]; by `Link`.
        num_peers, num_nodes: [R].
    """
    kind = law.split(".")[0]
    values = []
    for pick, opposite in (("low", "high"), ("value", "value"), ("high", "low")):

        def read(quantity: str, of_law: str, pick: str = pick) -> float:
            term = term_of(profile, f"{quantity}.{of_law}")
            return 0.0 if term is None else float(getattr(term, pick))

        seconds = np.zeros(link_bytes.shape[1])
        for link in Link:
            efficiency = read("efficiency", f"{kind}.{link.name.lower()}", opposite)
            if link_bytes[link].any():
                rate = profile.link_rate(link) * efficiency
                seconds = np.maximum(seconds, link_bytes[link] / rate)
        floor = read("floor_s", law) + read("floor_per_peer_s", law) * num_peers
        doublings = np.log2(np.maximum(num_nodes, 1))
        values.append(seconds + floor + read("floor_per_doubling_s", law) * doublings)
    is_extrapolated = np.zeros(link_bytes.shape[1], dtype=np.bool_)
    return Times(np.array(values), Basis.BOUND, is_extrapolated)
