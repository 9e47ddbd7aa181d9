"""transformers as a contender: each experts implementation with each cache.

Run: python run_transformers.py FOLDER NUM_THREADS
"""

import sys

import torch
from serving import Answers, serve
from transformers import AutoModelForCausalLM

EXPERTS = ("eager", "grouped_mm", "batched_mm")
CACHES = ("dynamic", "static")
MAX_GATHERED_BYTES = 4e9  # batched_mm copies an expert's weights for each token routed to it


def main() -> None:
    answers = Answers()
    torch.set_num_threads(int(sys.argv[2]))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    config = model.config
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    gathered_bytes = config.num_experts_per_tok * 2 * inner * config.hidden_size * 2

    def generate(prompts: list[list[int]], max_tokens: int, variant: str) -> list[list[int]]:
        experts, cache = variant.split("/")
        ids = torch.tensor(prompts)
        if experts == "batched_mm" and ids.numel() * gathered_bytes > MAX_GATHERED_BYTES:
            raise ValueError(f"batched_mm would copy {ids.numel() * gathered_bytes / 1e9:.0f} GB")
        model.set_experts_implementation(experts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            cache_implementation=cache,
        )
        return output[:, ids.shape[1] :].tolist()

    with torch.inference_mode():
        serve(answers, [f"{experts}/{cache}" for experts in EXPERTS for cache in CACHES], generate)


if __name__ == "__main__":
    main()
