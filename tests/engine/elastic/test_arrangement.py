"""The one holder of members, placements and nodes."""

from expertlane.engine.elastic.arrangement import Arranged, Arrangement
from expertlane.spec.layout import Layout, Members

WHOLE = Arrangement.alike(Members(Layout.parse("replicas=2,dp=2,ep=2")), ("at first",), 2)
SMALLER = Arrangement.alike(WHOLE.members.without({1}), ("on fewer",), 2)


class Follower:
    def __init__(self, name, log):
        self._name, self._log = name, log

    def abandon(self, plans):
        self._log.append((self._name, plans))

    def reshape(self, arrangement):
        self._log.append((self._name, arrangement))


def test_experts_that_move_while_all_serve_have_moved_in_the_whole():
    arranged = Arranged(WHOLE)
    arranged.move(1, ("moved",))
    assert arranged.now is arranged.whole
    assert arranged.now.placements == (("at first",), ("moved",))
    assert WHOLE.placements == (("at first",), ("at first",))


def test_experts_that_move_while_fewer_serve_are_back_with_all():
    arranged = Arranged(WHOLE)
    arranged.change(SMALLER)
    arranged.move(0, ("moved",))
    assert arranged.now.placements == (("moved",),)
    assert arranged.whole is WHOLE
    arranged.change(arranged.whole)
    arranged.move(0, ("later",))
    assert arranged.whole.placements[0] == ("later",)


def test_another_whole_that_is_wanted_is_not_that_of_now():
    arranged, other = Arranged(WHOLE), Arrangement.alike(Members(Layout.parse("tp=2")), ("x",), 1)
    arranged.want(other)
    arranged.move(0, ("moved",))
    assert (arranged.now.layout, arranged.whole) == (WHOLE.layout, other)


def test_all_that_follow_are_told_in_their_order_and_none_of_an_earlier_start():
    log = []
    arranged = Arranged(WHOLE)
    arranged.follow(Follower("of a start that was lost", log))
    arranged.begin(WHOLE)
    for name in ("first", "second"):
        arranged.follow(Follower(name, log))
    arranged.abandon([])
    arranged.change(SMALLER)
    assert log == [("first", []), ("second", []), ("first", SMALLER), ("second", SMALLER)]
    assert arranged.now is SMALLER
