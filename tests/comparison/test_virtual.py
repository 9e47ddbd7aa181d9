"""How much slower links are in virtual time, by hand."""

from dataclasses import replace

import numpy as np
import pytest

import example_results as example
from cli.screen import telling
from comparison.test_compare import EXPERIMENT
from expertlane.comparison.assumptions import StepWork
from expertlane.comparison.virtual import (
    LinkScale,
    VirtualRuns,
    VirtualSettings,
    choose_scale,
    compute_ratio,
)
from expertlane.cost.laws.profile import read_profile
from expertlane.errors import UserError
from expertlane.results.hardware import MachinePeak
from expertlane.spec.experiment import read_experiment, shipped_experiments
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase, Stage

PROFILE = read_profile("h100")
PEAK = MachinePeak(
    gemm_flops_per_s=200e9, read_bytes_per_s=20e9, num_units=2, unit="core", dtype="float32"
)


def step_with(flops, weight_bytes, kv_bytes=0):
    """A step of one rank with so much work in attention and in its experts."""
    (step,) = example.steps(example.EXPERT, Phase.DECODE, start_s=0.0, step_s=0.1, num_rounds=1)
    record = step.records[0]
    sizes = np.zeros((2, len(record.flops)), dtype=np.int64)
    sizes[:, [Stage.ATTENTION, Stage.EXPERTS]] = flops, weight_bytes
    record = replace(record, flops=sizes[0], weight_bytes=sizes[1], kv_bytes=kv_bytes)
    return replace(step, records=(record,))


def work(*args):
    return StepWork(step_with(*args).records)


def test_work_is_bound_by_what_takes_longer_here_and_there():
    # Here 100 GFLOP/s and 10 GB/s a core: attention takes 1 s (FLOPs), the experts 2 s (bytes).
    own = work([100e9, 100e9], [1e9, 20e9])
    device = PROFILE.device
    flops_s = 100e9 / device.flops_per_s["float16"]
    of_bytes_s = [num / device.memory_bytes_per_s for num in (1e9, 20e9)]
    there_s = sum(max(flops_s, each) for each in of_bytes_s)
    assert compute_ratio(own, own, PEAK, PROFILE) == pytest.approx(3.0 / there_s)


def test_keys_and_values_are_read_by_attention():
    assert work([0, 0], [0, 0], 3e9).seconds(1e9, 1e9) == 3
    assert work([2e9, 0], [0, 0], 1e9).seconds(1e9, 1e9) == 2


def test_other_work_there_is_another_ratio():
    once, twice = work([1e9, 0], [0, 0]), work([2e9, 0], [0, 0])
    ratio = compute_ratio(once, once, PEAK, PROFILE)
    assert compute_ratio(once, twice, PEAK, PROFILE) == pytest.approx(ratio / 2)


def test_no_work_has_no_ratio():
    nothing = work([0, 0], [0, 0])
    with pytest.raises(UserError, match=telling("no work --link-scale")):
        compute_ratio(nothing, nothing, PEAK, PROFILE)


def test_what_was_asked_for_goes_first():
    scale = choose_scale(VirtualSettings(PROFILE, 5.0), EXPERIMENT, [], PEAK)
    assert (scale.times, scale.byte_scale) == (5.0, 1.0)
    as_they_are = choose_scale(VirtualSettings(PROFILE, None, PROFILE), EXPERIMENT, [], PEAK)
    assert (as_they_are.times, as_they_are.byte_scale) == (1.0, 1.0)


def test_an_experiment_of_its_own_kind_has_the_ratio_of_compute_speeds():
    step = step_with([100e9, 0], [0, 0])
    scale = choose_scale(VirtualSettings(PROFILE), EXPERIMENT, [step, step], PEAK)
    own = StepWork(step.records)
    assert scale.times == pytest.approx(compute_ratio(own, own, PEAK, PROFILE))
    assert scale.byte_scale == 1


def test_a_small_copy_of_the_papers_model_has_its_transfers():
    small = read_experiment(shipped_experiments()["paper-small"])
    paper = read_experiment(shipped_experiments()["paper"])
    scale = choose_scale(VirtualSettings(PROFILE), small, [], PEAK)
    # Of each token that is dispatched, 16 bits a value there, 32 here; ids beside.
    hidden = paper.model.hidden_size * 2 / (small.model.hidden_size * 4)
    assert scale.byte_scale == pytest.approx(hidden, rel=0.1)
    assert 0.1 < scale.times < 100


def test_each_rank_has_a_core():
    runs = VirtualRuns(VirtualSettings(PROFILE), 4, 8, PEAK, LinkScale(5.0))
    peak = runs.peak_of(Layout.parse("dp=16,ep=16"))
    assert (peak.gemm_flops_per_s, peak.num_units) == (1600e9, 16)
    assert [each.name for each in runs.assumptions()] == ["links", "compute", "excluded"]
    assert {each.source for each in runs.assumptions()} == {"virtual"}


def test_a_profile_without_the_rates_is_refused_before_anything_runs():
    device = replace(PROFILE.device, flops_per_s={"float8": 2e15})
    links = replace(PROFILE, device=device)
    with pytest.raises(UserError, match="no FLOP/s of float16; give --link-scale"):
        VirtualSettings(links).check([])
    VirtualSettings(links, 5.0).check([])
