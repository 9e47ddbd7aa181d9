"""Results of a made-up load, with numbers as wide as they get."""

from expertlane.results.estimate import Estimate, Summary
from expertlane.results.hardware import Machine
from expertlane.results.record import DeploymentRecord
from expertlane.results.results import Results, Versions
from expertlane.results.serving_record import ServingRecord
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout

SPREAD = Summary(*map(Estimate, (123.456, 123.456, 1234.5, 12345.6)))
LAYOUT = Layout(replicas=2, pp=2, dp=16, tp=8, ep=32)
POINT = ServingRecord(
    rate=0.125,
    num_requests=10_000,
    num_prompt_tokens=10**7,
    num_output_tokens=10**7,
    num_preemptions=0,
    wall_s=Estimate(1.0),
    ttft_s=SPREAD,
    tpot_s=SPREAD,
    itl_s=SPREAD,
    e2e_s=SPREAD,
    output_tps=Estimate(1_234_567.8),
    total_tps=Estimate(12_345_678.9),
    requests_per_s=Estimate(1234.5),
)
RECORD = DeploymentRecord(str(LAYOUT), LAYOUT, Options(), "measured", serving=(POINT,))
RESULTS = Results(
    kind="bench",
    command="expertlane bench a",
    created="2026-01-01T00:00:00+00:00",
    versions=Versions("0", "3", "2", "2"),
    question={
        "model": "a",
        "workload": {"prompt_len": "2:8", "output_len": "1", "seed": 0, "requests": None},
        "ranks_per_node": 0,
    },
    deployments=(RECORD,),
    machine=Machine(
        cpu_name="a CPU",
        device="cpu",
        num_cores=2,
        num_idle_gpus=0,
        memory_bytes=10**9,
        num_ranks=LAYOUT.world_size,
        ranks_per_node=8,
        backend="gloo",
        dtype="float32",
        kernels="torch",
    ),
)
