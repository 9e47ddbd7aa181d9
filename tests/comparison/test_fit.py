"""The fit of factors: on made-up projections whose answer is known."""

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.comparison.fit import Fitter, Measurements

NAMES = ("compute", "link", "driver")


def parts_of(rng, num):
    """[num, 3]; seconds of each part of some numbers; no two parts alike."""
    return rng.uniform(0.05, 1.0, (num, len(NAMES)))


def fitter_of(parts, factors, noise=0.0, rng=None, names=NAMES):
    truth = np.log(parts @ np.array([factors.get(name, 1.0) for name in NAMES]))
    values = truth + (noise * rng.standard_normal(len(parts)) if noise else 0.0)

    def project(changes):
        return np.log(parts @ np.exp([changes.get(name, 0.0) for name in NAMES]))

    groups = np.arange(len(parts)) // 3
    measured = Measurements(values, np.full(len(parts), max(noise, 0.02)), groups)
    return Fitter(measured, names, project)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(NAMES), st.floats(1.6, 4.0), st.booleans(), st.integers(0, 10_000))
def test_the_changed_part_gets_its_factor(name, factor, is_faster, seed):
    rng = np.random.default_rng(seed)
    factor = 1 / factor if is_faster else factor
    found = fitter_of(parts_of(rng, 18), {name: factor}, 0.02, rng).fit()
    error = found.deviation[name]
    assert found.changes[name] == pytest.approx(log(factor), abs=4 * error + 0.1)
    for other in {*NAMES} - {name}:
        assert abs(found.changes.get(other, 0.0)) < 4 * found.deviation.get(other, 0.0) + 0.1


def test_of_two_with_the_same_effect_any_may_change():
    rng = np.random.default_rng(2)
    parts = parts_of(rng, 9)
    parts[:, 2] = parts[:, 1]
    changes = fitter_of(parts, {"link": 2.0}, 0.02, rng).fit().changes
    both = sum(np.exp(changes.get(name, 0.0)) for name in ("link", "driver"))
    assert both == pytest.approx(3.0, rel=0.05)  # 2 and 1, or any two with this sum


def test_what_changes_nothing_is_left_out():
    rng = np.random.default_rng(3)
    parts = parts_of(rng, 9)
    parts[:, 2] = 0.0
    assert "driver" not in fitter_of(parts, {"link": 2.0}, 0.02, rng).fit().changes


def test_one_disturbed_number_does_not_decide():
    rng = np.random.default_rng(5)
    fitter = fitter_of(parts_of(rng, 12), {"link": 1.8}, 0.02, rng)
    fitter.measured.values[0] += 1.0
    assert fitter.fit().changes["link"] == pytest.approx(log(1.8), abs=0.15)


def test_several_changes_are_fitted_together():
    rng = np.random.default_rng(6)
    factors = {"link": 2.0, "compute": 1.3, "driver": 0.6}
    found = fitter_of(parts_of(rng, 60), factors, 0.02, rng).fit()
    for name, factor in factors.items():
        assert found.changes[name] == pytest.approx(
            log(factor), abs=4 * found.deviation[name] + 0.02
        )


@pytest.mark.parametrize("num", [0, 1])
def test_few_numbers_and_no_assumption(num):
    rng = np.random.default_rng(7)
    found = fitter_of(parts_of(rng, num), {"link": 2.0}, names=NAMES[:num]).fit()
    assert len(found.changes) <= num
