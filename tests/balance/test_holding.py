"""What ranks hold: against an obvious definition, and what the engine reads; what they keep."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cost.test_memory import mesh_of_place
from cost.tiny_models import MODELS
from expertlane.balance.holding import Holding, Slices, keeping, over_survivors, placements_of
from expertlane.balance.placement import Placement
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.model.weights import SeededWeights
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.tensors import cut_dim, tensor_shape


class Recorded(SeededWeights):
    """Seeded weights that record which part of each tensor was read."""

    def take(self, name, part=None, dtype=None):
        size = tensor_shape(self.model, name)[cut_dim(name)]
        read = range(size) if part is None else part
        assert self.read.setdefault(name, read) == read, f"{name} is read in one slice"
        return super().take(name, part, dtype)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("layout", ["tp=1", "tp=4", "pp=3,tp=2", "dp=2,tp=2,ep=2", "dp=4,ep=4"])
def test_a_rank_reads_what_it_holds(name, layout):
    model, layout = MODELS[name], Layout.parse(layout)
    placements = placements_of(model, layout, Options())
    for rank in range(layout.world_size):
        source = Recorded(model, torch.float32, torch.device("cpu"), lambda: None)
        source.read = {}
        TransformerStage(model, placements, source, mesh_of_place(layout, rank))
        read = {tensor: part for tensor, part in source.read.items() if part}
        assert read == Holding(model, layout, rank, placements).tensors(), f"rank {rank}"


def test_ranks_that_share_a_key_value_head_hold_the_same_one():
    model = MODELS["windows"]  # 4 query heads, 2 of keys and values
    found = [Slices(tp=4, tp_rank=rank).kv_heads(model) for rank in range(4)]
    assert found == [range(0, 1), range(0, 1), range(1, 2), range(1, 2)]


@given(st.data(), st.integers(1, 24), st.booleans())
def test_slots_and_copies_stay(data, num_experts, is_linear):
    def placement():
        ep = data.draw(st.integers(1, 10))
        most = max(0, num_experts * (ep - 1))
        make = Placement.linear if is_linear else Placement.round_robin
        return make(num_experts, ep, data.draw(st.integers(0, min(most, num_experts))))

    before, wanted = placement(), placement()
    held = [before.experts_of_rank[rank] if rank < before.ep else () for rank in range(wanted.ep)]
    found = keeping(wanted, held)
    assert [*map(len, found.experts_of_rank)] == [*map(len, wanted.experts_of_rank)]
    copies = [Counter(chain(*each.experts_of_rank)) for each in (found, wanted)]
    assert copies[0] == copies[1]
    if wanted.num_slots == num_experts == before.num_slots and wanted.ep >= before.ep:
        for own, has in zip(found.experts_of_rank, held, strict=True):
            assert not has or set(own) <= set(has) or len(has) < len(own)
    if before == wanted:
        assert [set(own) for own in found.experts_of_rank] == [set(has) for has in held]


def test_new_ranks_take_what_others_give_up():
    wanted, before = Placement.linear(16, 4), Placement.linear(16, 2)
    found = keeping(wanted, [*before.experts_of_rank, (), ()])
    assert found.experts_of_rank == ((0, 1, 2, 3), (8, 9, 10, 11), (4, 6, 12, 14), (5, 7, 13, 15))


def test_lost_experts_go_to_the_emptiest_rank():
    linear = Placement.linear(8, 4)
    assert over_survivors(linear, [3, 1, 2]).experts_of_rank == ((6, 7, 0), (2, 3, 1), (4, 5))
    heavy = np.array([9, 1, 5, 5, 1, 1, 1, 1])
    assert over_survivors(linear, [3, 1, 2], heavy).experts_of_rank == (
        (6, 7, 0),
        (2, 3),
        (4, 5, 1),
    )
    copies = Placement.linear(4, 2, 4)  # each rank holds all
    assert over_survivors(copies, [1]).experts_of_rank == (copies.experts_of_rank[1],)


@st.composite
def placements(draw):
    ep = draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, 16))
    holders = draw(
        st.lists(
            st.frozensets(st.integers(0, ep - 1), min_size=1),
            min_size=num_experts,
            max_size=num_experts,
        )
    )
    held = [[e for e, ranks in enumerate(holders) if rank in ranks] for rank in range(ep)]
    return Placement(num_experts, tuple(tuple(rank) or (0,) for rank in held))


@given(placements(), st.data())
def test_all_stays_and_every_expert_is_somewhere(placement, data):
    ranks = data.draw(st.lists(st.integers(0, placement.ep - 1), min_size=1, unique=True))
    load = data.draw(
        st.none()
        | st.lists(
            st.integers(0, 100),
            min_size=placement.num_experts,
            max_size=placement.num_experts,
        ).map(np.array)
    )
    left = over_survivors(placement, ranks, load)  # a Placement has every expert somewhere
    had = set()
    for rank, experts in zip(ranks, left.experts_of_rank, strict=True):
        before = placement.experts_of_rank[rank]
        assert experts[: len(before)] == before or len(ranks) == 1
        had |= set(before)
    new = [
        e
        for r, es in zip(ranks, left.experts_of_rank, strict=True)
        for e in es
        if e not in placement.experts_of_rank[r]
    ]
    assert sorted(new) == sorted(set(range(placement.num_experts)) - had)
    sizes = [len(placement.experts_of_rank[rank]) for rank in ranks]
    fullest = max(map(len, left.experts_of_rank))
    assert fullest <= max(max(sizes), -(-(sum(sizes) + len(new)) // len(ranks)))
