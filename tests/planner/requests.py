"""Small requests to a planner."""

import pytest

from expertlane.cost.laws.profile import LIKELY, Execution, ModelledCluster, parse_cluster
from expertlane.cost.projector import Projector, Setting, StepSize
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.throughput import Goals
from expertlane.planner.candidates import PlanRequest
from expertlane.planner.screen import ScreenedCandidate
from expertlane.planner.search import OnePool, Search
from expertlane.planner.simulated import simulated_pool
from expertlane.spec.mixers import (
    CompressedAttention,
    Indexer,
    LatentAttention,
    StateMixer,
    WindowHeads,
)
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload

PAPER = PRESETS["paper"]
WORKLOAD = Workload(num_sequences=64, prompt_len=512, output_len=128)
MIXED = PAPER.with_overrides(
    name="mixed",
    num_hidden_layers=5,
    hidden_size=2048,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=1024,
    gated_mlp=True,
    dense_layers=(0,),
    intermediate_size=8192,
    shared_expert_intermediate_size=1024,
    sliding_window=(None, 128, None, 128, None),
)

HYBRID = MIXED.with_overrides(  # states, an indexer, layers of a mixer or an MLP alone
    name="hybrid",
    num_hidden_layers=6,
    num_key_value_heads=None,
    head_dim=96,
    latent=LatentAttention(256, 64, 32, 64, q_lora_rank=512),
    indexer=Indexer(8, 64, 256),
    shared_choice_layers=(5,),
    state=StateMixer("gated_delta", 16, 8, 64, 64),
    state_layers=(1, 2, 4),
    mixer_only_layers=(2,),
    mlp_only_layers=(3,),
    sliding_window=(),
)
CHOOSING = MIXED.with_overrides(  # an indexer in some layers, for each head of keys and values
    name="choosing",
    sliding_window=(),
    indexer=Indexer(4, 64, 256, block_size=64, by_group=True),
    unindexed_layers=(0, 3),
    shared_choice_layers=(2,),
)
WINDOWED = MIXED.with_overrides(  # windows with heads of their own, which are kept alone
    name="windowed",
    v_head_dim=64,
    window_heads=WindowHeads(24, 8, sinks=True),
    query_rank=256,
    attention_gate="head",
    qk_norm="rotated_head",
    further_biases=("norm", "head"),
)

COMPRESSED = MIXED.with_overrides(  # entries of both kinds, residual streams, a hashed layer
    name="compressed",
    num_key_value_heads=1,
    head_dim=256,
    sliding_window=(128,) * 5,
    compressed=CompressedAttention(512, 8, 256, (None, "all", "chosen", "chosen", "all")),
    indexer=Indexer(8, 64, 256),
    num_streams=4,
    hash_layers=(1,),
)


def setting_of(
    model: ModelConfig, dtype: str = "bfloat16", execution: Execution = Execution.GRAPH, skew=0.0
) -> Setting:
    routing = PowerLawRouting.of(model, skew, num_sampled_layers=2)
    return Setting(NumberTypes.asked(dtype), execution, routing)


def cluster_of(num_devices: int, profile: str = "h100") -> ModelledCluster:
    return parse_cluster(f"{profile}x{num_devices}")


def request_of(
    model: ModelConfig = MIXED,
    num_devices: int = 4,
    workload: Workload = WORKLOAD,
    goals: Goals | None = None,
    **setting,
) -> PlanRequest:
    """`setting`: as `setting_of` takes it."""
    chosen = setting_of(model, **setting)
    return PlanRequest(model, cluster_of(num_devices), workload, goals or Goals(), chosen)


def search_of(*args, **kwargs) -> Search:
    """A search for `request_of`."""
    return Search(request_of(*args, **kwargs))


def agrees_with_the_whole_model(each: ScreenedCandidate, request: PlanRequest) -> None:
    """One rank that stands for all takes about as long as all of the deployment's ranks."""
    layout, options, num_drafts = each.candidate
    args = request.model, layout, options, request.cluster, request.setting, num_drafts
    projector, prompts = Projector(*args), each.steps.prompts
    decode = StepSize(int(each.steps.num_seqs[-1]), 1, request.workload.mean_context)
    num = prompts.num_seqs * layout.replicas * layout.dp
    prefill = StepSize(num, prompts.num_new, prompts.num_cached, phase=Phase.PREFILL)
    for seconds, size, rel in (
        (each.steps.decode_s[LIKELY, -1], decode, 0.1),
        (each.steps.prefill_s[LIKELY], prefill, 0.12),
    ):
        step_s = projector.step(size).round_s.value
        assert seconds == pytest.approx(step_s, rel=rel), each.candidate


def planned(search: Search) -> OnePool:
    """The best of one pool, simulated."""
    return simulated_pool(search, search.screen(), lambda _: None)
