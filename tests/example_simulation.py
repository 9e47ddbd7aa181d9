"""A simulation of made-up numbers."""

import example_timelines
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.simulation import (
    Number,
    PhaseSimulation,
    PoolSimulation,
    RankMemoryResult,
    Service,
    SimulatedCluster,
    SimulatedDeployment,
    SimulatedLoad,
    Simulation,
    SimulationAssumption,
    SoftwareVersions,
    Spread,
)
from expertlane.results.traffic import TrafficBytes
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link

NUMBER = Number(2.0, 1.0, 4.0, "fitted")
SPREAD = Spread(NUMBER, NUMBER, NUMBER)
SIZES = LayoutSizes.of(Layout(dp=16, ep=16))
PHASE = PhaseSimulation(
    num_steps=3,
    num_tokens=5.5,
    num_seqs=2.0,
    seconds=NUMBER,
    step_s=SPREAD,
    shares={"weight reads": 0.75, "launch": 0.25},
    floor_s=0.5,
    flops_utilisation=0.1,
    read_utilisation=0.2,
    basis_shares={"fitted": 1.0},
    extrapolated_share=0.0,
    traffic_bytes={link.label: TrafficBytes(3, 2, 1) for link in Link},
    sent_bytes=tuple(
        tuple(0 if source == to else 1000 + to for to in range(16)) for source in range(16)
    ),
    tokens_by_ranks_reached=(0, 3, 1),
    rank_pairs=1.5,
    timeline=example_timelines.timeline(16),
)
SIMULATION = Simulation(
    command="expertlane simulate paper",
    created="2026-01-01T00:00:00+00:00",
    versions=SoftwareVersions("0", "3", "2"),
    model={"name": "paper", "sliding_window": []},
    cluster=SimulatedCluster("h100x16", "a GPU", 16, 8, 0),
    deployment=SimulatedDeployment(
        layout=SIZES,
        prefill_layout=None,
        options=Options(),
        dtype="bfloat16",
        kv_dtype="bfloat16",
        execution="graph",
        routing="uniform",
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        block_size=16,
        mtp=0,
        mtp_acceptance=0.0,
    ),
    workload=SimulatedLoad(8, None, 8, "32", "4:8", 0, 256, 48),
    assumptions=(SimulationAssumption("routing", "uniform", "--routing", "the best case"),),
    service=Service(SPREAD, None, SPREAD, NUMBER, NUMBER, NUMBER, NUMBER),
    pools=(PoolSimulation("both", SIZES, RankMemoryResult(1, 2, 3, 9, 10, 4), 4, 0, PHASE, None),),
    num_tokens_per_expert=((0, 0), (5, 3)),
)
