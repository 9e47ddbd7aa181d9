"""What a request gives: all of it in the end, or piece by piece as it comes."""

from dataclasses import dataclass, field

from expertlane.schedule.request import FinishReason
from expertlane.spec.sampling import TokenLogprobs


@dataclass(eq=False)
class RequestOutput:
    """A request and all that came of it.

    Attributes:
        prompt: None where the prompt was given as tokens.
        token_ids: the output, with the token that ended it.
        text: of the output; without what stopped it, and empty without a tokenizer.
        logprobs: [len(token_ids)]; empty unless asked for.
        finish_reason: None while it goes on.
        error: why it ended in an error, in a line; None where it did not.
        num_preemptions: how often its keys and values were dropped and computed again.
        arrival_s: when it was added, on `time.perf_counter`.
        token_times_s: [len(token_ids)]; when each token came, on the same clock.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    arrival_s: float
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    token_times_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None before there is one."""
        return self.token_times_s[0] - self.arrival_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None before there are two."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


@dataclass(slots=True)  # not frozen: made once a token, that would take three times as long
class Chunk:
    """What a step brought a request.

    Attributes:
        token_id: the new token; None where the request ended without one.
        text: the new text that is certain; may be empty.
        finish_reason: set in a request's last chunk.
        error: as `RequestOutput.error`.
    """

    request_id: str
    token_id: int | None
    text: str
    finish_reason: FinishReason | None
    error: str | None = None
