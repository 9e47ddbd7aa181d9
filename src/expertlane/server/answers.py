"""Answers to requests for text: whole, or as server-sent events."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Any, ClassVar, Protocol
from uuid import uuid4

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from expertlane.engine.async_engine import Generation
from expertlane.schedule.request import Chunk, FinishReason, RequestOutput
from expertlane.server.errors import JSON, LATER, ApiError
from expertlane.server.logprobs import TokenTexts
from expertlane.server.logs import GENERATED, TextOutputs
from expertlane.server.middleware import DIRECT_SEND, client_left
from expertlane.server.requests import GenerationRequest
from expertlane.server.service import Service
from expertlane.spec.sampling import SamplingParams, TokenLogprobs
from expertlane.text.grammars import Grammar

_EVENTS_HEAD = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
)
_DONE = b"data: [DONE]\n\n"
_MOST_AT_ONCE = 2048  # entries of a whole answer that is made in the loop: some milliseconds
_ENTRIES = 32  # entries of a list that are objects at the same time
_PART_BYTES = 64 * 2**10  # at least, but for the last part


@dataclass(frozen=True)
class GenerationTask:
    """A checked request, ready for the engine.

    Attributes:
        request: its body.
        prompts: [num_prompts]; token ids.
        params: [num_prompts × num_choices]; choices of a prompt stand together.
        texts: [num_prompts]; texts of the prompts, where the answer needs them, else empty.
        grammar: the grammar of its outputs; held, so that the engine finds it compiled.
        root: 122 random bits, from which the ids of the answer and its parts follow.
        created: time of the request, in seconds since 1970.
    """

    request: GenerationRequest
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    texts: Sequence[str] = ()
    grammar: Grammar | None = None
    root: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def id_of(self, *what: str | int) -> str:
        """An id of 32 hexadecimal digits for a part of the answer, always the same."""
        text = "/".join(map(str, (self.root, *what)))
        return blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def num_choices(self) -> int:
        """Choices of each prompt."""
        return len(self.params) // len(self.prompts)

    @property
    def prompts_of_choices(self) -> list[list[int]]:
        """[num_prompts × num_choices]; the prompt of each choice."""
        return [prompt for prompt in self.prompts for _ in range(self.num_choices)]


def _listed(value: object) -> list[Any]:
    if isinstance(value, Iterator):
        return list(value)
    raise NotImplementedError(f"{type(value).__name__} is not JSON")


# To JSON; an iterator is a list, whose entries are made when they are needed.
as_json = msgspec.json.Encoder(enc_hook=_listed).encode


class ClientGone(Exception):
    """The client has closed the connection."""


class Source(Protocol):
    """Chunks that an answer is made from, as they arrive: a `Generation` or a `ReplaySource`."""

    @property
    def outputs(self) -> Sequence[RequestOutput]:
        """[num_prompts × num_choices]; the outputs so far."""

    async def take(self) -> list[tuple[int, Chunk]]:
        """Wait for chunks, and return (index of the output, chunk); empty once all are finished."""

    def end(self, error: Exception) -> None:
        """Have `take` raise an error."""


class ReplaySource(Source, Protocol):
    """A source that keeps its chunks, so that the answer can be made again or a stream resumed."""

    @property
    def request_id(self) -> str:
        """The id by which clients come back to it."""

    def open(self) -> None:
        """Begin to read; to be called before `take`."""

    def close(self) -> None:
        """Stop reading."""

    def numbered(self, event: bytes) -> bytes:
        """The next event, with its id; empty if the client already has it."""


@dataclass(slots=True)
class Piece:
    """The new text and tokens of one choice since its last piece.

    Attributes:
        start, stop: the range of its tokens in the output.
    """

    place: int
    output: RequestOutput
    start: int
    stop: int
    text: str
    finish_reason: FinishReason | None

    @property
    def token_ids(self) -> list[int]:
        """Its tokens."""
        return self.output.token_ids[self.start : self.stop]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Log-probabilities of its tokens; empty unless asked for."""
        return self.output.logprobs[self.start : self.stop]


class Answer(Response):
    """The response of a request for text, whole or as events; a closed connection ends both.

    With `kept` it generates nothing: every event follows from the chunks of that source.

    Attributes:
        began_s: when the request arrived, on the loop's clock.
        kept: the source of its chunks, if they outlive this answer; else None.
    """

    param: ClassVar[str]  # the field of the prompts
    prefix: ClassVar[str]
    kind: ClassVar[str]
    kind_of_chunks: ClassVar[str]

    def __init__(self, service: Service, prepared: GenerationTask) -> None:
        super().__init__()  # unused: `__call__` sends the answer
        request = prepared.request
        self._service = service
        self._prepared = prepared
        self._request = request
        self._num_choices = request.num_choices
        self._params = prepared.params
        self._texts = TokenTexts(
            service.model.tokenizer, as_ids=bool(request.return_tokens_as_token_ids)
        )
        options = request.stream_options
        self._is_usage_asked = options is not None and bool(options.include_usage)
        self._is_usage_everywhere = options is not None and bool(options.continuous_usage_stats)
        self._head = {
            "id": f"{self.prefix}-{prepared.root}",
            "object": self.kind_of_chunks if request.stream else self.kind,
            "created": prepared.created,
            "model": service.model.name,
        }
        # The same in all events, up to the choice.
        self._event_begin = b'data: %b,"choices":[' % as_json(self._head).removesuffix(b"}")
        self._num_taken = [0] * len(self._params)
        self._source: Source | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.began_s = 0.0
        self.kept: ReplaySource | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; for the server."""
        generation: Generation | None = None
        source: Source | None = self.kept
        try:
            if self.kept is not None:
                self.kept.open()
            if source is None:
                source = generation = await self._service.generate(
                    *(self._prepared.prompts_of_choices, self._params, self._request),
                    *(self.param, self.began_s),
                )
            self._source = source
            scope[GENERATED] = TextOutputs(
                *(str(self._head["id"]), source.outputs),
                *(self._num_choices, bool(self._request.stream)),
            )
            self._watcher = asyncio.create_task(_watch(receive, source))
            if self._request.stream:
                # A task of its own is woken without the middlewares around this one.
                stream = self._stream(source, send, scope.get(DIRECT_SEND, send))
                await asyncio.create_task(stream)
            else:
                answer = await self._whole(source)
                answer.raw_headers += self._own_head()
                await answer(scope, receive, send)
        except ApiError as error:  # before anything was sent
            await error.response()(scope, receive, send)
        except ClientGone:
            pass
        finally:
            if self._watcher is not None:
                self._watcher.cancel()
            if self.kept is not None:
                self.kept.close()
            if generation is not None:
                self._service.under_way.finish(generation)

    def _own_head(self) -> list[tuple[bytes, bytes]]:
        """Headers of an answer that can be asked for again."""
        return [] if self.kept is None else [(b"x-request-id", self.kept.request_id.encode())]

    def _numbered(self, event: bytes) -> bytes:
        return event if self.kept is None else self.kept.numbered(event)

    async def _whole(self, source: Source) -> Response:
        """The whole answer, once all choices are finished."""
        while arrived := await taken(source):
            for place, chunk in arrived:
                self.note(place, chunk)
        pieces = [
            Piece(place, output, 0, len(output.token_ids), output.text, output.finish_reason)
            for place, output in enumerate(source.outputs)
        ]
        for piece in pieces:
            self.check(piece)
        self._num_taken = [piece.stop for piece in pieces]
        more = {"usage": self._usage()} | self.more_of_whole(pieces)
        body = self._head | {"choices": map(self.choice, pieces)} | more
        if sum(map(self._num_entries, pieces)) <= _MOST_AT_ONCE:
            return Response(as_json(body), media_type=JSON)
        return InParts(json_parts(body), self._is_gone)

    def _num_entries(self, piece: Piece) -> int:
        """Approximate number of lists, objects and tokens in a choice."""
        params, num_prompt = self._params[piece.place], len(piece.output.prompt_token_ids)
        num_each = int(bool(self._request.return_token_ids))
        return (
            1
            + piece.stop * (num_each + (0 if params.logprobs is None else params.logprobs + 1))
            + num_prompt
            * (num_each + (0 if params.prompt_logprobs is None else params.prompt_logprobs + 1))
        )

    def _is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        return self._watcher is not None and self._watcher.done()

    async def _stream(self, source: Source, send: Send, direct: Send) -> None:
        """Send events as chunks arrive; a hot loop.

        Args:
            direct: sends all but the answer's beginning.
        """
        headers = [*_EVENTS_HEAD, *self._own_head()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        end: list[bytes] = []
        try:
            while arrived := await taken(source):
                events: list[bytes] = []
                try:
                    events.extend(map(self._event, self._pieces(source, arrived)))
                finally:  # also what came together with an error
                    if events:
                        await send_part(direct, b"".join(events))
            if self._is_usage_asked:
                usage = {"choices": [], "usage": self._usage()}
                end.append(_as_event(self._head | usage))
            end.append(_DONE)
        except ApiError as error:
            if self.kept is None or error.code not in LATER:  # else the answer goes on later
                end = [_as_event(error.body), _DONE]
        await send_part(direct, b"".join(map(self._numbered, end)), is_last=True)

    def _pieces(self, source: Source, arrived: list[tuple[int, Chunk]]) -> Iterator[Piece]:
        """A piece for each choice, of all chunks of a step; for a kept answer, one for each chunk.

        Raises:
            ApiError: after the pieces that came before it.
        """
        if len(arrived) == 1 or self.kept is not None:
            for place, chunk in arrived:
                yield self._only(source, place, chunk)
                self._num_taken[place] += chunk.token_id is not None
            return
        pieces: dict[tuple[int, bool], Piece] = {}
        for place, chunk in arrived:
            self.note(place, chunk)
            # An end without a token is by itself, whether it came later or not.
            key = place, chunk.token_id is None
            piece = pieces.get(key)
            if piece is None:
                before = pieces.get((place, False))
                start = self._num_taken[place] if before is None else before.stop
                output = source.outputs[place]
                piece = pieces[key] = Piece(place, output, start, start, "", None)
            piece.stop += chunk.token_id is not None
            piece.text += chunk.text
            piece.finish_reason = chunk.finish_reason
        for piece in pieces.values():
            self.check(piece)
            yield piece
            self._num_taken[piece.place] = piece.stop

    def _only(self, source: Source, place: int, chunk: Chunk) -> Piece:
        """A piece of one chunk."""
        self.note(place, chunk)
        start = self._num_taken[place]
        stop = start + (chunk.token_id is not None)
        piece = Piece(place, source.outputs[place], start, stop, chunk.text, chunk.finish_reason)
        self.check(piece)
        return piece

    def _event(self, piece: Piece) -> bytes:
        usage = b""
        if self._is_usage_everywhere:
            usage = b',"usage":' + as_json(self._usage(piece.stop - piece.start))
        elif self._is_usage_asked:
            usage = b',"usage":null'
        event = b"%b%b]%b}\n\n" % (self._event_begin, as_json(self.delta(piece)), usage)
        return self._numbered(event)

    def _usage(self, num_more: int = 0) -> dict[str, Any]:
        """The `usage` object of the tokens taken so far, and of `num_more` others."""
        outputs = () if self._source is None else self._source.outputs
        firsts = outputs[:: self._num_choices]  # others of a prompt share it
        num_prompt, num_output = (
            sum(map(len, self._prepared.prompts)),
            sum(self._num_taken) + num_more,
        )
        num_cached = sum(output.num_cached_tokens for output in firsts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens},
        }

    @property
    def num_reasoning_tokens(self) -> int:
        """Output tokens of reasoning, before the answer itself."""
        return 0

    def note(self, place: int, chunk: Chunk) -> None:
        """Look at a chunk before it is answered with."""

    def _with_ids(self, piece: Piece, choice: dict[str, Any]) -> dict[str, Any]:
        if self._request.return_token_ids:
            choice["token_ids"] = piece.token_ids
            if piece.start == 0:
                choice["prompt_token_ids"] = self._prepared.prompts[
                    piece.place // self._num_choices
                ]
        return choice

    def more_of_whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Further fields of a whole answer."""
        return {}

    def check(self, piece: Piece) -> None:
        """Refuse a piece whose request ended in an error.

        Raises:
            ApiError: the logits were not finite, or the grammar was too costly.
        """
        if piece.finish_reason is FinishReason.ERROR:
            raise ApiError(500, str(piece.output.error), code="model_error")
        if piece.finish_reason is FinishReason.GRAMMAR:
            raise ApiError(400, str(piece.output.error), code="grammar_too_costly")

    def choice(self, piece: Piece) -> dict[str, Any]:
        """The object of a whole choice; may be made in another thread."""
        raise NotImplementedError

    def delta(self, piece: Piece) -> dict[str, Any]:
        """The object of a piece in a stream."""
        raise NotImplementedError


async def _watch(receive: Receive, source: Source) -> None:
    """Wait until the client closes the connection, then end the source."""
    await client_left(receive)
    source.end(ClientGone())


async def taken(source: Source) -> list[tuple[int, Chunk]]:
    """Wait for the source's next chunks.

    Raises:
        ApiError: the request, or the engine, has ended with an error.
        ClientGone: the client has closed the connection.
    """
    try:
        return await source.take()
    except (ApiError, ClientGone):
        raise
    except Exception as error:
        raise ApiError(500, f"the engine has ended: {error}", code="engine_dead") from None


@dataclass(frozen=True)
class Endpoint:
    """A route that generates text.

    Attributes:
        body: the type of its requests' bodies.
        prepare: checks a body and tokenizes its prompts; raises an `ApiError`.
        answer: the class of its answers, which depend only on the prepared request and its chunks.
    """

    path: str
    body: type[GenerationRequest]
    prepare: Callable[[Service, Any], Awaitable[GenerationTask]]
    answer: type[Answer]

    async def make(self, service: Service, request: GenerationRequest, began_s: float) -> Answer:
        """An answer to a request.

        Args:
            began_s: when it arrived, on the loop's clock.

        Raises:
            ApiError: the request can never be served, or not now.
        """
        service.check_admission(request.model)
        answer = self.answer(service, await self.prepare(service, request))
        answer.began_s = began_s
        return answer


class InParts(Response):
    """JSON that is made in another thread and sent in parts, so that memory never has all of it.

    Args:
        is_gone: tells whether the client has left.
    """

    def __init__(self, parts: Iterator[bytes], is_gone: Callable[[], bool]) -> None:
        super().__init__()
        self.raw_headers = [(b"content-type", JSON.encode())]
        self._parts, self._is_gone = parts, is_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; for the server."""
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        while (part := await asyncio.to_thread(next, self._parts, b"")) and not self._is_gone():
            await send_part(send, part)
        await send_part(send, b"", is_last=True)


async def send_part(send: Send, body: bytes, *, is_last: bool = False) -> None:
    """Send a part of a body."""
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


def _as_event(body: object) -> bytes:
    return b"data: %b\n\n" % as_json(body)


def json_parts(value: object) -> Iterator[bytes]:
    """The bytes of `as_json`, in parts of about 64 KiB, none of them empty."""
    part = bytearray()
    for data in _pieces(value):
        part += data
        if len(part) >= _PART_BYTES:
            yield bytes(part)
            part.clear()
    if part:
        yield bytes(part)


def _pieces(value: object) -> Iterator[bytes]:
    if isinstance(value, dict):
        before = b"{"
        for name, each in value.items():
            yield before + as_json(name) + b":"
            yield from _pieces(each)
            before = b","
        yield b"}" if value else b"{}"
    elif isinstance(value, Iterator):
        yield b"["
        before = b""
        while entries := list(islice(value, _ENTRIES)):
            yield before
            before = b","
            if _is_lazy(entries[0]):  # they are alike
                for place, each in enumerate(entries):
                    yield b"," if place else b""
                    yield from _pieces(each)
            else:
                yield as_json(entries)[1:-1]
        yield b"]"
    else:
        yield as_json(value)


def _is_lazy(value: object) -> bool:
    """Whether a value is or holds an iterator."""
    if isinstance(value, dict):
        return any(map(_is_lazy, value.values()))
    return isinstance(value, Iterator)
