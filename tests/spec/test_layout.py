import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.screen import refusing, telling
from expertlane.errors import SpecError
from expertlane.spec.layout import Coordinates, Layout, partition
from expertlane.spec.model import PRESETS

TINY = PRESETS["paper-tiny"]


@st.composite
def layouts(draw):
    replicas, pp, dp, tp = (draw(st.integers(1, 4)) for _ in range(4))
    divisors = [n for n in range(1, dp * tp + 1) if dp * tp % n == 0]
    return Layout(replicas, pp, dp, tp, ep=draw(st.sampled_from(divisors)))


# Coordinates: replica, pp_rank, dp_rank, tp_rank, ep_rank, etp_rank.
BY_HAND = {
    "dp=2,tp=8,ep=2": [
        *((0, 0, 0, tp_rank, 0, tp_rank) for tp_rank in range(8)),
        *((0, 0, 1, tp_rank, 1, tp_rank) for tp_rank in range(8)),
    ],
    "pp=2,dp=2,tp=2,ep=4": [
        (0, 0, 0, 0, 0, 0),
        (0, 0, 0, 1, 1, 0),
        (0, 0, 1, 0, 2, 0),
        (0, 0, 1, 1, 3, 0),
        (0, 1, 0, 0, 0, 0),
        (0, 1, 0, 1, 1, 0),
        (0, 1, 1, 0, 2, 0),
        (0, 1, 1, 1, 3, 0),
    ],
    "replicas=2,dp=2,ep=2": [
        (0, 0, 0, 0, 0, 0),
        (0, 0, 1, 0, 1, 0),
        (1, 0, 0, 0, 0, 0),
        (1, 0, 1, 0, 1, 0),
    ],
    # Each expert is cut in two over data-parallel ranks: ep=1 shards, it does not copy.
    "dp=2": [(0, 0, 0, 0, 0, 0), (0, 0, 1, 0, 0, 1)],
    "dp=4,ep=2": [(0, 0, 0, 0, 0, 0), (0, 0, 1, 0, 0, 1), (0, 0, 2, 0, 1, 0), (0, 0, 3, 0, 1, 1)],
    "tp=1": [(0, 0, 0, 0, 0, 0)],
}


@pytest.mark.parametrize("text", BY_HAND)
def test_coordinates_by_hand(text):
    layout = Layout.parse(text)
    assert layout.world_size == len(BY_HAND[text])
    for rank, expected in enumerate(BY_HAND[text]):
        assert layout.coordinates(rank) == Coordinates(*expected)


@given(layouts())
def test_rank_order_is_replica_pp_dp_tp_with_tp_innermost(layout):
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [place[:4] for place in places] == [
        (replica, pp_rank, dp_rank, tp_rank)
        for replica in range(layout.replicas)
        for pp_rank in range(layout.pp)
        for dp_rank in range(layout.dp)
        for tp_rank in range(layout.tp)
    ]
    for rank, place in enumerate(places):
        in_stage = place.ep_rank * layout.etp + place.etp_rank
        stage = place.replica * layout.pp + place.pp_rank
        assert stage * layout.stage_size + in_stage == rank
        assert rank in layout.ranks_of_replica(place.replica)
        assert rank in layout.ranks_of_dp_rank(place.replica, place.dp_rank)


def test_layers_of_stages_are_near_equal():
    layout = Layout.parse("pp=3")
    assert [layout.layers_of_stage(4, pp_rank) for pp_rank in range(3)] == [
        range(2),
        range(2, 3),
        range(3, 4),
    ]


@given(layouts())
def test_text_and_back(layout):
    assert Layout.parse(str(layout)) == layout


def test_text_leaves_out_ones_and_spaces_are_allowed():
    assert Layout.parse(" tp = 8 , pp=2, ") == Layout(pp=2, tp=8)
    assert Layout.parse("TP=8,Ep=8") == Layout(tp=8, ep=8)
    assert str(Layout(pp=2, tp=8)) == "pp=2,tp=8"
    assert str(Layout()) == "tp=1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no axis tp=8,pp=2"),
        (" , ", "no axis tp=8,pp=2"),
        ("xp=2", "xp=2 unknown xp"),
        ("=2", "=2 unknown"),
        ("DX=2", "DX=2 unknown DX"),
        ("tp8", "tp8 unknown tp8 did you mean tp=8?"),
        ("TP8EP8", "unknown did you mean tp=8,ep=8?"),
        ("pp=2,tp:8", "unknown tp:8 did you mean tp=8?"),
        ("edp=8", "unknown edp did you mean ep or dp?"),
        ("tp=2,tp=2", "tp=2,tp=2 twice"),
        ("tp=2,TP=2", "tp=2,TP=2 twice"),
        ("tp", "tp 1 1,000,000"),
        ("tp=", "tp= 1 1,000,000"),
        ("tp=-2", "tp=-2 -2 1 1,000,000"),
        ("tp=2.0", "tp=2.0 2.0 1 1,000,000"),
        ("tp=2=3", "tp=2=3 2=3 1 1,000,000"),
        ("tp=²", "tp=² ² 1 1,000,000"),
        ("tp=1000001", "tp=1000001 1000001 1 1,000,000"),
        ("tp=0", "tp=0 0 1 1,000,000"),
        ("dp=4,ep=3", "dp=4,ep=3 ep=3 divide × = 4 1 2"),
        ("dp=3,tp=4,ep=24", "dp=3,tp=4,ep=24 ep=24 divide × = 12 1 2 3 4 6"),
        ("ep=2", "ep=2 divide × = 1"),
    ],
)
def test_what_cannot_be_parsed(text, message):
    with pytest.raises(SpecError, match=telling(message)):
        Layout.parse(text)


@pytest.mark.parametrize("text", ["tp8x", "x8", "8", "tp8" * 30, "tp8xp8"])
def test_what_is_nothing_like_an_axis_gets_no_hint(text):
    with pytest.raises(SpecError, match="unknown axis") as refused:
        Layout.parse(text)
    assert "mean" not in str(refused.value)


def test_axes_that_the_engine_does_not_run_are_told_to_modelled_layouts_alone():
    with pytest.raises(SpecError, match=r"replicas, pp, dp, tp, ep$"):
        Layout.parse("xp=2")
    with pytest.raises(SpecError, match=r"replicas, pp, dp, tp, ep, dcp$"):
        Layout.parse("xp=2", is_modelled=True)


def test_a_huge_mistake_is_refused_at_once():
    with pytest.raises(SpecError, match="has 999,998,000,001 ranks; valid: 1,000,000 at most"):
        Layout.parse("dp=999999,tp=999999,ep=999983")
    with pytest.raises(SpecError, match=telling("whole number")):
        Layout.parse("tp=" + "9" * 5000)


_TAKEN = "tp=1 tp=16 pp=4 dp=3,ep=3 dp=16,ep=16 dp=24,ep=24 dp=5 replicas=7 pp=3,tp=8,ep=8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=5", "tp=5 divide 16 1 2 4 8"),
        ("pp=5", "pp=5 4 layers 1"),
        *((text, "") for text in _TAKEN.split()),
    ],
)
def test_what_the_model_can_take(text, message):
    with refusing(message):
        Layout.parse(text).check_model(TINY)


def test_ranks_of_a_node_are_counted_over_all_stages():
    assert Layout.parse("pp=3,dp=2,ep=2").ep_ranks_per_node(2) == 2
    assert Layout.parse("pp=3,dp=2,ep=2").ep_ranks_per_node(1) == 1
    # Ranks 2 and 3, the second stage, lie on two nodes.
    with pytest.raises(SpecError, match=telling("nodes 3 1 2 stage")):
        Layout.parse("pp=3,dp=2,ep=2").ep_ranks_per_node(3)


MULTI_QUERY = TINY.with_overrides(num_attention_heads=8, num_key_value_heads=2)


@pytest.mark.parametrize(("layout", "most"), [("tp=1", 1), ("tp=2", 1), ("tp=4", 2), ("tp=8", 4)])
def test_context_parallelism_parts_what_ranks_hold_twice(layout, most):
    parsed = Layout.parse(layout)
    assert parsed.most_dcp(MULTI_QUERY) == most
    for dcp in (1, 2, 4, 8):
        if parsed.tp % dcp:
            with pytest.raises(SpecError, match=telling(f"dcp={dcp} divide tp={parsed.tp}")):
                Layout.parse(f"{layout},dcp={dcp}")
            continue
        parted = Layout.parse(f"{layout},dcp={dcp}")
        assert parted.world_size == parsed.world_size
        if most % dcp:
            with pytest.raises(SpecError, match="valid dcp"):
                parted.check_model(MULTI_QUERY)
        else:
            parted.check_model(MULTI_QUERY)


@pytest.mark.parametrize(
    ("total", "num_parts", "expected"),
    [
        (16, 3, [range(6), range(6, 11), range(11, 16)]),
        (4, 2, [range(2), range(2, 4)]),
        (2, 4, [range(1), range(1, 2), range(2, 2), range(2, 2)]),
        (0, 2, [range(0), range(0)]),
        (1, 1, [range(1)]),
        (5, 1, [range(5)]),
    ],
)
def test_partitions_by_hand(total, num_parts, expected):
    assert list(partition(total, num_parts)) == expected


@given(st.integers(0, 300), st.integers(1, 40))
def test_partitions_cover_all_in_order_and_differ_by_at_most_one(total, num_parts):
    parts = partition(total, num_parts)
    sizes = [len(part) for part in parts]
    assert len(parts) == num_parts
    assert [number for part in parts for number in part] == list(range(total))
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
