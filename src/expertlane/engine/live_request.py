"""Unfinished requests: the scheduler's request, its output so far, and how tokens become text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import SystemRandom

from expertlane.errors import UserError
from expertlane.schedule.request import Chunk, FinishReason, Request, RequestOutput
from expertlane.spec.sampling import SamplingParams
from expertlane.text.grammars import Constraint
from expertlane.text.tokenizer import IncrementalDetokenizer, Tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request that is not finished.

    Attributes:
        detokenizer: None where there is no tokenizer.
        is_plain: its chunks have neither text nor log-probabilities.
        add_time: takes each token's seconds since the arrival.
        includes_stop: whether the token that ends it is part of its text.
        constraint: the grammar state that masks its tokens; None without structured output.
    """

    request: Request
    output: RequestOutput
    detokenizer: IncrementalDetokenizer | None
    wants_logprobs: bool
    is_plain: bool
    add_time: Callable[[float], None]
    includes_stop: bool = False
    constraint: Constraint | None = None

    def end(self, token_id: int | None, reason: FinishReason, text: str = "") -> Chunk:
        """Finish the output, and return its last chunk.

        Args:
            token_id: the last token; None if the request ends without one.
            text: the text of this token.
        """
        output = self.output
        output.finish_reason = reason
        output.error = self.request.error
        output.num_preemptions = self.request.num_preemptions
        if self.detokenizer is not None:
            rest = self.detokenizer.finish()
            output.text += rest
            text += rest
        return Chunk(output.request_id, token_id, text, reason, output.error)


class RequestMaker:
    """Turns prompts and sampling parameters into the scheduler's requests.

    Args:
        eos_token_ids: tokens that end an output unless `ignore_eos`.
        tokenizer: None where prompts are tokens only.
    """

    def __init__(self, eos_token_ids: frozenset[int], tokenizer: Tokenizer | None) -> None:
        self._eos_token_ids, self._tokenizer = eos_token_ids, tokenizer
        self._seeds = SystemRandom()

    def encode(self, name: str, prompt: Prompt, params: SamplingParams) -> Sequence[int]:
        """Token ids of a prompt.

        Args:
            name: the name of the request in messages.

        Raises:
            UserError: the prompt is a text, or has stop strings, but there is no tokenizer.
        """
        if self._tokenizer is None and params.stop:
            raise UserError(f"{name}: stop strings need a tokenizer; use stop_token_ids instead")
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise UserError(f"{name}: a text needs a tokenizer; give the prompt as token ids")
        return self._tokenizer.encode(prompt)

    def request(
        self,
        request_id: str,
        token_ids: Sequence[int],
        params: SamplingParams,
        constraint: Constraint | None,
        priority: int,
        name: str,
    ) -> Request:
        """A request for the scheduler; with a random seed if `params` has none."""
        sampling = params.with_valid(stop=())  # texts are not the ranks' matter
        if constraint is not None:  # its masks say what may end the output
            sampling = sampling.with_valid(structured=None, min_tokens=0)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        return Request(
            request_id,
            token_ids,
            max_tokens=params.max_tokens,
            stop_token_ids=params.stop_token_ids,
            eos_token_ids=self._eos_token_ids,
            ignore_eos=params.ignore_eos and constraint is None,
            priority=priority,
            sampling=sampling if params.needs_logits else None,
            sampling_seed=seed,
            mask=None if constraint is None else constraint.mask,
            name=name,
        )

    def live(
        self,
        request: Request,
        params: SamplingParams,
        constraint: Constraint | None,
        output: RequestOutput,
    ) -> LiveRequest:
        """A live request, whose detokenizer has read the tokens that its output already has."""
        detokenizer = self._detokenizer(params, output)
        wants_logprobs = params.logprobs is not None
        return LiveRequest(
            request,
            output,
            detokenizer,
            wants_logprobs,
            is_plain=detokenizer is None and not wants_logprobs,
            add_time=output.token_times_s.append,
            includes_stop=params.include_stop_str_in_output,
            constraint=constraint,
        )

    def _detokenizer(
        self, params: SamplingParams, output: RequestOutput
    ) -> IncrementalDetokenizer | None:
        if self._tokenizer is None:
            return None
        detokenizer = IncrementalDetokenizer(
            self._tokenizer,
            output.prompt_token_ids,
            stop=params.stop,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
            shown_token_ids=params.shown_token_ids,
            include_stop=params.include_stop_str_in_output,
        )
        for token_id in output.token_ids:
            detokenizer.append(token_id)
        return detokenizer
