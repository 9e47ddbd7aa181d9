"""The cache's size by a measured step: with made-up devices, and on real ranks of this host."""

from dataclasses import replace

import numpy as np
import pytest

from cli.screen import tells
from cli.stub_llm import MACHINE
from distributed.running import deployment, runner_on
from expertlane.engine.ranks.commands import (
    Deploy,
    DescribeMachine,
    HeldBytes,
    MeasureStep,
    ReadTotals,
    RecordGraphs,
    SetDispatch,
    StageSpec,
)
from expertlane.engine.warm_up import largest_step, measured_limits
from expertlane.errors import CapacityError
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import GraphLimits, Options
from expertlane.spec.layout import Layout, Members
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Phase

TINY = PRESETS["paper-tiny"]
LIMITS = Limits(TINY.vocab_size, 64, 1000, 16, max_num_batched_tokens=40, max_num_seqs=12)
GB = 10**9
OPTIONS = Options()


class MadeUp:
    """Ranks with devices of 80 GB, of which a step takes so much and weights leave so much.

    Args:
        graph_gb: what each rank's device has less once the largest graphs are there, and then
            others; None for ranks without graphs.
    """

    def __init__(self, free_gb, step_gb, weight_gb=10, block_mb=100, graph_gb=None, **machine):
        self.machines = [
            replace(
                MACHINE, device="H100", memory_bytes=80 * GB, free_bytes=int(each * GB), **machine
            )
            for each in free_gb
        ]
        self.step_bytes = [int(each * GB) for each in step_gb]
        self.held = HeldBytes(weight_gb * GB, block_mb * 10**6)
        if graph_gb is not None:  # a block more, for padding
            self.held = HeldBytes(weight_gb * GB, 2 * block_mb * 10**6, has_graphs=True)
        self.graph_bytes = [int(each * GB) for each in graph_gb or ()]
        self.deployed, self.recorded = [], []

    def call(self, command, *, ranks=None):
        if isinstance(command, DescribeMachine):
            num = sum(isinstance(each, RecordGraphs) for each in self.recorded)
            taken = sum(self.graph_bytes[:num])
            return [replace(each, free_bytes=each.free_bytes - taken) for each in self.machines]
        if isinstance(command, RecordGraphs | SetDispatch):
            if isinstance(command, SetDispatch):
                self.recorded.clear()
            self.recorded.append(command)
            return [1] * len(self.machines)
        self.deployed.append(command.num_blocks)
        return [self.held] * len(self.machines)

    def submit_each(self, commands):
        assert all(isinstance(command, MeasureStep) for command, _ in commands)
        return [rank for _, ranks in commands for rank in ranks]

    def collect(self, ranks):
        return [self.step_bytes[rank] for rank in ranks]


def measured(pool, layout, limits=LIMITS, options=OPTIONS):
    layout, lines = Layout.parse(layout), []
    spec = StageSpec(TINY, layout, [None] * TINY.num_hidden_layers, 0, 8)
    graphs = GraphLimits(limits.max_num_seqs, limits.max_model_len)
    given = Deploy(spec, options, limits.num_blocks, limits.block_size, graphs)
    found = measured_limits(pool, given, Members(layout), limits, lines.append)
    assert pool.deployed == [1]  # nothing but a block, before it is known
    return found, lines


GRAPHS = {"graph_gb": [0.5, 0.1]}  # sizes 1, 2, 4, 8, 12: 0.5 GB, and four times 0.1 GB


@pytest.mark.parametrize(
    ("free_gb", "step_gb", "given", "limits", "num_blocks"),
    [
        ([68], [2.55], {}, {}, 574),  # 68 GB less a reserve of 8 and a step of 2.55: 57.45 GB
        ([68], [2.55], {}, {"num_blocks": 300}, 300),
        ([68, 60], [5, 1], {}, {}, 470),  # 60 - 8 - 5 GB: the fullest rank, the largest step
        ([68, 68], [2, 1], {"ranks_on_device": 2}, {}, 280),  # (68 - 8) / 2 - 2 GB
        ([68], [2.55], GRAPHS, {}, 564),  # 0.9 GB less, and a block for padding
        ([68, 68], [2, 1], GRAPHS | {"ranks_on_device": 2}, {}, 274),  # half of 0.9 GB each
        ([68], [2.55], {"graph_gb": [0.5]}, {"max_num_seqs": 1}, 568),
    ],
)
def test_what_is_left_beside_weights_step_and_graphs(free_gb, step_gb, given, limits, num_blocks):
    pool = MadeUp(free_gb, step_gb, **given)
    layout = "tp=1" if len(free_gb) == 1 else "dp=2,ep=2"
    found, (line,) = measured(pool, layout, replace(LIMITS, **limits))
    assert found == replace(LIMITS, **limits | {"num_blocks": num_blocks})
    assert tells(line, f"memory rank weights 10 GB KV cache {num_blocks} blocks")
    sizes = [each.size for each in pool.recorded if isinstance(each, RecordGraphs)]
    most = limits.get("max_num_seqs", 12)
    assert sizes == [most, 8][: len(given.get("graph_gb", ()))]


def test_memory_of_graphs_of_several_forms():
    """For each that may be timed as many sizes; with overlap there are none."""
    pool = MadeUp([68], [2.55], graph_gb=[0.5, 0.1])
    num_forms = len(OPTIONS.forms(Layout(), 8))
    options = Options(dispatch="auto", overlap="auto")
    found, _ = measured(pool, "tp=1", options=options)
    modes = options.modes(Layout(), 8)
    assert len(modes) >= num_forms
    num_sizes = 5 * len([mode for mode in modes if not mode.overlap])
    assert found.num_blocks == int((68 - 8 - 2.55 - 0.5 - 0.1 * (num_sizes - 1)) / 0.1) - 1


def test_too_little_memory_for_graphs():
    with pytest.raises(CapacityError, match=r"of activations, 0\.9 GB are for CUDA graphs"):
        measured(MadeUp([13], [4], graph_gb=[0.5, 0.1]), "tp=1")


def test_too_little_memory():
    with pytest.raises(CapacityError) as error:
        measured(MadeUp([13], [4.9]), "tp=1")  # 0.1 GB, of 0.4 GB that a sequence takes
    assert tells(
        str(error.value), "paper-tiny tp=1 15.3 GB rank weights 10 KV cache 0.4 4.9 15 memory free"
    )


@pytest.mark.parametrize(("tokens", "seqs"), [(40, 12), (5, 12), (40, 1), (1, 1)])
def test_the_largest_step(tokens, seqs):
    limits = replace(LIMITS, max_num_batched_tokens=tokens, max_num_seqs=seqs)
    plan = largest_step(Layout.parse("dp=2,ep=2"), limits, replica=0)
    for batch in plan.micro_batches[0]:
        assert batch.num_seqs == min(tokens, seqs)
        assert batch.num_tokens == tokens
        assert not batch.block_tables.any()
    assert len(plan.admitted) == 2 * min(tokens, seqs)


def test_on_ranks_of_this_host(pools):
    """All pairs go to the first rank's experts; afterwards a step is as if there had been none."""
    made = deployment("dp=2,ep=2,tp=2")
    pool, limits, lines = pools.pool(4), replace(LIMITS, num_blocks=9), []
    batch = Batch(
        seq_ids=np.arange(1),
        num_scheduled_tokens=np.array([3]),
        num_computed_tokens=np.array([0]),
        token_ids=np.array([5, 6, 7]),
        block_tables=np.array([[4]], dtype=np.int32),
        yields_token=np.ones(1, dtype=np.bool_),
    )
    batches = batch, replace(batch, seq_ids=np.array([1]))
    plan = StepPlan(0, 0, Phase.PREFILL, (batches,), return_logits=True)

    def logits(**flags):
        runner = runner_on(*(pool, TINY, made, limits), log=lines.append, **flags)
        assert runner.limits == limits
        assert all(each.kv_bytes == runner.held[0].kv_bytes for each in runner.held)
        return runner.collect(runner.submit(plan)).logits

    plain, after = logits(), logits(measures_memory=True)
    assert tells(lines[0], "memory rank weights")
    for seq in (0, 1):
        np.testing.assert_array_equal(plain[seq], after[seq])

    runner = runner_on(pool, TINY, made, limits)
    numbers = runner.members.numbers
    pool.call(ReadTotals(), ranks=numbers)
    steps = largest_step(made.layout, limits).of_dp_ranks()
    table = Options().fixed_table
    commands = [
        (MeasureStep(step, (table,)), runner.members.of_dp_rank[0, dp_rank])
        for dp_rank, step in enumerate(steps)
    ]
    assert all(each >= 0 for each in pool.collect(pool.submit_each(commands)))
    totals = pool.call(ReadTotals(), ranks=numbers)
    num_pairs = sum(int(each.num_tokens.sum()) for each in totals)
    assert num_pairs == 2 * 40 * TINY.num_experts_per_tok * TINY.num_hidden_layers
    used = {expert for each in totals for expert in each.experts}
    assert used == {*range(TINY.num_experts_per_tok)}
