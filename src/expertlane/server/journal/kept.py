"""Requests of a journal, which keep their chunks: every connection reads them from the first."""

import asyncio
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from expertlane.engine.async_engine import RequestGroup
from expertlane.schedule.request import Chunk, FinishReason, RequestOutput
from expertlane.server.answers import Endpoint, GenerationTask
from expertlane.server.errors import LATER, ApiError
from expertlane.server.journal.file import BeginRecord, More, Row, SuspectRecord
from expertlane.spec.sampling import PromptLogprobs, PromptPart, SamplingParams, TokenLogprobs

_CHUNK_BYTES = 200  # memory of a chunk, at least
_TOKEN_BYTES = 36  # memory of a prompt token
_LOGPROB_BYTES = 150  # memory of a likely token
_AT_ONCE = 256  # chunks that a reading takes before others have their turn


class KeptRequest(RequestGroup):
    """All choices of one HTTP request, with their chunks; used in one event loop.

    Args:
        cancel: ends requests in the engine, by their ids there.
        on_change: called when a connection begins or ends reading it, and when it is over.

    Attributes:
        chunks: [num_chunks]; those of all choices, in the order of their arrival.
        error: the error that ended it early; None without one.
        is_awaited: whether its client is expected to come back if it leaves.
        num_readings: connections that read it.
        num_events: events of its whole stream; None while their number is not known.
        num_begun_bytes: memory that it takes before its first chunk, estimated.
        suspected: its last `SuspectRecord` record, if it comes from an earlier process; else None.
    """

    def __init__(
        self,
        begun: BeginRecord,
        prepared: GenerationTask,
        endpoint: Endpoint,
        cancel: Callable[[list[str]], None],
        on_change: Callable[["KeptRequest"], None],
    ) -> None:
        places = range(len(prepared.params))
        super().__init__([f"{begun.number}-{place}" for place in places], cancel)
        self.begun, self.prepared, self.endpoint = begun, prepared, endpoint
        self.outputs = [
            RequestOutput(request_id, None, prompt, 0.0)
            for request_id, prompt in zip(
                self.request_ids, prepared.prompts_of_choices, strict=True
            )
        ]
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None
        self.is_awaited = begun.is_named
        self.num_readings = 0
        self.num_events: int | None = None
        self.suspected: SuspectRecord | None = None
        self._num_recalled = 0  # chunks
        self.num_begun_bytes = (
            len(begun.body)
            + sum(map(len, begun.texts))
            + sum(map(len, begun.prompts)) * _TOKEN_BYTES
        )
        self._on_change = on_change
        self._num_open = len(places)  # choices whose last chunk has not come
        self._num_written = [0] * len(places)  # tokens
        self._wants_logprobs = any(each.logprobs is not None for each in prepared.params)
        self._readings: set[Reading] = set()

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, estimated."""
        num_top = max((each.logprobs or 0 for each in self.prepared.params), default=0)
        return self.num_begun_bytes + len(self.chunks) * (_CHUNK_BYTES + num_top * _LOGPROB_BYTES)

    @property
    def has_brought_more(self) -> bool:
        """Whether this process has added chunks to it."""
        return len(self.chunks) > self._num_recalled

    @property
    def is_complete(self) -> bool:
        """Whether all of its choices have ended, without an error."""
        return not self._num_open and self.error is None

    @property
    def is_over(self) -> bool:
        """Whether no chunk will follow."""
        return self.error is not None or self.is_complete

    def begin(self, output: RequestOutput) -> None:
        """Set the output of a choice; called in the engine's thread."""
        self.outputs[self._places[output.request_id]] = output

    def add(self, chunk: Chunk) -> RequestOutput:
        """Keep a chunk for all readings, later ones too."""
        reason = chunk.finish_reason
        if reason is not FinishReason.CANCELLED:
            self._keep(chunk)
            for reading in self._readings:
                reading.wake()
        if reason is not None:
            self.unfinished.pop(chunk.request_id, None)
            if not self.unfinished:
                self._on_change(self)
        return self.outputs[self.place_of(chunk)]

    def end(self, error: Exception) -> None:
        """Cancel the unfinished choices; readings get the error after the chunks so far."""
        if not self.is_over:
            self.error = error
            self.cancel()
            for reading in self._readings:
                reading.wake()
            self._on_change(self)

    @property
    def is_interrupted(self) -> bool:
        """Whether the next process continues it."""
        error = self.error
        return error is not None and not (isinstance(error, ApiError) and error.code not in LATER)

    def read(self, after: int = 0) -> "Reading":
        """A reading of all chunks, which begins when it is opened.

        Args:
            after: events that the client has.
        """
        return Reading(self, after)

    def opened(self, reading: "Reading") -> None:
        """Note that a connection reads."""
        self.num_readings += 1
        self._readings.add(reading)
        self._on_change(self)

    def closed(self, reading: "Reading") -> None:
        """Note that it reads no more."""
        self.num_readings -= 1
        self._readings.discard(reading)
        self._on_change(self)

    def place_of(self, chunk: Chunk) -> int:
        """The place of the choice that a chunk belongs to."""
        return self._places[chunk.request_id]

    def _keep(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        if chunk.finish_reason is not None:
            self._num_open -= 1

    # To records, and back.

    def row(self, chunk: Chunk) -> Row:
        """The journal's row of the next chunk."""
        return self._row(self.place_of(chunk), chunk, self._num_written)

    def rows(self) -> Iterator[Row]:
        """The journal's rows of all chunks so far."""
        num_tokens = [0] * len(self.outputs)
        for chunk in self.chunks:
            yield self._row(self.place_of(chunk), chunk, num_tokens)

    def _row(self, place: int, chunk: Chunk, num_tokens: list[int]) -> Row:
        """The journal's row of a chunk; a hot path."""
        more, index, token_id = None, num_tokens[place], chunk.token_id
        if chunk.finish_reason is not None or self._wants_logprobs or not index:
            more = self._more(self.outputs[place], chunk, self.prepared.params[place], index)
        if token_id is not None:
            num_tokens[place] = index + 1
        return self.begun.number, place, token_id, chunk.text, more

    def _more(
        self, output: RequestOutput, chunk: Chunk, params: SamplingParams, index: int
    ) -> More:
        logprob = prompt = None
        is_token = chunk.token_id is not None
        if is_token and params.logprobs is not None:
            of_token = output.logprobs[index]
            logprob = of_token.logprob, of_token.top
        is_first = is_token and not index
        if is_first and output.prompt_logprobs is not None:
            part = output.prompt_logprobs.whole()
            arrays = (part.logprobs, part.ranks, part.top_ids, part.top_logprobs)
            first, second, third, fourth = (array.tobytes() for array in arrays)
            prompt = first, second, third, fourth
        return More(
            chunk.finish_reason,
            chunk.error,
            logprob,
            output.num_cached_tokens if is_first else None,
            prompt,
        )

    def recall(self, rows: Sequence[Row]) -> None:
        """Take over the chunks that an earlier process wrote."""
        for _, place, token_id, text, more in rows:
            output, more = self.outputs[place], more or More()
            if token_id is not None:
                self._recall_token(output, token_id, more, place)
            output.text += text
            output.finish_reason, output.error = more.reason, more.error
            chunk = Chunk(output.request_id, token_id, text, more.reason, more.error)
            self._keep(chunk)
            if more.reason is not None:
                self.unfinished.pop(output.request_id, None)
        self._num_recalled = len(self.chunks)

    def _recall_token(self, output: RequestOutput, token_id: int, more: More, place: int) -> None:
        params = self.prepared.params[place]
        if more.num_cached is not None:
            output.num_cached_tokens = more.num_cached
        if more.prompt is not None and params.prompt_logprobs is not None:
            output.prompt_logprobs = _prompt_logprobs(output, params.prompt_logprobs, more.prompt)
        if more.logprob is not None:
            logprob, top = more.logprob
            output.logprobs.append(TokenLogprobs(token_id, logprob, top))
        output.token_ids.append(token_id)
        self._num_written[place] += 1


def _prompt_logprobs(
    output: RequestOutput, num_top: int, arrays: tuple[bytes, bytes, bytes, bytes]
) -> PromptLogprobs:
    tokens = output.prompt_token_ids
    found = PromptLogprobs(tokens, num_top)
    logprobs, ranks, top_ids, top_logprobs = arrays
    found.add(
        PromptPart(
            0,
            np.frombuffer(logprobs, dtype=np.float32),
            np.frombuffer(ranks, dtype=np.int32),
            np.frombuffer(top_ids, dtype=np.int32).reshape(len(tokens), num_top),
            np.frombuffer(top_logprobs, dtype=np.float32).reshape(len(tokens), num_top),
        )
    )
    return found


class Reading:
    """The chunks of a kept request, read by one connection; an answer's `ReplaySource`.

    Events are numbered from 1; those up to `after` are made, but not given again.
    """

    def __init__(self, kept: KeptRequest, after: int) -> None:
        self.request_id = kept.begun.request_id
        self._kept, self._after = kept, after
        self._id_begin = f"id: {self.request_id}:".encode()
        self._num_chunks = self._num_events = 0
        self._is_whole = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def outputs(self) -> Sequence[RequestOutput]:
        """The outputs of the request."""
        return self._kept.outputs

    def open(self) -> None:
        """Begin to read."""
        self._kept.opened(self)

    def close(self) -> None:
        """Stop reading."""
        if self._is_whole:
            self._kept.num_events = self._num_events
        self._kept.closed(self)

    async def take(self) -> list[tuple[int, Chunk]]:
        """Wait for chunks, and return (index of the choice, chunk); empty once there are no more.

        Raises:
            Exception: the client has gone, or the error that ended the request early.
        """
        kept = self._kept
        while True:
            if self._error is not None:
                raise self._error
            if self._num_chunks < len(kept.chunks):
                break
            if kept.is_complete:
                self._is_whole = True
                return []
            if kept.error is not None:
                raise kept.error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._num_chunks and len(kept.chunks) - self._num_chunks > _AT_ONCE:
            await asyncio.sleep(0)
        found = kept.chunks[self._num_chunks : self._num_chunks + _AT_ONCE]
        self._num_chunks += len(found)
        return [(kept.place_of(chunk), chunk) for chunk in found]

    def end(self, error: Exception) -> None:
        """Have `take` raise an error; the request itself goes on."""
        self._error = error
        self.wake()

    def wake(self) -> None:
        """Let `take` check for new chunks."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def numbered(self, event: bytes) -> bytes:
        """The next event, with its id; empty if the client already has it."""
        self._num_events += 1
        if self._num_events <= self._after:
            return b""
        return b"%b%d\n%b" % (self._id_begin, self._num_events, event)
