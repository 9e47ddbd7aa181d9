"""Copies are chosen, and tokens counted, as the engine's own functions do."""

from functools import partial

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.balance.placement import Placement
from expertlane.cost.step.copies import CopyChoice
from expertlane.cost.step.dispatch_counts import count_dispatch
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.ops.backend import backend_for
from expertlane.spec.layout import Layout

OPS = backend_for(torch.device("cpu"))


@st.composite
def stages(draw):
    """A placement with copies on a stage, and tokens of its ranks."""
    ep, etp = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    layout = Layout(dp=ep * etp, ep=ep)
    first_stage = draw(st.integers(0, 2))
    mesh = StageMesh(layout, first_stage * layout.stage_size, draw(st.integers(1, 4)))
    num_experts = draw(st.integers(2, 10))
    most = num_experts * ep - max(num_experts, ep)
    make = draw(st.sampled_from([Placement.linear, Placement.round_robin]))
    placement = make(num_experts, ep, draw(st.integers(0, most)) if num_experts >= ep else 0)
    top_k = draw(st.integers(1, min(4, num_experts)))
    owned = np.array(draw(st.lists(st.integers(0, 9), min_size=mesh.size, max_size=mesh.size)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    scores = rng.random((int(owned.sum()), num_experts))
    topk_ids = np.argsort(scores, axis=1)[:, :top_k]
    return mesh, placement, owned, topk_ids


def torch_choice(mesh, placement, rank, topk_ids):
    """[T, K]; physical ids as a rank of the engine chooses them."""
    ep_rank, nodes = int(mesh.ep_rank[rank]), mesh.nodes_of_ep_group[rank].tolist()

    def nearest(ranks):
        if ep_rank in ranks:
            return [ep_rank]
        return [each for each in ranks if nodes[each] == nodes[ep_rank]] or ranks

    usable = [nearest(ranks) for ranks in placement.ranks_of_experts()]
    num_copies = torch.tensor([len(ranks) for ranks in usable])
    table = torch.tensor(np.array([np.resize(ranks, int(num_copies.max())) for ranks in usable]))
    return OPS.choose_copies(torch.from_numpy(topk_ids), table, num_copies, rank)


@settings(max_examples=150, deadline=None)
@given(stages())
def test_as_the_engine(stage):
    mesh, placement, owned, topk_ids = stage
    choice = CopyChoice(placement, mesh)
    rank = np.arange(mesh.size).repeat(owned)
    chosen = choice.ep_ranks(topk_ids, rank)
    counts = count_dispatch(topk_ids, owned, choice, mesh, fan_out=True)
    for place, ids in enumerate(np.split(topk_ids, np.cumsum(owned)[:-1])):
        expected = torch_choice(mesh, placement, place, np.ascontiguousarray(ids))
        np.testing.assert_array_equal(chosen[rank == place], expected)
        rows = OPS.rows_by_peer(expected, 1, mesh.layout.ep).counts
        np.testing.assert_array_equal(counts.rows[place], rows)
    assert counts.pairs.sum() == counts.num_tokens_per_expert.sum() == topk_ids.size
    np.testing.assert_array_equal(
        counts.num_tokens_per_expert.sum(axis=0),
        np.bincount(topk_ids.ravel(), minlength=placement.num_experts),
    )
    held = placement.slots() >= 0
    assert not counts.num_tokens_per_expert[~held].any()


def test_copies_take_turns():
    """Two copies on another node: rank 2 begins with the first, rank 3 with the other."""
    placement = Placement(3, ((0, 1), (0, 1), (2,), (2,)))
    mesh = StageMesh.of(Layout(dp=4, ep=4), 0, 0, ranks_per_node=2)
    ep_ranks = partial(CopyChoice(placement, mesh).ep_ranks, np.array([[0], [0], [0], [1]]))
    assert ep_ranks(np.full(4, 2)).ravel().tolist() == [0, 1, 0, 0]
    assert ep_ranks(np.full(4, 3)).ravel().tolist() == [1, 0, 1, 1]
    assert ep_ranks(np.full(4, 1)).ravel().tolist() == [1, 1, 1, 1]  # its own
    near = CopyChoice(placement, mesh).ep_ranks(np.array([[2], [2]]), np.zeros(2, dtype=int))
    assert near.ravel().tolist() == [2, 3]


def test_without_copies_there_is_no_choice():
    mesh = StageMesh.of(Layout(dp=2, ep=2), 0, 0, ranks_per_node=2)
    assert not CopyChoice(Placement.linear(4, 2), mesh).has_copies
    assert CopyChoice(Placement.linear(4, 2, 1), mesh).has_copies
