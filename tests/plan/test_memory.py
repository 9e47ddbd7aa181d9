import pytest

from expertlane.plan.memory import RankMemory, largest_rank_memory, rank_memory
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

PAPER = PRESETS["paper"]
PAPER_WORKLOAD = Workload(num_sequences=1024, prompt_len=10_000, output_len=1)
# 4 layers, hidden and attention 64, experts 16 × 2 × 64 × 128, vocabulary 257.
TINY = PRESETS["paper-tiny"]


def memory_of(layout: str, workload: Workload, rank: int, model=TINY, itemsize=4) -> RankMemory:
    return rank_memory(model, Layout.parse(layout), workload, rank, itemsize)


def test_the_paper_s_proposal_by_hand():
    memory = memory_of("dp=16,ep=16", PAPER_WORKLOAD, 5, PAPER, 2)
    attention = 4 * 8192 * 8192
    expert = 2 * 8192 * 32_768
    layer = attention + expert + 16 * 8192 + 2 * 8192
    assert 2 * 4 * layer == 6_443_630_592  # the 6.4 GB a GPU of the paper's reading
    outside = 2 * 32_768 * 8192 + 8192  # embedding and head, final norm
    assert memory.weight_bytes == 2 * (4 * layer + outside) == 7_517_388_800
    # 131,072 bytes a token × 64 sequences × 10,000 positions.
    assert memory.kv_bytes == 83_886_080_000
    # 640,000 tokens × 8 × 8192 values; an even share of 20,480,000 pairs × (2 × 8192 + 32768).
    assert memory.activation_bytes == 2 * (640_000 * 65_536 + 1_280_000 * 49_152)
    assert memory.total_bytes == 7_517_388_800 + 83_886_080_000 + 209_715_200_000


def test_loading_needs_the_largest_matrix_in_float32_beside_the_weights():
    """Before there is a cache or a batch: the embedding, drawn in float32, then converted."""
    memory = memory_of("tp=1", Workload(1, 1, 1), 0, itemsize=2)
    assert memory.loading_bytes == 257 * 64 * (4 + 2)
    assert memory.total_bytes == memory.weight_bytes + memory.loading_bytes
    assert memory_of("pp=2", Workload(1, 1, 1), 1, itemsize=2).loading_bytes == 257 * 64 * 6
    assert memory_of("pp=4", Workload(1, 1, 1), 1, itemsize=2).loading_bytes == 64 * 128 * 6


@pytest.mark.parametrize(("rank", "outside"), [(3, 32_768 * 8192), (11, 4096 * 8192 + 8192)])
def test_the_paper_s_baseline_by_hand(rank, outside):
    """The first stage has the embedding, the last an eighth of the head and the final norm."""
    memory = memory_of("tp=8,pp=2", PAPER_WORKLOAD, rank, PAPER, 2)
    layer = 4 * 8192 * 1024 + 16 * 2 * 8192 * 4096 + 16 * 8192 + 2 * 8192
    assert memory.weight_bytes == 2 * (2 * layer + outside)
    # 1024 sequences × 10,000 positions × 2 layers × 2 × 1024 values of 2 bytes.
    assert memory.kv_bytes == 83_886_080_000


def test_the_literal_reading_holds_eighths_of_eight_experts():
    memory = memory_of("dp=2,tp=8,ep=2", PAPER_WORKLOAD, 0, PAPER, 2)
    layer = 4 * 8192 * 1024 + 8 * 2 * 8192 * 4096 + 16 * 8192 + 2 * 8192
    outside = 32_768 * 8192 + 4096 * 8192 + 8192
    assert memory.weight_bytes == 2 * (4 * layer + outside)
    assert memory.kv_bytes == 512 * 10_000 * 4 * 2 * 1024 * 2


def test_one_rank_holds_the_whole_model():
    memory = memory_of("tp=1", Workload(1, 1, 1), 0)
    assert memory.weight_bytes == 4 * TINY.num_params
    assert memory.kv_bytes == 4 * 4 * 2 * 64  # layers × bytes × (key and value)
    assert memory.activation_bytes == 4 * (1 * 512 + 2 * 256)


@pytest.mark.parametrize(
    ("rank", "num_experts", "num_seqs", "num_pairs"), [(0, 6, 2, 6), (1, 5, 1, 5), (2, 5, 1, 5)]
)
def test_uneven_experts_and_sequences(rank, num_experts, num_seqs, num_pairs):
    # 4 sequences × 2 tokens × top-2 = 16 pairs over 16 experts; 4 positions a sequence.
    memory = memory_of("dp=3,ep=3", Workload(4, prompt_len=2, output_len=3), rank)
    layer = 16_384 + 1024 + 128 + num_experts * 16_384
    assert memory.weight_bytes == 4 * (4 * layer + 2 * 16_448 + 64)
    assert memory.kv_bytes == 4 * (4 * num_seqs * 4 * 128)
    assert memory.activation_bytes == 4 * (num_seqs * 2 * 512 + num_pairs * 256)


@pytest.mark.parametrize(("tp_rank", "vocab"), [(0, 129), (1, 128)])
def test_an_uneven_vocabulary_is_cut_over_tp(tp_rank, vocab):
    memory = memory_of("tp=2", Workload(1, 1, 1), tp_rank)
    layer = 8192 + 1024 + 128 + 16 * 2 * 64 * 64
    assert memory.weight_bytes == 4 * (4 * layer + 16_448 + vocab * 64 + 64)
    assert memory.kv_bytes == 4 * 4 * 64


def test_without_expert_parallelism_pairs_come_from_all_data_parallel_ranks():
    memory = memory_of("dp=2", Workload(2, prompt_len=2, output_len=1), 0)
    # Own 2 tokens; 4 tokens × top-2 pairs reach the rank's halves of the experts.
    assert memory.activation_bytes == 4 * (2 * 512 + 8 * (128 + 64))


def test_a_rank_without_sequences_still_has_weights_and_pairs():
    layout = "replicas=2,dp=2,ep=2"
    workload = Workload(3, prompt_len=2, output_len=1)
    third, fourth = memory_of(layout, workload, 2), memory_of(layout, workload, 3)
    assert fourth.kv_bytes == 0
    assert fourth.activation_bytes == 4 * (2 * 256)
    assert fourth.weight_bytes == third.weight_bytes


def test_the_largest_rank():
    workload = Workload(4, prompt_len=2, output_len=3)
    largest = largest_rank_memory(TINY, Layout.parse("dp=3,ep=3"), workload, 4)
    assert largest == memory_of("dp=3,ep=3", workload, 0)
    largest = largest_rank_memory(PAPER, Layout.parse("tp=8,pp=2"), PAPER_WORKLOAD, 2)
    assert largest == memory_of("tp=8,pp=2", PAPER_WORKLOAD, 0, PAPER, 2)
