"""The bookkeeping of dispatch by hand: rows by peer, pairs by expert; every backend alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.bookkeeping import inverse, stable_order
from expertlane.engine.ops.torch_backend import TorchBackend

X = torch.tensor([[1.0, 10], [2, 20], [3, 30]])
TORCH, CHOSEN = TorchBackend(), backend_for(torch.device("cpu"))


@pytest.fixture(params=[TORCH, CHOSEN], ids=lambda backend: type(backend).__name__)
def ops(request):
    return request.param


def ids(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def test_pairs_by_expert(ops):
    pairs = ops.group_pairs(ids([1, -1], [0, 1], [-1, -1]), 0, 1, 3)
    # Expert 0 has row 1; expert 1 has rows 0 and 1; the third has none.
    assert X[pairs.rows].tolist() == [[2, 20], [1, 10], [2, 20]]
    assert pairs.counts.tolist() == [1, 2, 0]
    assert pairs.order.tolist() == [1, 0, 2]
    assert pairs.numbers.tolist() == [[0, -1], [1, 2], [-1, -1]]
    weights = torch.tensor([[0.5, 9], [0.25, 0.75], [9, 9]])
    results = torch.tensor([[1.0, 10], [2, 20], [2, 20]])  # by row, then choice
    assert ops.gather_sum(results, pairs.numbers, weights).tolist() == [[0.5, 5], [2, 20], [0, 0]]
    assert ops.gather_sum(results, pairs.numbers).tolist() == [[1, 10], [4, 40], [0, 0]]


def test_pairs_of_some_experts_only(ops):
    pairs = ops.group_pairs(ids([3, 4], [5, 2], [4, -1], [6, 9]), 4, 1, 2)  # of experts 4 and 5
    assert pairs.counts.tolist() == [2, 1]
    assert pairs.rows.tolist() == [0, 2, 1]
    assert pairs.order.tolist() == [0, 2, 1]
    assert pairs.numbers.tolist() == [[-1, 0], [1, -1], [2, -1], [-1, -1]]


def test_pairs_by_rank(ops):
    pairs = ops.group_pairs(ids([3, 0], [2, 1]), 0, 2, 2)  # two slots a rank
    assert pairs.counts.tolist() == [2, 2]
    assert inverse(pairs.order).view(2, 2).tolist() == [[2, 0], [3, 1]]


@pytest.mark.parametrize("num_rows", [0, 2])
def test_no_pair(ops, num_rows):
    pairs = ops.group_pairs(torch.full((num_rows, 2), -1, dtype=torch.int32), 0, 1, 2)
    rows = X[:num_rows][pairs.rows]
    assert rows.shape == (0, 2)
    assert pairs.counts.tolist() == [0, 0]
    assert ops.gather_sum(rows, pairs.numbers).tolist() == [[0, 0]] * num_rows


def test_room_for_more_pairs_than_there_are(ops):
    """Behind them stand rows that there are, and numbers that no pair has."""
    given = ids([1, -1], [0, 1], [-1, 7])
    exact = ops.group_pairs(given, 0, 1, 3, 3)
    assert exact.order.tolist() == [1, 0, 2]
    more = ops.group_pairs(given, 0, 1, 3, 4)
    assert more.counts.tolist() == [1, 2, 0]
    assert (more.rows.tolist(), more.order.tolist()) == ([1, 0, 1, 0], [1, 0, 2, 3])
    assert more.numbers.tolist() == [[0, -1], [1, 2], [-1, -1]]
    # Room for all: they are numbered through, as where all are pairs.
    every = ops.group_pairs(given, 0, 1, 3, 6)
    assert (every.rows.tolist(), every.order.tolist()) == ([1, 0, 1, 0, 2, 2], [2, 0, 3, 1, 4, 5])
    assert every.numbers.tolist() == [[0, -1], [2, 3], [-1, -1]]
    assert every.ends.tolist() == [1, 3, 3]
    assert every.of_pairs(torch.tensor([5, 6, 7])).tolist()[:3] == [5, 6, 6]


def test_rows_by_peer(ops):
    # Three slots a peer: the first token goes to peer 1 for two of them, the second to both.
    rows = ops.rows_by_peer(ids([5, 3], [4, 0], [1, -1]), 3, 3)
    assert rows.counts.tolist() == [2, 2, 0]
    assert rows.tokens.tolist() == [1, 2, 0, 1]
    assert rows.ids.tolist() == [[-1, 0], [1, -1], [2, 0], [1, -1]]
    assert rows.ids.dtype is torch.int32
    assert rows.places.tolist() == [[-1, 2, -1], [0, 3, -1], [1, -1, -1]]


def test_rows_by_peer_with_padding(ops):
    """Room for all three tokens for each peer, its own first."""
    rows = ops.rows_by_peer(ids([5, 3], [4, 0], [1, -1]), 3, 3, padded=True)
    assert rows.counts.tolist() == [2, 2, 0]
    assert rows.tokens.tolist()[:2] + rows.tokens.tolist()[3:5] == [1, 2, 0, 1]
    assert rows.tokens.max() < 3
    none = [-1, -1]
    there = [[-1, 0], [1, -1], none, [2, 0], [1, -1], none, none, none, none]
    assert rows.ids.tolist() == there
    assert rows.places.tolist() == [[-1, 3, -1], [0, 4, -1], [1, -1, -1]]


def test_how_far_tokens_spread(ops):
    """Two ids a rank; ranks 0 and 2 are a node, ranks 1 and 3 the other."""
    ids = torch.tensor([[0, 1, 4], [2, 3, 7], [0, 2, 6]], dtype=torch.int32)
    nodes = torch.tensor([0, 1, 0, 1])
    ranks, num_nodes, remote_ranks, remote_nodes = ops.fan_out(ids, 2, nodes, 1)
    assert (ranks.tolist(), num_nodes.tolist()) == ([2, 2, 3], [1, 1, 2])
    assert (remote_ranks, remote_nodes) == (3, 2)
    ranks, num_nodes, *remote = ops.fan_out(ids[:0], 2, nodes, 0)
    assert (ranks.tolist(), num_nodes.tolist(), remote) == ([], [], [0, 0])


def test_no_row_for_any_peer(ops):
    for padded in (False, True):
        rows = ops.rows_by_peer(torch.empty(0, 2, dtype=torch.int32), 3, 2, padded=padded)
        assert rows.counts.tolist() == [0, 0]
        shapes = [part.shape for part in (rows.tokens, rows.ids, rows.places)]
        assert shapes == [(0,), (0, 2), (0, 2)]


def test_copies_take_turns(ops):
    # Expert 0 has the physical ids 4, 7 and 9 (the last not to be used), expert 1 only 2.
    table, num_copies = torch.tensor([[4, 7, 9], [2, 2, 2]]), torch.tensor([2, 1])
    topk_ids = torch.tensor([[0, 1], [1, 0], [0, 1]])
    assert ops.choose_copies(topk_ids, table, num_copies, 0).tolist() == [[4, 2], [2, 7], [4, 2]]
    assert ops.choose_copies(topk_ids, table, num_copies, 1).tolist() == [[7, 2], [2, 4], [7, 2]]
    assert ops.choose_copies(topk_ids[:0], table, num_copies, 1).shape == (0, 2)
    none = topk_ids.where(topk_ids == 0, -1)  # of padding
    assert ops.choose_copies(none, table, num_copies, 0).tolist() == [[4, -1], [-1, 7], [4, -1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_ids_of_another_type_are_refused(ops, dtype):
    table, num_copies = torch.tensor([[4, 7], [2, 2]]), torch.tensor([2, 1])
    for num_tokens in (0, 1):
        topk_ids = torch.zeros(num_tokens, 2, dtype=dtype)
        with pytest.raises(AssertionError, match=telling("memory")):
            ops.choose_copies(topk_ids, table, num_copies, 0)


@pytest.mark.parametrize("num_values", [3, 300, 70_000])
def test_orders(num_values):
    values = torch.tensor([2, 0, num_values - 1, 0, 2])
    order = stable_order(values, num_values)
    by_hand = [1, 3, 0, 2, 4] if num_values == 3 else [1, 3, 0, 4, 2]
    assert order.tolist() == by_hand
    assert order[inverse(order)].tolist() == [0, 1, 2, 3, 4]


def test_sums_in_bfloat16_are_those_in_float32(ops):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 32, generator=generator).bfloat16()
    places = torch.tensor([[0, 5, -1], [-1, -1, -1], [3, 3, 1]])
    weights = torch.rand(3, 3, generator=generator)
    ours = ops.gather_sum(values, places, weights)
    assert ours.dtype is torch.bfloat16
    exact = ops.gather_sum(values.float(), places, weights)
    torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=2**-8)
    assert ours[1].abs().max() == 0


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    num_rows=st.integers(0, 9),
    top_k=st.integers(1, 4),
    divisor=st.integers(1, 5),
    num_peers=st.integers(1, 6),
    room=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_backend_does_what_torch_does(num_rows, top_k, divisor, num_peers, room, seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(-1, divisor * num_peers, (num_rows, top_k + 2), generator=generator).int()
    some_ids, first = wide[:, 1:-1], seed % 3
    experts, most_copies = 3, 1 + seed % 4
    table = torch.randint(0, 99, (experts, most_copies), generator=generator)
    num_copies = torch.randint(1, most_copies + 1, (experts,), generator=generator)
    topk_ids = torch.randint(-1, experts, (num_rows, top_k), generator=generator)

    def found(ops):
        rows = ops.rows_by_peer(some_ids, divisor, num_peers)
        pairs = ops.group_pairs(some_ids, first, divisor, max(1, num_peers - 1))
        assert torch.equal(pairs.ends, pairs.counts.cumsum(0))
        num_pairs = min(len(pairs.rows) + room, some_ids.numel())
        more = ops.group_pairs(some_ids, first, divisor, max(1, num_peers - 1), num_pairs)
        assert torch.equal(more.ends, pairs.ends)
        assert sorted(more.order.tolist()) == list(range(num_pairs))
        is_there = more.numbers >= 0
        assert torch.equal(is_there, pairs.numbers >= 0)
        real = len(pairs.rows)
        assert torch.equal(more.rows[:real], pairs.rows)
        number = pairs.numbers[is_there].new_zeros(num_pairs)
        number[more.numbers[is_there]] = pairs.numbers[is_there]
        assert torch.equal(number[more.order[:real]], pairs.order)
        within = table % (divisor * num_peers)
        leaving = ops.outgoing(topk_ids, within, num_copies, first, divisor, num_peers)
        copies = ops.choose_copies(topk_ids, table, num_copies, first)
        padded = ops.rows_by_peer(some_ids, divisor, num_peers, padded=True)
        parts = rows, padded, pairs, more, leaving
        return [*(each for of in parts for each in vars(of).values()), copies]

    for one, other in zip(found(CHOSEN), found(TORCH), strict=True):
        assert torch.equal(one, other)
        assert one.dtype is other.dtype
