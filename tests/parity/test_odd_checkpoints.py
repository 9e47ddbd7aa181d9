"""Contract 1 against transformers, for checkpoints whose config.json does not say it all."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.screen import tells
from engine.model.families import save_checkpoint
from expertlane.engine.launch import check_checkpoint
from expertlane.engine.model.checkpoint import Checkpoint
from parity.against_transformers import check_against_transformers

NUM_STEPS = 6
_KIMI_YARN = {
    **{"rope_type": "yarn", "rope_theta": 5e4, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 8},
}
EMBEDDING = "model.embed_tokens.weight"


def _check(pools, folder: Path, layout: str) -> list[str]:
    """Gives the warnings."""
    lines: list[str] = []
    model = Checkpoint(folder).model
    model = check_checkpoint(model, folder, ignore_unused_tensors=False, log=lines.append)
    check_against_transformers(pools, folder, model, layout, NUM_STEPS)
    return lines


def _write_config(folder: Path, changes: dict, *left_out: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: config[key] for key in config if key not in left_out}))


@pytest.mark.smoke(3)
@pytest.mark.parametrize(
    ("family", "made", "changes", "left_out"),
    [
        ("deepseek_v3", {}, {}, ["n_shared_experts"]),
        ("deepseek_v3", {"norm_topk_prob": False}, {"norm_topk_prob": None}, []),
        ("deepseek_v3", {"rope_interleave": False}, {"rope_interleave": None}, []),
        ("deepseek_v2", {"n_shared_experts": 2}, {}, ["n_shared_experts"]),
        ("deepseek_v2_lite", {}, {"norm_topk_prob": None}, ["topk_method", "attention_bias"]),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 4096},
            {},
            ["sliding_window", "norm_topk_prob"],
        ),
        (
            "qwen2_moe",
            {"mlp_only_layers": []},
            {"mlp_only_layers": None, "layer_types": None},
            ["qkv_bias"],
        ),
        ("mixtral", {"num_key_value_heads": 8}, {}, ["num_key_value_heads", "num_local_experts"]),
        ("gpt_oss", {}, {"layer_types": None}, ["attention_bias", "swiglu_alpha"]),
        ("mixtral", {}, {"dtype": None, "torch_dtype": "torch.float32"}, ["architectures"]),
        # As Kimi-K2 has them: the blend of frequencies begins and ends at one dimension.
        ("deepseek_v3", {"rope_parameters": _KIMI_YARN}, {}, ["num_mtp_layers"]),
        ("glm4_moe", {"rope_parameters": {**_KIMI_YARN, "partial_rotary_factor": 0.25}}, {}, []),
        ("minimax_m2", {}, {"rotary_dim": 8, "rope_parameters": None}, ["num_experts"]),
        ("gpt_oss", {"num_key_value_heads": 8}, {"rope_parameters": None}, ["swiglu_limit"]),
    ],
)
def test_fields_left_out_or_null(pools, tmp_path, family, made, changes, left_out) -> None:
    folder = save_checkpoint(family, tmp_path, **made)
    _write_config(folder, changes, *left_out)
    assert _check(pools, folder, "tp=2,ep=2") == []


_PARTIAL = {"glm4_moe": 0.5, "minimax_m2": 0.5}  # shares of a head that are rotated


@pytest.mark.smoke(1)
@pytest.mark.parametrize("seed", range(60))
def test_dynamic_rotary_positions(pools, tmp_path, seed) -> None:
    """Within the positions of the model they are the plain ones."""
    draw = random.Random(seed)
    family = draw.choice(["mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "minimax_m2"])
    rope = {"rope_type": "dynamic", "factor": draw.uniform(1.5, 40)}
    rope["rope_theta"] = 10 ** draw.uniform(3, 7)
    if family in _PARTIAL:
        rope["partial_rotary_factor"] = _PARTIAL[family]
    sizes = {"max_position_embeddings": draw.randrange(40, 300)}  # the longest sequence has 27
    if family == "mixtral":
        sizes["head_dim"] = 8  # transformers does not work it out for this kind
    folder = save_checkpoint(family, tmp_path, rope_parameters=rope, **sizes)
    if draw.random() < 0.5:  # as transformers 4 wrote it
        plain = {"type": "dynamic", "factor": rope["factor"]}
        old = {"rope_theta": rope["rope_theta"], "rope_scaling": plain}
        old |= {name: rope[name] for name in rope.keys() & {"partial_rotary_factor"}}
        _write_config(folder, old, "rope_parameters")
    assert _check(pools, folder, draw.choice(["tp=1", "tp=2,ep=2", "pp=2,dp=2,ep=2"])) == []


def _with_tensors(folder: Path, *left_out: str, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    stored = load_file(path) | {f"{name}.weight": tensors[name] for name in tensors}
    kept = {name: stored[name] for name in stored if name not in left_out}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["tp=1", "tp=2,ep=2", "pp=2,dp=2,ep=2"])
def test_another_head_beside_the_embedding_it_is_tied_to(pools, tmp_path, layout) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path)
    head = torch.randn(97, 64, generator=torch.Generator().manual_seed(1)) / 8
    _with_tensors(folder, lm_head=head)
    (warning,) = _check(pools, folder, layout)
    assert tells(warning, f"warning: {folder} config.json lm_head.weight used")


def test_a_copy_of_the_embedding_it_is_tied_to(pools, tmp_path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path)
    _with_tensors(folder, lm_head=load_file(folder / "model.safetensors")[EMBEDDING])
    assert _check(pools, folder, "tp=2,ep=2") == []


def test_a_tied_head_without_its_embedding(pools, tmp_path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path)
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    _with_tensors(folder, EMBEDDING, lm_head=embedding)
    assert _check(pools, folder, "pp=2,dp=2,ep=2") == []


NO_WIDTH = {
    "deepseek_v2": "n_shared_experts",
    "deepseek_v3": "n_shared_experts",
    "glm4_moe": "n_shared_experts",
    "glm4_moe_lite": "n_shared_experts",
    "dots1": "n_shared_experts",
    "qwen2_moe": "shared_expert_intermediate_size",
}


@pytest.mark.smoke(2)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's, as intended
@pytest.mark.parametrize("layout", ["tp=1", "tp=2,ep=2", "pp=2,dp=2,ep=2"])
@pytest.mark.parametrize("family", NO_WIDTH)
def test_shared_experts_of_no_width(pools, tmp_path, family, layout) -> None:
    folder = save_checkpoint(family, tmp_path, **{NO_WIDTH[family]: 0})
    stored = load_file(folder / "model.safetensors")
    assert {tuple(each.shape) for each in stored.values() if not each.numel()} == {(0, 64), (64, 0)}
    assert _check(pools, folder, layout) == []
