"""A checkpoint of zeros that takes no room on the disk, and how much memory the reference needs.

    python tests/endpoint/sparse.py FOLDER HIDDEN_SIZE EXPERT_SIZE NUM_EXPERTS NUM_LAYERS

prints bytes as JSON: of the file, of a layer in float32, and the most that scoring added to memory.
"""

import json
import math
import sys
from pathlib import Path

_SIZE = 2  # bytes of bfloat16
_VOCAB = 1024


def write_sparse(folder: Path, hidden: int, expert: int, num_experts: int, layers: int) -> int:
    """Write a Qwen3-MoE of zeros in bfloat16; gives the parameters of a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": _VOCAB,
        "hidden_size": hidden,
        "intermediate_size": expert,
        "moe_intermediate_size": expert,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": num_experts,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (512, hidden),
        "self_attn.k_proj.weight": (128, hidden),
        "self_attn.v_proj.weight": (128, hidden),
        "self_attn.o_proj.weight": (hidden, 512),
        "self_attn.q_norm.weight": (64,),
        "self_attn.k_norm.weight": (64,),
        "mlp.gate.weight": (num_experts, hidden),
    }
    for index in range(num_experts):
        for part in ("gate", "up"):
            layer[f"mlp.experts.{index}.{part}_proj.weight"] = (expert, hidden)
        layer[f"mlp.experts.{index}.down_proj.weight"] = (hidden, expert)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (_VOCAB, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (_VOCAB, hidden),
    }
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + _SIZE * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return sum(map(math.prod, layer.values()))


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    folder, *sizes = sys.argv[1:]
    per_layer = write_sparse(Path(folder), *map(int, sizes))

    import torch

    from expertlane.endpoint.reference import CheckpointReference
    from expertlane.progress import Progress

    torch.ones(64, 64) @ torch.ones(64, 64)  # its threads and buffers are there
    reference = CheckpointReference(Path(folder))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _resident("VmRSS")
    prompts = [list(range(start, start + 8)) for start in range(0, 64, 8)]
    reference.score_in(prompts, ("float32", "bfloat16"), Progress())
    print(
        json.dumps(
            {
                "file": (Path(folder) / "model.safetensors").stat().st_size,
                "layer": 4 * per_layer,
                "added": _resident("VmHWM") - before,
            }
        )
    )


if __name__ == "__main__":
    main()
