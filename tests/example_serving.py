"""Results of a made-up load, with numbers as wide as they get."""

from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.schema import Versions
from expertlane.results.serving import Point, ServingMachine, ServingResults, Spread
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout

SPREAD = Spread(123.456, 123.456, 1234.5, 12345.6)
POINT = Point(
    layout=LayoutSizes.of(Layout(replicas=2, pp=2, dp=16, tp=8, ep=32)),
    batch=None,
    rate=0.125,
    num_requests=10_000,
    num_prompt_tokens=10**7,
    num_output_tokens=10**7,
    num_preemptions=0,
    wall_s=1.0,
    ttft_s=SPREAD,
    tpot_s=SPREAD,
    itl_s=SPREAD,
    e2e_s=SPREAD,
    output_tps=1_234_567.8,
    total_tps=12_345_678.9,
    requests_per_s=1234.5,
    prefill_tps=None,
)
RESULTS = ServingResults(
    command="expertlane bench a",
    created="2026-01-01T00:00:00+00:00",
    versions=Versions("0", "3", "2"),
    machine=ServingMachine("a CPU", "cpu", 2, 10**9, "gloo", "float32", "torch"),
    model="a",
    options=Options(),
    ranks_per_node=0,
    seed=0,
    prompt_len="2:8",
    output_len="1",
    points=(POINT,),
    foreign_cpu_share=0.0,
)
