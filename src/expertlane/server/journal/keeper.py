"""Requests that outlive connections and this process: accepted, written, resumed, forgotten."""

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import SystemRandom

from prometheus_client.core import Metric
from pydantic import ValidationError
from starlette.types import Scope

from expertlane.errors import UserError
from expertlane.schedule.request import Chunk, FinishReason
from expertlane.server.answers import Answer, Endpoint, GenerationTask
from expertlane.server.completions import CHATS, COMPLETIONS
from expertlane.server.errors import ApiError, bad_field
from expertlane.server.journal.file import (
    BeginRecord,
    EndRecord,
    ForgetRecord,
    JournalEntry,
    JournalError,
    JournalFile,
    Record,
    StepRecord,
    SuspectRecord,
)
from expertlane.server.journal.kept import KeptRequest
from expertlane.server.metrics import Families
from expertlane.server.middleware import key_digest
from expertlane.server.requests import GenerationRequest
from expertlane.server.service import Service

_PREFIX = "expertlane:journal_"


ID_HEADER, LAST_HEADER = "X-Request-Id", "Last-Event-ID"
_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
_EVENT_ID = re.compile(rf"({_ID.pattern}):(\d{{1,9}})")


@dataclass(frozen=True)
class RequestId:
    """The request that a client asks for, by its headers.

    Attributes:
        key: SHA-256 of its API key; empty where none is asked for.
        request_id: None where the client names none.
        after: number of events that the client has; None where it does not say.
    """

    key: bytes
    request_id: str | None
    after: int | None


def asked_of(scope: Scope, request_id: str | None = None, *, has_keys: bool) -> RequestId:
    """The request that a client asks for, from its headers.

    Args:
        request_id: its id, where the path has it.
        has_keys: whether clients are asked for keys; else all count as the same client.

    Raises:
        ApiError: a header is not valid, or two contradict each other.
    """
    headers = {name: value.decode("latin-1").strip() for name, value in scope["headers"]}
    key = key_digest(scope)[1] if has_keys else b""
    if request_id is None and (given := headers.get(ID_HEADER.lower().encode())):
        if _ID.fullmatch(given) is None:
            text = f"{ID_HEADER} must have 1 to 128 letters, digits, or - . _ ~"
            raise bad_field(ID_HEADER, text)
        request_id = given
    last = headers.get(LAST_HEADER.lower().encode())
    if not last:
        return RequestId(key, request_id, None)
    found = _EVENT_ID.fullmatch(last)
    if found is None or request_id not in (None, found[1]):
        wanted = "an event's id" if request_id is None else f"the id of an event of {request_id}"
        raise bad_field(LAST_HEADER, f"{LAST_HEADER} must be {wanted}, as ID:NUMBER")
    return RequestId(key, found[1], int(found[2]))


def unknown(request_id: str, param: str) -> ApiError:
    """The error for a request that is not kept, or belongs to another key."""
    return ApiError(
        404,
        f"{param}: there is no request {request_id}, or it is no longer kept",
        param=param,
        code="request_not_found",
    )


_ENDPOINTS = {each.path: each for each in (COMPLETIONS, CHATS)}
_COMPACT_BYTES = 64 * 2**20  # beyond twice the size of what is needed: a new file is begun
_MOST_FINISHED_CHUNKS = 2**18  # of finished answers; beyond, unread ones are forgotten
_MOST_FINISHED_BYTES = 64 * 2**20  # memory of finished answers
_MOST_BYTES = 256 * 2**20  # memory of all requests without their chunks
_ROWS = 4096  # rows of a record
_DEATHS = 2  # deaths of processes, after which the request they computed is tried alone
_ALONE_S, _LOOK_S = 10.0, 0.01  # how long it stays alone after its first new chunk


class JournalKeeper:
    """The requests of one server's journal; used in its event loop.

    Attributes:
        requests: by key and id: unfinished ones, and answers that clients may still ask for.
        num_resumed: requests of an earlier process that continued.
        num_reconnects: connections to a request that was there already.
        num_abandoned: requests that were ended because no client came back.
    """

    def __init__(self, service: Service, file: JournalFile) -> None:
        self._service, self.file = service, file
        self.requests: dict[tuple[bytes, str], KeptRequest] = {}
        self.num_resumed = self.num_reconnects = self.num_abandoned = 0
        self._by_engine_id: dict[str, KeptRequest] = {}
        self._making: dict[tuple[bytes, str], asyncio.Future[None]] = {}
        self._timers: dict[KeptRequest, asyncio.TimerHandle] = {}
        self._finished: dict[KeptRequest, None] = {}  # the first one first
        self._num_finished_chunks = self._num_finished_bytes = self._num_begun_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._seeds = SystemRandom()
        self._number = max(file.found, default=0)
        self._are_tried = asyncio.Event()  # all that may have ended an earlier process
        for found in file.found.values():
            self._recall(found)
        file.found.clear()
        self._begin_file()

    @property
    def _has_keys(self) -> bool:
        return bool(self._service.options.api_keys)

    # Clients.

    async def answer(
        self, scope: Scope, request: GenerationRequest, endpoint: Endpoint, began_s: float
    ) -> Answer:
        """The answer to a request: that of an earlier one with the same id, or a new one.

        Raises:
            ApiError: it cannot be served, or its id is another request's.
        """
        asked = asked_of(scope, has_keys=self._has_keys)
        if asked.request_id is None:
            if not request.stream:  # nobody could come back to it
                await self._are_tried.wait()
                return await endpoint.make(self._service, request, began_s)
            return self._read(await self._take_in(asked, request, endpoint, began_s))
        name = asked.key, asked.request_id
        while True:
            if (kept := self.requests.get(name)) is not None:
                _check_same(kept, request, endpoint)
                return self.reconnect(kept, asked.after or 0)
            if asked.after is not None:
                raise unknown(asked.request_id, LAST_HEADER)
            if (other := self._making.get(name)) is None:
                break
            await asyncio.wait([other])
        making = self._making[name] = self._loop.create_future()
        try:
            return self._read(await self._take_in(asked, request, endpoint, began_s))
        finally:
            making.set_result(None)
            del self._making[name]

    def find(self, scope: Scope, request_id: str) -> tuple[KeptRequest, int]:
        """A request of a client by its id, and how many events the client has.

        Raises:
            ApiError: the client has no such request.
        """
        asked = asked_of(scope, request_id, has_keys=self._has_keys)
        kept = self.requests.get((asked.key, request_id))
        if kept is None:
            raise unknown(request_id, "request_id" if asked.after is None else LAST_HEADER)
        return kept, asked.after or 0

    def reconnect(self, kept: KeptRequest, after: int) -> Answer:
        """An answer that goes on after the events that the client has."""
        self.num_reconnects += 1
        kept.is_awaited = True
        return self._read(kept, after)

    def _read(self, kept: KeptRequest, after: int = 0) -> Answer:
        answer = kept.endpoint.answer(self._service, kept.prepared)
        answer.kept = kept.read(after)
        return answer

    async def _take_in(
        self, asked: RequestId, request: GenerationRequest, endpoint: Endpoint, began_s: float
    ) -> KeptRequest:
        """Write a new request down, and queue it.

        Raises:
            ApiError: it cannot be served.
        """
        service = self._service
        service.check_admission(request.model)
        await self._are_tried.wait()
        prepared = await endpoint.prepare(service, request)
        service.check_queue()  # again: others have come meanwhile
        params = [
            each if each.seed is not None else each.with_valid(seed=self._seeds.getrandbits(64))
            for each in prepared.params
        ]
        prepared = replace(prepared, params=params)
        self._bound_memory()
        self._number += 1
        begun = BeginRecord(
            self._number,
            asked.key,
            asked.request_id or prepared.root,
            asked.request_id is not None,
            endpoint.path,
            _body(request),
            list(prepared.prompts),
            params[:1],
            list(prepared.texts),
            [],
            prepared.root,
            prepared.created,
            time.time() - (self._loop.time() - began_s),
            [each.seed or 0 for each in params],
            [each.max_tokens for each in params],
        )
        self._append(begun)
        kept = self._kept(begun, prepared, endpoint)
        self._add(kept)
        try:
            await service.engine.begin(
                *(kept, prepared.prompts_of_choices, params), priority=request.priority or 0
            )
        except BaseException as error:
            self.forget(kept)
            if not isinstance(error, Exception):
                raise
            param = endpoint.answer.param
            raise service.refusal(error, param, prepared.num_choices) from None
        self._watch_over(kept, began_s)
        return kept

    def _kept(
        self, begun: BeginRecord, prepared: GenerationTask, endpoint: Endpoint
    ) -> KeptRequest:
        cancel = self._service.engine.cancel
        return KeptRequest(begun, prepared, endpoint, cancel, self._look_at)

    def _watch_over(self, kept: KeptRequest, began_s: float) -> None:
        limit_s = self._service.time_limit_s(kept.prepared.request)
        self._service.under_way.begin(kept, began_s, limit_s)

    def metrics(self) -> Iterator[Metric]:
        """Metrics of the journal."""
        file, families = self.file, Families(_PREFIX, {"model_name": self._service.model.name})
        reconnects = "Connections to a request that was there already", self.num_reconnects
        yield from families.of(
            "counter",
            {
                "bytes": ("Bytes written to the journal", file.num_bytes),
                "records": ("Records written to the journal", file.num_records),
                "write_seconds": ("Time of these writes, encoding included", file.write_s),
                "files": ("Files begun: at the start, and when one has grown", file.num_files),
                "resumed": ("Requests of an earlier process that continued", self.num_resumed),
                "reconnects": reconnects,
                "abandoned": ("Requests ended because no client came back", self.num_abandoned),
            },
        )
        num_finished = sum(kept.is_over for kept in self.requests.values())
        states = {"unfinished": len(self.requests) - num_finished, "finished": num_finished}
        yield from families.of(
            "gauge",
            {
                "requests": ("Requests in the journal", states, "state"),
                "file_bytes": ("Size of the current file", file.size),
            },
        )

    # What comes of requests.

    def write(self, chunks: list[Chunk]) -> None:
        """Write a step's chunks; a hot path. If it fails, the server ends."""
        by_id, rows = self._by_engine_id, []
        for chunk in chunks:
            kept = by_id.get(chunk.request_id)
            if kept is not None and chunk.finish_reason is not FinishReason.CANCELLED:
                rows.append(kept.row(chunk))
        if rows:
            self._append(StepRecord(rows))

    def forget(self, kept: KeptRequest) -> None:
        """Cancel a request's unfinished choices, and keep it no longer."""
        self._service.under_way.finish(kept)
        self._leave(kept)
        if (timer := self._timers.pop(kept, None)) is not None:
            timer.cancel()
        if kept in self._finished:
            del self._finished[kept]
            self._num_finished_chunks -= len(kept.chunks)
            self._num_finished_bytes -= kept.num_bytes
        if self.requests.get(_name(kept)) is kept:
            del self.requests[_name(kept)]
            self._num_begun_bytes -= kept.num_begun_bytes

    def _leave(self, kept: KeptRequest) -> None:
        """Let the journal forget a request; known ids of the engine tell which it has."""
        known = [self._by_engine_id.pop(each, None) for each in kept.request_ids]
        if any(known):
            self._append(ForgetRecord(kept.begun.number))

    def _add(self, kept: KeptRequest) -> None:
        self.requests[_name(kept)] = kept
        self._num_begun_bytes += kept.num_begun_bytes
        self._by_engine_id.update(dict.fromkeys(kept.request_ids, kept))

    def _look_at(self, kept: KeptRequest) -> None:
        """Decide how long a request stays, now that it is read, read no more, or over."""
        if (timer := self._timers.pop(kept, None)) is not None:
            timer.cancel()
        if kept.is_interrupted or self.requests.get(_name(kept)) is not kept:
            return  # it ends with this process, and goes on with the next; or it is forgotten
        if kept.error is not None:
            self._leave(kept)
        elif kept.is_complete and kept not in self._finished:
            self._service.under_way.finish(kept)
            self._finished[kept] = None
            self._num_finished_chunks += len(kept.chunks)
            self._num_finished_bytes += kept.num_bytes
            self._bound_finished()
        if kept.num_readings:
            return
        if not (kept.is_over or kept.is_awaited):
            self.forget(kept)
            return
        after_s = self._service.options.reconnect_s
        self._timers[kept] = self._loop.call_later(after_s, self._abandon, kept)

    def _abandon(self, kept: KeptRequest) -> None:
        self.num_abandoned += not kept.is_over
        self.forget(kept)

    def _bound_memory(self) -> None:
        """Forget finished answers that nobody reads, if requests take too much memory.

        Raises:
            ApiError: the others still take too much.
        """
        if self._num_begun_bytes <= _MOST_BYTES:
            return
        for kept in list(self._finished):
            if self._num_begun_bytes > _MOST_BYTES and not kept.num_readings:
                self.forget(kept)
        if self._num_begun_bytes > _MOST_BYTES:
            text = (
                f"requests of the journal take {self._num_begun_bytes:,} bytes, more than "
                f"{_MOST_BYTES:,}; try again later"
            )
            raise ApiError(429, text, code="queue_full", retry_after_s=1)

    def _bound_finished(self) -> None:
        for kept in list(self._finished):
            if (
                self._num_finished_chunks <= _MOST_FINISHED_CHUNKS
                and self._num_finished_bytes <= _MOST_FINISHED_BYTES
            ):
                return
            if not kept.num_readings:
                self.forget(kept)

    # Files.

    def _append(self, record: Record) -> None:
        try:
            if self.file.size >= self._compact_at:  # first: requests do not have its rows yet
                self._begin_file()
            self.file.append(record)
        except JournalError as error:
            self._service.engine.fail(error)

    def _begin_file(self) -> None:
        """Begin a new file with the records that are still needed.

        Raises:
            JournalError: it cannot be written.
        """
        self.file.replace(self._records())
        self._compact_at = 2 * self.file.size + _COMPACT_BYTES

    def _records(self) -> Iterator[Record]:
        for kept in dict.fromkeys(self._by_engine_id.values()):
            yield kept.begun
            rows = list(kept.rows())
            for start in range(0, len(rows), _ROWS):
                yield StepRecord(rows[start : start + _ROWS])
            if kept.suspected is not None and not kept.is_over:
                is_cleared = kept.has_brought_more
                yield (
                    SuspectRecord(kept.begun.number, 0, False, False)
                    if is_cleared
                    else kept.suspected
                )

    def note_end(self) -> None:
        """Write that a signal ends the process."""
        self._append(EndRecord())

    # From an earlier process.

    def _recall(self, found: JournalEntry) -> None:
        """Restore a request.

        Raises:
            UserError: this version does not take such a request.
        """
        begun = found.begun
        try:
            endpoint = _ENDPOINTS[begun.path]
            request = endpoint.body.model_validate_json(begun.body)
        except (KeyError, ValidationError, ApiError) as error:
            raise UserError(
                f"--journal {self.file.folder}: request {begun.request_id} to {begun.path} is not "
                f"valid in this version: {type(error).__name__}"
            ) from None
        prepared = GenerationTask(
            *(request, begun.prompts, begun.params(), begun.texts),
            root=begun.root,
            created=begun.created,
        )
        kept = self._kept(begun, prepared, endpoint)
        kept.recall(found.rows)
        kept.suspected = SuspectRecord(begun.number, found.num_deaths, False, False)
        kept.is_awaited = True
        self._add(kept)
        self._look_at(kept)

    async def resume(self) -> None:
        """Continue the requests of an earlier process; their clients may be there already.

        Requests with which processes died repeatedly go first, one at a time: if this process
        dies, only one of them can be the cause.
        """
        unfinished = [kept for kept in self.requests.values() if not kept.is_over]
        suspects = [kept for kept in unfinished if _num_deaths(kept) >= _DEATHS]
        suspects.sort(key=_num_deaths, reverse=True)
        for place, kept in enumerate(suspects):
            await self._resume(kept, is_alone=all(each.is_finished for each in suspects[:place]))
            while not (kept.has_brought_more or kept.is_finished):
                await asyncio.sleep(_LOOK_S)
            until_s = self._loop.time() + _ALONE_S
            while not kept.is_finished and self._loop.time() < until_s:
                await asyncio.sleep(_LOOK_S)
        self._are_tried.set()
        others = [kept for kept in unfinished if kept not in suspects]
        await asyncio.gather(*map(self._resume, others))  # they begin in this order

    async def _resume(self, kept: KeptRequest, is_alone: bool = False) -> None:
        if kept.is_finished:  # meanwhile: it is over, or its client has given up
            return
        kept.suspected = SuspectRecord(kept.begun.number, _num_deaths(kept), True, is_alone)
        self._append(kept.suspected)
        try:
            await self._go_on(kept)
            self.num_resumed += 1
        except ApiError as error:
            kept.end(error)
        except Exception as error:  # nobody waits for this
            self._service.engine.fail(error)

    async def _go_on(self, kept: KeptRequest) -> None:
        """Let the engine continue a request like a preempted one.

        Raises:
            ApiError: it cannot be served any more.
        """
        service, prepared = self._service, kept.prepared
        structured = prepared.params[0].structured
        if structured is not None:
            grammar = await service.compile(structured, "structured")
            prepared = kept.prepared = replace(prepared, grammar=grammar)
        places = [place for place, each in enumerate(kept.request_ids) if each in kept.unfinished]
        if not places:  # its client has given up meanwhile
            return
        outputs = [kept.outputs[place] for place in places]
        most = service.model.max_model_len
        longest = max(len(each.prompt_token_ids) + len(each.token_ids) for each in outputs)
        if longest > most:
            text = f"it has {longest} tokens so far; this server takes at most {most}"
            raise bad_field(None, text, "context_length_exceeded")
        prompts = prepared.prompts_of_choices
        try:
            await service.engine.begin(
                kept,
                [prompts[place] for place in places],
                [prepared.params[place] for place in places],
                priority=prepared.request.priority or 0,
                earlier=[output if output.token_ids else None for output in outputs],
            )
        except Exception as error:
            param = kept.endpoint.answer.param
            raise service.refusal(error, param, prepared.num_choices) from None
        ago_s = max(0.0, time.time() - kept.begun.began)
        self._watch_over(kept, self._loop.time() - ago_s)


def _num_deaths(kept: KeptRequest) -> int:
    return 0 if kept.suspected is None else kept.suspected.num_deaths


def _name(kept: KeptRequest) -> tuple[bytes, str]:
    return kept.begun.key, kept.begun.request_id


def _body(request: GenerationRequest) -> bytes:
    return request.model_dump_json(by_alias=True, exclude_unset=True).encode()


def _check_same(kept: KeptRequest, request: GenerationRequest, endpoint: Endpoint) -> None:
    if kept.endpoint is not endpoint or kept.begun.body != _body(request):
        raise ApiError(
            409,
            f"{ID_HEADER} {kept.begun.request_id} is the id of another request; give this one a "
            "new id",
            param=ID_HEADER,
            code="request_id_in_use",
        )
