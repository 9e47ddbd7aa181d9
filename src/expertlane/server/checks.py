"""What is checked of a request that its types do not say."""

import re

from expertlane.server.errors import bad_field
from expertlane.server.requests import GenerationRequest

_PROMPT = re.compile(r"prompt(?: (\d+))?(?=:)")


def check_tokens(request: GenerationRequest, vocab_size: int) -> None:
    """Refuse what is no token of the model.

    Raises:
        ApiError: a field names one.
    """
    for name, given in (
        ("stop_token_ids", request.stop_token_ids or ()),
        ("logit_bias", map(int, request.logit_bias or ())),
    ):
        for token_id in given:
            if token_id >= vocab_size:
                text = f"{name}: there is no token {token_id}; valid ids: 0 to {vocab_size - 1}"
                raise bad_field(name, text)


def as_field(message: str, param: str, num_choices: int) -> str:
    """A refusal of the engine with the field's name for `prompt`, or `prompt 3`."""
    found = _PROMPT.match(message)
    if found is None:
        return f"{param}: {message}"
    number = found[1]
    place = "" if number is None else f"[{(int(number) - 1) // num_choices}]"
    return f"{param}{place}{message[found.end() :]}"
