"""Contract 1: every layout, overlap mode and micro-batching computes the reference's function."""

import pytest
from hypothesis import strategies as st

from distributed.running import deployment, run_deployment
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload
from parity.contract import check_contract

TINY = PRESETS["paper-tiny"]
WORKLOAD = Workload(num_sequences=35, prompt_len=5, output_len=3, seed=7)

SMALL_LAYOUTS = [
    "tp=1",
    "dp=4,ep=4",
    "dp=3,ep=3",  # 16 experts: 6, 5 and 5
    "dp=2",  # every expert cut in two
    "tp=4,ep=4",
    "pp=2,dp=2,tp=2,ep=4",
    "pp=4",
    "replicas=2,dp=2,ep=2",
]
LARGE_LAYOUTS = ["tp=8,pp=2", "dp=2,tp=8,ep=2", "dp=16,ep=16", "pp=2,dp=4,tp=2,ep=4"]
# Rotating with one micro-batch is the same as drained.
SCHEDULES = [(1, "drained"), (2, "drained"), (2, "rotating"), (4, "drained"), (4, "rotating")]


def marks_of(layout, overlap, num_micro_batches, schedule):
    """Each two of layout, overlap and schedule meet in a quick case; all three in full runs.

    16 ranks take seconds: only in full runs.
    What computes matters to each layout, hardly to how its steps overlap: one way is repeated.
    """
    if layout in LARGE_LAYOUTS:
        return pytest.mark.full
    place = (SMALL_LAYOUTS + LARGE_LAYOUTS).index(layout)
    if (place + SCHEDULES.index((num_micro_batches, schedule))) % 2 != overlap:
        return pytest.mark.full
    return pytest.mark.numerical if (num_micro_batches, schedule) == (2, "rotating") else ()


def every_combination():
    """All layouts, with and without overlap, in every schedule.

    Layouts change last, since a rank keeps its weights while only options change.
    """
    return [
        pytest.param(
            layout,
            overlap,
            num_micro_batches,
            schedule,
            id=f"{layout}-{'overlap' if overlap else 'plain'}-{num_micro_batches} {schedule}",
            marks=marks_of(layout, overlap, num_micro_batches, schedule),
        )
        for layout in SMALL_LAYOUTS + LARGE_LAYOUTS
        for overlap in (False, True)
        for num_micro_batches, schedule in SCHEDULES
    ]


def check(pools, references, model, layout, workload, seed=0, **options):
    """Hold a run that was fed the reference's tokens against the reference."""
    chosen = deployment(layout, **options)
    reference = references.run(model, workload, seed)
    run = run_deployment(
        pools.pool(chosen.layout.world_size),
        model,
        chosen,
        workload,
        seed=seed,
        forced=reference.tokens,
        return_logits=True,
    )
    return check_contract(reference, run.logits, run.tokens)


@pytest.mark.smoke(14)
@pytest.mark.parametrize(
    ("layout", "overlap", "num_micro_batches", "schedule"), every_combination()
)
def test_every_way_to_run(pools, references, layout, overlap, num_micro_batches, schedule):
    check(
        pools,
        references,
        TINY,
        layout,
        WORKLOAD,
        overlap=overlap,
        num_micro_batches=num_micro_batches,
        micro_batch_schedule=schedule,
    )


@pytest.mark.smoke(2)
@pytest.mark.numerical
@pytest.mark.parametrize("top_k", [1, 3, 16])
@pytest.mark.parametrize("layout", ["dp=3,ep=3", "pp=2,dp=2,tp=2,ep=4"])
def test_other_numbers_of_experts_a_token(pools, references, layout, top_k):
    model = TINY.with_overrides(num_experts_per_tok=top_k)
    check(pools, references, model, layout, WORKLOAD, overlap=True, num_micro_batches=2)


@pytest.mark.smoke(8)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "layout", ["tp=1", "dp=4,ep=4", "tp=4,ep=4", "pp=4", "pp=2,dp=2,tp=2,ep=4", "replicas=2,dp=2"]
)
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_fewer_sequences_than_ranks(pools, references, layout, overlap, num_sequences):
    workload = Workload(num_sequences, prompt_len=1, output_len=2, seed=1)
    options = {"num_micro_batches": 2, "micro_batch_schedule": "rotating", "overlap": overlap}
    check(pools, references, TINY, layout, workload, **options)


@pytest.mark.parametrize("layout", ["tp=1", "dp=16,ep=16", "tp=8,pp=2", "pp=2,dp=2,tp=2,ep=4"])
def test_one_token_of_one_sequence(pools, references, layout):
    check(pools, references, TINY, layout, Workload(1, prompt_len=1, output_len=1))


def test_every_position_the_model_has(pools, references):
    model = TINY.with_overrides(max_position_embeddings=9)
    check(pools, references, model, "tp=2,pp=2", Workload(3, prompt_len=7, output_len=3))


@pytest.mark.numerical
def test_nothing_divides_anything(pools, references):
    model = TINY.with_overrides(
        name="odd",
        num_hidden_layers=3,
        hidden_size=30,
        num_attention_heads=6,
        head_dim=10,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=7,
        vocab_size=101,
    )
    workload = Workload(7, prompt_len=3, output_len=3, seed=2)
    for layout in ["pp=2,dp=1,tp=3,ep=3", "tp=6,ep=2", "dp=2,tp=3,ep=2", "dp=4"]:
        check(pools, references, model, layout, workload, overlap=True, num_micro_batches=2)


def test_another_seed_is_another_model(pools, references):
    workload = Workload(4, prompt_len=3, output_len=2, seed=3)
    check(pools, references, TINY, "dp=2,ep=2", workload, seed=5)
    other, chosen = references.run(TINY, workload, 6), deployment("dp=2,ep=2")
    run = run_deployment(
        pools.pool(2), TINY, chosen, workload, seed=5, forced=other.tokens, return_logits=True
    )
    with pytest.raises(AssertionError, match="logit error"):
        check_contract(other, run.logits, run.tokens)


def small_layouts(least: int = 1, most: int = 8):
    """All layouts of so many ranks, with few values for each size."""
    sizes = [1, 2, 3, 4, 8, 16]
    return st.sampled_from(
        [
            f"replicas={replicas},pp={pp},dp={dp},tp={tp},ep={ep}"
            for replicas in (1, 2)
            for pp in (1, 2, 3, 4)
            for dp in sizes
            for tp in (1, 2, 4, 8)
            for ep in sizes
            if least <= replicas * pp * dp * tp <= most and dp * tp % ep == 0
        ]
    )
