"""Surfaces against numbers worked out by hand."""

import numpy as np
import pytest

from expertlane.cost.laws.times import Basis, Surface

_TWO = {"m": (1.0, 4.0, 16.0), "n": (10.0, 1000.0)}
_TABLE = np.log([[1.0, 4.0], [2.0, 8.0], [2.0, 32.0]])


def _surface(axes=_TWO, correction=_TABLE, low=0.8, high=1.5):
    return Surface(axes, np.asarray(correction), low, high, Basis.FITTED, "by hand")


def test_correction_at_the_knots_is_the_table():
    m, n = np.meshgrid([1.0, 4.0, 16.0], [10.0, 1000.0], indexing="ij")
    seconds = _surface().times(np.ones((3, 2)), {"m": m, "n": n}).seconds
    assert seconds == pytest.approx(np.exp(_TABLE))


def test_correction_between_knots_is_multilinear_in_logarithms():
    # m = 2 is half way from 1 to 4, n = 100 half way from 10 to 1000.
    times = _surface().times(np.array([3.0]), {"m": np.array([2.0]), "n": 100.0})
    assert times.seconds == pytest.approx([3 * (1 * 4 * 2 * 8) ** 0.25])
    assert times.low == pytest.approx(times.seconds * 0.8)
    assert times.high == pytest.approx(times.seconds * 1.5)
    assert times.basis is Basis.FITTED
    assert not times.is_extrapolated.any()


def test_outside_the_knots_the_edge_holds_and_bounds_widen():
    # Two doublings above 16: bounds are wider by 2 · 0.1.
    times = _surface().times(np.ones(2), {"m": np.array([16.0, 64.0]), "n": 10.0})
    assert times.seconds == pytest.approx([2, 2])
    assert times.low == pytest.approx([1.6, 1.6 / 1.2])
    assert times.high == pytest.approx([3.0, 3.0 * 1.2])
    assert times.is_extrapolated.tolist() == [False, True]


def test_an_axis_of_one_knot_marks_what_is_elsewhere():
    surface = _surface({"key_dim": (576.0,)}, [0.0])
    times = surface.times(np.ones(2), {"key_dim": np.array([576.0, 288.0])})
    assert times.seconds.tolist() == [1, 1]
    assert times.is_extrapolated.tolist() == [False, True]


def test_without_axes_one_correction_holds():
    times = _surface({}, np.log(2.0)).times(np.array([1.0, 3.0]), {})
    assert times.seconds == pytest.approx([2, 6])
