import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertlane.spec.layout import partition


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
def test_by_hand(total, num_parts, expected):
    assert partition(total, num_parts) == expected


@given(st.integers(0, 300), st.integers(1, 40))
def test_parts_cover_all_in_order_and_differ_by_at_most_one(total, num_parts):
    parts = partition(total, num_parts)
    sizes = [len(part) for part in parts]
    assert len(parts) == num_parts
    assert [number for part in parts for number in part] == list(range(total))
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
