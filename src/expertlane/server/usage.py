"""Token counts of an answer, in the API's form."""

from typing import Any

from expertlane.schedule.request import Chunk
from expertlane.server.marks import MarkedText, Marks


def usage_of(
    num_prompt: int, num_cached: int, num_output: int, num_reasoning: int
) -> dict[str, Any]:
    """The object `usage`.

    Args:
        num_cached: prompt tokens found in the prefix cache.
        num_reasoning: output tokens before the answer itself.
    """
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning},
    }


class ReasoningCount:
    """Counts the tokens of a choice that are reasoning, marks included.

    Args:
        prompt: text of the prompt, whose end tells whether the answer begins inside reasoning.

    Attributes:
        num_tokens: reasoning tokens so far.
    """

    def __init__(self, marks: Marks, prompt: str) -> None:
        self.num_tokens = 0
        self._text = MarkedText(marks, prompt, takes_calls=False)
        self._num_unknown = 0  # tokens so far, while it is not known what they begin

    def feed(self, chunk: Chunk) -> None:
        """Take in a chunk: a token, or the end."""
        was = self._text.kind
        if was not in (None, "reasoning"):
            return
        self._text.feed(chunk.text)
        num = int(chunk.token_id is not None)
        if was == "reasoning":
            self.num_tokens += num
        else:
            self._num_unknown += num
            if self._text.kind == "reasoning":
                self.num_tokens += self._num_unknown
                self._num_unknown = 0
