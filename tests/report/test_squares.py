"""Squares of experts and of pairs of ranks, and how far tokens spread."""

import pytest

from cli.screen import in_order, tells
from expertlane.report.charts.colours import ABOVE, BELOW
from expertlane.report.charts.squares import alike, load_chart, traffic_charts
from report.shown import values

MARKUP = '</script><b title="x">&'


def test_loads_are_shares_of_the_even_one_around_1():
    chart = load_chart(["a", MARKUP], ((1, 2, 3, 2), (0, 0, 0, 0), (8, 0, 4, 4)))
    assert [(each["layer"], each["expert"], each["load"]) for each in values(chart)] == [
        *((0, expert, load) for expert, load in enumerate((0.5, 1.0, 1.5, 1.0))),
        *((2, expert, load) for expert, load in enumerate((2.0, 0.0, 1.0, 1.0))),
    ]
    by_load = {each["load"]: (each["side"], each["shade"], each["said"]) for each in values(chart)}
    assert by_load == {
        0.0: ("below", 0.75, "0.00"),  # as strong as it gets, from a quarter on
        0.5: ("below", 0.38, "0.50"),
        1.0: ("above", 0.0, "1.00"),
        1.5: ("above", pytest.approx(0.75 * 0.585 / 2, abs=0.01), "1.50"),
        2.0: ("above", 0.38, "2.00"),
    }
    colours = chart.spec["layer"][0]["encoding"]["color"]["scale"]
    assert dict(zip(colours["domain"], colours["range"], strict=True)) == {
        "below": BELOW,
        "above": ABOVE,
    }
    assert in_order(chart.title, "Expert 0 layer 2 2.00× 1.75×")
    assert MARKUP in chart.note
    assert chart.table.rows == (("0", "1", "2", "3", "2"), ("2", "8", "0", "4", "4"))


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        ((), None),
        (((0, 0), (0, 0)), None),
        (((7,), (7,)), "balanced a 1.00×"),
        (
            ((100, 104), (50, 50)),
            "balanced a 1.02×",
        ),
        (((3, 1),), "Expert 0 layer 1.50× a"),
    ],
)
def test_what_needs_no_map(loads, said):
    found = load_chart(["a"], loads)
    assert found is None if said is None else tells(found, said)


def test_of_many_experts_their_order_is_drawn():
    """Layers of 256 experts, of which one has as much as all others together."""
    layer = (255, *[1] * 255)
    chart = load_chart(["a"], [layer] * 61)
    assert len(values(chart)) == 61 * 12
    first, *others = [each["load"] for each in values(chart) if each["layer"] == 60]
    assert first == pytest.approx((128 + 21 * 256 / 510) / 22, abs=1e-3)  # 22 of them together
    assert others == [pytest.approx(256 / 510, abs=1e-3)] * 11
    assert tells(chart.note, "most loaded first")
    assert tells(chart.title, "Expert 0 layer 128×")
    assert [len(chart.table.rows), len(chart.table.columns)] == [61, 4]


def test_loads_that_are_the_same_are_one():
    """The third is of five times as many tokens, the last has another shape."""
    one, other, fivefold, none = ((1, 2),), ((2, 1),), ((5, 10),), ((0, 0), (0, 0))
    assert alike({"a": one, "b": other, "c": fivefold, "d": none}) == [
        (["a", "c"], one),
        (["b"], other),
        (["d"], none),
    ]
    assert alike({}) == alike({"a": ()})[1:] == []


def test_each_pattern_is_drawn_once():
    """The second is twice the first, the third another, of the fourth nothing is known."""
    one = ((0, 4, 0), (0, 0, 4), (2, 0, 0))
    twice = tuple(tuple(2 * num for num in row) for row in one)
    other = ((0, 4, 4), (4, 0, 4), (4, 4, 0))
    sent = {"a": one, MARKUP: twice, "c": other, "d": ((0, 0, 0),) * 3}
    (drawn,) = traffic_charts("decode", sent, 2, "all steps")
    assert tells(drawn.title, "3 2 decode")
    assert [chart.title for chart in drawn.charts] == [f"a, {MARKUP}", "c"]
    first, second = drawn.charts
    squares = {(each["top"], each["left"], each["right"]): each["shade"] for each in values(first)}
    assert squares == {(-0.5, 0.5, 1.5): 1.0, (0.5, 1.5, 2.5): 1.0, (1.5, -0.5, 0.5): 0.57}
    assert len(values(second)) == 4  # squares beside each other with one shade are one
    assert in_order(first.note, "50% 4.00 rank 0 1")
    assert f"Total: a 10.0 B, {MARKUP} 20.0 B." in first.words
    assert first.table.rows[2] == ("2", "2.00 B", "0 B", "0 B")
    borders = [layer["data"]["values"] for layer in first.spec["layer"][1:]]
    assert borders == [[{"at": 1.5}], [{"at": 1.5}]]


def test_traffic_that_needs_no_square():
    assert traffic_charts("decode", {}, 1, "one step") == []
    assert traffic_charts("decode", {"a": ((0,),)}, 1, "one step") == []
    (said,) = traffic_charts("decode", {"a": ((0, 5), (3, 0))}, 1, "one step")
    assert in_order(said, "a rank 0 5.00 B rank 1 3.00 B")


def test_of_many_ranks_nodes_are_drawn():
    sent = {"a": tuple(tuple(int(row != to) for to in range(64)) for row in range(64))}
    (drawn,) = traffic_charts("prefill", sent, 8, "one step")
    (chart,) = drawn.charts
    assert tells(drawn.title, "Traffic prefill")
    assert len(chart.table.rows) == 8
    assert in_order(chart.note, "100% 64.0 node 0 1")
