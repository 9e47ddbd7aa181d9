"""Results of made-up runs, built through the same calls as real ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

import example_timelines
from expertlane.comparison.assumptions import measured_assumptions
from expertlane.comparison.records import measured_record
from expertlane.cost.memory import workload_limits
from expertlane.engine.ranks.commands import HeldBytes
from expertlane.results.estimate import Estimate
from expertlane.results.hardware import Machine, MachinePeak, VirtualTime
from expertlane.results.metrics import num_tokens_per_expert, phase_record
from expertlane.results.record import EXPERIMENT, SCALING, DeploymentRecord, PairRecord
from expertlane.results.results import Results
from expertlane.results.step_record import StepRecord
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Experiment
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Cause, Phase, Stage, Traffic
from expertlane.spec.workload import Workload
from records import rank_record, step_record

MODEL = PRESETS["paper-tiny"]
WORKLOAD = Workload(num_sequences=16, prompt_len=4, output_len=3)
PEAK = MachinePeak(1e9, 1e9, 2, "core", "float32")
RANKS_PER_NODE = 8

TENSOR = Deployment("TP 8 × PP 2", Layout(tp=8, pp=2), is_baseline=True)
ROTATING = Deployment(
    "TP 8 × PP 2, 2 micro-batches rotating",
    Layout(tp=8, pp=2),
    Options(num_micro_batches=2, micro_batch_schedule="rotating"),
    is_baseline=True,
)
EXPERT = Deployment("EP 16", Layout(dp=16, ep=16))
OVERLAP = Deployment("EP 16, two-batch overlap", Layout(dp=16, ep=16), Options(overlap=True))
SMALL = Deployment("EP 1", Layout())


def machine(num_cores: int = 2) -> Machine:
    """A made-up machine."""
    return Machine(
        cpu_name="Example CPU",
        device="cpu",
        num_cores=num_cores,
        num_idle_gpus=0,
        memory_bytes=8 * 10**9,
        num_ranks=16,
        ranks_per_node=RANKS_PER_NODE,
        backend="gloo",
        dtype="float32",
        kernels="torch",
        peak=PEAK,
    )


def sent(rank: int, world_size: int, stage: Stage) -> dict[tuple[Stage, Traffic, int], int]:
    """100 bytes of payload and 8 of metadata to each rank that is there, padding to the first."""
    others = [other for other in range(world_size) if other != rank]
    padding = {(stage, Traffic.PADDING, 0): 5} if rank else {}
    return padding | {
        (stage, traffic, other): num_bytes
        for other in others
        for traffic, num_bytes in ((Traffic.PAYLOAD, 100), (Traffic.METADATA, 8))
    }


def steps(
    deployment: Deployment,
    phase: Phase,
    *,
    start_s: float,
    step_s: float,
    num_rounds: int,
    num_seqs: int = WORKLOAD.num_sequences,
) -> list[StepRecord]:
    """Steps one after another in which each rank computes, dispatches, and lacks the last 10 %."""
    layout, tokens_each = deployment.layout, WORKLOAD.prompt_len if phase is Phase.PREFILL else 1
    stage = Stage.DISPATCH if layout.ep > 1 else Stage.COLLECTIVES
    wall = {(0, 0, Stage.EXPERTS): 0.5 * step_s, (0, 0, stage): 0.4 * step_s}
    load = np.ones((MODEL.num_hidden_layers, MODEL.num_experts), dtype=int).tolist()
    records = [
        rank_record(
            rank,
            wall=wall,
            cpu={(0, 0, Stage.EXPERTS): 0.1 * step_s},
            blocked={(0, 0, stage): (0.1 if rank == 0 else 0.3) * step_s},
            process_cpu_s=0.2 * step_s,
            tokens=load,
            flops=1000,
            weight_bytes=2000,
            kv_bytes=10,
            sent=sent(rank, layout.world_size, stage),
            world_size=layout.world_size,
            by_ranks_reached=(0, 1, 3)[: layout.world_size + 1],
            by_nodes_reached=(0, 3, 1)[: layout.world_size + 1],
            num_remote_copies=(2, 1),
            num_collectives=4,
        )
        for rank in range(layout.world_size)
    ]
    return [
        step_record(
            start_s + round_ * step_s,
            start_s + (round_ + 1) * step_s,
            range(num_seqs),
            records,
            phase=phase,
            num_tokens=tokens_each * num_seqs,
        )
        for round_ in range(num_rounds)
    ]


def record(
    deployment: Deployment, step_s: float, role: str = EXPERIMENT, *, output_len: int = 3
) -> DeploymentRecord:
    """What a deployment with decode steps of `step_s` and a prefill of 10 such gives.

    A size of scaling has steps of one sequence a rank too, which take half as long.
    """
    layout = deployment.layout
    prefill = steps(deployment, Phase.PREFILL, start_s=0, step_s=10 * step_s, num_rounds=1)
    decode = steps(deployment, Phase.DECODE, start_s=50, step_s=step_s, num_rounds=output_len - 1)
    phases = [
        replace(
            phase_record(layout, of_phase, PEAK, RANKS_PER_NODE),
            timeline=example_timelines.timeline(layout.world_size, times * step_s),
        )
        for of_phase, times in ((prefill, 10), (decode, 1))
        if of_phase
    ]
    if role == SCALING and output_len > 1:
        num_seqs, num_rounds = layout.world_size, output_len - 1
        share = steps(
            *(deployment, Phase.DECODE),
            start_s=90,
            step_s=step_s / 2,
            num_rounds=num_rounds,
            num_seqs=num_seqs,
        )
        phases.append(phase_record(layout, share, PEAK, RANKS_PER_NODE))
    return measured_record(
        deployment,
        MODEL,
        phases,
        [HeldBytes(1000 + rank, 100) for rank in range(layout.world_size)],
        np.zeros((WORKLOAD.num_sequences, output_len), dtype=np.int64),
        roles=(role,),
        num_tokens_per_expert=num_tokens_per_expert([*prefill, *decode]),
    )


def results(
    step_s: Sequence[tuple[Deployment, float]],
    *,
    scaling: Sequence[tuple[Deployment, float]] = (),
    output_len: int = 3,
    num_cores: int = 2,
) -> Results:
    """Results of several deployments, each given with its step time."""
    experiment = Experiment(
        "example",
        MODEL,
        Workload(WORKLOAD.num_sequences, WORKLOAD.prompt_len, output_len),
        tuple(deployment for deployment, _ in step_s),
        tuple(deployment for deployment, _ in scaling),
    )
    limits = {
        each.name: workload_limits(experiment.workload, MODEL, each.layout)
        for each in experiment.deployments + experiment.scaling
    }
    where = machine(num_cores)
    return Results.now(
        "comparison",
        "expertlane compare",
        {"experiment": experiment},
        [
            *(record(*each, output_len=output_len) for each in step_s),
            *(record(*each, SCALING, output_len=output_len) for each in scaling),
        ],
        torch_version="2.9",
        machine=where,
        assumptions=measured_assumptions(experiment, where, limits),
    )


def usual() -> Results:
    """Two baselines, the proposal without and with overlap, and one more size for scaling."""
    return results(
        [(TENSOR, 0.4), (ROTATING, 0.32), (EXPERT, 0.16), (OVERLAP, 0.12)], scaling=[(SMALL, 0.2)]
    )


def with_pair(
    given: Results, ratio: Estimate, causes_s: Mapping[Cause, Estimate] | None = None
) -> Results:
    """The same, its first and its last deployment measured in turns; the last is the faster."""
    other, *_, one = given.select("measured", EXPERIMENT)
    steps_s = one.decode.round_s.value, other.decode.round_s.value
    pair = PairRecord(
        "measured", one.name, other.name, Phase.DECODE, 5, ratio, *steps_s, dict(causes_s or {})
    )
    return replace(given, pairs=(pair,))


def in_virtual_time(given: Results, virtual: VirtualTime) -> Results:
    """The same records in virtual time too."""
    own = tuple(replace(each, source="virtual") for each in given.select("measured"))
    pairs = tuple(replace(each, source="virtual") for each in given.pairs)
    return replace(
        given,
        deployments=given.deployments + own,
        pairs=given.pairs + pairs,
        virtual_time=virtual,
    )
