"""Make one of the checkpoints that `bench_engine.py` runs: random weights, no tokenizer.

Run: python make_checkpoint.py mixtral|qwen3 FOLDER
Every matrix is drawn with standard deviation 1/√fan_in, the embedding with 1, so that hidden
states keep their scale and a router's logits spread tokens over all experts.
"""

import sys
from pathlib import Path

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(
            num_hidden_layers=4,
            hidden_size=1024,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_local_experts=16,
            num_experts_per_tok=2,
            intermediate_size=1024,
            vocab_size=8192,
            max_position_embeddings=4096,
            sliding_window=None,
            dtype="bfloat16",
        )
    )


def qwen3() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            num_hidden_layers=4,
            hidden_size=512,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=64,
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=256,
            intermediate_size=1024,  # of dense layers, of which there is none
            norm_topk_prob=True,
            vocab_size=8192,
            max_position_embeddings=4096,
            dtype="bfloat16",
        )
    )


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    embedding = model.get_input_embeddings().weight
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=1.0 if weight is embedding else weight.shape[-1] ** -0.5)


def main() -> None:
    make = {"mixtral": mixtral, "qwen3": qwen3}[sys.argv[1]]
    model = make().to(torch.bfloat16)
    randomise(model)
    model.save_pretrained(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
