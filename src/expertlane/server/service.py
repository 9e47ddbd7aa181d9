"""The service of one model: admission of requests, tokenizing, queueing and time limits."""

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from prometheus_client.core import Metric

from expertlane.engine.async_engine import AsyncEngine, Generation, RequestGroup
from expertlane.errors import UserError
from expertlane.schedule.request import Chunk
from expertlane.schedule.scheduler import FinishedStep
from expertlane.server.errors import ApiError, bad_field
from expertlane.server.fields import Message
from expertlane.server.health import Stall
from expertlane.server.marks import Marks
from expertlane.server.metrics import Families, Metrics
from expertlane.server.requests import ChatRequest, GenerationRequest
from expertlane.server.setup import PromptEncoder, ServedModel, ServerOptions, TooLongError
from expertlane.spec.sampling import SamplingParams, Structured
from expertlane.text.grammars import Grammar
from expertlane.text.tokenizer import Tokenizer

MOST_LOGPROBS = 2**20  # log-probabilities of a request, some 150 bytes each
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
        params: sampling parameters of every choice of every prompt, in their order.

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


class Journal(Protocol):
    """A journal, by which requests outlive this process."""

    def write(self, chunks: list[Chunk]) -> None:
        """Write the chunks of a step, before clients get them."""
        ...


_RETRY_S = 1
# What to do without a tokenizer, by the field that needs one; others are left out.
_WITHOUT_TOKENIZER = {
    "prompt": "use token ids",
    "messages": "use token ids with /v1/completions",
    "stop": "use stop_token_ids",
    "tokens": "",  # of /detokenize
    "tokenizer": "",  # of /tokenizer_info
}
_MANY_TOKENS = 4096  # decoding them takes some milliseconds


class Service:
    """Admission, tokenizing and queueing of requests for one model; used in one event loop.

    Args:
        check_ranks: notices ranks that have ended; see `AsyncEngine`.
        on_end: called with the error when the ranks have ended.

    Attributes:
        marks: the marks of reasoning and calls that the chat template has.
        created: start of the service, in seconds since 1970.
        is_draining: whether new requests are refused.
        num_open: requests that have no complete answer yet.
        under_way: unfinished requests of the engine, with their time limits.
        stall: sees that ranks keep requests waiting.
        journal: keeps requests beyond this process; None for no journal.
    """

    def __init__(
        self,
        model: ServedModel,
        options: ServerOptions,
        *,
        check_ranks: Callable[[], None] = lambda: None,
        on_end: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.model = model
        self.options = options
        template = model.template
        self.marks = Marks()
        if template is not None:
            self.marks = Marks.of_template(
                template.source, calls=options.tool_call_parser, thoughts=options.reasoning_parser
            )
        self.created = int(time.time())
        self.is_draining = False
        self.num_open = 0
        self.metrics = Metrics(model.name, model.limits, model.engine, model.watch)
        self.metrics.others.append(self._health_metrics)
        model.engine.on_commit = self._on_step
        self._check_ranks = check_ranks
        self.stall = Stall(model.engine, model.watch, options.stall_s)
        self.engine = AsyncEngine(
            model.engine,
            check_ranks=self._check_idle,
            on_chunk=self.metrics.on_chunk,
            on_end=on_end,
            before_chunks=self._note_chunks,
        )
        self.journal: Journal | None = None
        self._encoder: PromptEncoder | None = None
        if model.tokenizer is not None:
            self._encoder = PromptEncoder(model.tokenizer, model.max_model_len)
        self.under_way = UnderWay()

    def _on_step(self, step: FinishedStep) -> None:
        self.metrics.on_step(step)
        if self.model.watch is not None:
            self.model.watch.poll()

    def _check_idle(self) -> None:
        self._check_ranks()
        if self.model.watch is not None:
            self.model.engine.guarded(self.model.watch.poll)

    def _note_chunks(self, chunks: list[Chunk]) -> None:
        if self.journal is not None:
            self.journal.write(chunks)

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
        self.check_queue()

    def check_queue(self) -> None:
        """Refuse a request if too many are waiting.

        Raises:
            ApiError: with 429: too many are.
        """
        most = self.options.max_num_queued
        if self.num_queued >= most:
            raise ApiError(
                429,
                f"{self.num_queued} requests are waiting, of at most {most}; try again later",
                code="queue_full",
                retry_after_s=_RETRY_S,
            )

    def check_running(self) -> None:
        """Refuse a request while the server is ending.

        Raises:
            ApiError: with 500 if the ranks have ended, 503 if it drains.
        """
        if self.engine.error is not None:
            raise ended(self.engine.error)
        if self.is_draining:
            raise ApiError(
                503,
                "the server is shutting down and takes no new requests",
                code="draining",
                retry_after_s=_RETRY_S,
            )

    def check_health(self) -> None:
        """Say whether a request that comes now would be answered soon.

        Raises:
            ApiError: as `check_running`; with 503 too while ranks keep requests waiting.
        """
        self.check_running()
        if (reason := self.stall.reason()) is not None:
            raise ApiError(503, reason, code="stalled", retry_after_s=_RETRY_S)

    def _health_metrics(self) -> Iterator[Metric]:
        try:
            self.check_health()
            is_healthy = True
        except ApiError:
            is_healthy = False
        rows = {"healthy": ("1 while /health answers 200", float(is_healthy))}
        yield from Families("expertlane:", {"model_name": self.model.name}).of("gauge", rows)

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: with 404: the name is another model's.
        """
        if name not in (None, self.model.name):
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {self.model.name!r}",
                param="model",
                code="model_not_found",
            )

    async def encode(
        self,
        texts: Sequence[str],
        param: str,
        *,
        add_special_tokens: bool | None = None,
        factor: int = 1,
    ) -> list[list[int]]:
        """Token ids of texts; long ones do not block the event loop.

        Args:
            factor: multiple of the longest prompt that a text may have.

        Raises:
            ApiError: there is no tokenizer, or a text is too long or no Unicode.
        """
        self.tokenizer(param)
        assert self._encoder is not None, "there is a tokenizer"
        try:
            return await self._encoder.encode(
                texts, add_special_tokens=add_special_tokens is not False, factor=factor
            )
        except TooLongError as error:
            raise bad_field(param, f"{param}: {error}", "context_length_exceeded") from None
        except UserError as error:
            raise bad_field(param, f"{param}: {error}") from None

    async def decode(
        self, token_ids: Sequence[int], param: str, *, skip_special_tokens: bool = False
    ) -> str:
        """The text of token ids; many do not block the event loop.

        Raises:
            ApiError: there is no tokenizer.
        """
        decode = partial(
            self.tokenizer(param).decode, token_ids, skip_special_tokens=skip_special_tokens
        )
        return decode() if len(token_ids) < _MANY_TOKENS else await asyncio.to_thread(decode)

    def tokenizer(self, param: str) -> Tokenizer:
        """The model's tokenizer.

        Args:
            param: the field that needs it.

        Raises:
            ApiError: the model has none.
        """
        if self.model.tokenizer is None:
            remedy = _WITHOUT_TOKENIZER.get(param, f"leave out {param}")
            text = f"{param}: {self.model.name} has no tokenizer{remedy and f'; {remedy}'}"
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
            ApiError: there is no template, or it refuses the chat.
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
            raise bad_field("messages", f"messages: {error}") from None
        (tokens,) = await self.encode(
            [text], "messages", add_special_tokens=bool(add_special_tokens)
        )
        return tokens, text

    def shown_token_ids(self, request: ChatRequest) -> tuple[int, ...]:
        """Control tokens that stay in the answer's text, to find its reasoning and calls."""
        tokenizer = self.model.tokenizer
        needs_them = request.callable_functions or self.marks.thoughts is not None
        if tokenizer is None or not needs_them:
            return ()
        return self.marks.shown_token_ids(tokenizer)

    async def compile(self, structured: Structured, param: str) -> Grammar:
        """A grammar, compiled in another thread; while it is cached, requests find it at once.

        Raises:
            ApiError: it is not valid, or too costly.
        """
        self.tokenizer(param)
        try:
            grammars = self.model.engine.grammars
            if (known := grammars.known(structured)) is not None:
                return known
            return await asyncio.wrap_future(grammars.compile_soon(structured))
        except UserError as error:
            raise bad_field(param, f"{param}: {error}") from None

    def params(
        self,
        request: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        param: str,
        **more: Any,
    ) -> list[SamplingParams]:
        """[num_prompts × num_choices]; sampling parameters, choices of a prompt together.

        Args:
            param: the field of the prompts.
            more: arguments of `GenerationRequest.params`.

        Raises:
            ApiError: a prompt or its output would be too long, or fields do not go together.
        """
        check_tokens(request, self.model.limits.vocab_size)
        if request.stop:
            self.tokenizer("stop")
        lengths = [self._num_wanted(request, len(prompt), param) for prompt in prompts]
        for length in lengths:
            self.metrics.on_request(request.num_choices, length)
        recommended = self.model.recommended or {}
        # One token is computed where none is asked for.
        first = request.params(recommended, max_tokens=max(lengths[0], 1), **more)
        seeds = [request.seed_of(choice) for choice in range(request.num_choices)]
        found = [
            first.with_valid(max_tokens=max(length, 1), seed=seed)
            for length in lengths
            for seed in seeds
        ]
        check_logprobs(found, prompts)
        return found

    def _num_wanted(self, request: GenerationRequest, prompt_len: int, param: str) -> int:
        """The most output tokens for a prompt of this length.

        Raises:
            ApiError: the prompt and these tokens are more than `max_model_len`.
        """
        most = self.model.max_model_len
        num_left, wanted = most - prompt_len, request.wanted_tokens
        if num_left < (not request.drops_output):
            text = f"{param} has {prompt_len} tokens; the model takes {most}, output included"
            raise bad_field(param, text, "context_length_exceeded")
        if wanted is not None and wanted > num_left:
            text = (
                f"max_tokens is {wanted} and the prompt has {prompt_len} tokens; together at most "
                f"{most}"
            )
            raise bad_field("max_tokens", text, "context_length_exceeded")
        wanted = num_left if wanted is None else wanted
        if (request.min_tokens or 0) > wanted:
            text = f"min_tokens is {request.min_tokens}; it must be at most {wanted}"
            raise bad_field("min_tokens", text)
        return wanted

    def time_limit_s(self, request: GenerationRequest) -> float | None:
        """Seconds that a request may take from its arrival; None for any time."""
        limits = (request.timeout_s, self.options.request_timeout_s)
        return min((each for each in limits if each is not None), default=None)

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        request: GenerationRequest,
        param: str,
        began_s: float,
    ) -> Generation:
        """Queue requests; they are cancelled when their time is up, or the server ends.

        Args:
            param: the field of the prompts.
            began_s: when the request arrived, on the loop's clock.

        Raises:
            ApiError: they can never be served, the queue is full, or the ranks have ended.
        """
        self.check_queue()  # again: others have come while prompts became tokens
        try:
            generation = await self.engine.generate(prompts, params, priority=request.priority or 0)
        except Exception as error:
            raise self.refusal(error, param, request.num_choices) from None
        self.under_way.begin(generation, began_s, self.time_limit_s(request))
        return generation

    @staticmethod
    def refusal(error: Exception, param: str, num_choices: int) -> ApiError:
        """The error of a request that the engine has refused."""
        if isinstance(error, UserError):
            return bad_field(param, as_field(str(error), param, num_choices))
        return ended(error)


def ended(error: Exception) -> ApiError:
    """The error of requests once the engine has ended."""
    return ApiError(500, f"the engine has ended: {error}", code="engine_dead")


class UnderWay:
    """The unfinished requests of one server and their timers; used in its event loop."""

    def __init__(self) -> None:
        self._timers: dict[RequestGroup, asyncio.TimerHandle | None] = {}
        self._ending: Exception | None = None  # the error with which all requests end

    def begin(self, group: RequestGroup, began_s: float, limit_s: float | None) -> None:
        """Start the timer of a group of requests, which runs until `finish`.

        Args:
            began_s: arrival of the requests, on the loop's clock.
            limit_s: seconds that they may take; None for any time.
        """
        timer = None
        if limit_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_at(began_s + limit_s, group.end, late(limit_s))
        self._timers[group] = timer
        if self._ending is not None:  # the server has ended meanwhile
            group.end(self._ending)

    def finish(self, group: RequestGroup) -> None:
        """Cancel a group's unfinished requests, and its timer."""
        group.cancel()
        timer = self._timers.pop(group, None)
        if timer is not None:
            timer.cancel()

    def end(self, error: Exception) -> None:
        """Cancel all requests, and any that begin later; clients get the error."""
        self._ending = error
        for group in list(self._timers):
            group.end(error)


def late(limit_s: float | None) -> ApiError:
    """The error of a request whose time is up."""
    return ApiError(504, f"not finished within {limit_s:g} s", code="timeout")
