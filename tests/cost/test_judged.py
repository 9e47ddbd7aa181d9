"""What is said of how far projections were off is what was found."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cli.screen import telling
from example_plan import PLAN
from expertlane.cost.laws.frameworks import (
    CALIBRATED,
    find_framework,
    frameworks,
    judged,
    judged_groups,
    nearest,
    served_by,
)
from expertlane.cost.laws.profile_file import read_profile, shipped_profiles
from expertlane.cost.laws.times import Basis
from expertlane.cost.records import with_known_errors
from expertlane.errors import SpecError
from expertlane.spec.from_hf import from_hf
from golden.cases import DEEPSEEK
from plan.requests import MIXED

ROOT = Path(__file__).parents[2]
LATENT = from_hf(DEEPSEEK, "DeepSeek-V3")
PLAIN = MIXED.with_overrides(dense_layers=(), sliding_window=())
SINKS = PLAIN.with_overrides(attention_sinks=True)


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
    measured = replace(profile, surfaces=surfaces)
    for model in (LATENT, MIXED):
        assert judged(measured, "bfloat16", model=model) is CALIBRATED
        assert nearest(measured, "bfloat16", model=model) is None


@pytest.mark.parametrize("group", judged_groups(), ids=str)
def test_a_group_is_told_of_its_own_kind(group):
    profile = read_profile(group.hardware)
    if group.framework:
        profile = served_by(profile, find_framework(group.framework), LATENT)
    layers, hidden, experts = group.sizes
    base = {"latent": LATENT, "sinks": SINKS, "grouped": PLAIN}[group.attention]
    kind = {
        "model": base.with_overrides(
            num_hidden_layers=layers, hidden_size=hidden, num_experts=experts
        ),
        "has_two_pools": group.has_two_pools,
        "has_drafts": group.has_drafts,
    }
    said = judged(profile, group.weights, **kind)
    assert said.median_error >= group.tpot
    assert group.hardware.upper() in said.what
    assert group.num_rows >= 10
    known = nearest(profile, group.weights, **kind)
    assert known.what in said.what
    assert known.tpot[1] / known.tpot[0] >= group.tpot_range[1] / group.tpot_range[0]
    assert 0 < known.tpot[0] <= 1 <= known.tpot[1] > known.tpot[0]
    assert known.ttft[0] <= 1 < known.ttft[1]


def test_what_was_not_judged():
    assert judged(read_profile("a100"), "bfloat16", model=LATENT) is None
    assert judged(read_profile("h200"), "bfloat16", model=LATENT) is None
    assert judged(read_profile("h200"), "mxfp4", model=LATENT, has_drafts=True) is None
    assert judged(read_profile("h200"), "float8", model=MIXED) is None
    smaller = LATENT.with_overrides(num_hidden_layers=30)
    assert judged(read_profile("h200"), "float8", model=LATENT) is not None
    assert judged(read_profile("h200"), "float8", model=smaller) is None
    other = served_by(read_profile("h200"), find_framework("dynamo-trt"), LATENT)
    assert judged(other, "float8", model=LATENT) is None  # TensorRT-LLM was judged there


@pytest.mark.parametrize(
    ("card", "weights", "model", "what"),
    [
        ("h200", "float8", LATENT, "DeepSeek-R1, H200, float8, aggregated"),
        ("h100", "float8", LATENT, "DeepSeek-R1, H200, float8, aggregated"),
        ("h100", "bfloat16", MIXED, "Qwen3-235B, H100, float8, aggregated"),
        ("h100", "mxfp4", SINKS, "gpt-oss-120b, H100, mxfp4, aggregated"),
        ("gb300", "float8", LATENT, "DeepSeek-R1, GB300, float8, disaggregated"),
    ],
)
def test_the_nearest_kind_is_of_like_attention_then_of_the_card(card, weights, model, what):
    known = nearest(read_profile(card), weights, model=model)
    assert known.what == what
    for low, high in (known.tpot, known.output, known.ttft):
        assert 0 < low <= 1 <= high > low


@pytest.mark.parametrize("asked", [MIXED, LATENT], ids=["mixed", "latent"])
def test_bounds_are_no_narrower_than_the_error_of_the_nearest_kind(asked):
    """Of records as plan, simulate and compare make them; ratios stay as they are."""
    profile, weights = read_profile("h100"), PLAN.deployments[0].conditions.dtype
    known = nearest(profile, weights, model=asked)
    before = replace(PLAN, cluster=replace(PLAN.cluster, nearest=known))
    after = with_known_errors(before, asked, profile)
    for one, other in zip(before.deployments, after.deployments, strict=True):
        assert other.over_best == one.over_best
        for narrow, wide in zip(one.serving, other.serving, strict=True):
            assert wide.output_tps.value == narrow.output_tps.value
            assert wide.output_tps.high >= wide.output_tps.value * known.output[1]
            assert wide.output_tps.low <= wide.output_tps.value * known.output[0]
            assert wide.output_tps.low <= narrow.output_tps.low
            assert wide.tpot_s.mean.high >= wide.tpot_s.mean.value * known.tpot[1]
            assert wide.ttft_s.mean.low <= wide.ttft_s.mean.value * known.ttft[0]
    assert after.plans[0].engines[0].aggregated.serving == after.deployments[0].serving
    (said,) = (each for each in after.assumptions if each.name == "least bounds")
    assert known.what in said.value
    assert with_known_errors(PLAN, asked, profile) is PLAN  # measured on the machine itself


def test_a_framework_s_terms_stand_in_place_of_the_profile_s():
    assert {each.hardware for each in judged_groups()} <= set(shipped_profiles())
    profile = read_profile("h200")
    for name, each in frameworks().items():
        served, other = (served_by(profile, each, model) for model in (LATENT, MIXED))
        assert served.framework == other.framework == name
        fitted = each.terms.get("driver_s", profile.terms["driver_s"])
        assert served.terms["driver_s"] is fitted
        assert other.terms["driver_s"] is profile.terms["driver_s"]  # fitted to another model
        assert served.terms["launch_s"] is profile.terms["launch_s"]
    assert {name for name, each in frameworks().items() if not each.terms} == {
        "vllm",
        "dynamo-sglang",
    }
    with pytest.raises(SpecError, match=telling("framework ollama")):
        find_framework("ollama")
