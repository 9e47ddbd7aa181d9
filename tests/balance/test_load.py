import numpy as np
import pytest

from expertlane.balance.placement import max_over_mean


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        ([4, 4, 4, 4], 1.0),
        ([8, 0, 0, 0], 4.0),
        ([6, 2], 1.5),
        ([7], 1.0),
        ([0, 0, 0], 0.0),
        ([0], 0.0),
    ],
)
def test_one_layer_by_hand(num_tokens, expected):
    assert max_over_mean(np.array(num_tokens)) == expected


def test_layers_are_taken_by_themselves():
    num_tokens = np.array([[3, 1], [0, 0], [2, 2]])
    np.testing.assert_array_equal(max_over_mean(num_tokens), [1.5, 0.0, 1.0])


def test_no_layer():
    assert max_over_mean(np.zeros((0, 4), dtype=np.int64)).shape == (0,)
