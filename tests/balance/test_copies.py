"""The definitions of an expert's copy for a pair, by hand, and what computes it held to them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.balance.copies import CopyChoice
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


def choice_of(placement, mesh):
    return CopyChoice(placement, mesh.ep_rank, mesh.nodes_of_ep_group)


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
