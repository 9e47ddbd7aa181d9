"""vLLM's CPU backend as a contender; needs the environment that bench_engine.py describes.

Run: python run_vllm.py FOLDER TENSOR_PARALLEL_SIZE
"""

import sys

from serving import Answers, serve


def main() -> None:
    answers = Answers()
    from vllm import LLM, SamplingParams  # after standard output is kept from what it prints

    llm = LLM(
        sys.argv[1],
        tensor_parallel_size=int(sys.argv[2]),
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

    serve(answers, generate)


if __name__ == "__main__":
    main()
