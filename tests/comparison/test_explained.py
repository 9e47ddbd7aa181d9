"""Statistics of explaining a difference: on made-up projections whose answer is known."""

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.comparison.explained import Explainer, Measured

NAMES = ("compute", "link", "driver")


def parts_of(rng, num):
    """[num, 3]; seconds of each part of some numbers; no two parts alike."""
    return rng.uniform(0.05, 1.0, (num, len(NAMES)))


def explainer_of(parts, factors, noise=0.0, rng=None, names=NAMES):
    truth = np.log(parts @ np.array([factors.get(name, 1.0) for name in NAMES]))
    values = truth + (noise * rng.standard_normal(len(parts)) if noise else 0.0)

    def project(changes):
        return np.log(parts @ np.exp([changes.get(name, 0.0) for name in NAMES]))

    groups = np.arange(len(parts)) // 3
    measured = Measured(values, np.full(len(parts), max(noise, 0.02)), groups)
    return Explainer(measured, names, project)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(NAMES), st.floats(1.6, 4.0), st.booleans(), st.integers(0, 10_000))
def test_the_changed_part_is_named_with_its_factor(name, factor, is_faster, seed):
    rng = np.random.default_rng(seed)
    factor = 1 / factor if is_faster else factor
    parts = parts_of(rng, 18)
    found = explainer_of(parts, {name: factor}, 0.02, rng).explain()
    if found.is_noise:  # a small part of all numbers
        return
    assert name in {each.name for each in found.likeliest}
    if len(found.likeliest) == 1:
        assert found.singles[0].change == pytest.approx(log(factor), abs=0.25)
        assert found.together.changes[name] == pytest.approx(log(factor), abs=0.4)


def test_confidences_are_shares():
    rng = np.random.default_rng(1)
    found = explainer_of(parts_of(rng, 9), {"link": 2.0}, 0.02, rng).explain()
    assert sum(each.weight for each in found.singles) == pytest.approx(1)
    assert found.singles[0].name == "link"
    assert found.singles[0].explained > 0.9


def test_two_that_change_all_numbers_alike_are_both_named():
    rng = np.random.default_rng(2)
    parts = parts_of(rng, 9)
    parts[:, 2] = parts[:, 1]
    found = explainer_of(parts, {"link": 2.0}, 0.02, rng).explain()
    assert {each.name for each in found.likeliest} == {"link", "driver"}
    assert [set(pair) for pair in found.together.confounded] == [{"link", "driver"}]
    changes = found.together.changes
    both = sum(np.exp(changes.get(name, 0.0)) for name in ("link", "driver"))
    assert both == pytest.approx(3.0, rel=0.05)  # 2 and 1, or any two that come to the same


def test_what_changes_nothing_is_left_out():
    rng = np.random.default_rng(3)
    parts = parts_of(rng, 9)
    parts[:, 2] = 0.0
    found = explainer_of(parts, {"link": 2.0}, 0.02, rng).explain()
    assert found.without_effect == ("driver",)
    assert "driver" not in {each.name for each in found.singles}


def test_nothing_is_explained_where_nothing_differs():
    rng = np.random.default_rng(4)
    found = explainer_of(parts_of(rng, 9), {}, 0.02, rng).explain()
    assert found.is_noise


def test_one_disturbed_number_does_not_choose():
    rng = np.random.default_rng(5)
    explainer = explainer_of(parts_of(rng, 12), {"link": 1.8}, 0.02, rng)
    explainer.measured.values[0] += 1.0
    assert explainer.explain().singles[0].name == "link"


def test_several_changes_are_fitted_together():
    rng = np.random.default_rng(6)
    factors = {"link": 2.0, "compute": 1.3, "driver": 0.6}
    found = explainer_of(parts_of(rng, 60), factors, 0.02, rng).explain()
    for name, factor in factors.items():
        error = found.together.deviation[name]
        assert found.together.changes[name] == pytest.approx(log(factor), abs=4 * error + 0.02)


@pytest.mark.parametrize("num", [0, 1])
def test_few_numbers_and_no_assumption(num):
    rng = np.random.default_rng(7)
    found = explainer_of(parts_of(rng, num), {"link": 2.0}, names=NAMES[:num]).explain()
    assert len(found.singles) == num
    assert len(found.together.changes) <= num
