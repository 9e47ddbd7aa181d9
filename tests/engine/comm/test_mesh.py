"""Groups of a layout by hand, and groups shared by axes and layouts."""

import pytest

from expertlane.engine.comm.mesh import AXES, groups_of_axis
from expertlane.spec.layout import Layout


@pytest.mark.parametrize(
    ("axis", "groups"),
    [
        ("tp", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("pp", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("ep", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("etp", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("stage", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_groups_by_hand(axis: str, groups: list[list[int]]) -> None:
    assert groups_of_axis(Layout(pp=2, dp=2, tp=2, ep=2), axis) == groups


def test_replicas_have_groups_of_their_own() -> None:
    layout = Layout(replicas=2, dp=2, ep=2)
    assert groups_of_axis(layout, "ep") == [[0, 1], [2, 3]]
    assert groups_of_axis(layout, "pp") == [[0], [1], [2], [3]]


@pytest.mark.parametrize("layout", [Layout(), Layout(replicas=2, pp=2, dp=3, tp=2, ep=3)])
def test_every_rank_is_in_one_group_of_every_axis(layout: Layout) -> None:
    for axis in AXES:
        members = [rank for ranks in groups_of_axis(layout, axis) for rank in ranks]
        assert sorted(members) == list(range(layout.world_size))
