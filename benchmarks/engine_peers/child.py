"""A contender of `bench_engine.py` in a process of its own, perhaps of another environment.

Run: python child.py ours FOLDER LAYOUT[,weights=int8]
     python child.py transformers FOLDER EXPERTS_IMPLEMENTATION[,float32] NUM_THREADS
     python child.py vllm FOLDER TENSOR_PARALLEL_SIZE

Requests come on stdin, answers go to stdout, as JSON lines. The first line, {}, says that it has
loaded. A request {"prompts": [[token ids]], "max_tokens": n} is answered by {"seconds": s}, the
time from having token ids to having token ids, or by {"error": line}.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Prompts, max_tokens → output ids of each prompt. A ValueError: it cannot run this point.
Generate = Callable[[list[list[int]], int], Sequence[Sequence[int]]]
NUM_BLOCKS = 2048  # of 16 tokens: over three times what the largest point needs
MAX_GATHERED_BYTES = 1e9  # batched_mm copies an expert's weights for each token routed to it


class Answers:
    """Standard output, kept for answers: what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, answer: dict[str, object]) -> None:
        """Write one line, at once."""
        self._file.write(json.dumps(answer) + "\n")
        self._file.flush()

    def serve(self, generate: Generate) -> None:
        """Answer requests until standard input ends."""
        self.send({})
        for line in sys.stdin:
            request = json.loads(line)
            max_tokens = request["max_tokens"]
            began_s = time.perf_counter()
            try:
                outputs = generate(request["prompts"], max_tokens)
            except ValueError as error:
                self.send({"error": str(error)})
                continue
            seconds = time.perf_counter() - began_s
            lengths = [len(output) for output in outputs]
            if lengths != [max_tokens] * len(request["prompts"]):
                raise AssertionError(f"{max_tokens} tokens each were wanted, got {lengths}")
            self.send({"seconds": seconds})


def run_ours(answers: Answers, folder: str, option: str) -> None:
    from expertlane.engine.llm import LLM
    from expertlane.spec.deployment import Options
    from expertlane.spec.sampling import SamplingParams

    parts = option.split(",")
    weights: Any = dict(part.split("=") for part in parts if part.startswith("weights="))
    with LLM(
        folder,
        layout=",".join(part for part in parts if not part.startswith("weights=")),
        options=Options(**weights),
        dtype="bfloat16",
        max_model_len=1024,
        num_blocks=NUM_BLOCKS,
        prefix_caching=False,
        max_num_batched_tokens=4096,
        max_num_seqs=256,
    ) as llm:

        def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            return [output.token_ids for output in llm.generate(prompts, params)]

        answers.serve(generate)


def run_vllm(answers: Answers, folder: str, tensor_parallel_size: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        tensor_parallel_size=int(tensor_parallel_size),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        enable_prefix_caching=False,
        max_num_batched_tokens=4096,
        max_num_seqs=256,
        kv_cache_memory_bytes=2**30,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(requests, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    answers.serve(generate)


def run_transformers(answers: Answers, folder: str, option: str, num_threads: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

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
        answers.serve(generate)


RUN: dict[str, Callable[..., None]] = {
    "ours": run_ours,
    "transformers": run_transformers,
    "vllm": run_vllm,
}

if __name__ == "__main__":
    RUN[sys.argv[1]](Answers(), *sys.argv[2:])
