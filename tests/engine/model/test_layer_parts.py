"""Which models' layers are computed in few calls, and that these compute what single operations do.

A small model stands for each family: what decides the path is its kind of heads, norms, experts.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from expertlane.balance.placement import Placement
from expertlane.engine.comm.clocks import clock_for
from expertlane.engine.comm.collectives import interleave
from expertlane.engine.comm.mesh import Meshes, ParallelMesh
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.model.blocks import DenseBlock
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.head import HeadResult
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.model.weights import SeededWeights
from expertlane.engine.ops.backend import backend_of_cpu
from expertlane.engine.ops.cpu import VectorBackend
from expertlane.results.step_record import RankRecord
from expertlane.schedule.plan import Batch
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import LatentAttention
from expertlane.spec.model import ModelConfig, Routing

OURS, WHY_NOT = backend_of_cpu()
pytestmark = pytest.mark.skipif(not isinstance(OURS, VectorBackend), reason=WHY_NOT)
CPU, LAYOUT, BLOCK_SIZE = torch.device("cpu"), Layout(), 4


class Small:
    """A model's only rank, in this process."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        board, num_layers = ProgressBoard(1), model.num_hidden_layers
        self.position = lambda: board.position(0)
        self.recorder = Recorder(
            0, num_layers, model.num_experts, board.reporter(0), clock_for(CPU), world_size=1
        )
        mesh = ParallelMesh(LAYOUT, Meshes(), 0, 1, self.recorder)
        placements = [
            None if model.is_dense(layer) else Placement.linear(model.num_experts, 1)
            for layer in range(num_layers)
        ]
        source = SeededWeights(model, dtype, CPU, lambda: None)
        self.stage = TransformerStage(model, placements, source, mesh)
        self.stage.set_forms(("all_to_all",), "model")

    def step(
        self, lengths: Sequence[int], num_new: int, *, record: bool = False
    ) -> tuple[torch.Tensor, RankRecord | None]:
        """Logits of the last tokens, after two steps: a prompt's and the next one's."""
        width = -(-(max(lengths) + num_new) // BLOCK_SIZE)
        self.stage.allocate_cache(len(lengths) * width, BLOCK_SIZE)
        computed = np.zeros(len(lengths), dtype=np.int64)
        logits, found = torch.empty(0), None
        for scheduled in (np.array(lengths), np.full(len(lengths), num_new)):
            batch = Batch(
                seq_ids=np.arange(len(lengths)),
                num_scheduled_tokens=scheduled,
                num_computed_tokens=computed.copy(),
                token_ids=np.random.default_rng(0).integers(0, 40, scheduled.sum()),
                block_tables=np.arange(len(lengths) * width, dtype=np.int32).reshape(-1, width),
                yields_token=np.ones(len(lengths), dtype=np.bool_),
            )
            at = LAYOUT.coordinates(0)
            part = ForwardBatch(batch, [batch.num_tokens], LAYOUT, at, CPU, BLOCK_SIZE)
            self.recorder.begin_step(0, 1, record=record, count_idle=False, record_routing=record)
            with torch.inference_mode():
                (result,) = interleave([self.stage.forward(self.stage.embed(part), part, False)])
            found = self.recorder.end_step()
            assert isinstance(result, HeadResult)
            logits = result.logits.clone()
            computed += scheduled
        return logits, found

    def go_the_general_way(self) -> None:
        """Operation by operation."""
        for layer in self.stage._layers:
            layer._part = None
        for block in self.stage.moe_blocks.values():
            block.here = None
            if block.shared is not None:
                block.shared.part = None
        for layer in self.stage._layers:
            if isinstance(layer.block, DenseBlock):
                layer.block.mlp.part = None
        assert self.stage._head is not None
        self.stage._head._part = None


BASE = ModelConfig(
    name="mixtral",
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    head_dim=32,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    gated_mlp=True,
    hidden_act="silu",
    vocab_size=48,
    max_position_embeddings=64,
)
LATENT = LatentAttention(
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, q_lora_rank=None
)
GROUPS = Routing("sigmoid", correction_bias=True, n_group=4, topk_group=2, group_score="top2_sum")
# What stands for each family, and what is computed in few calls: attention, MoE block, all layers.
FAMILIES = {
    "paper": (BASE.with_overrides(gated_mlp=False, hidden_act="gelu"), (True, True, True)),
    "mixtral": (BASE.with_overrides(sliding_window=(5, None)), (True, True, True)),
    "qwen3": (BASE.with_overrides(qk_norm="head"), (True, True, True)),
    "narrow heads": (BASE.with_overrides(head_dim=24), (False, True, False)),
    "qwen2": (
        BASE.with_overrides(
            qkv_bias=True, shared_expert_intermediate_size=32, shared_expert_gate=True
        ),
        (True, True, True),
    ),
    "olmoe": (BASE.with_overrides(qk_norm="full"), (False, True, False)),
    "glm4": (
        BASE.with_overrides(
            dense_layers=(0,),
            intermediate_size=96,
            shared_expert_intermediate_size=64,
            routing=GROUPS,
        ),
        (True, True, True),
    ),
    "narrow shared expert": (
        BASE.with_overrides(shared_expert_intermediate_size=24),
        (True, True, None),
    ),
    "half of a head rotated": (
        BASE.with_overrides(qk_norm="head", qkv_bias=True, partial_rotary_factor=0.5),
        (True, True, True),
    ),
    "ernie": (
        BASE.with_overrides(rope_interleave=True, routing=Routing(correction_bias=True)),
        (True, True, True),
    ),
    "granite": (
        BASE.with_overrides(
            attention_multiplier=0.1,
            embedding_multiplier=6.0,
            residual_multiplier=0.3,
            logits_scaling=4.0,
        ),
        (True, True, True),
    ),
    "deepseek": (
        BASE.with_overrides(latent=LATENT, head_dim=32, num_key_value_heads=None, routing=GROUPS),
        (False, True, False),
    ),
    "gpt-oss": (
        BASE.with_overrides(
            attention_sinks=True,
            qkv_bias=True,
            output_bias=True,
            expert_bias=True,
            swiglu_limit=7.0,
        ),
        (True, False, False),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_which_way_layers_go(family: str, dtype: torch.dtype):
    model, expected = FAMILIES[family]
    small = Small(model, dtype)
    small.step([3], 1)
    layers = small.stage._layers
    attention = {layer._part is not None for layer in layers}
    blocks = {block.here is not None for block in small.stage.moe_blocks.values()}
    whole = small.stage._layers_part() is not None
    if expected[2] is None:  # which only kernels of unpacked weights take
        expected = (*expected[:2], dtype is torch.float32)
    assert (attention, blocks, whole) == ({expected[0]}, {expected[1]}, expected[2])


@pytest.mark.smoke(26)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("lengths", "num_new"), [([1], 1), ([5, 2, 9], 1), ([4, 7], 3)])
def test_all_ways_give_the_same(family: str, dtype: torch.dtype, lengths, num_new: int):
    """All layers at once, each in its parts (where stages are recorded), and operations alone."""
    small = Small(FAMILIES[family][0], dtype)
    at_once, _ = small.step(lengths, num_new)
    in_parts, of_parts = small.step(lengths, num_new, record=True)
    small.go_the_general_way()
    alone, of_alone = small.step(lengths, num_new, record=True)
    assert torch.equal(at_once, in_parts)
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    assert (at_once - alone).abs().max() <= bound * alone.abs().max()
    assert of_parts is not None
    assert of_alone is not None
    for name in ("flops", "weight_bytes", "num_tokens_per_expert"):
        assert np.array_equal(getattr(of_parts, name), getattr(of_alone, name)), name
    assert of_parts.kv_bytes == of_alone.kv_bytes
    assert (of_parts.wall_s > 0).tolist() == (of_alone.wall_s > 0).tolist()
    for layer, topk_ids in of_alone.topk_ids.items():
        assert np.array_equal(of_parts.topk_ids[layer], topk_ids)


def test_where_the_rank_is_stays_up_to_date():
    """All layers in one call say so on the progress board, too."""
    small = Small(BASE, torch.float32)
    small.step([3], 1)
    before = small.position()
    small.step([3], 1)
    assert small.position().counter >= before.counter + 2 * 2 * 5  # steps, layers, stages
    assert small.position().time_s > before.time_s
