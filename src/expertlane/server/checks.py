"""Checks of a request that need the model's vocabulary, or several fields together."""

import re
from collections.abc import Sequence

from expertlane.server.errors import bad_field
from expertlane.server.requests import GenerationRequest
from expertlane.spec.sampling import SamplingParams

MOST_LOGPROBS = 2**20  # of a request: some 150 bytes each
_PROMPT = re.compile(r"prompt(?: (\d+))?(?=:)")


def check_tokens(request: GenerationRequest, vocab_size: int) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        ApiError: a field has one.
    """
    for name, given in (
        ("stop_token_ids", request.stop_token_ids or ()),
        ("logit_bias", map(int, request.logit_bias or ())),
    ):
        for token_id in given:
            if token_id >= vocab_size:
                text = f"{name}: there is no token {token_id}; valid ids: 0 to {vocab_size - 1}"
                raise bad_field(name, text)


def check_logprobs(params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]]) -> None:
    """Refuse a request whose log-probabilities would take too much memory.

    Args:
        params: of every choice of every prompt, in their order.

    Raises:
        ApiError: it asks for too many.
    """
    num_choices = len(params) // len(prompts)
    num_asked = sum(
        (each.max_tokens * (each.logprobs + 1) if each.logprobs is not None else 0)
        + (
            len(prompts[place // num_choices]) * (each.prompt_logprobs + 1)
            if each.prompt_logprobs is not None
            else 0
        )
        for place, each in enumerate(params)
    )
    if num_asked > MOST_LOGPROBS:
        text = (
            f"logprobs: this request may give {num_asked:,} (for each token, and for the likeliest "
            f"ones in its place); at most {MOST_LOGPROBS:,} are taken"
        )
        raise bad_field("logprobs", text)


def as_field(message: str, param: str, num_choices: int) -> str:
    """An engine's message about `prompt`, or `prompt 3`, with the field's name in its place."""
    found = _PROMPT.match(message)
    if found is None:
        return f"{param}: {message}"
    number = found[1]
    place = "" if number is None else f"[{(int(number) - 1) // num_choices}]"
    return f"{param}{place}{message[found.end() :]}"
