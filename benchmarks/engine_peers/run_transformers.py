"""transformers as a contender, with one of its experts implementations.

Run: python run_transformers.py FOLDER EXPERTS_IMPLEMENTATION[,float32] NUM_THREADS
"""

import sys

import torch
from serving import Answers, serve
from transformers import AutoModelForCausalLM

MAX_GATHERED_BYTES = 1e9  # batched_mm copies an expert's weights for each token routed to it


def main() -> None:
    answers = Answers()
    folder, option, num_threads = sys.argv[1:]
    experts, _, dtype = option.partition(",")
    torch.set_num_threads(int(num_threads))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype or "bfloat16"), experts_implementation=experts
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    config = model.config
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    gathered_bytes = config.num_experts_per_tok * 2 * inner * config.hidden_size * 2

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        if experts == "batched_mm" and ids.numel() * gathered_bytes > MAX_GATHERED_BYTES:
            raise ValueError(f"batched_mm would copy {ids.numel() * gathered_bytes / 1e9:.0f} GB")
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        return output[:, ids.shape[1] :].tolist()

    with torch.inference_mode():
        serve(answers, generate)


if __name__ == "__main__":
    main()
