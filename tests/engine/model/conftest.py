"""Checkpoints with changes."""

import json

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def rewrite(checkpoints, tmp_path):
    """Copies a family's checkpoint with changes to its tensors (None removes) and its config."""

    def copy(family, tensors=None, config=None):
        source = checkpoints.folder(family)
        changed = load_file(source / "model.safetensors") | (tensors or {})
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors")
        text = (source / "config.json").read_text()
        (tmp_path / "config.json").write_text(json.dumps(json.loads(text) | (config or {})))
        return tmp_path

    return copy
