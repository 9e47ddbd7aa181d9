"""expertlane as a contender. Run: python run_ours.py FOLDER LAYOUT[,weights=int8]"""

import sys
from typing import Any

from serving import Answers, serve

from expertlane.engine.llm import LLM
from expertlane.spec.deployment import Options
from expertlane.spec.sampling import SamplingParams

NUM_BLOCKS = 2048  # of 16 tokens: over three times what the largest point needs


def main() -> None:
    answers = Answers()
    folder, option = sys.argv[1:]
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

        serve(answers, generate)


if __name__ == "__main__":
    main()
