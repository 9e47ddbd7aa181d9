"""A simulation of made-up numbers."""

import example_timelines
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.hardware import Cluster
from expertlane.results.record import Conditions, DeploymentRecord, PoolRecord, StepsRecord
from expertlane.results.results import Assumption, Results, Versions
from expertlane.results.serving_record import ServingRecord
from expertlane.results.traffic import FanOut, TrafficBytes, TrafficRecord
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link, Phase

NUMBER = Estimate(2.0, 1.0, 4.0)
SPREAD = Summary(NUMBER, NUMBER, NUMBER, NUMBER)
STEPS = StepsRecord(
    phase=Phase.PREFILL,
    num_steps=3,
    num_tokens=16,
    num_seqs=6,
    wall_s=NUMBER,
    tps=16 / NUMBER,
    step_s=SPREAD,
    breakdown_s={"weight reads": 1.5, "kernel launch": 0.5},
    floor_s=0.5,
    flops_utilisation=0.1,
    read_utilisation=0.2,
    basis_shares={"fitted": 1.0},
    extrapolated_share=0.0,
    traffic=TrafficRecord(
        by_link={link.label: TrafficBytes(9, 6, 3) for link in Link},
        sent_bytes={
            "payload": tuple(
                tuple(0 if source == to else 1000 + to for to in range(16)) for source in range(16)
            )
        },
        fan_out=FanOut((0, 3, 1)),
        busiest_over_mean=1.5,
    ),
    timeline=example_timelines.timeline(16),
)
RECORD = DeploymentRecord(
    name="dp=16,ep=16",
    layout=Layout(dp=16, ep=16),
    options=Options(),
    source="projected",
    conditions=Conditions(2, "graph", "uniform", "bfloat16", "bfloat16"),
    pools=(
        PoolRecord(
            weight_bytes=1,
            kv_bytes=2,
            activation_bytes=3,
            allowed_bytes=9,
            device_bytes=10,
            num_resident=4,
            most_running=4,
            num_preemptions=0,
        ),
    ),
    steps=(STEPS,),
    serving=(
        ServingRecord(
            batch=8,
            num_requests=8,
            num_prompt_tokens=256,
            num_output_tokens=48,
            wall_s=NUMBER,
            ttft_s=SPREAD,
            e2e_s=SPREAD,
            output_tps=NUMBER,
            total_tps=NUMBER,
            requests_per_s=NUMBER,
            basis="fitted",
        ),
    ),
    num_tokens_per_expert=((0, 0), (5, 3)),
)
SIMULATION = Results(
    kind="simulation",
    command="expertlane simulate paper",
    created="2026-01-01T00:00:00+00:00",
    versions=Versions("0", "3", "2"),
    question={
        "model": {"name": "paper", "sliding_window": []},
        "workload": {"prompt_len": "32", "output_len": "4:8", "seed": 0, "requests": None},
        "serving": {
            "max_num_seqs": 256,
            "max_num_batched_tokens": 2048,
            "block_size": 16,
            "mtp": 0,
            "mtp_acceptance": 0.0,
        },
    },
    deployments=(RECORD,),
    cluster=Cluster("h100x16", "a GPU", 16, 8, 80e9, 3.35e12, 989e12),
    assumptions=(Assumption("routing", "uniform", "the best case", "--routing"),),
)
