"""Which processes make up the smaller layout after a loss."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.screen import telling
from expertlane.errors import SpecError
from expertlane.spec.layout import Layout, Members

LAYOUTS = [
    *("tp=1", "tp=4", "dp=4,ep=4", "dp=4,ep=2", "dp=4,ep=1", "dp=2,tp=2,ep=4", "dp=3,tp=2,ep=3"),
    *("pp=2,dp=3,ep=3", "replicas=3,dp=2,ep=2", "replicas=2,pp=2,dp=4,tp=2,ep=4"),
]


def without(layout, *lost):
    left = Members(Layout.parse(layout)).without(lost)
    return str(left.layout), left.numbers


def test_by_hand():
    assert without("dp=4,ep=4", 3) == ("dp=3,ep=3", (0, 1, 2))
    assert without("dp=4,ep=4", 0) == ("dp=3,ep=3", (3, 1, 2))
    assert without("dp=4,ep=4", 0, 2) == ("dp=2,ep=2", (3, 1))
    assert without("dp=2,tp=2,ep=4", 1) == ("tp=2,ep=2", (2, 3))
    assert without("pp=2,dp=3,ep=3", 0) == ("pp=2,dp=2,ep=2", (2, 1, 5, 4))
    assert without("dp=4,ep=2", 1) == ("dp=2", (2, 3))  # two ranks share each expert
    assert without("replicas=3,dp=2,ep=2", 1) == ("replicas=2,dp=2,ep=2", (4, 5, 2, 3))
    assert without("replicas=2,dp=2,ep=2", 0, 3) == ("replicas=2", (1, 2))
    for layout in ("tp=1", "tp=4", "dp=4,ep=1", "pp=2"):
        with pytest.raises(SpecError, match=telling("data-parallel rank lost")):
            without(layout, 0)


@given(st.sampled_from(LAYOUTS), st.data())
def test_every_smaller_layout(layout, data):
    """It has the same slices of weights on whole data-parallel ranks that keep their caches."""
    members = Members(Layout.parse(layout))
    lost = data.draw(st.frozensets(st.sampled_from(members.numbers), max_size=4))
    try:
        left = members.without(lost)
    except SpecError:
        hit = members.dp_ranks_of(lost)
        assert {replica for replica, _ in hit} == set(range(members.layout.replicas))
        return
    old, new = members.layout, left.layout
    assert not lost & set(left.numbers)
    assert (new.tp, new.pp, new.etp) == (old.tp, old.pp, old.etp)
    if not lost:
        assert left == members
    for rank, number in enumerate(left.numbers):
        at, before = new.coordinates(rank), old.coordinates(number)
        assert (at.pp_rank, at.tp_rank, at.etp_rank) == (
            before.pp_rank,
            before.tp_rank,
            before.etp_rank,
        )
        assert left.rank_of(number) == rank
    kept = left.kept_caches(members)
    assert list(kept) == left.dp_ranks
    assert len(set(kept.values())) == len(kept)
    assert not set(kept.values()) & members.dp_ranks_of(lost)
    moved = [place for place, before in kept.items() if place != before]
    assert len(moved) <= len(members.dp_ranks) - len(left.dp_ranks)
    # And back: what served has its caches, what was lost begins anew.
    assert members.kept_caches(left) == {before: place for place, before in kept.items()}
