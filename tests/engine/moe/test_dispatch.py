"""Tokens to experts and back, written out by hand; expert e multiplies by e + 1."""

import numpy as np
import pytest

from distributed.on_ranks import DispatchAndCombine
from expertlane.balance.placement import Placement
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link, Stage, Traffic
from records import sent_over as sent

pytestmark = pytest.mark.numerical

A, B, C, D = [1, 10], [2, 20], [3, 30], [4, 40]  # hidden states of some tokens
ROW_BYTES = 8  # two float32


def own(tokens=(), topk_ids=(), topk_weights=None, *, top_k=2):
    """What one rank brings in; equal weights by default."""
    ids = np.array(topk_ids, dtype=np.int64).reshape(-1, top_k)
    weights = np.full(ids.shape, 1 / top_k) if topk_weights is None else np.array(topk_weights)
    return np.array(tokens, dtype=np.float32).reshape(-1, 2), ids, weights.astype(np.float32)


def run(
    pools,
    layout,
    num_experts,
    inputs,
    ranks_per_node=8,
    *,
    form="all_to_all",
    placed=None,
    payload="model",
):
    layout = Layout.parse(layout)
    pool = pools.pool(layout.world_size)
    placement = placed or Placement.linear(num_experts, layout.ep)
    command = DispatchAndCombine(layout, ranks_per_node, placement, form, inputs, payload)
    results = pool.call(command)
    return results[: layout.world_size]


def test_two_ranks_with_two_experts_each(pools):
    inputs = [
        own([A, B], [[0, 2], [3, 2]], [[0.75, 0.25], [0.5, 0.5]]),
        own([C], [[1, 0]], [[0.25, 0.75]]),
    ]
    zero, one = run(pools, "dp=2,ep=2", 4, inputs)
    # Grouped by expert, in order of arrival: by rank, then token.
    assert zero.rows.tolist() == [A, C, C]
    assert zero.num_tokens_per_expert == [2, 1]
    assert one.rows.tolist() == [A, B, B]
    assert one.num_tokens_per_expert == [2, 1]
    # a: .75 × 1 + .25 × 3; b: .5 × 4 + .5 × 3; c: .25 × 2 + .75 × 1.
    assert zero.combined.tolist() == [[1.5, 15], [7, 70]]
    assert one.combined.tolist() == [[3.75, 37.5]]


def test_bytes_of_two_ranks_by_hand(pools):
    inputs = [own([A, B], [[0, 2], [3, 2]]), own([C], [[1, 0]])]
    zero, one = run(pools, "dp=2,ep=2", 4, inputs)
    # a and b go to rank 1 once each, c to rank 0 once, though it has two experts there.
    assert sent(zero.dispatch, Traffic.PAYLOAD) == 2 * ROW_BYTES
    assert sent(one.dispatch, Traffic.PAYLOAD) == 1 * ROW_BYTES
    # Counts for 2 ranks of rows and of pairs, 8 bytes each; 2 expert ids of 4 bytes a row.
    assert sent(zero.dispatch, Traffic.METADATA) == 2 * 2 * 8 + 2 * 2 * 4
    assert sent(one.dispatch, Traffic.METADATA) == 2 * 2 * 8 + 1 * 2 * 4
    # Back comes a row for every pair: two of c from rank 0; one of a and two of b from rank 1.
    assert sent(zero.combine, Traffic.PAYLOAD) == 2 * ROW_BYTES
    assert sent(one.combine, Traffic.PAYLOAD) == 3 * ROW_BYTES
    for result in (zero, one):
        assert sent(result.combine, Traffic.METADATA) == 0
        assert result.dispatch.num_collectives[Stage.DISPATCH] == 2
        assert result.combine.num_collectives[Stage.COMBINE] == 1


def test_bytes_between_nodes_by_hand(pools):
    # Four ranks, one expert each, two ranks a node: every token goes to the other node.
    inputs = [own([A], [[(rank + 2) % 4]], top_k=1) for rank in range(4)]
    for rank, result in enumerate(run(pools, "dp=4,ep=4", 4, inputs, ranks_per_node=2)):
        assert sent(result.dispatch, Traffic.PAYLOAD, Link.INTRA_NODE, 2) == 0
        assert sent(result.dispatch, Traffic.PAYLOAD, Link.INTER_NODE, 2) == ROW_BYTES
        counts = 4 * 2 * 8  # to every other rank
        assert sent(result.dispatch, Traffic.METADATA, Link.INTRA_NODE, 2) == counts
        assert sent(result.dispatch, Traffic.METADATA, Link.INTER_NODE, 2) == 2 * counts + 4
        assert sent(result.combine, Traffic.PAYLOAD, Link.INTER_NODE, 2) == ROW_BYTES
        factor = (rank + 2) % 4 + 1
        assert result.combined.tolist() == [[1 * factor, 10 * factor]]


def test_experts_spread_and_cut(pools):
    # Ranks 0 and 1 hold halves of expert 0, ranks 2 and 3 halves of expert 1.
    inputs = [
        own([A], [[1]], top_k=1),
        own([B], [[0]], top_k=1),
        own(top_k=1),
        own([C, D], [[0], [1]], top_k=1),
    ]
    results = run(pools, "dp=2,tp=2,ep=2", 2, inputs)
    # Gathered over the ranks of a group: what rank 1 took in stands behind what rank 0 took in.
    assert [result.rows.tolist() for result in results] == [[B, C], [B, C], [A, D], [A, D]]
    combined = [result.combined.tolist() for result in results]
    assert combined == [[[2, 20]], [[2, 20]], [], [[3, 30], [8, 80]]]
    # Rank 0 sends a to rank 2 (its own half's place), which gathers it to rank 3.
    assert [sent(r.dispatch, Traffic.PAYLOAD) for r in results] == [8, 16, 8, 16]
