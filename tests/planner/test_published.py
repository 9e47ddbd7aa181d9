"""Projections beside what others published: nothing was fitted to it, and no error may grow.

Rows, their sources and deployments are those of `calibration/judge_published.py`.
"""

import sys
from pathlib import Path

import pytest

from expertlane.spec.from_hf import from_hf
from golden.cases import DEEPSEEK

sys.path.append(str(Path(__file__).parents[2] / "calibration"))

from judge_published import GAINS, PUBLISHED, gain, projected

MODEL = from_hf(DEEPSEEK, "DeepSeek-V3")
MORE = 0.02
ERRORS = {  # by row, in absolute terms: those of 1 December 2026
    "prefill EP32, 4 × 4,096, DeepSeek's profile": 0.025,
    "the same, SGLang, balanced by simulation": 0.031,
    "prefill EP32, 4 × 4,096, SGLang, as routed": 0.219,
    "8 × 2,048, SGLang, as routed": 0.210,
    "16 × 1,024, SGLang, as routed": 0.189,
    "decode EP72, 256 × 2,000, SGLang": 0.027,
    "decode EP128, 128 × 4,096, DeepSeek's profile, with MTP": 0.003,
    "decode EP72, 128 × 4,000, SGLang, MTP simulated": 0.054,
    "prefill EP32, 8 × 2,048 after 2,640 cached, DeepSeek in production": 0.716,
    "decode EP144, 88 × 4,989, DeepSeek in production": 0.140,
    "decode EP48, 768 × 2,000, bfloat16 cache": 0.032,
    "decode EP48, 1,408 × 2,000, bfloat16 cache": 0.001,
    "prefill EP4, 8 × 2,000, bfloat16 cache": 0.033,
    "decode EP48, 1,408 × 2,000, NVFP4": 0.218,
    "prefill EP2, 8 × 2,000, NVFP4": 0.034,
    # Of EPLB's gains.
    "prefill EP32, 4 × 4,096": 0.090,
    "decode EP72, 256 × 2,000": 0.197,
}
# Not within their bounds: a day's mean of a service, and kernels that no table has.
OUTSIDE = {
    "prefill EP32, 8 × 2,048 after 2,640 cached, DeepSeek in production",
    "decode EP144, 88 × 4,989, DeepSeek in production",
    "decode EP48, 1,408 × 2,000, NVFP4",
}


def test_every_row_has_an_error():
    names = [each.name for each in (*PUBLISHED, *GAINS)]
    assert sorted(names) == sorted(ERRORS)
    assert set(names) > OUTSIDE


@pytest.mark.smoke(1)
@pytest.mark.parametrize("row", PUBLISHED, ids=lambda each: each.name)
def test_no_error_grows(row):
    low, likely, high = projected(row, MODEL)
    assert abs(likely / row.tps - 1) <= ERRORS[row.name] + MORE
    assert low < likely < high
    assert low < row.tps < high or row.name in OUTSIDE


@pytest.mark.full
@pytest.mark.parametrize("row", GAINS, ids=lambda each: each.name)
def test_what_placing_experts_by_load_brings(row):
    """With the most even routing next to nothing, with the most uneven more than was published."""
    least, likely, most = gain(row, MODEL)
    assert abs(likely / row.times - 1) <= ERRORS[row.name] + MORE
    assert 1 <= least < row.times < most
