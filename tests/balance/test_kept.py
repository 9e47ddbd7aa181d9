"""Ranks keep their experts in another layout."""

from collections import Counter
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from expertlane.balance.kept import keeping
from expertlane.balance.placement import Placement


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
