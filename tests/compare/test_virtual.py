"""The ratio of compute speeds, by hand."""

from dataclasses import replace

import numpy as np
import pytest

import example_results as example
from expertlane.compare.virtual import VirtualRuns, VirtualSettings, compute_ratio
from expertlane.cost.laws.profile_file import read_profile
from expertlane.errors import UserError
from expertlane.results.results import MachinePeak
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase

PROFILE = read_profile("h100")
PEAK = MachinePeak(
    gemm_flops_per_s=200e9, read_bytes_per_s=20e9, num_units=2, unit="core", dtype="float32"
)


def step_with(flops, weight_bytes):
    """A step of one rank with so much work in its first two stages."""
    (step,) = example.steps(example.EXPERT, Phase.DECODE, start_s=0.0, step_s=0.1, num_rounds=1)
    record = step.records[0]
    sizes = np.zeros((2, len(record.flops)), dtype=np.int64)
    sizes[0, :2], sizes[1, :2] = flops, weight_bytes
    return replace(step, records=(replace(record, flops=sizes[0], weight_bytes=sizes[1]),))


def test_work_is_bound_by_what_takes_longer_here_and_there():
    # Here 100 GFLOP/s and 10 GB/s a core: the first stage takes 1 s (FLOPs), the second 2 (bytes).
    steps = [step_with([100e9, 100e9], [1e9, 20e9])]
    device = PROFILE.device
    there_s = max(100e9 / device.flops_per_s["float16"], 1e9 / device.memory_bytes_per_s)
    there_s += max(100e9 / device.flops_per_s["float16"], 20e9 / device.memory_bytes_per_s)
    assert compute_ratio(steps, PEAK, PROFILE) == pytest.approx(3.0 / there_s)


def test_no_work_has_no_ratio():
    with pytest.raises(UserError, match="--link-scale says how much slower links are to be"):
        compute_ratio([step_with([0, 0], [0, 0])], PEAK, PROFILE)


def test_what_was_asked_for_goes_first_and_each_rank_has_a_core():
    runs = VirtualRuns(VirtualSettings(PROFILE, 5.0), 4, 8, PEAK)
    runs.choose_scale([])
    assert runs.scale == 5.0
    peak = runs.peak_of(Layout.parse("dp=16,ep=16"))
    assert (peak.gemm_flops_per_s, peak.num_units) == (1600e9, 16)
    assert [each.name for each in runs.assumptions()] == ["links", "computing", "left out"]
    assert {each.source for each in runs.assumptions()} == {"virtual"}
