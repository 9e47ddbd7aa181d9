"""Programs as such: order, sharing, sizes by hand."""

from dataclasses import replace

import numpy as np
import pytest

from cost import projected
from cost.plans import DECODE, PREFILL, random_plan
from cost.tiny_models import MODELS
from expertlane.cost.routing import GivenRouting, PowerLawRouting
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.operation import (
    OUTSIDE,
    SIZES,
    NumberTypes,
    Operation,
    OpKind,
    Transfer,
    TransferKind,
)
from expertlane.cost.step.program import count
from expertlane.cost.step.step_list import GPU_LIBRARIES
from expertlane.spec.deployment import DISPATCH_FORMS, DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Stage, Traffic

# 2 layers, hidden size 8, 2 heads of 4, 4 experts of inner size 6, vocabulary 12.
MODEL = PRESETS["paper-tiny"].with_overrides(
    name="countable",
    num_hidden_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    head_dim=4,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    vocab_size=12,
)
FLOAT32 = NumberTypes.all_of("float32")


def builder(model=MODEL, layout="dp=2,ep=2", types=FLOAT32, **more):
    return projected.builder_of(layout, model, types=types, **more)


def given(topk_ids):
    """Choices by rank, the same in all layers."""
    ids = [np.array(each, dtype=np.int32).reshape(-1, 2) for each in topk_ids]
    return GivenRouting([{0: each, 1: each} for each in ids])


def test_by_hand():
    """Rank 0 has one sequence of 3 new tokens after 4; rank 1 one of 1 token after 9."""
    part = PartSizes(
        dp=2,
        tp=1,
        num_new=np.array([3, 1]),
        num_cached=np.array([4, 9]),
        dp_rank=np.array([0, 1]),
        yields=np.array([True, False]),
    )
    # Experts 0 and 1 are rank 0's. Of rank 0's tokens one stays, two go to rank 1, one of them
    # with both choices; rank 1's token goes to both.
    routing = given([[[0, 1], [0, 2], [2, 3]], [[1, 2]]])
    program = builder().build_sized([("all_to_all", [part])], routing, record=True)
    zero, one = count(program, 2, 4)
    layers = 2
    # Attention: 4 matrices of 64; rank 0 has 5 + 6 + 7 pairs and reads 7 positions, rank 1 10.
    assert zero.flops[Stage.ATTENTION] == layers * (2 * 3 * 256 + 4 * 18 * 8)
    assert one.flops[Stage.ATTENTION] == layers * (2 * 1 * 256 + 4 * 10 * 8)
    assert (zero.kv_bytes, one.kv_bytes) == (layers * 2 * 7 * 32, layers * 2 * 10 * 32)
    # Experts: up and down of 48. Rank 0 computes 4 pairs of 2 experts, rank 1 4 of 2.
    assert zero.flops[Stage.EXPERTS] == one.flops[Stage.EXPERTS] == layers * 4 * 2 * 96
    assert zero.weight_bytes[Stage.EXPERTS] == layers * 2 * 96 * 4
    assert zero.num_tokens_per_expert.tolist() == [[2, 2, 0, 0]] * layers
    assert one.num_tokens_per_expert.tolist() == [[0, 0, 3, 1]] * layers
    # Two tokens go from 0 to 1 as rows of 32 bytes, and come back as 3 pairs; one the other way.
    payload = [each.sent_bytes[:, Traffic.PAYLOAD] for each in (zero, one)]
    assert payload[0][Stage.DISPATCH].tolist() == [0, layers * 2 * 32]
    assert payload[1][Stage.DISPATCH].tolist() == [layers * 32, 0]
    assert payload[0][Stage.COMBINE].tolist() == [0, layers * 32]
    assert payload[1][Stage.COMBINE].tolist() == [layers * 3 * 32, 0]
    # Counts of 2 ranks, rows and pairs; with every row 2 ids.
    assert zero.sent_bytes[Stage.DISPATCH, Traffic.METADATA, 1] == layers * (32 + 2 * 8)
    assert zero.num_collectives.sum() == layers * 3
    assert zero.tokens_by_ranks_reached.tolist() == [0, layers * 2, layers * 1]
    # The head takes the one sequence that goes on.
    assert (zero.flops[Stage.HEAD], one.flops[Stage.HEAD]) == (2 * 8 * 12, 0)


def program_of(form="all_to_all", layout="dp=2,ep=2", model=MODEL, **more):
    parsed = Layout.parse(layout)
    part = PartSizes.even(parsed.dp, parsed.tp, 4, num_cached=10)
    return projected.program_of(layout, part, model, form, **{"types": FLOAT32} | more)


def names(section):
    return [(step.stage.label, str(step.kind)) for step in section.steps]


def test_order_of_a_layer():
    program = program_of()
    embed, first, second, head = program.stages[0][0].parts[0]
    assert (embed.layer, first.layer, second.layer, head.layer) == (OUTSIDE, 0, 1, OUTSIDE)
    assert names(first) == [
        ("attention", "memory"),
        ("attention", "gemm"),
        ("attention", "memory"),
        ("attention", "decode_attention"),
        ("attention", "gemm"),
        ("router", "memory"),
        ("router", "gemm"),
        ("router", "memory"),
        ("dispatch", "memory"),
        ("dispatch", "all_gather"),
        ("dispatch", "memory"),
        ("dispatch", "all_to_all"),
        ("dispatch", "memory"),
        ("experts", "experts"),
        ("combine", "all_to_all"),
        ("combine", "memory"),
    ]
    counts = first.steps[9]
    assert isinstance(counts, Transfer)
    assert counts.num_steps_before_wait == 1  # rows are packed while counts travel
    assert names(embed) == [("embed", "memory")]
    assert names(head) == [("head", "memory"), ("head", "gemm"), ("head", "memory")]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("form", DISPATCH_FORMS)
def test_sizes_are_those_of_the_kind(family, form):
    """And are told for every rank or for all; operations' counts are [R] whole numbers."""
    layout, model = Layout.parse("dp=2,tp=2,ep=4"), MODELS[family]
    plan = random_plan(np.random.default_rng(0), 2, 2, model.vocab_size, PREFILL + DECODE)
    routing = PowerLawRouting(model.num_experts, model.num_experts_per_tok)
    table = DispatchTable.fixed(form)
    made = builder(model, str(layout), ranks_per_node=2, dispatch=table)
    program = made.build(replace(plan, replica=0), routing)
    for stage in program.stages[0]:
        for step in (step for section in stage.sections() for step in section.steps):
            if isinstance(step, Operation):
                assert set(step.sizes) == set(SIZES[step.kind])
                for count_of in (step.flops, step.weight_bytes, step.kv_bytes):
                    assert count_of.shape == (4,)
                    assert count_of.dtype == np.int64
                for size in step.sizes.values():
                    assert np.shape(size) in ((), (4,))
            else:
                assert step.sent_bytes.shape == (3, 4, 4)
                assert not step.sent_bytes.diagonal(axis1=1, axis2=2).any()


def test_layers_that_do_the_same_share_steps():
    """94 layers of one kind and one sample are built once; the program names each."""
    model = MODEL.with_overrides(num_hidden_layers=94, dense_layers=(0, 1), intermediate_size=16)
    sections = program_of(model=model).stages[0][0].parts[0]
    assert [section.layer for section in sections] == [OUTSIDE, *range(94), OUTSIDE]
    assert len({id(section.steps) for section in sections}) == 4


def test_windows_keep_layers_apart():
    sections = program_of(model=MODELS["windows"]).stages[0][0].parts[0]
    assert len({id(section.steps) for section in sections}) == 5


def test_float8_weights():
    """Router in float32, head and embedding in bfloat16, all else one byte a weight."""
    types = NumberTypes("float8", "bfloat16", "float8")
    wide = count(program_of(), 2, 4)[0]
    narrow = count(program_of(types=types), 2, 4)[0]
    for stage, factor in (
        (Stage.ATTENTION, 4),
        (Stage.EXPERTS, 4),
        (Stage.HEAD, 2),
        (Stage.ROUTER, 1),
    ):
        in_wide = narrow.weight_bytes[stage] * factor
        assert in_wide == pytest.approx(wide.weight_bytes[stage], rel=0.02)  # scales
    # The four values of a head take a byte each, and one for their scale.
    assert narrow.kv_bytes * 4 * 4 == wide.kv_bytes * 5
    np.testing.assert_array_equal(narrow.flops, wide.flops)
    payload = [each.sent_bytes[Stage.DISPATCH, Traffic.PAYLOAD].sum() for each in (wide, narrow)]
    assert payload[0] == 2 * payload[1]


@pytest.mark.parametrize(("form", "num"), [("all_to_all", 0), ("hierarchical", 1)])
def test_kernels_of_gpu_libraries_tell_counts_inside_dispatch_or_not_at_all(form, num):
    program = program_of(form, "dp=4,ep=4", ranks_per_node=2, kernels=GPU_LIBRARIES)
    transfers = [e for e in program.stages[0][0].parts[0][1].steps if isinstance(e, Transfer)]
    assert {each.kind for each in transfers} == {TransferKind.ALL_TO_ALL}
    assert sum(each.syncs_host for each in transfers) == num


def transfers_of(program, place=1):
    """Of a section of the first stage."""
    steps = program.stages[0][0].parts[0][place].steps
    return [each for each in steps if isinstance(each, Transfer)]


def test_a_stage_of_one_group_adds_up_by_all_reduce():
    """Three tokens; rank 0 owns two. Each rank adds up its own rows, and hands them out."""
    part = PartSizes.even(1, 2, 1, num_new=3)
    routing = given([[[0, 1], [0, 2]], [[2, 3]]])
    for layout, form in (("tp=2", "all_to_all"), ("tp=2,ep=2", "all_gather")):
        made = builder(layout=layout, kernels=GPU_LIBRARIES)
        program = made.build_sized([(form, [part])], routing)
        summed = transfers_of(program)
        assert [(each.kind, each.stage) for each in summed] == [
            (TransferKind.ALL_REDUCE, Stage.COLLECTIVES),
            (TransferKind.ALL_REDUCE, Stage.COMBINE),
        ]
        for each in summed:
            assert each.sent_bytes[Traffic.PAYLOAD].tolist() == [[0, 3 * 32], [3 * 32, 0]]
        steps = program.stages[0][0].parts[0][1].steps
        (router,) = (each for each in steps if each.stage is Stage.ROUTER and each.flops.any())
        assert router.flops.tolist() == [2 * 3 * 8 * 4] * 2  # of all tokens, on each rank
        with_engine = builder(layout=layout).build_sized([(form, [part])], routing)
        assert TransferKind.ALL_REDUCE not in {each.kind for each in transfers_of(with_engine)}


@pytest.mark.parametrize(
    ("layout", "form"), [("tp=2,ep=2", "all_to_all"), ("dp=2,tp=2,ep=4", "all_gather")]
)
def test_where_tokens_are_sent_each_rank_owns_its_own(layout, form):
    program = program_of(form, layout, kernels=GPU_LIBRARIES)
    kinds = {each.kind for each in transfers_of(program)}
    assert TransferKind.ALL_REDUCE not in kinds
    assert {TransferKind.REDUCE_SCATTER, TransferKind.ALL_GATHER} <= kinds


def test_small_sums_are_normed_as_they_are_added_up():
    def norms(num_tokens):
        model = MODEL.with_overrides(hidden_size=256)
        part = PartSizes.even(1, 2, num_tokens)
        routing = PowerLawRouting.of(model, 0.0, num_sampled_layers=1)
        made = builder(model, "tp=2", kernels=GPU_LIBRARIES)
        program = made.build_sized([("all_gather", [part])], routing)
        steps = program.stages[0][0].parts[0][1].steps
        return [
            each.sizes["bytes"].tolist()
            for each in steps
            if each.stage is Stage.COMBINE and each.kind is OpKind.MEMORY
        ]

    # Rows of 1,024 bytes, 2 ** 19 bytes at most.
    assert norms(512) == [[0, 0]]
    assert norms(513) == [[3 * 513 * 1024] * 2]


def test_one_sum_for_experts_and_the_shared_one():
    model = MODEL.with_overrides(shared_expert_intermediate_size=8)
    program = program_of("all_gather", "tp=2,ep=2", model, kernels=GPU_LIBRARIES)
    kinds = [each.kind for each in transfers_of(program)]
    assert kinds == [TransferKind.ALL_REDUCE] * 2


def test_a_stage_after_the_first_gathers_what_it_got():
    program = program_of("all_gather", "pp=2,tp=2", kernels=GPU_LIBRARIES)
    (first,), (last,) = program.stages
    assert [section.layer for section in last.parts[0]] == [OUTSIDE, 1, OUTSIDE]
    (gathered,) = last.parts[0][0].steps
    assert gathered.kind is TransferKind.ALL_GATHER
    assert first.hand_over.sent_bytes.sum() == gathered.sent_bytes.sum()  # of two ranks


def test_hand_over_between_nodes():
    program = program_of(layout="pp=2,dp=2,ep=2", ranks_per_node=2)
    (first,), (last,) = program.stages
    assert first.hand_over.sent_bytes.tolist() == [4 * 32, 4 * 32]
    assert first.hand_over.is_remote.tolist() == [True, True]
    assert last.hand_over is None
    assert [section.layer for section in first.parts[0]] == [OUTSIDE, 0]
    assert [section.layer for section in last.parts[0]] == [1, OUTSIDE]
