"""Answers of `/v1/completions`."""

from collections.abc import Iterator, Sequence
from typing import Any

from expertlane.schedule.request import FinishReason
from expertlane.server.answers import Answer, Piece
from expertlane.server.endpoint import Endpoint
from expertlane.server.logprobs import TextOffsets
from expertlane.server.prepared import Prepared
from expertlane.server.requests import CompletionRequest
from expertlane.server.service import Service
from expertlane.spec.sampling import TokenLogprobs


class CompletionAnswer(Answer):
    """Texts that continue prompts, after the prompts' own where those are echoed."""

    param = "prompt"
    prefix, kind, kind_of_chunks = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, prepared: Prepared) -> None:
        super().__init__(service, prepared)
        assert isinstance(self._request, CompletionRequest), "it is one"
        self._wants = self._request
        self._echoed = prepared.texts
        self._offsets: dict[int, TextOffsets] = {}  # by choice, if it has log-probabilities

    def _before(self, place: int) -> str:
        return self._echoed[place // self._num_choices] if self._echoed else ""

    def check(self, piece: Piece) -> None:
        """Refuse an error; drop the one token that is computed with `max_tokens` 0."""
        super().check(piece)
        if self._wants.drops_output:
            piece.stop, piece.text = piece.start, ""
            piece.finish_reason = FinishReason.LENGTH

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A choice of text, after the prompt's with `echo`."""
        is_first = piece.start == 0
        choice = {
            "index": piece.place,
            "text": self._before(piece.place) + piece.text if is_first else piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        prompt, num_top = piece.output.prompt_logprobs, self._wants.prompt_logprobs
        if is_first and prompt is not None and num_top is not None:
            choice["prompt_logprobs"] = self._texts.of_prompt(prompt, num_top)
        return self._with_ids(piece, choice)

    delta = choice

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        num_top = self._wants.logprobs
        if num_top is None:
            return None
        token_ids = [each.token_id for each in piece.logprobs]
        known: list[Sequence[TokenLogprobs | None]] = [piece.logprobs]
        prompt = piece.output.prompt_logprobs
        if self._wants.echo and piece.start == 0 and prompt is not None:
            token_ids = [*piece.output.prompt_token_ids, *token_ids]
            known = [prompt, *known]
        offsets = self._offsets.get(piece.place)
        if offsets is None:
            offsets = TextOffsets(self._texts, self._before(piece.place))
            self._offsets[piece.place] = offsets
        return self._texts.of_completion(token_ids, known, offsets, num_top)


async def prepare_completion(service: Service, request: CompletionRequest) -> Prepared:
    """Check a request, and tokenize its prompts.

    Raises:
        ApiError: it can never be served.
    """
    texts = [each for each in request.prompt if isinstance(each, str)]
    encoded: Iterator[list[int]] = iter(())
    if texts:
        encoded = iter(
            await service.encode_all(texts, "prompt", add_special_tokens=request.add_special_tokens)
        )
    prompts = [next(encoded) if isinstance(each, str) else each for each in request.prompt]
    structured, field = request.structured()
    grammar = None if structured is None else await service.compile(structured, field)
    params = service.params(request, prompts, "prompt", structured=structured)
    echoed: Sequence[str] = ()
    if request.echo:
        echoed = [
            each
            if isinstance(each, str)
            else await service.decode(each, "echo", skip_special_tokens=True)
            for each in request.prompt
        ]
    return Prepared(request, prompts, params, echoed, grammar)


COMPLETIONS = Endpoint("/v1/completions", CompletionRequest, prepare_completion, CompletionAnswer)
