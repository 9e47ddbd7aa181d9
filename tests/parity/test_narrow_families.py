"""Contract 1 for weights of one byte of families whose matrices are read in ways of their own.

transformers runs the plain checkpoint of the rounded numbers.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertlane.model.checkpoint import Checkpoint
from model.quantised import save_fp8
from parity.against_transformers import check_against_transformers
from parity.reference import rounded_to_int8

FAMILIES = [
    *("glm4_moe", "glm4_moe_lite", "dots1", "minimax_m2", "ernie4_5_moe", "qwen3_vl_moe"),
    "granitemoe",
]
NUM_STEPS = 4
# Ends of names of matrices that stay as they are.
_KEPT = ("embed_tokens.weight", "gate.weight", "layer.weight", "kv_b_proj.weight")


@pytest.mark.smoke(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_float8(pools, checkpoints, tmp_path, family: str) -> None:
    """In blocks that meet neither heads nor the cuts of layouts."""
    stored, plain = tmp_path / "fp8", tmp_path / "plain"
    save_fp8(checkpoints.folder(family), stored, plain, (12, 20))
    model = Checkpoint(stored).model
    check_against_transformers(pools, stored, model, "tp=2,ep=2", NUM_STEPS, plain=plain)


def _save_rounded(source: Path, plain: Path) -> None:
    """What int8 weights mean; the head is one of its own, since an embedding is not rounded."""
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
