"""A checkpoint that is a configuration alone, for commands that load no weights."""

import json
from pathlib import Path
from typing import Any

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}


def checkpoint(folder: Path, **more: Any) -> None:
    """A folder with a configuration and no weights; `more` is added to it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL | more))
