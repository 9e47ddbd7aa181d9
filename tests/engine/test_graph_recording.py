"""Which graphs ranks are asked to record before requests come, in which order, and for how long."""

from types import SimpleNamespace

import pytest

from cli.screen import tells
from expertlane.engine import warm_up
from expertlane.engine.ranks.commands import RecordGraphs
from expertlane.engine.warm_up import forms_of_sizes, record_graphs
from expertlane.spec.deployment import DispatchMode, DispatchRow, DispatchTable, GraphLimits
from expertlane.spec.layout import Layout, Members

LIMITS = GraphLimits(8, 24)
STATIC = DispatchTable.fixed("static")


def table_of(few, many):
    """`few` with one token each at most, else `many`."""
    rows = DispatchRow(1, (0.0, 1.0)), DispatchRow(2, (1.0, 0.0))
    return DispatchTable((DispatchMode(few), DispatchMode(many)), rows)


@pytest.mark.parametrize(
    ("table", "forms"),
    [
        (STATIC, ("static",)),
        (DispatchTable.fixed("static", overlap=True), ()),
        (DispatchTable.fixed("static", prefill_form="all_to_all"), ("static",)),
    ],
)
def test_forms_that_need_graphs(table, forms):
    found = forms_of_sizes(LIMITS, table, Layout.parse("dp=2,ep=2"))
    assert [*found.items()] == [(size, forms) for size in (8, 4, 2, 1)]


def test_forms_that_need_graphs_where_many_take_another():
    """Up to 1 of a rank's tokens, and above; with tp=2 of twice as many sequences."""
    table = table_of("all_gather", "all_to_all")
    many, both = ("all_to_all",), ("all_to_all", "all_gather")
    found = forms_of_sizes(LIMITS, table, Layout.parse("dp=2,ep=2"))
    assert found == {8: many, 4: many, 2: many, 1: both}
    found = forms_of_sizes(LIMITS, table, Layout.parse("tp=2,ep=2"))
    assert found == {8: many, 4: many, 2: both, 1: both}


class SlowPool:
    """Records what it is asked for; each size takes so long."""

    def __init__(self, size_s, num_graphs=1):
        self.size_s, self.num_graphs = size_s, num_graphs
        self.now_s, self.asked = 1000.0, []

    def call(self, command, *, ranks):
        self.now_s += self.size_s
        self.asked.append(command)
        return [self.num_graphs] * len(ranks)


@pytest.mark.parametrize(
    ("size_s", "num_graphs", "sizes", "lines"),
    [
        (0.5, 3, [8, 4, 2, 1], ["4 8 2.0 s"]),
        (70.0, 1, [8, 4], ["2 4 8 140.0 s"]),
        (0.0, 0, [8, 4, 2, 1], []),
    ],
)
def test_ranks_record_the_largest_first_until_it_takes_too_long(
    size_s, num_graphs, sizes, lines, monkeypatch
):
    pool, members, found = SlowPool(size_s, num_graphs), Members(Layout.parse("dp=2,ep=2")), []
    clock = SimpleNamespace(monotonic=lambda: pool.now_s)
    monkeypatch.setattr(warm_up, "time", clock)
    record_graphs(pool, members, LIMITS, STATIC, found.append)
    assert pool.asked == [RecordGraphs(size, ("static",)) for size in sizes]
    assert len(found) == len(lines)
    assert all(map(tells, found, lines))


def test_nothing_is_asked_for_where_no_step_can_be_a_graph():
    pool, found = SlowPool(0.0), []
    table = DispatchTable.fixed("static", overlap=True)
    record_graphs(pool, Members(Layout.parse("dp=2,ep=2")), LIMITS, table, found.append)
    assert (pool.asked, found) == ([], [])
