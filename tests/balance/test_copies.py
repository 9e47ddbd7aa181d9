"""The definitions of an expert's copy for a pair, by hand, and what computes it held to them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from expertlane.balance.copies import BalancedCopies, CopyChoice
from expertlane.balance.placement import Placement
from expertlane.cost.step.counts import StageMesh, count_dispatch
from expertlane.engine.comm.mesh import Meshes, ParallelMesh
from expertlane.engine.moe.dispatch import CopyChooser
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.spec.layout import Layout

# Torch, and our own kernels where they are available.
BACKENDS = [TorchBackend(), backend_for(torch.device("cpu"))]
NAMES = [type(ops).__name__ for ops in BACKENDS]


class NoGroups(Meshes):
    """For ranks that are built and never talk."""

    def link(self, ranks):
        return None


@st.composite
def stages(draw):
    """A placement with copies on a stage, and tokens of its ranks; none at all among them."""
    ep, etp = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    layout = Layout(dp=ep * etp, ep=ep)
    num_experts = draw(st.integers(2, 10))
    most = num_experts * ep - max(num_experts, ep)
    make = draw(st.sampled_from([Placement.linear, Placement.round_robin]))
    placement = make(num_experts, ep, draw(st.integers(0, most)) if num_experts >= ep else 0)
    top_k = draw(st.integers(1, min(4, num_experts)))
    owned = np.array(draw(st.lists(st.integers(0, 9), min_size=ep * etp, max_size=ep * etp)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    scores = rng.random((int(owned.sum()), num_experts))
    topk_ids = np.argsort(scores, axis=1)[:, :top_k]
    return layout, draw(st.integers(1, 4)), placement, owned, topk_ids


def choice_of(placement, mesh, kind=CopyChoice):
    return kind(placement, mesh.ep_rank, mesh.nodes_of_ep_group)


def chosen_by_ranks(ops, layout, ranks_per_node, placement, owned, topk_ids):
    """[T, K]; the ep ranks that the engine's ranks choose, each for its own tokens."""
    chosen = []
    for rank, ids in enumerate(np.split(topk_ids, np.cumsum(owned)[:-1])):
        recorder = SimpleNamespace(is_recording=False)
        mesh = ParallelMesh(layout, NoGroups(), rank, ranks_per_node, recorder)
        choice = CopyChooser(mesh, placement, torch.device("cpu"))
        choice.ops = ops
        physical = choice.physical_ids(torch.from_numpy(np.ascontiguousarray(ids)))
        chosen.append(physical.numpy() // choice.num_slots)
        held = placement.slots()[chosen[-1], ids]
        np.testing.assert_array_equal(physical.numpy() % choice.num_slots, held)
    return np.concatenate(chosen)


@pytest.mark.parametrize("ops", BACKENDS, ids=NAMES)
@settings(max_examples=100, deadline=None)
@given(stage=stages())
def test_the_engine_chooses_the_same_copies(ops, stage):
    layout, ranks_per_node, placement, owned, topk_ids = stage
    mesh = StageMesh.of(layout, 0, 0, ranks_per_node)
    rank = np.arange(mesh.size).repeat(owned)
    expected = choice_of(placement, mesh).ep_ranks(topk_ids, rank)
    np.testing.assert_array_equal(chosen_by_ranks(ops, *stage), expected)


@pytest.mark.parametrize("ops", BACKENDS, ids=NAMES)
@pytest.mark.parametrize(
    ("placement", "owned", "topk_ids", "expected"),
    [
        pytest.param(Placement.linear(4, 4, 4), [0] * 4, np.empty((0, 2)), [], id="no token"),
        pytest.param(Placement.linear(4, 4), [0, 1, 0, 0], [[2, 0]], [[2, 0]], id="one copy"),
        # Expert 0 on ranks 0 and 1, expert 1 on 2 and 3: rank 2 begins with the first of the far.
        pytest.param(
            Placement(3, ((0, 2), (0,), (1,), (1,))), [0, 0, 1, 0], [[0, 1]], [[0, 2]], id="one"
        ),
        # Rank 3 begins with the second, and takes turns.
        pytest.param(
            Placement(3, ((0, 2), (0,), (1,), (1,))),
            [0, 0, 0, 3],
            [[0], [0], [0]],
            [[1], [0], [1]],
            id="turns",
        ),
        # Two copies on the node of ranks 0 and 1, one of them rank 1's own; a third is far away.
        pytest.param(
            Placement(2, ((0,), (0,), (0, 1), (1,))),
            [1, 1, 0, 1],
            [[0], [0], [0]],
            [[0], [1], [2]],
            id="own, then near",
        ),
    ],
)
def test_by_hand_and_by_the_engine(ops, placement, owned, topk_ids, expected):
    layout, owned = Layout(dp=4, ep=4), np.array(owned)
    topk_ids = np.asarray(topk_ids, dtype=np.int64)
    mesh = StageMesh.of(layout, 0, 0, ranks_per_node=2)
    chosen = choice_of(placement, mesh).ep_ranks(topk_ids, np.arange(4).repeat(owned))
    assert chosen.tolist() == expected
    found = chosen_by_ranks(ops, layout, 2, placement, owned, topk_ids)
    np.testing.assert_array_equal(found, chosen)


@settings(max_examples=100, deadline=None)
@given(stages())
def test_counts_are_those_of_the_copies_chosen(stage):
    layout, ranks_per_node, placement, owned, topk_ids = stage
    mesh = StageMesh.of(layout, 0, 0, ranks_per_node)
    choice, rank = choice_of(placement, mesh), np.arange(mesh.size).repeat(owned)
    chosen = choice.ep_ranks(topk_ids, rank)
    counts = count_dispatch(topk_ids, owned, choice, mesh, fan_out=True)
    for place in range(mesh.size):
        ids = torch.from_numpy(chosen[rank == place].astype(np.int32))
        rows = BACKENDS[0].rows_by_peer(ids, 1, layout.ep).counts
        np.testing.assert_array_equal(counts.rows_to[place], rows)
    assert counts.pairs_of_ep_rank.sum() == counts.num_tokens_per_expert.sum() == topk_ids.size
    np.testing.assert_array_equal(
        counts.num_tokens_per_expert.sum(axis=0),
        np.bincount(topk_ids.ravel(), minlength=placement.num_experts),
    )
    held = placement.slots() >= 0
    assert not counts.num_tokens_per_expert[~held].any()


class Recorder:
    is_recording = False

    def count_copies(self, num_saved, seconds):
        self.num_saved = num_saved


def least_fullest(counts, placement):
    """The optimum of the linear program: the fullest rank's pairs, as a real number.

    Args:
        counts: [num_experts]; pairs.
    """
    held = np.argwhere(placement.slots().T >= 0)  # expert, rank
    num = len(held)
    of_expert = np.zeros((placement.num_experts, num + 1))
    of_expert[held[:, 0], np.arange(num)] = 1.0
    of_rank = np.zeros((placement.ep, num + 1))
    of_rank[held[:, 1], np.arange(num)] = 1.0
    of_rank[:, -1] = -1.0
    cost = np.zeros(num + 1)
    cost[-1] = 1.0
    done = linprog(
        cost, A_ub=of_rank, b_ub=np.zeros(placement.ep), A_eq=of_expert, b_eq=counts, method="highs"
    )
    assert done.success
    return done.fun


@settings(max_examples=150, deadline=None)
@given(stage=stages())
def test_the_fullest_rank_has_what_the_linear_program_says(stage):
    layout, ranks_per_node, placement, owned, topk_ids = stage
    mesh = StageMesh.of(layout, 0, 0, ranks_per_node)
    rank = np.arange(mesh.size).repeat(owned)
    choice = choice_of(placement, mesh, BalancedCopies)
    chosen, num_saved = choice.shared_out(topk_ids, rank)
    assert (placement.slots()[chosen, topk_ids] >= 0).all()
    loads = np.bincount(chosen.ravel(), minlength=layout.ep)
    nearest = choice_of(placement, mesh).ep_ranks(topk_ids, rank)
    before = np.bincount(nearest.ravel(), minlength=layout.ep).max()
    assert num_saved == before - loads.max() >= 0
    counts = np.bincount(topk_ids.ravel(), minlength=placement.num_experts)
    assert loads.max() == np.ceil(least_fullest(counts, placement) - 1e-6)


@pytest.mark.parametrize("ops", BACKENDS, ids=NAMES)
@settings(max_examples=100, deadline=None)
@given(stage=stages())
def test_the_engine_balances_the_same_copies(ops, stage):
    layout, ranks_per_node, placement, owned, topk_ids = stage
    mesh = StageMesh.of(layout, 0, 0, ranks_per_node)
    choice, rank = choice_of(placement, mesh, BalancedCopies), np.arange(mesh.size).repeat(owned)
    if not choice.is_balanced:
        return
    expected, num_saved = choice.shared_out(topk_ids, rank)
    counts = count_dispatch(topk_ids, owned, choice, mesh)
    ids = torch.from_numpy(topk_ids.astype(np.int32))
    for place in {0, mesh.size - 1}:
        recorder = Recorder()
        chooser = CopyChooser(
            ParallelMesh(layout, NoGroups(), place, ranks_per_node, recorder),
            placement,
            torch.device("cpu"),
        )
        chooser.ops = ops
        physical = chooser.balanced(ids, owned.tolist())
        np.testing.assert_array_equal(physical // chooser.num_slots, expected)
        np.testing.assert_array_equal(
            physical % chooser.num_slots, placement.slots()[expected, topk_ids]
        )
        assert recorder.num_saved == num_saved == counts.num_pairs_saved
        sizes = chooser.num_slots, layout.ep
        found = ops.rows_and_pairs(physical, owned.tolist(), *sizes).numpy()
        np.testing.assert_array_equal(found[:, 0], counts.rows_to)
        np.testing.assert_array_equal(found[:, 1].sum(axis=0), counts.pairs_of_ep_rank)
        own = chooser.own_of(physical, owned.tolist())
        assert ops.leaving(own, *sizes).counts.tolist() == found[place].ravel().tolist()


def large_cases():
    """64 ranks on nodes of 8, 256 experts, power laws; placements with copies at random."""
    for seed, redundant in enumerate((64, 128, 256)):
        rng = np.random.default_rng(seed)
        ranks = np.argsort(rng.random((256, 64)), axis=1)[:, :5]
        held = [[] for _ in range(64)]
        room = (256 + redundant) // 64
        order = [*range(256), *rng.choice(256, redundant).tolist()]
        for expert in order:
            free = [r for r in range(64) if len(held[r]) < room and expert not in held[r]]
            near = [r for r in ranks[expert] if r in free]
            held[near[0] if near else free[0]].append(expert)
        placement = Placement(256, tuple(map(tuple, held)))
        owned = rng.integers(0, 40, 64)
        weights = rng.permutation(np.arange(1, 257.0) ** -0.8)
        scores = np.log(weights) + rng.gumbel(size=(int(owned.sum()), 256))
        yield placement, owned, np.argsort(-scores, axis=1)[:, :8]


def test_large_stages_reach_the_optimum_along_few_paths():
    mesh = StageMesh.of(Layout(dp=64, ep=64), 0, 0, ranks_per_node=8)
    for placement, owned, topk_ids in large_cases():
        choice, rank = choice_of(placement, mesh, BalancedCopies), np.arange(64).repeat(owned)
        chooser = rank[:, None] * 256 + topk_ids
        counts = np.bincount(chooser.ravel(), minlength=64 * 256).reshape(64, 256)
        shares = choice.share(counts)
        assert shares.fullest == shares.least < shares.fullest_before
        assert shares.num_paths < 4 * 64
        assert shares.fullest == np.ceil(least_fullest(counts.sum(axis=0), placement) - 1e-6)
        np.testing.assert_array_equal(
            shares.quotas.sum(axis=2), counts[:, choice.shared], "no pair is lost"
        )
        expected, _ = choice.shared_out(topk_ids, rank)
        held = placement.slots()[choice.holders.T, np.arange(256)].T + 1000 * choice.holders
        physical, _ = BACKENDS[1].balance_copies(
            torch.from_numpy(topk_ids.astype(np.int32)),
            owned.tolist(),
            choice,
            torch.from_numpy(np.ascontiguousarray(held)),
        )
        np.testing.assert_array_equal(physical.numpy() // 1000, expected)


def test_pairs_move_only_where_they_must():
    """Four ranks on two nodes; expert 0 on ranks 0 and 1, expert 2 on 0 and 3; others alone."""
    placement = Placement(4, ((0, 2), (0, 1), (3,), (2,)))
    mesh = StageMesh.of(Layout(dp=4, ep=4), 0, 0, ranks_per_node=2)
    choice = choice_of(placement, mesh, BalancedCopies)
    even = np.array([[0], [1], [3], [2]])  # each rank has one as they come
    assert choice.shared_out(even, np.array([0, 1, 2, 3]))[0].ravel().tolist() == [0, 1, 2, 3]
    # Six pairs of rank 0: all would be its own; two of expert 0 go to its neighbour, two far.
    topk_ids = np.array([[0], [0], [0], [2], [2], [2]])
    chosen, num_saved = choice.shared_out(topk_ids, np.zeros(6, dtype=int))
    assert np.bincount(chosen.ravel(), minlength=4).tolist() == [2, 2, 0, 2]
    assert num_saved == 4
    # A rank from which expert 2 is far either way gives its pairs first: rank 0 keeps its own.
    topk_ids, rank = np.array([[2], [2], [0], [0]]), np.array([0, 1, 0, 0])
    chosen, _ = choice.shared_out(topk_ids, rank)
    assert np.bincount(chosen.ravel(), minlength=4).max() == 2
    assert (chosen[[0, 2, 3]] == 0).sum() >= 1


def test_without_copies_and_without_tokens():
    mesh = StageMesh.of(Layout(dp=2, ep=2), 0, 0, ranks_per_node=2)
    alone = choice_of(Placement.linear(4, 2), mesh, BalancedCopies)
    assert not alone.is_balanced
    assert alone.ep_ranks(np.array([[3]]), np.zeros(1, dtype=int)).tolist() == [[1]]
    none = choice_of(Placement.linear(4, 2, 2), mesh, BalancedCopies)
    assert none.shared_out(np.empty((0, 2), dtype=int), np.empty(0, dtype=int))[1] == 0
