"""How much may run at once, and which requests can be served at all."""

from dataclasses import dataclass

import numpy as np

from expertlane.errors import UserError
from expertlane.schedule.request import Request
from expertlane.spec.ranges import take, take_fields


@dataclass(frozen=True)
class Limits:
    """Sizes that bound a scheduler; those of the cache and of a step hold a data-parallel rank.

    Attributes:
        max_model_len: positions a sequence may take. The last output token is never fed back, so
            a prompt of this length still gets one.
        num_blocks, block_size: the paged cache; `block_size` positions a block.
        max_num_batched_tokens: new tokens in a step.
        max_num_seqs: running requests.
        aging_steps: steps of waiting that make up for one level of priority.
        prefix_caching: requests with equal beginnings share blocks.
        phases_apart: a step holds prompts or decodes, never both, and prompts go first; so that
            each can be measured by itself. A decode waits while any prompt can be computed.

    Raises:
        SpecError: a size is out of its range.
    """

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    aging_steps: int = 1000
    prefix_caching: bool = True
    phases_apart: bool = False

    def __post_init__(self) -> None:
        take_fields(self, "scheduler: {}".format)

    @property
    def max_positions(self) -> int:
        """The most positions that any sequence can take."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def max_num_tokens(self, request: Request) -> int:
        """Prompt and output tokens at which a request has reached its length."""
        prompt_len = len(request.prompt_token_ids)
        return prompt_len + min(request.max_tokens, self.max_positions - prompt_len + 1)

    def check(self, request: Request) -> None:
        """Check that a request can be served.

        Raises:
            UserError: the prompt is empty, too long for the model or the cache, or holds what is
                no token of the vocabulary; `max_tokens` is under 1; `priority` is no number.
        """
        name = request.name
        self._check_prompt(name, request.prompt_token_ids)
        take("max_tokens", request.max_tokens, f"{name}: max_tokens")
        take("priority", request.priority, f"{name}: priority")

    def _check_prompt(self, name: str, prompt: np.ndarray) -> None:
        if prompt.size == 0:
            raise UserError(f"{name}: the prompt is empty; it must have 1 token or more")
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
            raise UserError(f"{name}: the prompt must be one list of whole numbers")
        wrong = prompt[(prompt < 0) | (prompt >= self.vocab_size)]
        if wrong.size:
            raise UserError(
                f"{name}: token id {wrong[0]} is not in the vocabulary; "
                f"valid ids: 0 to {self.vocab_size - 1}"
            )
        if len(prompt) > self.max_model_len:
            raise UserError(
                f"{name}: the prompt has {len(prompt)} tokens but the model takes "
                f"{self.max_model_len}; valid lengths: 1 to {self.max_positions}"
            )
        if len(prompt) > self.max_positions:
            raise UserError(
                f"{name}: the prompt of {len(prompt)} tokens needs "
                f"{-(-len(prompt) // self.block_size)} blocks of {self.block_size} but the cache "
                f"has {self.num_blocks}; valid lengths: 1 to {self.max_positions}"
            )
