"""One rank's part of a decode step on this device, beside what is projected of it.

- The paper's two deployments: one rank of EP 16 (one expert of each layer, 64 sequences), and one
  of each stage of TP 8 × PP 2 (1,024 sequences); both stages together are a step without
  micro-batches.
- Batch 1 of models that fill most of the memory: as many of their layers as fit.

Everything is computed but nothing sent: what other ranks would send is copied on the device
(one_rank.py). `step` is the median by the host's clock, launched operation by operation; `graph`
launched as the engine's CUDA graph, in the dispatch form that can be recorded; `kernels` what its
kernels take without gaps, by torch's profiler. Projected are computing terms alone, without
transfers, launches and driver: with the H100 profile that comes with expertlane, and with that of
--profile.

    PYTHONPATH=src python benchmarks/bench_one_rank.py [--profile FILE] [--json FILE] [--rehearse]

`--rehearse` runs small models, on any machine.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from one_rank import OneRank, kernel_seconds, seconds

from expertlane import __version__
from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.profile import Profile, kernels_of, read_profile
from expertlane.cost.pricing import law_dtype
from expertlane.cost.routing import GivenRouting
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.operation import NumberTypes, Operation
from expertlane.cost.step.program import ProgramBuilder, StepProgram, count
from expertlane.cost.step.step_list import ENGINE_ON_GPUS, KernelSet
from expertlane.results.step_record import RankRecord
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.names import Stage
from expertlane.spec.tensors import num_params

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bfloat16"
EP, TP_PP = Layout(dp=16, ep=16), Layout(tp=8, pp=2)
FULL_SHARE = 0.75  # of free memory that a model's weights may take
MIXTRAL = ModelConfig(
    name="Mixtral-8x7B",
    num_hidden_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    head_dim=128,
    num_key_value_heads=8,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=14_336,
    gated_mlp=True,
    hidden_act="silu",
    vocab_size=32_000,
    max_position_embeddings=32_768,
)
QWEN3 = MIXTRAL.with_overrides(
    name="Qwen3-30B-A3B",
    num_hidden_layers=48,
    hidden_size=2048,
    num_key_value_heads=4,
    qk_norm="head",
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    vocab_size=151_936,
)
SMALL = PRESETS["paper-tiny"].with_overrides(num_attention_heads=16, head_dim=16)


@dataclass(frozen=True)
class Work:
    """A decode step of one rank.

    Attributes:
        group: of works that the summary judges together.
        num_seqs: of a data-parallel rank.
        context: positions of each sequence before the step.
    """

    group: str
    name: str
    model: ModelConfig
    layout: Layout
    rank: int
    num_seqs: int
    context: int


@dataclass(frozen=True)
class Row:
    """What was measured, counted and projected.

    Attributes:
        graph_s, kernels_s: None where there are none.
        why_no_graph: in a line.
        read_bytes: of weights, and of keys and values; `weight_bytes` of them.
        copied_bytes: in place of transfers.
        is_counted: whether the recorder's FLOPs and bytes are those that are priced, exactly.
        projected: by profile, the low, likely and high seconds of computing.
    """

    group: str
    name: str
    step_s: float
    graph_s: float | None
    why_no_graph: str
    kernels_s: float | None
    read_bytes: int
    weight_bytes: int
    flops: int
    pairs_per_layer: float
    copied_bytes: int
    is_counted: bool
    projected: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def best_s(self) -> float:
        """As the engine can run it."""
        return self.step_s if self.graph_s is None else self.graph_s


def fitting(model: ModelConfig, free_bytes: float) -> ModelConfig:
    """As many of its layers as fit; its name says how many that are."""
    sizes = [
        2 * num_params(model.with_overrides(num_hidden_layers=each + 1))
        for each in range(model.num_hidden_layers)
    ]
    num = sum(each <= FULL_SHARE * free_bytes for each in sizes)
    name = model.name if num == len(sizes) else f"{model.name}, {num} of {len(sizes)} layers"
    return model.with_overrides(name=name, num_hidden_layers=max(1, num))


def works(*, rehearse: bool) -> Iterator[Work]:
    """Those of the paper, then batch 1; small ones in a rehearsal."""
    paper = SMALL if rehearse else PRESETS["paper"]
    per_rank = 4 if rehearse else 64
    for context in (1,) if rehearse else (1, 1024):
        yield Work(f"paper EP 16, context {context}", "rank", paper, EP, 0, per_rank, context)
        for stage, rank in enumerate((0, TP_PP.tp)):
            group = f"paper TP 8 × PP 2, context {context}"
            yield Work(group, f"stage {stage}", paper, TP_PP, rank, 16 * per_rank, context)
    for model in (MIXTRAL, QWEN3):
        if rehearse:
            small = {"hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": 128}
            chosen = model.with_overrides(num_hidden_layers=2, **small)
        else:
            chosen = fitting(model, torch.cuda.mem_get_info(DEVICE)[0])
        yield Work(f"batch 1, {chosen.name}", "alone", chosen, Layout(), 0, 1, 128)


def program_of(one: OneRank, work: Work, record: RankRecord, kernels: KernelSet) -> StepProgram:
    """The step of all ranks, as if all did what this one recorded."""
    model, layout = work.model, work.layout
    builder = ProgramBuilder(
        model,
        layout,
        one.placements,
        types=NumberTypes.all_of(DTYPE),
        kernels=kernels,
    )
    ids = next(iter(record.topk_ids.values()))  # alike in all layers, where ranks are several
    of_rank = [
        record.topk_ids
        if layout.world_size == 1
        else dict.fromkeys(layout.layers_of_stage(model.num_hidden_layers, pp_rank), ids)
        for pp_rank in range(layout.pp)
        for _ in range(layout.stage_size)
    ]
    part = PartSizes.even(layout.dp, layout.tp, work.num_seqs, 1, work.context)
    return builder.build_sized([("all_to_all", [part])], GivenRouting(of_rank))


def computing_s(
    program: StepProgram, layout: Layout, rank: int, profile: Profile
) -> tuple[float, float, float]:
    """Low, likely and high seconds of the operations of a rank, one after the other."""
    device, types = DeviceModel(profile), NumberTypes.all_of(DTYPE)
    pp_rank, place = divmod(rank, layout.stage_size)
    total = np.zeros(3)
    for step, num in program.stages[pp_rank][0].distinct_steps():
        if isinstance(step, Operation):
            times = device.times(step.kind, law_dtype(types, step), step.sizes)
            total += num * np.broadcast_to(times.bounds, (3, layout.stage_size))[:, place]
    low, likely, high = total.tolist()
    return low, likely, high


def is_counted(program: StepProgram, one: OneRank, record: RankRecord) -> bool:
    """Whether contract 8 holds for the rank."""
    of_rank = count(program, one.model.num_hidden_layers, one.model.num_experts)[one.rank]
    names = "flops", "weight_bytes", "kv_bytes", "num_collectives"
    counted, priced = ([getattr(each, name) for name in names] for each in (record, of_rank))
    priced[-1][Stage.HAND_OVER] = 0  # of hidden states, which nobody takes here
    return all(map(np.array_equal, counted, priced))


def run(work: Work, profiles: dict[str, Profile]) -> Row:
    """Make the rank, and measure its step."""
    one = OneRank(work.model, work.layout, work.rank, getattr(torch, DTYPE), DEVICE)
    step = one.step(work.num_seqs, work.context, 1)
    record, before = one.record(step), one.copied_bytes
    step()
    copied = one.copied_bytes - before
    step_s, kernels_s = seconds(step, DEVICE), kernel_seconds(step, DEVICE)
    graph_s, why = None, "the device has none"
    try:
        if (replay := one.graph_step(work.num_seqs, work.context)) is not None:
            graph_s, why = seconds(replay, DEVICE), ""
            kernels_s = kernel_seconds(replay, DEVICE)
    except RuntimeError as error:  # something in it cannot be captured
        why = str(error).strip().splitlines()[0][:120]
    own = program_of(one, work, record, ENGINE_ON_GPUS)
    projected = {
        name: computing_s(
            program_of(one, work, record, kernels_of(profile)), work.layout, work.rank, profile
        )
        for name, profile in profiles.items()
    }
    return Row(
        work.group,
        work.name,
        step_s,
        graph_s,
        why,
        kernels_s,
        int(record.weight_bytes.sum()) + record.kv_bytes,
        int(record.weight_bytes.sum()),
        int(record.flops.sum()),
        float(record.num_tokens_per_expert.sum()) / len(record.topk_ids),
        copied,
        is_counted(own, one, record),
        projected,
    )


def said(row: Row) -> Iterator[str]:
    """A row as lines of at most 80 columns."""

    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds:.3f}"

    yield f"{row.group}: {row.name}"
    yield (
        f"  step {ms(row.step_s)} ms, graph {ms(row.graph_s)}, kernels {ms(row.kernels_s)}; "
        f"{row.read_bytes / row.best_s / 1e9:,.0f} GB/s"
    )
    if row.why_no_graph and DEVICE.type == "cuda":
        yield f"  no graph: {row.why_no_graph}"[:80]
    yield (
        f"  {row.read_bytes / 1e6:,.1f} MB read, {row.flops / 1e9:,.1f} GFLOP, "
        f"{row.pairs_per_layer:.0f} pairs a layer; counts {'equal' if row.is_counted else 'DIFFER'}"
    )
    for name, (low, likely, high) in row.projected.items():
        yield f"  projected by {name}: {ms(likely)} ms ({ms(low)} to {ms(high)})"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--profile", type=Path, help="measured on this device")
    options.add_argument("--json", type=Path, metavar="FILE")
    options.add_argument("--rehearse", action="store_true", help="small, on any machine")
    given = options.parse_args()
    if DEVICE.type == "cpu" and not given.rehearse:
        print("bench_one_rank: torch sees no GPU here; nothing was run", file=sys.stderr)
        return 2
    profiles = {"h100": read_profile("h100")}
    if given.profile is not None and given.profile.exists():
        profiles["this card"] = read_profile(given.profile)
    device = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "CPU"
    rows: list[Row] = []
    with torch.inference_mode():
        for work in works(rehearse=given.rehearse):
            rows.append(run(work, profiles))
            print("\n".join(said(rows[-1])), flush=True)
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
            if given.json is not None:
                line = {"card": device, "version": __version__, "torch": str(torch.__version__)}
                text = json.dumps(line | {"rows": [asdict(row) for row in rows]}, indent=1)
                given.json.write_text(text + "\n")
    return int(not all(row.is_counted for row in rows))


if __name__ == "__main__":
    sys.exit(main())
