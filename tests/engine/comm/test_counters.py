"""FLOPs and bytes of real steps against a count by hand.

The model: 2 layers, hidden size 8, 2 heads of 4, 4 experts of inner size 6, all of them chosen,
vocabulary 12; float32. One sequence with a prompt of 3 tokens, then one decode step at position 3.
"""

import pytest

from distributed.running import deployment, run_deployment
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Link, Stage, Traffic
from expertlane.spec.workload import Workload
from records import sent_over as sent

MODEL = PRESETS["paper-tiny"].with_overrides(
    name="countable",
    num_hidden_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    head_dim=4,
    num_experts=4,
    num_experts_per_tok=4,
    moe_intermediate_size=6,
    vocab_size=12,
)
WORKLOAD = Workload(num_sequences=1, prompt_len=3, output_len=2)
NUM_LAYERS = 2


@pytest.fixture
def records(pools):
    """By layout: the records of the prefill and of the decode step, each by rank."""

    def run(layout, ranks_per_node=8, workload=WORKLOAD):
        pool = pools.pool(Layout.parse(layout).world_size)
        steps = run_deployment(
            pool, MODEL, deployment(layout), workload, ranks_per_node=ranks_per_node
        ).steps
        return [step.outcome.records for step in steps]

    return run


def test_attention(records):
    (prefill,), (decode,) = records("tp=1")
    # Query, key, value and output: 4 matrices of 8 × 8. 1 + 2 + 3 query-key pairs in the prefill,
    # 4 in the decode step; 4 FLOPs a pair and a dimension of 2 heads of 4.
    assert prefill.flops[Stage.ATTENTION] == NUM_LAYERS * (2 * 3 * 4 * 64 + 4 * 6 * 8)
    assert decode.flops[Stage.ATTENTION] == NUM_LAYERS * (2 * 1 * 4 * 64 + 4 * 4 * 8)
    assert prefill.weight_bytes[Stage.ATTENTION] == NUM_LAYERS * 4 * 64 * 4
    # Keys and values, 3 or 4 positions of 8 values of 4 bytes.
    assert prefill.kv_bytes == NUM_LAYERS * 2 * 3 * 8 * 4
    assert decode.kv_bytes == NUM_LAYERS * 2 * 4 * 8 * 4


def test_attention_cut_over_two_ranks(records):
    prefill, decode = records("tp=2")
    for record in prefill:  # one head: 4 × 8 × 4 weights
        assert record.flops[Stage.ATTENTION] == NUM_LAYERS * (2 * 3 * 128 + 4 * 6 * 4)
        assert record.weight_bytes[Stage.ATTENTION] == NUM_LAYERS * 128 * 4
        assert record.kv_bytes == NUM_LAYERS * 2 * 3 * 4 * 4
    assert [record.kv_bytes for record in decode] == [NUM_LAYERS * 2 * 4 * 4 * 4] * 2


def test_expert_mlp(records):
    (prefill,), (decode,) = records("tp=1")
    # 3 tokens × 4 experts, each up 8 × 6 and down 6 × 8; every expert is read once.
    assert prefill.flops[Stage.EXPERTS] == NUM_LAYERS * 12 * 2 * (48 + 48)
    assert decode.flops[Stage.EXPERTS] == NUM_LAYERS * 4 * 2 * (48 + 48)
    assert prefill.weight_bytes[Stage.EXPERTS] == NUM_LAYERS * 4 * 96 * 4
    assert decode.weight_bytes[Stage.EXPERTS] == NUM_LAYERS * 4 * 96 * 4
    assert prefill.num_tokens_per_expert.tolist() == [[3, 3, 3, 3]] * NUM_LAYERS
    assert decode.num_tokens_per_expert.tolist() == [[1, 1, 1, 1]] * NUM_LAYERS


def test_expert_mlp_cut_over_two_ranks(records):
    prefill, _ = records("dp=2")
    for record in prefill:  # halves of inner size 3
        assert record.flops[Stage.EXPERTS] == NUM_LAYERS * 12 * 2 * 48
        assert record.weight_bytes[Stage.EXPERTS] == NUM_LAYERS * 4 * 48 * 4
    zero, one = prefill  # tokens are reported once
    assert zero.num_tokens_per_expert.tolist() == [[3, 3, 3, 3]] * NUM_LAYERS
    assert one.num_tokens_per_expert.sum() == 0


def test_router_and_head(records):
    (prefill,), _ = records("tp=1")
    assert prefill.flops[Stage.ROUTER] == NUM_LAYERS * 2 * 3 * 8 * 4
    assert prefill.weight_bytes[Stage.ROUTER] == NUM_LAYERS * 8 * 4 * 4
    assert prefill.flops[Stage.HEAD] == 2 * 1 * 8 * 12  # the prompt's last token only
    assert prefill.weight_bytes[Stage.HEAD] == 8 * 12 * 4


def test_one_rank_sends_nothing(records):
    for (record,) in records("tp=1"):
        assert record.sent_bytes.sum() == record.num_collectives.sum() == 0


def test_dispatch_and_combine(records):
    (zero, one), _ = records("dp=2,ep=2")  # rank 0 has all three tokens
    # Each token travels to rank 1 once and comes back as 2 pairs, 32 bytes a row.
    assert sent(zero, Traffic.PAYLOAD) == NUM_LAYERS * 3 * 32
    assert sent(one, Traffic.PAYLOAD) == NUM_LAYERS * 6 * 32
    # Counts of 2 ranks, rows and pairs, 8 bytes each; with a row 4 expert ids of 4 bytes.
    assert sent(zero, Traffic.METADATA) == NUM_LAYERS * (32 + 3 * 16)
    assert sent(one, Traffic.METADATA) == NUM_LAYERS * 32
    payload = zero.sent_bytes[:, Traffic.PAYLOAD]
    assert payload.sum() == payload[Stage.DISPATCH].sum()
    assert zero.sent_bytes[:, Traffic.PADDING].sum() == 0
    for record in (zero, one):
        assert record.num_collectives[Stage.DISPATCH] == NUM_LAYERS * 2
        assert record.num_collectives[Stage.COMBINE] == NUM_LAYERS * 1
        assert record.num_collectives.sum() == NUM_LAYERS * 3


def test_tensor_parallel_step(records):
    (zero, one), _ = records("tp=2")  # rank 0 owns two tokens, rank 1 the last one
    # A layer: all-gather of owned rows, reduce-scatter of the other's rows, dispatch as an
    # all-gather, combine as a reduce-scatter of the other's tokens. Then the head's input.
    assert sent(zero, Traffic.PAYLOAD) == NUM_LAYERS * 32 * (2 + 1 + 2 + 1)
    assert sent(one, Traffic.PAYLOAD) == NUM_LAYERS * 32 * (1 + 2 + 1 + 2) + 32
    # Ids and weights with every dispatched row; value and id of the likeliest token, 8 bytes each.
    assert sent(zero, Traffic.METADATA) == NUM_LAYERS * 2 * 32 + 16
    assert sent(one, Traffic.METADATA) == NUM_LAYERS * 1 * 32 + 16
    for record in (zero, one):
        assert record.num_collectives[Stage.COLLECTIVES] == NUM_LAYERS * 2 + 2
        assert record.num_collectives[Stage.DISPATCH] == NUM_LAYERS
        assert record.num_collectives[Stage.COMBINE] == NUM_LAYERS


@pytest.mark.parametrize(("ranks_per_node", "link"), [(2, Link.INTRA_NODE), (1, Link.INTER_NODE)])
def test_hand_over(records, ranks_per_node, link):
    (zero, one), (zero_decode, _) = records("pp=2", ranks_per_node)
    other = Link.INTER_NODE if link is Link.INTRA_NODE else Link.INTRA_NODE
    assert sent(zero, Traffic.PAYLOAD, link, ranks_per_node) == 3 * 32
    assert sent(zero_decode, Traffic.PAYLOAD, link, ranks_per_node) == 1 * 32
    assert sent(zero, Traffic.PAYLOAD, other, ranks_per_node) == 0
    assert sent(zero, Traffic.METADATA, link, ranks_per_node) == 0
    assert one.sent_bytes.sum() == 0
    assert zero.num_collectives[Stage.HAND_OVER] == zero.num_collectives.sum() == 1
    assert one.num_collectives.sum() == 0
    # Each stage counts its own layer.
    assert zero.flops[Stage.ATTENTION] == one.flops[Stage.ATTENTION] == 2 * 3 * 4 * 64 + 4 * 6 * 8
    assert (zero.flops[Stage.HEAD], one.flops[Stage.HEAD]) == (0, 2 * 8 * 12)


def test_a_cut_step_s_flops_add_up_to_the_whole_one_s(records):
    whole = records("tp=1")
    for layout in ["tp=2", "dp=2,ep=2", "pp=2", "tp=2,ep=2", "dp=2,tp=2,ep=2"]:
        for (expected,), parts in zip(whole, records(layout), strict=True):
            for stage in (Stage.ATTENTION, Stage.ROUTER, Stage.EXPERTS, Stage.HEAD):
                assert sum(part.flops[stage] for part in parts) == expected.flops[stage]


def test_a_rank_without_tokens_reads_no_weights(records):
    (zero, one), _ = records("dp=2,ep=2")
    assert one.weight_bytes[Stage.ATTENTION] == one.weight_bytes[Stage.ROUTER] == 0
    assert one.weight_bytes[Stage.HEAD] == one.kv_bytes == 0
    assert one.weight_bytes[Stage.EXPERTS] == zero.weight_bytes[Stage.EXPERTS] > 0
