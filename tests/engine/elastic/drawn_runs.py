"""What runs are drawn from: options, small caches, prompts that begin alike."""

import numpy as np
from hypothesis import strategies as st

from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Options

OPTIONS = st.builds(
    Options,
    num_micro_batches=st.integers(1, 3),
    micro_batch_schedule=st.sampled_from(["drained", "rotating"]),
)


def small_limits(vocab_size, **more):
    """Of 40 tokens a sequence; `more`: strategies by the name of a limit."""
    return st.builds(
        Limits,
        vocab_size=st.just(vocab_size),
        max_model_len=st.just(40),
        num_blocks=st.integers(10, 30),
        block_size=st.integers(2, 4),
        max_num_batched_tokens=st.integers(3, 20),
        max_num_seqs=st.integers(2, 6),
        prefix_caching=st.booleans(),
        **more,
    )


def draw_prompt(rng, num_token_ids, most):
    """One to `most` token ids, of which some at the beginning are those of other prompts."""
    prompt = rng.integers(0, num_token_ids, rng.integers(1, most + 1))
    num_shared = int(rng.integers(0, len(prompt) + 1))
    prompt[:num_shared] = np.arange(num_shared) % 3
    return prompt
