"""Projections beside what others published of the same devices; nothing was fitted to it.

LMSYS, "Deploying DeepSeek on GB200 NVL72 with PD and Large Scale EP (Part II)", 2025-09-25: prompts
of 2,000 tokens, 12 nodes of four GPUs decode, four GPUs prefill; with bfloat16 attention and float8
experts 9,087 tokens a second and GPU out, 18,471 in. The batch of a GPU is not in the text, so
two are tried.
"""

import pytest

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.profile_file import parse_cluster
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import choose_routing
from expertlane.plan.project import Projector, Setting, StepSize
from expertlane.spec.deployment import Options
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from golden.cases import DEEPSEEK


@pytest.mark.parametrize(
    ("layout", "num_seqs", "num_new", "num_cached", "published"),
    [
        ("dp=48,ep=48", 768, 1, 2000, 9087),
        ("dp=48,ep=48", 1408, 1, 2000, 9087),
        ("dp=4,ep=4", 8, 2000, 0, 18471),
    ],
)
def test_deepseek_in_float8_on_gb200(layout, num_seqs, num_new, num_cached, published):
    model, placed = from_hf(DEEPSEEK, "DeepSeek-V3"), Layout.parse(layout)
    setting = Setting(
        NumberTypes("float8", "bfloat16", "bfloat16"),
        Execution.GRAPH,
        choose_routing(model, None, 0.0, 0, num_sampled_layers=2).source,
        "float8",
    )
    options = Options(dispatch="all_to_all", payload="float8", num_redundant_experts=32)
    cluster = parse_cluster(f"gb200x{placed.world_size}")
    step = Projector(model, placed, options, cluster, setting).step(
        StepSize(num_seqs * placed.world_size, num_new, num_cached)
    )
    low, tps, high = (each / placed.world_size for each in step.tps.bounds)
    assert low < published < high
    assert tps == pytest.approx(published, rel=0.15)
