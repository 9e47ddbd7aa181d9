import pytest

from expertlane.cost.number_types import NumberTypes
from expertlane.errors import CapacityError
from expertlane.plan.memory import RankMemory, fit_cache, rank_memory, workload_limits
from expertlane.schedule.limits import Limits
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

PAPER = PRESETS["paper"]
PAPER_WORKLOAD = Workload(num_sequences=1024, prompt_len=10_000, output_len=1)
# 4 layers, hidden and attention 64, experts 16 × 2 × 64 × 128, vocabulary 257.
TINY = PRESETS["paper-tiny"]


def memory_of(
    layout: str, positions: int, rank: int, model=TINY, dtype="float32", num_tokens=1
) -> RankMemory:
    """With a cache of `positions` in blocks of one, and `num_tokens` in a step."""
    limits = Limits(model.vocab_size, 1, positions, 1, num_tokens)
    return rank_memory(model, Layout.parse(layout), limits, rank, NumberTypes.all_of(dtype))


def test_the_paper_s_proposal_by_hand():
    memory = memory_of("dp=16,ep=16", 640_000, 5, PAPER, "float16", num_tokens=1024)
    attention = 4 * 8192 * 8192
    expert = 2 * 8192 * 32_768
    layer = attention + expert + 16 * 8192 + 2 * 8192
    assert 2 * 4 * layer == 6_443_630_592  # the 6.4 GB a GPU of the paper's reading
    outside = 2 * 32_768 * 8192 + 8192  # embedding and head, final norm
    assert memory.weight_bytes == 2 * (4 * layer + outside) == 7_517_388_800
    # 131,072 bytes a token × 64 sequences × 10,000 positions.
    assert memory.kv_bytes == 83_886_080_000
    # 1024 tokens × 8 × 8192 values; an even share of 32,768 pairs × (2 × 8192 + 32768).
    assert memory.activation_bytes == 2 * (1024 * 65_536 + 2048 * 49_152) == 335_544_320
    assert memory.total_bytes == 7_517_388_800 + 83_886_080_000 + 335_544_320


def test_loading_needs_the_largest_matrix_in_float32_beside_the_weights():
    """Before there is a cache or a batch: the embedding, drawn in float32, then converted."""
    memory = memory_of("tp=1", 1, 0, dtype="float16")
    assert memory.loading_bytes == 257 * 64 * (4 + 2)
    assert memory.total_bytes == memory.weight_bytes + memory.loading_bytes
    assert memory_of("pp=2", 1, 1, dtype="float16").loading_bytes == 257 * 64 * 6
    assert memory_of("pp=4", 1, 1, dtype="float16").loading_bytes == 64 * 128 * 6


@pytest.mark.parametrize(("rank", "outside"), [(3, 32_768 * 8192), (11, 4096 * 8192 + 8192)])
def test_the_paper_s_baseline_by_hand(rank, outside):
    """The first stage has the embedding, the last an eighth of the head and the final norm."""
    memory = memory_of("tp=8,pp=2", 10_240_000, rank, PAPER, "float16")
    layer = 4 * 8192 * 1024 + 16 * 2 * 8192 * 4096 + 16 * 8192 + 2 * 8192
    assert memory.weight_bytes == 2 * (2 * layer + outside)
    # 1024 sequences × 10,000 positions × 2 layers × 2 × 1024 values of 2 bytes.
    assert memory.kv_bytes == 83_886_080_000


def test_the_literal_reading_holds_eighths_of_eight_experts():
    memory = memory_of("dp=2,tp=8,ep=2", 5_120_000, 0, PAPER, "float16")
    layer = 4 * 8192 * 1024 + 8 * 2 * 8192 * 4096 + 16 * 8192 + 2 * 8192
    outside = 32_768 * 8192 + 4096 * 8192 + 8192
    assert memory.weight_bytes == 2 * (4 * layer + outside)
    assert memory.kv_bytes == 512 * 10_000 * 4 * 2 * 1024 * 2


def test_one_rank_holds_the_whole_model():
    memory = memory_of("tp=1", 1, 0)
    assert memory.weight_bytes == 4 * TINY.num_params
    assert memory.kv_bytes == 4 * 4 * 2 * 64  # layers × bytes × (key and value)
    assert memory.activation_bytes == 4 * (1 * 512 + 2 * 256)


@pytest.mark.parametrize(("rank", "num_experts", "num_pairs"), [(0, 6, 5), (1, 5, 4), (2, 5, 4)])
def test_uneven_experts(rank, num_experts, num_pairs):
    # 3 × 2 tokens × top-2 = 12 pairs over 16 experts.
    memory = memory_of("dp=3,ep=3", 8, rank, num_tokens=2)
    layer = 16_384 + 1024 + 128 + num_experts * 16_384
    assert memory.weight_bytes == 4 * (4 * layer + 2 * 16_448 + 64)
    assert memory.kv_bytes == 4 * (4 * 8 * 128)
    assert memory.activation_bytes == 4 * (2 * 512 + num_pairs * 256)


@pytest.mark.parametrize(("tp_rank", "vocab"), [(0, 129), (1, 128)])
def test_an_uneven_vocabulary_is_cut_over_tp(tp_rank, vocab):
    memory = memory_of("tp=2", 1, tp_rank)
    layer = 8192 + 1024 + 128 + 16 * 2 * 64 * 64
    assert memory.weight_bytes == 4 * (4 * layer + 16_448 + vocab * 64 + 64)
    assert memory.kv_bytes == 4 * 4 * 64


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
    fitted = fit_cache(PAPER, layout, limits, NumberTypes.all_of("float16"), 80e9)
    need = rank_memory(PAPER, layout, fitted, 0, NumberTypes.all_of("float16"))
    assert need.total_bytes <= 80e9 < need.total_bytes + 16 * 131_072
    assert fitted.num_blocks < 64 * 625
    half = fit_cache(PAPER, layout, limits, NumberTypes.all_of("float16"), 80e9, cache_share=0.5)
    assert half.num_blocks == fitted.num_blocks // 2
    assert fit_cache(PAPER, layout, limits, NumberTypes.all_of("float16"), 800e9) == limits


def test_one_sequence_must_fit():
    layout = Layout.parse("dp=16,ep=16")
    limits = workload_limits(PAPER_WORKLOAD, PAPER, layout)
    with pytest.raises(CapacityError, match=r"needs 9.16 GB on a rank .* but 9 GB of memory"):
        fit_cache(PAPER, layout, limits, NumberTypes.all_of("float16"), 9e9)
    assert fit_cache(PAPER, layout, limits, NumberTypes.all_of("float16"), 9.2e9).num_blocks == 642


def test_dense_layers_and_shared_experts_count():
    """Gated: a dense MLP of 96 in the first of four layers, a shared expert of 32 elsewhere."""
    plain = TINY.with_overrides(gated_mlp=True, hidden_act="silu")
    model = plain.with_overrides(
        dense_layers=(0,), intermediate_size=96, shared_expert_intermediate_size=32
    )
    per_expert = plain.num_expert_params

    def more(layout: str) -> int:
        of = (memory_of(layout, 1, 0, each).weight_bytes for each in (model, plain))
        return next(of) - next(of)

    added = 3 * 64 * (96 + 3 * 32)
    assert more("tp=1") == 4 * (added - 16 * (64 + per_expert))
    assert more("tp=2") == 4 * (added // 2 - 16 * 64 - 16 * per_expert // 2)
