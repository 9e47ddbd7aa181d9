"""What a server serves: one model on its engine, who may come in, and texts as tokens."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from expertlane.engine.async_engine import AsyncEngine, Generation
from expertlane.engine.chat_template import ChatTemplate
from expertlane.engine.engine import Engine
from expertlane.engine.tokenizer import LONG_TEXT, Tokenizer
from expertlane.errors import UserError
from expertlane.schedule.request import Limits
from expertlane.server.errors import ApiError, bad_field
from expertlane.server.marks import Marks
from expertlane.server.messages import Message
from expertlane.server.metrics import Metrics
from expertlane.server.requests import GenerationRequest
from expertlane.spec.sampling import SamplingParams

_RETRY_S = 1


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, as requests see it.

    Attributes:
        name: what requests call it.
        template: None where it cannot chat.
        recommended: sampling by the checkpoint, where a request says nothing.
    """

    name: str
    engine: Engine[Any]
    limits: Limits
    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    recommended: Mapping[str, Any] | None = None

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens of a request at most."""
        return self.limits.max_positions


@dataclass(frozen=True)
class ServerOptions:
    """How a server treats requests.

    Attributes:
        api_keys: one of them has to be given; none: nobody is asked.
        max_num_queued: waiting requests, beyond which others are refused.
        request_timeout_s: the longest that a request may take, waiting included; None: any time.
        drain_s: how long running requests may go on once the server is told to end.
    """

    api_keys: tuple[str, ...] = ()
    max_num_queued: int = 4096
    request_timeout_s: float | None = None
    drain_s: float = 30.0


class Service:
    """Takes requests in; of one event loop.

    Args:
        check_ranks: as `AsyncEngine` takes it.
        on_end: called when the ranks have ended.

    Attributes:
        marks: that the model's template tells it to write.
        created: seconds since 1970.
        is_draining: whether no new requests are taken.
        num_open: requests that have no complete answer yet.
    """

    def __init__(
        self,
        model: ServedModel,
        options: ServerOptions,
        *,
        check_ranks: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.options = options
        template = model.template
        self.marks = Marks() if template is None else Marks.of_template(template.source)
        self.created = int(time.time())
        self.is_draining = False
        self.num_open = 0
        self.metrics = Metrics(model.name, model.limits, model.engine.scheduler)
        model.engine.on_commit = self.metrics.on_step
        self.engine = AsyncEngine(
            model.engine,
            check_ranks=check_ranks,
            on_chunk=self.metrics.on_chunk,
            on_end=lambda error: on_end(),
        )
        self._open: dict[Generation, asyncio.TimerHandle | None] = {}

    @property
    def num_queued(self) -> int:
        """Requests that wait for their first step, or for blocks that they lost."""
        return self.engine.num_unseen + self.model.engine.scheduler.num_waiting

    def check_admission(self, model: str | None) -> None:
        """Refuse a request that cannot be served now, or is for another model.

        Raises:
            ApiError: with 404, 429, 500 or 503.
        """
        self.check_running()
        self.check_model(model)
        self._check_queue()

    def _check_queue(self) -> None:
        most = self.options.max_num_queued
        if self.num_queued >= most:
            raise ApiError(
                429,
                f"{self.num_queued} requests are waiting, of at most {most}; try again later",
                code="queue_full",
                retry_after_s=_RETRY_S,
            )

    def check_running(self) -> None:
        """Refuse what comes when the server is ending.

        Raises:
            ApiError: it is.
        """
        if self.engine.error is not None:
            raise _ended(self.engine.error)
        if self.is_draining:
            raise ApiError(
                503,
                "the server is shutting down and takes no new requests",
                code="draining",
                retry_after_s=_RETRY_S,
            )

    def check_model(self, name: str | None) -> None:
        """Refuse another model.

        Raises:
            ApiError: it is not served here.
        """
        if name not in (None, self.model.name):
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {self.model.name!r}",
                param="model",
                code="model_not_found",
            )

    async def encode(
        self, text: str, param: str, *, add_special_tokens: bool | None = None
    ) -> list[int]:
        """Token ids of a text; a long one does not hold others up.

        Raises:
            ApiError: there is no tokenizer, or the text is no Unicode.
        """
        tokenizer = self.tokenizer(param)
        encode = partial(tokenizer.encode, text, add_special_tokens=add_special_tokens is not False)
        try:
            return await asyncio.to_thread(encode) if len(text) > LONG_TEXT else encode()
        except UserError as error:
            raise bad_field(param, f"{param}: {error}") from None

    def tokenizer(self, param: str) -> Tokenizer:
        """The model's.

        Args:
            param: the field that needs it.

        Raises:
            ApiError: it has none.
        """
        if self.model.tokenizer is None:
            text = f"{param}: {self.model.name} has no tokenizer; give and take token ids"
            raise bad_field(param, text, "no_tokenizer")
        return self.model.tokenizer

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None,
        add_special_tokens: bool | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None,
    ) -> tuple[list[int], str]:
        """Token ids of a chat and its text, by the model's template.

        Raises:
            ApiError: there is none, or it refuses the chat.
        """
        template = self.model.template
        if template is None:
            text = f"{self.model.name} has no chat template; use /v1/completions"
            raise bad_field("messages", text, "no_chat_template")
        try:
            text = await asyncio.to_thread(
                template.render,
                [message.for_template() for message in messages],
                add_generation_prompt=add_generation_prompt is not False,
                tools=tools,
                variables=variables,
            )
        except UserError as error:
            raise bad_field("messages", str(error)) from None
        tokens = await self.encode(text, "messages", add_special_tokens=bool(add_special_tokens))
        return tokens, text

    def params(
        self, request: GenerationRequest, prompts: Sequence[Sequence[int]], param: str
    ) -> list[SamplingParams]:
        """Of every choice of every prompt, in their order.

        Args:
            param: the field of the prompts.

        Raises:
            ApiError: a prompt or its output would be too long, or fields do not go together.
        """
        most = self.model.max_model_len
        found = []
        for prompt in prompts:
            room = most - len(prompt)
            wanted = request.wanted_tokens
            if room < 1:
                text = f"{param} has {len(prompt)} tokens; the model takes {most}, output included"
                raise bad_field(param, text, "context_length_exceeded")
            if wanted is not None and wanted > room:
                text = (
                    f"max_tokens is {wanted} and the prompt has {len(prompt)} tokens; together at "
                    f"most {most}"
                )
                raise bad_field("max_tokens", text, "context_length_exceeded")
            if (request.min_tokens or 0) > (wanted or room):
                text = f"min_tokens is {request.min_tokens}; it must be at most {wanted or room}"
                raise bad_field("min_tokens", text)
            found += [
                request.params(self.model.recommended or {}, wanted or room, choice)
                for choice in range(request.num_choices)
            ]
            self.metrics.on_request(request.num_choices, wanted or room)
        return found

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        request: GenerationRequest,
        param: str,
    ) -> Generation:
        """Queue requests; they are cancelled when their time is over, or the server's.

        Args:
            param: the field of the prompts.

        Raises:
            ApiError: they can never be served, the queue is full, or the ranks have ended.
        """
        self._check_queue()  # again: others have come while prompts became tokens
        limits = (request.timeout_s, self.options.request_timeout_s)
        given = [each for each in limits if each is not None]
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            generation = await self.engine.generate(prompts, params, priority=request.priority or 0)
        except UserError as error:
            raise bad_field(_param_of(str(error), param), str(error)) from None
        except Exception as error:
            raise _ended(error) from None
        timer = None
        if given:
            late = ApiError(504, f"not finished within {min(given):g} s", code="timeout")
            timer = loop.call_at(began_s + min(given), generation.end, late)
        self._open[generation] = timer
        return generation

    def finish(self, generation: Generation) -> None:
        """Cancel what is left of it."""
        generation.cancel()
        timer = self._open.pop(generation, None)
        if timer is not None:
            timer.cancel()

    def end_all(self, error: Exception) -> None:
        """Cancel everything; clients get the error."""
        for generation in list(self._open):
            generation.end(error)


def _ended(error: Exception) -> ApiError:
    return ApiError(500, f"the engine has ended: {error}", code="engine_dead")


def _param_of(message: str, of_prompts: str) -> str:
    """The field that a refusal of the engine is about."""
    named = (name for name in ("logit_bias", "priority", "stop") if name in message)
    return next(named, of_prompts)
