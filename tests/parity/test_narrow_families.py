"""Narrow weights (float8, int8, compressed-tensors, MXFP4) of many families and odd sizes.

The reference is transformers on a checkpoint that stores the same rounded numbers in full.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.model.families import save_checkpoint
from engine.model.quantised import Scheme, save_compressed, save_fp8, save_mxfp4
from expertlane.engine.model.checkpoint import Checkpoint
from parity.against_transformers import check_against_transformers
from parity.reference import rounded_to_int8

FAMILIES = [
    *("glm4_moe", "glm4_moe_lite", "dots1", "minimax_m2", "ernie4_5_moe", "qwen3_vl_moe"),
    "granitemoe",
]
NUM_STEPS = 4
# Ends of names of matrices that are not rounded.
_KEPT = ("embed_tokens.weight", "gate.weight", "layer.weight", "kv_b_proj.weight")


@pytest.mark.smoke(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_float8(pools, checkpoints, tmp_path, family: str) -> None:
    """Borders of blocks are neither those of heads nor those of the layout's shards."""
    stored, plain = tmp_path / "fp8", tmp_path / "plain"
    save_fp8(checkpoints.folder(family), stored, plain, (12, 20))
    model = Checkpoint(stored).model
    check_against_transformers(pools, stored, model, "tp=2,ep=2", NUM_STEPS, plain=plain)


def _save_rounded(source: Path, plain: Path) -> None:
    """A checkpoint of the rounded numbers; its head is untied, since embeddings are not rounded."""
    shutil.copytree(source, plain)
    tensors = load_file(plain / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors.setdefault("lm_head.weight", tensors[embedding].clone())
    for name, tensor in tensors.items():
        is_matrix = tensor.dim() > 1 and not name.endswith((*_KEPT, "bias"))
        if is_matrix and not name.startswith("model.visual."):
            rows = tensor.flatten(0, -2).numpy()
            tensors[name] = torch.from_numpy(rounded_to_int8(rows)).view(tensor.shape)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"tie_word_embeddings": False}
    (plain / "config.json").write_text(json.dumps(config))


@pytest.mark.smoke(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_int8(pools, checkpoints, tmp_path, family: str) -> None:
    source, plain = checkpoints.folder(family), tmp_path / "plain"
    _save_rounded(source, plain)
    model = Checkpoint(source).model
    how = {"plain": plain, "weights": "int8"}
    check_against_transformers(pools, source, model, "tp=2,ep=2", NUM_STEPS, **how)


# Names of a family's fields for the width of its experts and their number.
_SIZES = {
    "mixtral": ("intermediate_size", "num_local_experts"),
    "qwen3_moe": ("moe_intermediate_size", "num_experts"),
    "qwen2_moe": ("moe_intermediate_size", "num_experts"),
    "glm4_moe": ("moe_intermediate_size", "n_routed_experts"),
    "dots1": ("moe_intermediate_size", "n_routed_experts"),
    "minimax_m2": ("intermediate_size", "num_local_experts"),
    "deepseek_v3": ("moe_intermediate_size", "n_routed_experts"),
}
_LAYOUTS = ("tp=1", "tp=2", "tp=2,ep=2", "dp=2,ep=2", "pp=2", "dp=2,tp=2,ep=4")


def _drawn_family(draw: random.Random, folder: Path) -> tuple[Path, str]:
    """A checkpoint of odd sizes, and a layout that they allow."""
    family, layout = draw.choice([*_SIZES]), draw.choice(_LAYOUTS)
    width, num_experts = _SIZES[family]
    sizes: dict[str, Any] = {
        "hidden_size": 2 * draw.randrange(17, 60),
        width: 4 * draw.randrange(3, 20) if "tp" in layout else draw.randrange(9, 80),
        num_experts: 4 * draw.randrange(1, 4) if family != "deepseek_v3" else 8,
        "num_experts_per_tok": draw.randrange(1, 4),
    }
    if family not in ("deepseek_v3",):
        sizes["head_dim"] = 4 * draw.randrange(2, 7)
    if family == "qwen2_moe":  # it has no head_dim
        del sizes["head_dim"]
        sizes["hidden_size"] = 16 * draw.randrange(2, 7)
        sizes["shared_expert_intermediate_size"] = 4 * draw.randrange(3, 20)
    return save_checkpoint(family, folder, draw.randrange(1000), **sizes), layout


def _drawn_scheme(draw: random.Random) -> Scheme:
    block = draw.randrange(1, 40), draw.randrange(1, 40)
    group = draw.randrange(1, 40)
    return draw.choice(
        [
            ("int-quantized", "channel", {}, (1, None)),
            ("int-quantized", "group", {"group_size": group}, (1, group)),
            ("pack-quantized", "channel", {"actorder": None}, (1, None)),
            ("pack-quantized", "group", {"group_size": group}, (1, group)),
            ("float-quantized", "tensor", {}, (None, None)),
            ("float-quantized", "channel", {}, (1, None)),
            ("float-quantized", "block", {"block_structure": list(block)}, block),
        ]
    )


def _check_drawn(pools, folder: Path, plain: Path, layout: str) -> None:
    model = Checkpoint(folder).model
    check_against_transformers(pools, folder, model, layout, 3, plain=plain)


_DRAWS = range(60)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("seed", _DRAWS)
def test_float8_in_blocks_of_odd_sizes(pools, tmp_path, seed: int) -> None:
    draw = random.Random(f"float8 {seed}")
    source, layout = _drawn_family(draw, tmp_path / "source")
    stored, plain = tmp_path / "stored", tmp_path / "plain"
    save_fp8(source, stored, plain, (draw.randrange(1, 40), draw.randrange(1, 40)))
    _check_drawn(pools, stored, plain, layout)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("seed", _DRAWS)
def test_compressed_tensors_of_odd_sizes(pools, tmp_path, seed: int) -> None:
    draw = random.Random(f"compressed {seed}")
    source, layout = _drawn_family(draw, tmp_path / "source")
    stored, plain = tmp_path / "stored", tmp_path / "plain"
    save_compressed(source, stored, plain, _drawn_scheme(draw))
    _check_drawn(pools, stored, plain, layout)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("seed", _DRAWS)
def test_mxfp4_of_odd_sizes(pools, tmp_path, seed: int) -> None:
    """Blocks have 32 values; layouts may cut experts inside a block."""
    draw = random.Random(f"mxfp4 {seed}")
    layout = draw.choice(_LAYOUTS)
    source = save_checkpoint(
        "gpt_oss",
        tmp_path / "source",
        draw.randrange(1000),
        hidden_size=32 * draw.randrange(1, 6),
        intermediate_size=32 * draw.randrange(1, 6),
        num_local_experts=4 * draw.randrange(1, 4),
        num_experts_per_tok=draw.randrange(1, 4),
        head_dim=4 * draw.randrange(2, 7),
        sliding_window=draw.randrange(1, 24),
    )
    stored, plain = tmp_path / "stored", tmp_path / "plain"
    save_mxfp4(source, stored, plain)
    _check_drawn(pools, stored, plain, layout)
