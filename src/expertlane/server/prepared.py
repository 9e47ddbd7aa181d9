"""A request whose prompts are tokens: all that its answer follows from, but for what is drawn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from expertlane.server.ids import AnswerIds
from expertlane.server.requests import SampledRequest
from expertlane.spec.sampling import SamplingParams
from expertlane.text.grammars import Grammar


@dataclass(frozen=True)
class Prepared:
    """A request that can be served.

    Attributes:
        request: its body.
        prompts: [num_prompts].
        params: [num_prompts × num_choices]; choices of a prompt stand together.
        texts: [num_prompts]; the prompts' own, where the answer needs them, else empty.
        grammar: of its outputs; kept, so that the engine finds it.
        before: messages that a response goes on from.
        ids: of the answer and its parts.
        created: seconds since 1970.
    """

    request: SampledRequest
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    texts: Sequence[str] = ()
    grammar: Grammar | None = None
    before: Sequence[dict[str, Any]] = ()
    ids: AnswerIds = field(default_factory=AnswerIds)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_choices(self) -> int:
        """Of each prompt."""
        return len(self.params) // len(self.prompts)

    @property
    def prompts_of_choices(self) -> list[list[int]]:
        """[num_prompts × num_choices]."""
        return [prompt for prompt in self.prompts for _ in range(self.num_choices)]
