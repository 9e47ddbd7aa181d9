"""Placements for another layout in which ranks keep the experts that they hold."""

from collections.abc import Sequence

import numpy as np

from expertlane.balance.placement import Placement
from expertlane.balance.placement_file import Placements
from expertlane.spec.layout import Layout, Members


def keeping_placements(
    wanted: Placements, layout: Layout, before: Placements, members: Members
) -> Placements:
    """`keeping` of each layer, by the ranks of the first replica.

    Args:
        wanted, before: [num_hidden_layers].
        layout: the new layout, where rank r is process r.
        members: members of the layout before.
    """
    now, num_layers = members.layout, len(wanted)
    if layout.etp != now.etp:  # no rank has the part of an expert that it needs
        return wanted
    found: list[Placement | None] = []
    for layer, (placement, old) in enumerate(zip(wanted, before, strict=True)):
        if placement is None or old is None:
            found.append(placement)
            continue
        held: list[Sequence[int]] = [()] * placement.ep
        for process in layout.ranks_of_replica(0):
            at, rank = layout.coordinates(process), members.rank_of(process)
            if rank is None or layer not in layout.layers_of_stage(num_layers, at.pp_rank):
                continue
            was = now.coordinates(rank)
            has_layer = layer in now.layers_of_stage(num_layers, was.pp_rank)
            if has_layer and at.etp_rank == was.etp_rank == 0:
                held[at.ep_rank] = old.experts_of_rank[was.ep_rank]
        found.append(keeping(placement, held))
    return tuple(found)


def keeping(wanted: Placement, held: Sequence[Sequence[int]]) -> Placement:
    """A placement with the same numbers of slots and copies, in which ranks keep what they can.

    What no rank keeps goes where there is room, in order. The wanted one where copies of an expert
    would meet on a rank.

    Args:
        held: [ep]; experts that each rank has now, in order; none of a new one.
    """
    num_left = np.bincount(np.concatenate(wanted.experts_of_rank), minlength=wanted.num_experts)
    room = [len(experts) for experts in wanted.experts_of_rank]
    kept: list[list[int]] = [[] for _ in room]
    for own, has, num in zip(kept, held, room, strict=True):
        for expert in has:
            if num_left[expert] and len(own) < num:
                own.append(expert)
                num_left[expert] -= 1
    # The most numerous first: they have the fewest ranks left.
    for expert in np.argsort(-num_left, kind="stable").tolist():
        free = [r for r, own in enumerate(kept) if len(own) < room[r] and expert not in own]
        free.sort(key=lambda rank: len(kept[rank]) - room[rank])
        if len(free) < num_left[expert]:
            return wanted
        for rank in free[: num_left[expert]]:
            kept[rank].append(expert)
    return Placement(wanted.num_experts, tuple(tuple(sorted(own)) for own in kept))
