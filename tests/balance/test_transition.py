"""What processes keep, receive and read from one arrangement to another."""

from dataclasses import astuple, replace

from hypothesis import given
from hypothesis import strategies as st

from expertlane.balance.placement import Placement, moves
from expertlane.balance.transition import Arrangement, PartKind, Transition
from expertlane.errors import SpecError
from expertlane.spec.layout import Layout, Members

NUM_EXPERTS, NUM_LAYERS = 6, 3  # the first layer is dense
LAYOUTS = [
    *("tp=1", "tp=2", "dp=2", "dp=2,ep=2", "dp=3,ep=3", "tp=2,ep=2", "dp=2,tp=2,ep=2"),
    *("dp=2,tp=2,ep=4", "pp=2", "pp=2,dp=2,ep=2", "replicas=2", "replicas=2,dp=2,ep=2"),
]


def arranged(layout, *, numbers=(), num_redundant=0, ranks_per_node=8):
    layout = Layout.parse(layout)
    placement = Placement.linear(NUM_EXPERTS, layout.ep, num_redundant)
    placements = (None, *[placement] * (NUM_LAYERS - 1))
    return Arrangement.alike(Members(layout, tuple(numbers)), placements, ranks_per_node)


def experts(parts, layer=1):
    """The experts among parts, of one layer."""
    return sorted(each.expert for each in parts if (each.layer, each.kind) == (layer, "expert"))


def kinds(parts):
    return {each.kind for each in parts}


def test_a_replaced_rank_gets_what_others_have_and_reads_the_rest():
    whole = arranged("dp=3,ep=3", num_redundant=3)  # an expert of three is on another rank too
    change = Transition(whole, whole, {0, 2})
    assert change.lost == change.joining == {1}
    assert change.caches == {(0, 0): (0, 0), (0, 2): (0, 2)}
    new = change.of(1)
    assert not new.keeps
    held = experts(whole.parts_of(1))
    elsewhere = {*experts(whole.parts_of(0)), *experts(whole.parts_of(2))}
    assert experts(new.reads) == sorted({*held} - elsewhere)
    assert experts(new.receives) == sorted(elsewhere & {*held})
    assert kinds(new.reads) == {PartKind.EXPERT}
    assert {*new.receives.values()} <= {0, 2}
    for other in (0, 2):
        assert change.of(other).keeps == whole.parts_of(other)


def test_slices_come_from_the_same_slices():
    whole = arranged("dp=2,tp=2,ep=2")
    change = Transition(whole, whole, {0, 1, 2})
    new = change.of(3)
    assert {sender for part, sender in new.receives.items() if part.cut[0] == 2} == {1}
    assert experts(new.reads) == [3, 4, 5]
    alone = Transition(whole, whole, {0, 2}).of(3)  # rank 1, which had its slices, is lost too
    assert kinds(alone.receives) == {PartKind.COMMON, PartKind.EMBEDDING}


def test_a_smaller_layout_reads_only_what_lost_ranks_alone_had():
    whole = arranged("dp=4,ep=2")
    left = whole.members.without([3])
    placed = Placement.linear(NUM_EXPERTS, 1)
    smaller = Arrangement.alike(left, (None, placed, placed), 8)
    change = Transition(whole, smaller, {0, 1, 2})
    assert change.caches == {(0, 0): (0, 0), (0, 1): (0, 1)}
    for number in left.numbers:
        assert experts(change.of(number).keeps) == [0, 1, 2]
        assert experts(change.of(number).reads) == [3, 4, 5]
        assert kinds(change.of(number).reads) == {PartKind.EXPERT}
    parked = change.of(2)
    assert (parked.keeps, parked.reads) == (frozenset(), frozenset())

    back = Transition(smaller, whole, {0, 1, 2}, {2: whole.parts_of(2)})
    assert back.of(2).keeps == whole.parts_of(2)
    assert back.joining == {2, 3}
    assert back.of(3).reads == whole.parts_of(3)


def test_another_layout_keeps_what_is_cut_alike():
    before, after = arranged("dp=2,ep=2"), arranged("tp=2,ep=2")
    change = Transition(before, after, {0, 1})
    assert not change.caches
    for number in (0, 1):
        moved = change.of(number)
        assert experts(moved.keeps) == experts(after.parts_of(number))
        assert kinds(moved.reads) == {PartKind.SLICE}
        assert not moved.receives


def test_moved_experts_are_sent_as_the_rebalancer_plans_them():
    before = arranged("dp=3,ep=3", ranks_per_node=2)
    then = Placement(NUM_EXPERTS, ((0, 2), (1, 4), (3, 5)))
    after = replace(before, placements=((None, then, before.placements[0][1]),))
    change = Transition(before, after, {0, 1, 2})
    got = {(r, p.expert, s) for r in range(3) for p, s in change.of(r).receives.items()}
    old = before.placements[0][1]
    wanted = moves([old], [then], 2)
    assert got == {(m.rank, m.expert, m.source) for m in wanted if m.source != m.rank}
    assert {(m.layer, m.rank, m.expert, m.source) for m in change.moves(0)} == {
        (1, *each) for each in got
    }
    assert len(change.caches) == 3


@st.composite
def arrangements(draw, like=None):
    """An arrangement of processes 0 to 9; with `like`, often of the same members."""
    if like is not None and draw(st.booleans()):
        members = like.members
    else:
        layout = Layout.parse(draw(st.sampled_from(LAYOUTS)))
        order = draw(st.permutations(range(10)))
        members = Members(layout, tuple(order[: layout.world_size]))
        if like is not None and draw(st.booleans()):
            try:
                members = like.members.without(draw(st.sets(st.sampled_from(like.members.numbers))))
            except SpecError:
                members = like.members
    ep = members.layout.ep
    placements = []
    for _ in range(members.layout.replicas):
        slots = draw(st.permutations(range(NUM_EXPERTS)))
        held = [list(slots[rank::ep]) for rank in range(ep)]
        for own in held:
            more = draw(st.sets(st.sampled_from(range(NUM_EXPERTS)), max_size=3))
            own += sorted(more - {*own})
        placed = Placement(NUM_EXPERTS, tuple(map(tuple, held)))
        placements.append((None, placed, Placement.linear(NUM_EXPERTS, ep)))
    return Arrangement(members, tuple(placements), draw(st.sampled_from([1, 2, 8])))


@given(st.data())
def test_every_rank_ends_with_what_it_needs_and_nothing_that_lives_is_lost(data):
    before = data.draw(arrangements())
    after = data.draw(arrangements(like=before))
    alive = data.draw(st.sets(st.sampled_from(range(10))))
    beside = {}
    if data.draw(st.booleans()):
        number = data.draw(st.sampled_from(after.members.numbers))
        beside[number] = data.draw(
            st.sets(st.sampled_from(sorted(after.parts_of(number), key=str)))
        )
    change = Transition(before, after, alive, beside)
    has = {
        number: before.parts_of(number) if number in alive else frozenset() for number in range(10)
    }
    has |= {each: has[each] | parts for each, parts in beside.items()}
    for number in range(10):
        own = change.of(number)
        needs = after.parts_of(number)
        assert own.keeps | own.receives.keys() | own.reads == needs
        assert len(own.keeps) + len(own.receives) + len(own.reads) == len(needs)
        assert own.keeps == has[number] & needs
        for part, sender in own.receives.items():
            assert sender in alive
            assert sender != number
            assert part in before.parts_of(sender)
            assert after.members.rank_of(sender) == before.members.rank_of(sender)
        if before.members == after.members:
            at = before.layout.coordinates(before.members.rank_of(number)) if needs else None
            stage = {
                each
                for rank, each in enumerate(before.members.numbers)
                if at and before.layout.coordinates(rank)[:2] == at[:2]
            }
            held = {part for each in stage & alive for part in before.parts_of(each)}
            assert not own.reads & held
    for new, old in change.caches.items():
        numbers = after.members.of_dp_rank[new]
        assert numbers == before.members.of_dp_rank[old]
        assert alive.issuperset(numbers)
    if before.members == after.members:  # what a rank gets beside steps is what it lacks
        layout, numbers = after.layout, after.members.numbers
        moving = Transition(before, after, numbers)
        for replica in range(layout.replicas):
            ranks = [
                range(first, first + layout.etp)
                for first in layout.ranks_of_replica(replica)[:: layout.etp]
            ]
            moved = {
                (numbers[to], layer, expert, numbers[by])
                for layer, expert, source, rank, _ in map(astuple, moving.moves(replica))
                for stage in range(layout.pp)
                if layer in layout.layers_of_stage(NUM_LAYERS, stage)
                for to, by in zip(
                    ranks[stage * layout.ep + rank], ranks[stage * layout.ep + source], strict=True
                )
            }
            assert moved == {
                (number, part.layer, part.expert, sender)
                for number in after.members.of_replica[replica]
                for part, sender in moving.of(number).receives.items()
                if part.kind is PartKind.EXPERT
            }
    whole = Transition(before, before, range(10))
    assert all(whole.of(each).keeps == before.parts_of(each) for each in range(10))
