from types import SimpleNamespace

import pytest
import torch

from cost.tiny_models import MODELS
from expertlane.balance.holding import placements_of
from expertlane.cost.memory import PlacedModel, RankMemory, workload_limits
from expertlane.cost.step.operation import NumberTypes
from expertlane.engine.comm.mesh import Meshes, ParallelMesh
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.model.weights import SeededWeights
from expertlane.engine.ops.backend import backend_for
from expertlane.errors import CapacityError
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

PAPER = PRESETS["paper"]
PAPER_WORKLOAD = Workload(num_sequences=1024, prompt_len=10_000, output_len=1)
# 4 layers, hidden and attention 64, experts 16 × 2 × 64 × 128, vocabulary 257.
TINY = PRESETS["paper-tiny"]


def placed(model, layout: Layout, types: NumberTypes) -> PlacedModel:
    """With linear placements."""
    return PlacedModel(model, layout, types, placements_of(model, layout, Options()))


def memory_of(
    layout: str, positions: int, rank: int, model=TINY, dtype="float32", num_tokens=1
) -> RankMemory:
    """With a cache of `positions` in blocks of one, and `num_tokens` in a step."""
    limits = Limits(model.vocab_size, 1, positions, 1, num_tokens)
    return placed(model, Layout.parse(layout), NumberTypes.all_of(dtype)).rank_memory(limits, rank)


class NoGroups(Meshes):
    """For ranks that are built and never talk."""

    def link(self, ranks):
        return None


def mesh_of_place(layout, rank) -> ParallelMesh:
    """The mesh of a rank that is built and never talks."""
    return ParallelMesh(layout, NoGroups(), rank, 8, SimpleNamespace(checks=None))


def held_by_engine(model, layout, rank, dtype, options) -> TransformerStage:
    """What the engine builds for a rank, with one position of cache."""
    source = SeededWeights(
        model, getattr(torch, dtype), torch.device("cpu"), lambda: None, options.weights
    )
    placements = placements_of(model, layout, Options())
    stage = TransformerStage(model, placements, source, mesh_of_place(layout, rank))
    stage.allocate_cache(1, 1, options.kv_dtype)
    return stage


def test_the_paper_s_proposal_by_hand():
    memory = memory_of("dp=16,ep=16", 640_000, 5, PAPER, "float16", num_tokens=1024)
    attention = 4 * 8192 * 8192
    expert = 2 * 8192 * 32_768
    matrices = 4 * (attention + expert) + 2 * 32_768 * 8192  # embedding and head
    wide = 4 * (16 * 8192 + 2 * 8192) + 8192  # routers and norms are float32
    assert memory.weight_bytes == 2 * matrices + 4 * wide == 7_518_584_832
    # 131,072 bytes a token × 64 sequences × 10,000 positions.
    assert memory.kv_bytes == 83_886_080_000
    # 1024 tokens × 8 × 8192 values; an even share of 32,768 pairs × (2 × 8192 + 32768).
    assert memory.activation_bytes == 2 * (1024 * 65_536 + 2048 * 49_152) == 335_544_320
    assert memory.total_bytes == 7_518_584_832 + 83_886_080_000 + 335_544_320


def test_loading_needs_the_largest_matrix_in_float32_beside_the_weights():
    """Before there is a cache or a batch: the embedding, drawn in float32, then converted."""
    memory = memory_of("tp=1", 1, 0, dtype="float16")
    assert memory.loading_bytes == 257 * 64 * (4 + 2)
    assert memory.total_bytes == memory.weight_bytes + memory.loading_bytes
    assert memory_of("pp=2", 1, 1, dtype="float16").loading_bytes == 257 * 64 * 6
    assert memory_of("pp=4", 1, 1, dtype="float16").loading_bytes == 64 * 128 * 6


@pytest.mark.parametrize(("rank", "num_experts", "num_pairs"), [(0, 6, 5), (1, 5, 4), (2, 5, 4)])
def test_uneven_experts(rank, num_experts, num_pairs):
    # 3 × 2 tokens × top-2 = 12 pairs over 16 experts.
    memory = memory_of("dp=3,ep=3", 8, rank, num_tokens=2)
    layer = 16_384 + 1024 + 128 + num_experts * 16_384
    assert memory.weight_bytes == 4 * (4 * layer + 2 * 16_448 + 64)
    assert memory.kv_bytes == 4 * (4 * 8 * 128)
    assert memory.activation_bytes == 4 * (2 * 512 + num_pairs * 256)


def test_without_expert_parallelism_pairs_come_from_all_data_parallel_ranks():
    memory = memory_of("dp=2", 4, 0, num_tokens=2)
    # Own 2 tokens; 4 tokens × top-2 pairs reach the rank's halves of the experts.
    assert memory.activation_bytes == 4 * (2 * 512 + 8 * (128 + 64))


def test_a_workload_s_cache_holds_its_largest_share():
    """Four sequences of 4 positions over three ranks: two on the first, and a block more each."""
    layout = Layout.parse("dp=3,ep=3")
    limits = workload_limits(Workload(4, prompt_len=2, output_len=3), TINY, layout)
    assert (limits.num_blocks, limits.max_num_seqs, limits.max_model_len) == (2 * 2, 2, 4)
    assert limits.max_num_batched_tokens == 2 * 2  # all prompts in one step
    assert limits.phases_apart
    assert not limits.prefix_caching


def test_deployments_of_a_workload_take_equally_many_tokens_in_a_step():
    steps = {
        layout: workload_limits(PAPER_WORKLOAD, PAPER, Layout.parse(layout)).max_num_batched_tokens
        for layout in ("tp=8,pp=2", "dp=2,tp=8,ep=2", "dp=16,ep=16", "replicas=2,dp=8,ep=8")
    }
    assert [*steps.values()] == [16_384, 8192, 1024, 1024]


def test_a_cache_takes_what_memory_there_is():
    layout = Layout.parse("dp=16,ep=16")
    limits = workload_limits(PAPER_WORKLOAD, PAPER, layout)
    assert limits.num_blocks == 64 * 626
    held = placed(PAPER, layout, NumberTypes.all_of("float16"))
    fitted = held.fit_cache(limits, 80e9)
    need = held.rank_memory(fitted, 0)
    assert need.total_bytes <= 80e9 < need.total_bytes + 16 * 131_072
    assert fitted.num_blocks < 64 * 625
    half = held.fit_cache(limits, 80e9, cache_share=0.5)
    assert half.num_blocks == fitted.num_blocks // 2
    assert held.fit_cache(limits, 800e9) == limits


def test_one_sequence_must_fit():
    layout = Layout.parse("dp=16,ep=16")
    limits = workload_limits(PAPER_WORKLOAD, PAPER, layout)
    held = placed(PAPER, layout, NumberTypes.all_of("float16"))
    with pytest.raises(CapacityError, match=r"needs 9.16 GB per rank .* but 9 GB of memory"):
        held.fit_cache(limits, 9e9)
    assert held.fit_cache(limits, 9.2e9).num_blocks == 641


def test_the_fullest_stage_may_be_one_in_the_middle():
    """The first and the last of four layers are MLPs of 8 values, far smaller than experts."""
    model = TINY.with_overrides(dense_layers=(0, 3), intermediate_size=8)
    held = placed(model, Layout.parse("pp=4"), NumberTypes.all_of("float32"))
    limits = Limits(model.vocab_size, 16, 1, 16, 16)
    middle = held.rank_memory(limits, 1, 1)
    assert middle.weight_bytes == 4 * (16_384 + 16 * 16_384 + 16 * 64 + 2 * 64)
    assert held.rank_memory(limits, 0, 1).weight_bytes < middle.weight_bytes
    used = middle.weight_bytes + middle.activation_bytes
    room = held.capacity((used + 3.5 * middle.kv_bytes) / 0.9, 16, 16)
    assert (room.max_seqs, room.memory) == (3, middle)
    nothing = held.capacity(used / 0.9, 16, 16)
    assert (nothing.max_seqs, nothing.memory) == (0, middle)


def test_float8_weights_leave_embedding_head_norms_and_router_as_they_were():
    layout, limits = Layout.parse("tp=2"), Limits(257, 1, 1, 1, 1)
    model = TINY.with_overrides(qkv_bias=True)
    memory = placed(model, layout, NumberTypes.asked("float8")).rank_memory(limits, 0)
    one_byte = 4 * (8192 + 16 * 2 * 64 * 64)
    two_bytes = 4 * 3 * 32 + 257 * 64 + 129 * 64  # biases; embedding; half of the head
    four_bytes = 4 * (16 * 64 + 2 * 64) + 64  # routers and norms
    without_scales = one_byte + 2 * two_bytes + 4 * four_bytes
    # A float32 for every 128 × 128 of them, in whole bytes of each matrix.
    assert _is_scales(memory.weight_bytes - without_scales, one_byte)


def _is_scales(num_bytes: int, num_weights: int) -> bool:
    return num_weights / 128**2 * 4 <= num_bytes < num_weights / 128**2 * 4 + 100


def test_four_bits_hold_scales_and_only_what_checkpoints_have_in_them():
    layout, limits = Layout.parse("tp=1"), Limits(257, 1, 1, 1, 1)

    def held(weights: str, **changed: int) -> int:
        model = TINY.with_overrides(**changed)
        return placed(model, layout, NumberTypes.asked(weights)).rank_memory(limits, 0).weight_bytes

    wide, nvfp4, mxfp4 = (held(weights) for weights in ("bfloat16", "nvfp4", "mxfp4"))
    in_experts = TINY.num_hidden_layers * 16 * 2 * 64 * TINY.moe_intermediate_size
    assert wide - nvfp4 == in_experts * (2 - 9 / 16)
    assert wide - mxfp4 == in_experts * (2 - 17 / 32)
    shared, in_shared = {"shared_expert_intermediate_size": 64}, 4 * 2 * 64 * 64
    assert held("nvfp4", **shared) - nvfp4 == in_shared * 9 / 16
    assert held("mxfp4", **shared) - mxfp4 == in_shared * 2


@pytest.mark.smoke(30)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", Options()),
        ("bfloat16", Options()),
        ("bfloat16", Options(weights="int8", kv_dtype="float8")),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["tp=1", "tp=2", "tp=4,ep=4", "tp=4,pp=3", "dp=3,ep=3,tp=2"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_rank_of_the_engine_holds_as_much(model, layout, dtype, options):
    layout, types = Layout.parse(layout), NumberTypes.of_engine(dtype, options)
    if backend_for(torch.device("cpu")).keeps_narrow:
        types = NumberTypes.kept_as(dtype, options, None)
    limits = Limits(model.vocab_size, 1, 1, 1, 1)
    for rank in range(layout.world_size):
        held = held_by_engine(model, layout, rank, dtype, options)
        need = placed(model, layout, types).rank_memory(limits, rank)
        assert (need.weight_bytes, need.kv_bytes) == (held.weight_bytes, held.kv_bytes)
