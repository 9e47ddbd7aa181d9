"""Balanced copies: their linear program, what only moves where it must, and our C++ beside them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linprog

from balance.test_copies import BACKENDS, NAMES, NoGroups, stages
from expertlane.balance.copies import CopyChoice
from expertlane.balance.even_copies import BalancedCopies
from expertlane.balance.placement import Placement
from expertlane.cost.step.counts import StageMesh, count_dispatch
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.moe.dispatch import CopyChooser
from expertlane.spec.layout import Layout


class Recorder:
    is_recording = False

    def count_copies(self, num_saved, seconds):
        self.num_saved = num_saved


def balanced(placement, mesh):
    return BalancedCopies(placement, mesh.ep_rank, mesh.nodes_of_ep_group)


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
    choice = balanced(placement, mesh)
    chosen, num_saved = choice.shared_out(topk_ids, rank)
    assert (placement.slots()[chosen, topk_ids] >= 0).all()
    loads = np.bincount(chosen.ravel(), minlength=layout.ep)
    nearest = CopyChoice(placement, mesh.ep_rank, mesh.nodes_of_ep_group).ep_ranks(topk_ids, rank)
    before = np.bincount(nearest.ravel(), minlength=layout.ep).max()
    assert num_saved == before - loads.max() >= 0
    counts = np.bincount(topk_ids.ravel(), minlength=placement.num_experts)
    assert loads.max() == np.ceil(least_fullest(counts, placement) - 1e-6)


@pytest.mark.parametrize("ops", BACKENDS, ids=NAMES)
@settings(max_examples=100, deadline=None)
@given(stage=stages())
def test_the_engine_chooses_the_same_copies(ops, stage):
    layout, ranks_per_node, placement, owned, topk_ids = stage
    mesh = StageMesh.of(layout, 0, 0, ranks_per_node)
    choice, rank = balanced(placement, mesh), np.arange(mesh.size).repeat(owned)
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
        choice, rank = balanced(placement, mesh), np.arange(64).repeat(owned)
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
    choice = balanced(placement, mesh)
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
    alone = balanced(Placement.linear(4, 2), mesh)
    assert not alone.is_balanced
    assert alone.ep_ranks(np.array([[3]]), np.zeros(1, dtype=int)).tolist() == [[1]]
    none = balanced(Placement.linear(4, 2, 2), mesh)
    assert none.shared_out(np.empty((0, 2), dtype=int), np.empty(0, dtype=int))[1] == 0
