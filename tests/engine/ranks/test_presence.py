"""Which numbers have a process, whatever happens in whatever order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.screen import telling
from expertlane.engine.ranks.losses import Presence

MOST = 8
ranks = st.sets(st.integers(0, MOST - 1), max_size=4)
events = st.one_of(
    st.tuples(st.just("start"), ranks),
    st.tuples(st.just("up"), ranks),
    st.tuples(st.just("drop"), ranks),
    st.tuples(st.just("epoch"), ranks, st.integers(0, MOST), st.booleans(), st.none() | ranks),
)


@given(st.integers(0, 5), st.lists(events, max_size=12))
def test_each_number_is_one_thing(num_ranks, events):
    presence = Presence(num_ranks)
    processes = set(range(num_ranks))  # as servers would have them
    for name, given_ranks, *more in events:
        if name == "start":
            if processes & given_ranks:
                with pytest.raises(ValueError, match=telling("have process")):
                    presence.start(given_ranks, MOST)
            else:
                presence.start(given_ranks, MOST)
                processes |= given_ranks
        elif name == "up":
            for rank in given_ranks & presence.starting:
                presence.is_up(rank)
        elif name == "drop":
            for rank in given_ranks & presence.early:
                presence.drop(rank)
                processes.discard(rank)
        else:
            begin(presence, processes, given_ranks, *more)
        assert presence.present | presence.early == processes
        assert not presence.present & presence.early
        assert presence.starting <= processes
        assert presence.absent == set(range(presence.num_ranks)) - processes
        assert presence.ahead == presence.early - presence.starting
        assert not any(rank >= presence.num_ranks for rank in presence.present)


def begin(presence, processes, lost, num_ranks, replaces, joining):
    before, early, old_num = set(presence.present), set(presence.early), presence.num_ranks
    starting, ahead = set(presence.starting), set(presence.ahead)
    if joining is not None and not joining <= {r for r in early if r < num_ranks}:
        with pytest.raises(ValueError, match=telling("ahead epoch")):
            presence.begin_epoch(lost, num_ranks, replaces=replaces, joining=joining)
        return
    change = presence.begin_epoch(lost, num_ranks, replaces=replaces, joining=joining)
    below = set(range(num_ranks))
    able = early if replaces else ahead
    joined = (able & below if joining is None else joining) - lost
    assert not change.ends & change.starts
    assert change.ends <= before | early
    asked_for = (lost | set(range(old_num, num_ranks))) & below
    assert change.starts == (asked_for - (early - lost) if replaces else set())
    assert presence.present == ((before & below) - lost) | joined | change.starts
    assert presence.early == early - joined - lost
    assert presence.starting == (starting & processes - change.ends - change.starts) | change.starts
    processes -= change.ends
    processes |= change.starts
    if replaces and joining is None and old_num >= num_ranks:
        assert presence.present >= lost & below
