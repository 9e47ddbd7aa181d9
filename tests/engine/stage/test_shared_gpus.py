"""What follows where ranks share GPUs: memory, peaks, and what a user is told."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from cli.screen import tells
from cli.stub_llm import MACHINE
from expertlane.balance.holding import placements_of
from expertlane.cli.local_model import _platform_text
from expertlane.comparison.run import _first_on_gpus, machine_record, measure_peak
from expertlane.cost.memory import workload_limits
from expertlane.engine.launch import LoadPlan
from expertlane.engine.ranks.commands import RankRates
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

CPU = replace(MACHINE, device="cpu", kernels="torch", num_idle_gpus=0)
GPU = replace(CPU, device="A card", backend="gloo, staged on the host", num_cores=4)


def ranks(*num_on_each, host="a"):
    """Ranks of a node: how many are on each of its GPUs, in turns."""
    num_ranks = sum(num_on_each)
    of_rank = [num for place in range(max(num_on_each)) for num in num_on_each if num > place]
    return [
        replace(GPU, host=host, ranks_on_device=num, ranks_per_node=num_ranks) for num in of_rank
    ]


@pytest.mark.parametrize(
    ("seen", "first"),
    [
        ([CPU] * 3, []),
        (ranks(1), [0]),
        (ranks(1, 1, 1), [0, 1, 2]),
        (ranks(4), [0]),
        (ranks(2, 2, 1), [0, 1, 2]),
        (ranks(2, 1) + ranks(2, 1, host="b"), [0, 1, 3, 4]),
    ],
)
def test_one_rank_of_each_gpu(seen, first):
    assert _first_on_gpus(seen) == first


def test_memory_and_peaks_count_each_gpu_once():
    seen, asked = ranks(2, 2, 1), []

    def call(command, ranks):
        asked.extend(ranks)
        return [RankRates(1e12, 2e12, 1) for _ in ranks]

    peak = measure_peak(SimpleNamespace(call=call), seen)
    assert asked == [0, 1, 2]
    assert (peak.num_units, peak.unit, peak.gemm_flops_per_s) == (3, "GPU", 3e12)
    assert machine_record(seen, 5, 5).memory_bytes == 3 * GPU.memory_bytes


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_the_memory_of_their_gpu_for_the_cache(num_ranks):
    model, layout = PRESETS["paper-tiny"], Layout(dp=num_ranks, ep=num_ranks)
    workload = Workload(num_sequences=64, prompt_len=8, output_len=8)
    limits = replace(workload_limits(workload, model, layout), num_blocks=1 << 25)

    def blocks(seen):
        plan = LoadPlan(model, layout, Options(), placements_of(model, layout, Options()))
        return plan.fit(limits, seen).num_blocks

    alone = [replace(each, free_bytes=10**9) for each in ranks(*[1] * num_ranks)]
    shared = [replace(each, free_bytes=num_ranks * 10**9) for each in ranks(num_ranks)]
    assert blocks(shared) == blocks(alone)
    if num_ranks > 1:  # two have one GPU, one has another
        mixed = [*alone[:-1], replace(alone[-1], ranks_on_device=2)]
        halved = [replace(each, free_bytes=5 * 10**8) for each in alone]
        assert blocks(mixed) == blocks(halved) < blocks(alone)


def test_a_user_is_told_of_idle_gpus_and_shared_ones():
    idle = replace(CPU, num_idle_gpus=1, ranks_per_node=4)
    assert tells(_platform_text(idle), "torch CPU GPUs 1 ranks 4 EXPERTLANE_TRANSPORT")
    assert tells(_platform_text(ranks(4)[0]), "torch 4 ranks GPU gloo")
    assert _platform_text(CPU) == _platform_text(GPU) == ""
