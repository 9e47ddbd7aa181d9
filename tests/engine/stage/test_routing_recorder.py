"""Routing as it is recorded on ranks, held against the reference's router."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distributed.running import deployment, runner_on
from expertlane.balance.trace import read_trace, write_trace
from expertlane.engine.model_runner import RoutingRecorder
from expertlane.schedule.plan import StepOutcome
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler, FinishedStep, drive
from expertlane.spec.layout import partition
from expertlane.spec.model import PRESETS
from parity import reference as reference_module
from parity.contract import MIN_ROUTER_MARGIN
from parity.reference import moe_block, router_logits

TINY = PRESETS["paper-tiny"]
OUTPUT_LEN = 3
LIMITS = Limits(
    TINY.vocab_size, 64, num_blocks=64, block_size=4, max_num_batched_tokens=9, max_num_seqs=8
)
PROMPTS = [
    np.random.default_rng(seed).integers(0, TINY.vocab_size, length)
    for seed, length in enumerate([5, 1, 12, 3, 7])
]


def record(pools, model, chosen, limits=LIMITS):
    """The trace, and the finished steps."""
    recorder = RoutingRecorder(model)
    runner = runner_on(
        pools.pool(chosen.layout.world_size), model, chosen, limits, ranks_per_node=2
    )
    scheduler = ContinuousScheduler(
        chosen.layout, chosen.options, limits, record=False, record_routing=True
    )
    for seq, prompt in enumerate(PROMPTS):
        scheduler.add(Request(str(seq), prompt, max_tokens=OUTPUT_LEN))
    steps = []
    for step in drive(scheduler, runner):
        recorder.add(step)
        steps.append(step)
    return recorder.trace(), steps


def fed_tokens(steps):
    """[num_seqs]; of each sequence, all tokens whose routing there is: the last is not fed."""
    outputs = [[] for _ in PROMPTS]
    for step in steps:
        for seq, token in step.outcome.token_ids.items():
            outputs[seq].append(token)
    return [
        [*prompt.tolist(), *output[:-1]] for prompt, output in zip(PROMPTS, outputs, strict=True)
    ]


@pytest.fixture
def routed(references, monkeypatch):
    """What the reference's router chooses for a sequence, [num_layers, len, top_k] sorted."""
    chosen = []

    def noting(x, router, up, down, top_k, *bias):
        chosen.append(router_logits(x, router, *bias).topk(top_k).indices.sort().values)
        return moe_block(x, router, up, down, top_k, *bias)

    monkeypatch.setattr(reference_module, "moe_block", noting)

    def route(tokens):
        chosen.clear()
        _, margins = references.model(TINY, 0).forward(torch.tensor([tokens]))
        assert margins.min() >= MIN_ROUTER_MARGIN, "too close to call; use other prompts"
        return torch.stack(chosen).numpy()

    return route


def computed(plan, layout, options):
    """(sequence, position) of a step's tokens: by rank of a stage, then as it computes them."""
    for rank in range(layout.stage_size):
        dp_rank, tp_rank = divmod(rank, layout.tp)
        for micro_batch in plan.micro_batches:
            for part in micro_batch[dp_rank].split(2 if options.overlap else 1):
                seqs = np.repeat(part.seq_ids, part.num_scheduled_tokens).tolist()
                places = [
                    start + new
                    for start, num in zip(
                        part.num_computed_tokens, part.num_scheduled_tokens, strict=True
                    )
                    for new in range(num)
                ]
                own = partition(part.num_tokens, layout.tp)[tp_rank]
                yield from [(seqs[token], places[token]) for token in own]


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp=4,ep=4", {"dispatch": "hierarchical", "overlap": True}),
        ("tp=1", {}),
        ("tp=1", {"overlap": True, "num_micro_batches": 2}),
        ("dp=2,ep=2", {"num_redundant_experts": 3, "placement": "round_robin"}),
        ("tp=2,ep=2", {"dispatch": "all_gather"}),
        ("dp=2,tp=2", {"overlap": True}),
        ("replicas=2,tp=2", {}),
        ("pp=2", {"overlap": True, "num_micro_batches": 3}),
        (
            "pp=2,dp=2,ep=2",
            {"overlap": True, "num_micro_batches": 2, "micro_batch_schedule": "rotating"},
        ),
        ("pp=2,tp=2,ep=2", {"overlap": True, "num_micro_batches": 2}),
    ],
)
def test_the_choices_of_the_reference_s_router(pools, routed, layout, options):
    chosen = deployment(layout, **options)
    trace, steps = record(pools, TINY, chosen)

    assert trace.layers == (0, 1, 2, 3)
    assert (trace.model, trace.num_experts) == ("paper-tiny", 16)
    steps.sort(key=lambda step: step.plan.step)
    order = [
        (step.plan.step, *token)
        for step in steps
        for token in computed(step.plan, chosen.layout, chosen.options)
    ]
    assert trace.step.tolist() == [step for step, _, _ in order]
    fed = fed_tokens(steps)
    assert sorted(token[1:] for token in order) == [
        (seq, position) for seq, tokens in enumerate(fed) for position in range(len(tokens))
    ]
    by_seq = [routed(tokens) for tokens in fed]
    expected = np.stack([by_seq[seq][:, position] for _, seq, position in order], axis=1)
    np.testing.assert_array_equal(np.sort(trace.topk_ids), expected)


def test_dense_layers_have_none(pools):
    model = TINY.with_overrides(dense_layers=(0, 2), intermediate_size=24)
    trace, steps = record(pools, model, deployment("pp=2"))
    assert trace.layers == (1, 3)
    assert trace.num_tokens == sum(map(len, fed_tokens(steps)))


def handmade_step(step):
    """One token, whose experts are the step's number and the next; rank 1 has none."""
    ids = np.array([[step, step + 1]], dtype=np.int32)
    ranks = [SimpleNamespace(topk_ids=dict.fromkeys(range(4), each)) for each in (ids, ids[:0])]
    outcome = StepOutcome({}, {}, tuple(ranks), 0.0, 0.0)
    return FinishedStep(SimpleNamespace(step=step), outcome)


def test_steps_may_end_in_any_order(tmp_path):
    recorder = RoutingRecorder(TINY)
    assert recorder.trace().num_tokens == 0
    for step in (3, 0):
        recorder.add(handmade_step(step))
    write_trace(recorder.trace(), tmp_path / "trace.npz")
    trace = read_trace(tmp_path / "trace.npz")
    assert trace.step.tolist() == [0, 3]
    assert trace.topk_ids.tolist() == [[[0, 1], [3, 4]]] * 4
    assert trace.topk_ids.dtype == np.int16
