"""Every dispatch form computes the same sums, whoever holds the experts; and sends what it says."""

import numpy as np
import pytest

from engine.moe.test_dispatch import ROW_BYTES, A, B, C, D, own, run
from expertlane.balance.placement import Placement
from expertlane.spec.deployment import DISPATCH_FORMS
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link, Traffic
from records import sent_over

pytestmark = pytest.mark.numerical

FORMS = tuple(DISPATCH_FORMS)


def expected(inputs):
    """Expert e multiplies by e + 1."""
    return [(w * (ids + 1)).sum(axis=1)[:, None] * x for x, ids, w in inputs]


def random_inputs(rng, num_ranks, num_experts, top_k, most_tokens):
    """Some ranks have no token."""
    inputs = []
    for _ in range(num_ranks):
        num_tokens = int(rng.integers(0, most_tokens + 1)) * int(rng.random() > 0.2)
        ids = np.array(
            [rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)], dtype=np.int64
        ).reshape(num_tokens, top_k)
        weights = rng.random((num_tokens, top_k)).astype(np.float32)
        inputs.append((rng.standard_normal((num_tokens, 4)).astype(np.float32), ids, weights))
    return inputs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("layout", "ranks_per_node"),
    [
        ("dp=2,ep=2", 1),
        ("dp=4,ep=4", 2),
        ("dp=4,ep=4", 4),
        ("dp=2,tp=2,ep=4", 2),
        ("dp=2,tp=2,ep=2", 2),
        ("dp=2,tp=2,ep=2", 1),
        ("dp=4,ep=2", 1),
    ],
)
@pytest.mark.parametrize("placed", ["linear", "round_robin", "copies"])
def test_all_forms_give_the_same_sums(pools, form, layout, ranks_per_node, placed):
    ep = Layout.parse(layout).ep
    placement = {
        "linear": Placement.linear(5, ep),
        "round_robin": Placement.round_robin(5, ep),
        "copies": Placement.round_robin(5, ep, 3),
    }[placed]
    rng = np.random.default_rng(ranks_per_node)
    inputs = random_inputs(rng, Layout.parse(layout).world_size, 5, 3, 6)
    results = run(pools, layout, 5, inputs, ranks_per_node, form=form, placed=placement)
    for result, wanted in zip(results, expected(inputs), strict=True):
        np.testing.assert_allclose(result.combined, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_more_ranks_than_experts(pools, form):
    inputs = random_inputs(np.random.default_rng(0), 4, 3, 2, 4)
    for result, wanted in zip(
        run(pools, "dp=4,ep=4", 3, inputs, 2, form=form), expected(inputs), strict=True
    ):
        np.testing.assert_allclose(result.combined, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_no_token_and_one_token(pools, form):
    for result in run(pools, "dp=4,ep=4", 4, [own()] * 4, 2, form=form):
        assert result.combined.shape == (0, 2)
    one = [own(), own([A], [[0, 3]]), own(), own()]
    results = run(pools, "dp=4,ep=4", 4, one, 2, form=form)
    assert results[1].combined.tolist() == [[2.5, 25]]


def test_hierarchy_by_hand(pools):
    # Ranks 0 and 1 are a node, 2 and 3 the other; expert e is on rank e.
    inputs = [
        own([A, B], [[2, 3], [0, 1]]),  # a crosses once for two experts, b stays in its node
        own([C], [[3, 0]]),
        own(),
        own([D], [[2, 1]]),
    ]
    results = run(pools, "dp=4,ep=4", 4, inputs, 2, form="hierarchical")
    assert [r.rows.tolist() for r in results] == [[B, C], [B, D], [A, D], [A, C]]
    across = [sent_over(r.dispatch, Traffic.PAYLOAD, Link.INTER_NODE, 2) for r in results]
    assert across == [ROW_BYTES, ROW_BYTES, 0, ROW_BYTES]
    # Back: a's two experts are summed at rank 2, so one row crosses; c's comes from 3, d's from 1.
    back = [sent_over(r.combine, Traffic.PAYLOAD, Link.INTER_NODE, 2) for r in results]
    assert back == [0, ROW_BYTES, ROW_BYTES, ROW_BYTES]
    for result, wanted in zip(results, expected(inputs), strict=True):
        np.testing.assert_allclose(result.combined, wanted)


@pytest.mark.parametrize("num_nodes", [2, 4])
def test_bytes_between_nodes_are_counted_to_the_byte(pools, num_nodes):
    num_ranks, top_k, num_experts = 8, 4, 32
    per_node = num_ranks // num_nodes
    rng = np.random.default_rng(num_nodes)
    inputs = random_inputs(rng, num_ranks, num_experts, top_k, 40)
    rank_of = np.arange(num_experts) // (num_experts // num_ranks)
    remote_ranks = remote_nodes = 0
    for source, (_, ids, _) in enumerate(inputs):
        for token in ids:
            ranks = set(rank_of[token].tolist())
            remote = {rank for rank in ranks if rank // per_node != source // per_node}
            remote_ranks += len(remote)
            remote_nodes += len({rank // per_node for rank in remote})
    assert remote_nodes < remote_ranks
    row = 4 * 4  # hidden states of four float32
    for form, copies in (("all_to_all", remote_ranks), ("hierarchical", remote_nodes)):
        results = run(pools, "dp=8,ep=8", num_experts, inputs, per_node, form=form)
        dispatched = [
            sent_over(r.dispatch, Traffic.PAYLOAD, Link.INTER_NODE, per_node) for r in results
        ]
        assert sum(dispatched) == copies * row
        assert all(
            sent_over(r.dispatch, Traffic.PADDING, Link.INTER_NODE, per_node) == 0 for r in results
        )
        records = [result.dispatch for result in results]
        assert sum(record.num_remote_rank_copies for record in records) == remote_ranks
        assert sum(record.num_remote_node_copies for record in records) == remote_nodes
        if form == "hierarchical":  # partial sums: one row a node on the way back too
            back = [
                sent_over(r.combine, Traffic.PAYLOAD, Link.INTER_NODE, per_node) for r in results
            ]
            assert sum(back) == copies * row


def test_a_copy_on_the_rank_itself_comes_first_then_one_on_its_node(pools):
    # Expert 0 on ranks 0 and 2, expert 1 on 1 and 3: nobody needs the other node.
    placed = Placement(2, ((0,), (1,), (0,), (1,)))
    inputs = [own([A], [[0, 1]]) for _ in range(4)]
    for result in run(pools, "dp=4,ep=4", 2, inputs, 2, placed=placed):
        assert sent_over(result.dispatch, Traffic.PAYLOAD, Link.INTER_NODE, 2) == 0
        assert sent_over(result.dispatch, Traffic.PAYLOAD, Link.INTRA_NODE, 2) == ROW_BYTES
        assert sum(result.num_tokens_per_expert) == 2


def test_pairs_without_a_near_copy_are_shared_out(pools):
    # Four tokens of rank 0 for expert 1, which only ranks 2 and 3 of the other node hold.
    placed = Placement(2, ((0,), (0,), (1,), (1,)))
    inputs = [own([A, B, C, D], [[1]] * 4, top_k=1), own(top_k=1), own(top_k=1), own(top_k=1)]
    results = run(pools, "dp=4,ep=4", 2, inputs, 2, placed=placed)
    assert [result.num_tokens_per_expert for result in results] == [[0], [0], [2], [2]]
    assert [result.rows.tolist() for result in results[2:]] == [[A, C], [B, D]]
