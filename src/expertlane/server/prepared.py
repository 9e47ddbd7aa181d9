"""A request with tokenized prompts: everything that its answer depends on, but for sampling."""

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
    """A checked request, ready for the engine.

    Attributes:
        request: its body.
        prompts: [num_prompts]; token ids.
        params: [num_prompts × num_choices]; choices of a prompt stand together.
        texts: [num_prompts]; texts of the prompts, where the answer needs them, else empty.
        grammar: the grammar of its outputs; held, so that the engine finds it compiled.
        before: messages of the earlier response that it continues.
        ids: ids of the answer and its parts.
        created: time of the request, in seconds since 1970.
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
        """Choices of each prompt."""
        return len(self.params) // len(self.prompts)

    @property
    def prompts_of_choices(self) -> list[list[int]]:
        """[num_prompts × num_choices]; the prompt of each choice."""
        return [prompt for prompt in self.prompts for _ in range(self.num_choices)]
