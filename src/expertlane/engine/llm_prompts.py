"""Prompts and sampling parameters of a call of `LLM`, one or several."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import cast

import numpy as np

from expertlane.engine.live_request import Prompt
from expertlane.errors import UserError
from expertlane.schedule.request import RequestOutput
from expertlane.spec.ranges import shown
from expertlane.spec.sampling import SamplingParams


def all_finished(outputs: list[RequestOutput]) -> Callable[[], bool]:
    """A test whether all outputs are finished, which checks each finished one only once."""
    num_finished = 0  # of the first ones

    def are_finished() -> bool:
        nonlocal num_finished
        number = num_finished  # several threads may ask at once
        while number < len(outputs) and outputs[number].finish_reason is not None:
            number += 1
        num_finished = number
        return number == len(outputs)

    return are_finished


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several.

    Raises:
        UserError: they are of another type.
    """
    is_array = isinstance(prompts, np.ndarray) and prompts.ndim > 0
    if not is_array and not isinstance(prompts, Sequence):
        raise UserError(
            f"prompts are a {type(prompts).__name__}; give a text, a list of token ids, or a list "
            "of either"
        )
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Integral)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def with_params(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams]]:
    """Each prompt with its own parameters.

    Raises:
        UserError: they are of another type, or not as many as prompts.
    """
    several = as_list(prompts)
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(several)
    is_list = isinstance(params, Sequence)
    if not is_list or not all(isinstance(each, SamplingParams) for each in params):
        raise UserError(f"params are {shown(params)}; give SamplingParams, one or a list of them")
    if len(params) != len(several):
        raise UserError(
            f"{len(several)} prompts but {len(params)} sampling parameters; "
            "give one for all, or one per prompt"
        )
    return list(zip(several, params, strict=True))
