"""The published greedy balancer for expert parallelism, written from its description.

Source: DeepSeek-AI, *Expert Parallelism Load Balancer (EPLB)*, 2025, and the redundant experts of
the *DeepSeek-V3 Technical Report* (section 3.4). Replicas go one by one to the expert with the
most load per copy; packs are filled heaviest first, each item into the least loaded pack that has
room, equal counts. The hierarchical form packs groups of experts to nodes, then replicates inside
each node, then packs to its ranks. Two copies of an expert may land on one rank.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def balanced_packing(weights: Floats, num_packs: int) -> list[list[int]]:
    """[num_packs][items]; equal counts of items, near-equal sums."""
    room = len(weights) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    sums = np.zeros(num_packs)
    full = np.zeros(num_packs, dtype=bool)
    for item in np.argsort(-weights, kind="stable"):
        pack = int(np.where(full, np.inf, sums).argmin())
        packs[pack].append(int(item))
        sums[pack] += weights[item]
        full[pack] = len(packs[pack]) == room
    return packs


def replicate(weights: Floats, num_slots: int) -> tuple[list[int], npt.NDArray[np.int64]]:
    """The expert of each physical expert, and the copies of each."""
    copies = np.ones(len(weights), dtype=np.int64)
    experts = list(range(len(weights)))
    for _ in range(num_slots - len(weights)):
        expert = int((weights / copies).argmax())
        experts.append(expert)
        copies[expert] += 1
    return experts, copies


def global_plan(load: Floats, ep: int, num_slots: int) -> list[list[int]]:
    """[ep][slots]; the logical expert in each slot, nodes unseen."""
    experts, copies = replicate(load, num_slots)
    per_slot = (load / copies)[experts]
    return [[experts[slot] for slot in pack] for pack in balanced_packing(per_slot, ep)]


def hierarchical_plan(
    load: Floats, ep: int, num_slots: int, num_groups: int, num_nodes: int
) -> list[list[int]]:
    """[ep][slots]; the logical expert in each slot, groups of experts kept on one node."""
    group_size = len(load) // num_groups
    groups = balanced_packing(load.reshape(num_groups, group_size).sum(axis=1), num_nodes)
    ranks: list[list[int]] = []
    for of_node in groups:
        members = [group * group_size + i for group in of_node for i in range(group_size)]
        inner = global_plan(load[members], ep // num_nodes, num_slots // num_nodes)
        ranks += [[members[expert] for expert in rank] for rank in inner]
    return ranks


def can_run(num_experts: int, ep: int, num_slots: int, num_groups: int, num_nodes: int) -> bool:
    """Whether the hierarchical form has equal counts everywhere (the global form: all ones)."""
    return (
        num_slots % ep == 0
        and ep % num_nodes == 0
        and num_groups % num_nodes == 0
        and num_experts % num_groups == 0
        and num_slots >= num_experts
    )


def sender_max_over_mean(plan: list[list[int]], load: Floats, ranks_per_node: int) -> float:
    """Of rank loads as the engine's senders choose copies, tokens spread evenly over ranks.

    Of two copies on one rank either each takes its turn, or the rank keeps one: the reading that
    is kinder to the plan.
    """
    counts = np.zeros((len(plan) // ranks_per_node, ranks_per_node, len(load)))
    for rank, experts in enumerate(plan):
        np.add.at(counts, (*divmod(rank, ranks_per_node), experts), 1)
    return min(_sender_max_over_mean(each, load) for each in (counts, np.minimum(counts, 1)))


def _sender_max_over_mean(counts: npt.NDArray[np.float64], load: Floats) -> float:
    """`counts`: [num_nodes, ranks_per_node, num_experts]; copies."""
    has_own = counts > 0
    on_node = counts.sum(axis=1, keepdims=True)
    near = (~has_own).sum(axis=1, keepdims=True) / np.maximum(on_node, 1)  # ranks for a copy there
    num_far = (on_node == 0).sum(axis=0, keepdims=True) * counts.shape[1]
    share = has_own + counts * (near + num_far / np.maximum(on_node.sum(axis=0), 1))
    loads = share @ load
    return float(loads.max() / loads.mean()) if loads.mean() else 0.0
