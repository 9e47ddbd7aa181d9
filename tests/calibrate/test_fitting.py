"""Fits recover laws that are known."""

import numpy as np
import pytest

from expertlane.calibrate.fit import (
    Rows,
    fit_correction,
    fit_surface,
    held_out_errors,
    knots_of,
)
from expertlane.cost.laws.times import Basis

_AXES = {"m": (1, 8, 64, 512, 4096), "n": (16, 256, 4096)}


def _law(m, n):
    """Seconds over the roofline: smooth, and not linear in the logarithms."""
    return 1.2 + 4 / np.sqrt(m) + 20 / n


def _rows(num_rows=600, noise=0.0, seed=0, most_m=4096.0):
    random = np.random.default_rng(seed)
    m = np.exp(random.uniform(0, np.log(most_m), num_rows))
    n = np.exp(random.uniform(np.log(16), np.log(4096), num_rows))
    roofline_s = 1e-9 * m * n
    error = np.exp(noise * random.standard_normal(num_rows))
    shape = random.integers(0, 20, num_rows)
    return Rows({"m": m, "n": n}, roofline_s, roofline_s * _law(m, n) * error, shape)


def test_a_known_law_is_recovered():
    rows = _rows()
    surface, errors = fit_surface(rows, _AXES, basis=Basis.MEASURED, origin="made up")
    times = surface.times(rows.roofline_s, rows.at)
    errors_s = np.abs(np.log(times.seconds / rows.seconds))
    assert errors_s.max() < 0.2
    assert np.median(errors_s) < 0.02
    assert np.median(np.abs(errors)) < 0.03
    assert surface.low <= 1 <= surface.high
    assert surface.basis is Basis.MEASURED
    assert surface.origin == "made up; 600 rows"


def test_spoiled_rows_hardly_move_the_fit():
    rows = _rows()
    spoiled = rows.seconds.copy()
    spoiled[::20] *= 5
    clean = fit_correction(rows, _AXES)
    robust = fit_correction(Rows(rows.at, rows.roofline_s, spoiled, rows.shape), _AXES)
    assert np.abs(robust - clean).max() < 0.1


def test_empty_cells_stay_near_their_neighbours():
    rows = _rows(most_m=60.0)
    correction = fit_correction(rows, _AXES)
    known = np.log(_law(60.0, np.array(_AXES["n"])))
    assert np.abs(correction[3:] - known).max() < 1.5


def test_knots_end_where_rows_do():
    surface, _ = fit_surface(_rows(most_m=60.0), _AXES, basis=Basis.FITTED, origin="made up")
    assert surface.axes["m"][0] == pytest.approx(1, rel=0.1)
    assert surface.axes["m"][-1] == pytest.approx(60, rel=0.1)
    times = surface.times(np.ones(2), {"m": np.array([30.0, 100.0]), "n": 64.0})
    assert times.is_extrapolated.tolist() == [False, True]


def test_bounds_are_those_of_rows_left_out():
    rows = _rows(num_rows=2000, noise=0.2)
    surface, errors = fit_surface(rows, _AXES, basis=Basis.FITTED, origin="made up")
    # 10th and 90th percentile of a normal deviation of 0.2.
    assert np.log(surface.low) == pytest.approx(-0.256, abs=0.04)
    assert np.log(surface.high) == pytest.approx(0.256, abs=0.04)
    assert len(errors) == 2000


def test_one_shape_cannot_be_left_out():
    rows = _rows()
    alone = Rows(rows.at, rows.roofline_s, rows.seconds, np.zeros(len(rows), dtype=np.int64))
    assert len(held_out_errors(alone, _AXES)) == 0
    surface, _ = fit_surface(alone, _AXES, basis=Basis.FITTED, origin="made up")
    assert (surface.low, surface.high) == (0.5, 2.0)


def test_knots_are_values_that_occur():
    assert knots_of(np.array([4.0, 1.0, 2.0, 2.0]), 3) == (1, 2, 4)
    assert knots_of(2.0 ** np.arange(11), 3) == (1, 32, 1024)
