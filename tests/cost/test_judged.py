"""What is said of how far projections were off is what was found."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cli.screen import telling
from example_plan import PLAN
from expertlane.cost.laws import shipped_profiles
from expertlane.cost.laws.frameworks import (
    CALIBRATED,
    ServingKind,
    frameworks,
    judged,
    judged_groups,
    kinds_of,
    nearest,
    served_by,
    with_known_errors,
)
from expertlane.cost.laws.profile import ModelledCluster, parse_cluster, read_profile
from expertlane.cost.laws.times import Basis
from expertlane.errors import SpecError
from expertlane.results.hardware import KnownError
from expertlane.spec.from_hf import from_hf
from golden.cases import DEEPSEEK
from planner.requests import MIXED

ROOT = Path(__file__).parents[2]
LATENT = from_hf(DEEPSEEK, "DeepSeek-V3")
PLAIN = MIXED.with_overrides(dense_layers=(), sliding_window=())
SINKS = PLAIN.with_overrides(attention_sinks=True)
_MIXERS = json.loads((ROOT / "tests/spec/published_mixers.json").read_text(encoding="utf-8"))
STATES, CHOSEN = (
    from_hf(_MIXERS[name], name, weights=False) for name in ("qwen3.5-397b-a17b", "deepseek-v3.2")
)
_OF_ATTENTION = {"latent": LATENT, "sinks": SINKS, "grouped": PLAIN, "states": STATES}


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
        assert judged(measured, ServingKind(model, "bfloat16")) is CALIBRATED
        assert nearest(measured, ServingKind(model, "bfloat16")) is None
        with pytest.raises(SpecError, match=telling("--framework trt leave it out")):
            served_by(ModelledCluster(measured, 8), "trt", model, "bfloat16")


@pytest.mark.parametrize("group", judged_groups(), ids=str)
def test_a_group_is_told_of_its_own_kind(group):
    layers, hidden, experts = group.sizes
    base = _OF_ATTENTION[group.attention]
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_experts": experts}
    model = base.with_overrides(**sizes)
    kind = ServingKind(model, group.weights, group.has_two_pools, group.has_drafts)
    cluster = parse_cluster(f"{group.hardware}x8")
    drafts = {"has_drafts": group.has_drafts}
    framework = group.framework or None
    profile = served_by(cluster, framework, model, group.weights, **drafts).profile
    said = judged(profile, kind)
    assert said.median_error >= group.tpot
    assert group.hardware.upper() in said.what
    assert group.num_rows >= 10
    known = nearest(profile, kind)
    assert known.what in said.what
    assert known.tpot[1] / known.tpot[0] >= group.tpot_range[1] / group.tpot_range[0]
    assert known.is_own_kind is bool(group.framework)
    for low, high in (known.tpot, known.output, known.ttft):
        assert 0 < low <= 1 <= high > low


def test_sparse_attention_is_not_judged_by_rows_of_dense():
    """DeepSeek-V3.2 has the layers, width and experts of DeepSeek-R1."""
    profile = read_profile("h200")
    assert judged(profile, ServingKind(LATENT, "float8")) is not None
    assert judged(profile, ServingKind(CHOSEN, "float8")) is None
    assert not nearest(profile, ServingKind(CHOSEN, "float8")).is_own_kind


def test_what_was_not_judged():
    assert judged(read_profile("a100"), ServingKind(LATENT, "bfloat16")) is None
    assert judged(read_profile("h200"), ServingKind(LATENT, "bfloat16")) is None
    assert judged(read_profile("h200"), ServingKind(LATENT, "mxfp4", has_drafts=True)) is None
    assert judged(read_profile("h200"), ServingKind(MIXED, "float8")) is None
    smaller = LATENT.with_overrides(num_hidden_layers=30)
    assert judged(read_profile("h200"), ServingKind(LATENT, "float8")) is not None
    assert judged(read_profile("h200"), ServingKind(smaller, "float8")) is None
    other = served_by(parse_cluster("h200x8"), "vllm", LATENT, "float8").profile
    assert judged(other, ServingKind(LATENT, "float8")) is None  # TensorRT-LLM was judged there


@pytest.mark.parametrize(
    ("card", "weights", "model", "what"),
    [
        ("h200", "float8", LATENT, "DeepSeek-R1, H200, float8, aggregated"),
        ("h100", "float8", LATENT, "DeepSeek-R1, H200, float8, aggregated"),
        ("h100", "bfloat16", MIXED, "Qwen3-235B, H100, float8, aggregated"),
        ("h100", "mxfp4", SINKS, "gpt-oss-120b, H100, mxfp4, aggregated"),
        ("gb300", "float8", LATENT, "DeepSeek-R1, GB300, float8, disaggregated"),
        ("b200", "bfloat16", STATES, "Qwen3.5-397B, B200, bfloat16, aggregated"),
        ("h200", "float8", STATES, "Qwen3.5-397B, B"),
        ("h200", "float8", CHOSEN, "DeepSeek-R1, H200, float8, aggregated"),
    ],
)
def test_the_nearest_kind_is_of_like_attention_then_of_the_card(card, weights, model, what):
    known = nearest(read_profile(card), ServingKind(model, weights))
    assert known.what.startswith(what)
    for low, high in (known.tpot, known.output, known.ttft):
        assert 0 < low <= 1 <= high > low


@pytest.mark.parametrize("asked", [MIXED, LATENT], ids=["mixed", "latent"])
def test_bounds_are_no_narrower_than_the_error_of_the_nearest_kind(asked):
    """Of records as plan, simulate and compare make them; ratios stay as they are."""
    profile, weights = read_profile("h100"), PLAN.deployments[0].conditions.dtype
    known = nearest(profile, ServingKind(asked, weights))
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


def test_a_framework_s_steps_take_what_was_measured():
    """Of a kind that was fitted to, of another model on such a card, and of no framework."""
    assert {each.hardware for each in judged_groups()} <= set(shipped_profiles())
    cluster = parse_cluster("h200x8")
    profile, law = cluster.profile, "experts.float8"
    assert served_by(cluster, None, LATENT, "float8") is cluster
    factors = []
    for model in (LATENT, MIXED):
        served = served_by(cluster, "trt", model, "float8").profile
        assert served.framework == "trt"
        assert served.terms["arrival_s"].value > 0
        assert served.terms["driver_s"] is profile.terms["driver_s"]
        moved = served.surfaces[law].correction - profile.surfaces[law].correction
        assert np.ptp(moved) < 1e-12
        factors.append(float(np.exp(moved.mean())))
    assert factors[0] != factors[1]
    assert all(0.8 < each < 1.5 for each in factors)
    for name in frameworks():
        assert served_by(cluster, name, LATENT, "float8").profile.framework == name
    with pytest.raises(SpecError, match=telling("framework ollama there are sglang, vllm")):
        served_by(cluster, "ollama", LATENT, "float8")
    with pytest.raises(SpecError, match=telling("trtllm did you mean trt or dynamo-trt")):
        served_by(cluster, "trtllm", LATENT, "float8")


def test_bounds_of_a_kind_that_was_measured_are_its_own():
    """No wider than what nine in ten rows were within, nor narrower."""
    cluster = parse_cluster("h200x8")
    profile = served_by(cluster, "trt", LATENT, "float8").profile
    known = nearest(profile, ServingKind(LATENT, "float8"))
    assert known.is_own_kind
    wide = replace(PLAN.deployments[0].serving[0].output_tps, low=1e-3, high=1e9)
    bounded = wide.bounded_by(known.output, alone=True)
    assert bounded.bounds == pytest.approx(
        (known.output[0] * wide.value, wide.value, known.output[1] * wide.value)
    )
    assert wide.bounded_by(known.output).bounds == wide.bounds
    assert not nearest(profile, ServingKind(LATENT, "nvfp4")).is_own_kind
    group = next(each for each in judged_groups() if each.framework == "trt")
    measured = ServingKind(LATENT, "float8", num_ranks=group.most_ranks)
    assert nearest(profile, measured).is_own_kind
    wider = nearest(profile, ServingKind(LATENT, "float8", num_ranks=4 * group.most_ranks))
    assert wider == replace(known, is_own_kind=False)


def test_latency_of_a_request_is_bounded_by_its_parts():
    """By what TTFT and the tokens after it are off, each by its share."""
    record = PLAN.deployments[0].serving[0]
    record = replace(record, e2e_s=replace(record.ttft_s, mean=record.ttft_s.mean * 4))
    known = KnownError("a kind", 12, (0.9, 1.1), (0.8, 1.2), (0.1, 5.0), is_own_kind=True)
    bounded = record.bounded_by(known)
    e2e, ttft = bounded.e2e_s.mean, bounded.ttft_s.mean
    share = 1 / 4
    assert e2e.low == pytest.approx(e2e.value * (0.1 * share + 0.9 * (1 - share)))
    assert e2e.high == pytest.approx(e2e.value * (5.0 * share + 1.1 * (1 - share)))
    assert ttft.high == pytest.approx(5 * ttft.value)


def test_a_kind_is_narrowed_part_by_part():
    kinds = kinds_of("trt", "h200", LATENT, "float8")
    assert kinds[0] == ()
    assert kinds[-1] == ("trt", "Hopper", "61x7168x256", "h200", "float8", "no drafts")
    assert all(one == other[: len(one)] for one, other in pairwise(kinds))
    assert kinds_of("trt", "h200", LATENT, "float8", has_drafts=True)[-1][-1] == "drafts"
    assert kinds_of("trt", "a100", LATENT, "float8")[2] == ("trt", "a100")
