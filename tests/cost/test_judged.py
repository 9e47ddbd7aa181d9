"""What is said of how far projections were off is what was found."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cli.screen import telling
from expertlane.cost.laws.frameworks import (
    CALIBRATED,
    find_framework,
    frameworks,
    judged,
    judged_groups,
    served_by,
)
from expertlane.cost.laws.profile_file import read_profile, shipped_profiles
from expertlane.cost.laws.times import Basis
from expertlane.errors import SpecError

ROOT = Path(__file__).parents[2]


def test_calibrated_rows_are_those_measured():
    file = ROOT / "benchmarks" / "results" / "2026-11-25-bench_projection-final.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    errors = [abs(row[phase]["error"]) for row in rows for phase in ("prefill_s", "decode_s")]
    assert len(errors) == CALIBRATED.num_rows
    assert len({row["deployment"] for row in rows}) <= len(rows) == 36
    assert np.median(errors) == pytest.approx(CALIBRATED.median_error, abs=5e-4)


def test_a_profile_measured_on_its_machine():
    profile = read_profile("h100")
    surfaces = {
        name: replace(each, basis=Basis.MEASURED) for name, each in profile.surfaces.items()
    }
    assert judged(replace(profile, surfaces=surfaces), "bfloat16") is CALIBRATED


@pytest.mark.parametrize("group", judged_groups(), ids=str)
def test_a_group_is_told_of_its_own_kind(group):
    profile = read_profile(group.hardware)
    if group.is_fitted:
        profile = served_by(profile, next(iter(frameworks().values())))
    kind = {"has_two_pools": group.has_two_pools, "has_drafts": group.has_drafts}
    said = judged(profile, group.weights, **kind)
    assert (said.num_rows, said.median_error) == (group.num_rows, group.tpot)
    assert group.hardware.upper() in said.what
    assert group.num_rows >= 20


def test_what_was_not_judged():
    assert judged(read_profile("a100"), "bfloat16") is None
    assert judged(read_profile("h200"), "bfloat16") is None
    assert judged(read_profile("h200"), "mxfp4", has_drafts=True) is None


def test_a_framework_s_terms_stand_in_place_of_the_profile_s():
    assert {each.hardware for each in judged_groups()} <= set(shipped_profiles())
    profile = read_profile("h200")
    for name, each in frameworks().items():
        served = served_by(profile, each)
        assert served.framework == name
        assert served.terms["driver_s"] is each.terms["driver_s"]
        assert served.terms["launch_s"] is profile.terms["launch_s"]
    with pytest.raises(SpecError, match=telling("framework vllm")):
        find_framework("vllm")
