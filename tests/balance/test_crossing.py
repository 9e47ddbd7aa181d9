import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.balance.placement import Placement
from expertlane.balance.planner import plan_placement
from expertlane.balance.trace import coactivation, cross_node_copies


def crossings(ids, source, placement, ranks_per_node=1):
    return cross_node_copies(np.array(ids), placement, ranks_per_node, np.array(source))


def test_copies_take_turns():
    placement = Placement(2, ((0,), (0,), (1,)))
    ids = [[0, 1]] * 4  # from node 2 to nodes 0, 1, 0, 1
    assert crossings(ids, [2] * 4, placement) == 4
    placement = Placement(3, ((0,), (0, 1), (2,)))
    # 1 is on node 1; 0 goes to node 0, then 1: two nodes, then one.
    assert crossings([[0, 1]], [2], placement) == 2
    assert crossings([[0, 1]] * 2, [2, 2], placement) == 3


def by_token(ids, placement, ranks_per_node, source_node):
    """The rule token by token."""
    turns = [0] * placement.num_experts
    holders = placement.ranks_of_experts()
    total = 0
    for experts, node in zip(ids, source_node, strict=True):
        nodes = set()
        for expert in experts:
            of = [rank // ranks_per_node for rank in holders[expert]]
            if node not in of:
                nodes.add(of[turns[expert] % len(of)])
                turns[expert] += 1
        total += len(nodes)
    return total


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_as_token_by_token(num_experts, num_nodes, ranks_per_node, seed):
    rng = np.random.default_rng(seed)
    ep = num_nodes * ranks_per_node
    top_k = int(rng.integers(1, num_experts + 1))
    ids = np.array([rng.permutation(num_experts)[:top_k] for _ in range(20)])
    num_redundant = int(rng.integers(0, num_experts * (ep - 1) + 1))
    load = np.bincount(ids.ravel(), minlength=num_experts)[None]
    (placement,) = plan_placement(load, ep, ranks_per_node, num_redundant)
    source = rng.integers(num_nodes, size=20)
    assert cross_node_copies(ids, placement, ranks_per_node, source) == by_token(
        ids, placement, ranks_per_node, source
    )


def test_coactivation_by_hand():
    ids = np.array([[0, 1], [1, 0], [2, 0]], dtype=np.int16)
    np.testing.assert_array_equal(coactivation(ids, 3), [[0, 2, 1], [2, 0, 0], [1, 0, 0]])
    assert not coactivation(ids[:0], 3).any()
