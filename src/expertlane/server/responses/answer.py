"""Answers of `/v1/responses`: items of output, whole or as events."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from fastapi import Response
from starlette.types import Send

from expertlane.schedule.request import FinishReason
from expertlane.server.answers import Source, send_part, taken
from expertlane.server.chat_answer import ChatAnswer
from expertlane.server.chats import prepare_chat
from expertlane.server.endpoint import Endpoint
from expertlane.server.errors import ApiError, json_response
from expertlane.server.prepared import Prepared
from expertlane.server.responses.items import Event, ResponseItems
from expertlane.server.responses.request import ResponsesRequest, renamed
from expertlane.server.responses.store import StoredResponse
from expertlane.server.service import Service


class ResponseAnswer(ChatAnswer):
    """An answer of `/v1/responses`."""

    param = "input"

    def __init__(self, service: Service, prepared: Prepared) -> None:
        request = prepared.request
        assert isinstance(request, ResponsesRequest), "it is of this route"
        super().__init__(service, prepared, request.as_chat(prepared.before))
        self._items = ResponseItems(partial(prepared.ids.of, "item"))
        self._reason: FinishReason | None = None
        self._num_events = 0
        self._is_stored = request.store is not False and service.responses.is_open
        self._messages = [*prepared.before, *request.messages()]
        self._body = _body(service, prepared, request) | {
            "created_at": prepared.created,
            "store": self._is_stored,
        }

    async def _whole(self, source: Source) -> Response:
        async for _ in self._steps(source):
            pass
        return json_response(self._finished())

    async def _stream(self, source: Source, send: Send, direct: Send) -> None:
        await self._begin_events(send)
        begun = self._body | {"status": "in_progress", "output": []}
        names = ("response.created", "response.in_progress")
        await send_part(direct, self._bytes({"type": name, "response": begun} for name in names))
        try:
            async for events in self._steps(source):
                await send_part(direct, self._bytes(events))
            response = self._finished()
        except ApiError as error:
            if self._goes_on(error):
                await send_part(direct, b"", is_last=True)
                return
            failure = {"code": "server_error", "message": error.body["error"]["message"]}
            response = begun | {"status": "failed", "error": failure, "output": self._items.items}
        end: Event = {"type": f"response.{response['status']}", "response": response}
        await send_part(direct, self._bytes([end]), is_last=True)

    async def _steps(self, source: Source) -> AsyncIterator[list[Event]]:
        """For each step of the engine, the events of its chunks.

        Raises:
            ApiError: the request, or the engine, has ended with an error.
            ClientGone: the client has closed the connection.
        """
        while arrived := await taken(source):
            events: list[Event] = []
            try:
                for piece in self._pieces(source, arrived):
                    found = (
                        list(self._texts.of_chat(piece.logprobs)) if self._wants_logprobs else []
                    )
                    events += self._items.feed(self._fields(piece), found)
                    self._reason = piece.finish_reason
            except ApiError:
                yield events  # events of the chunks that came with the error
                raise
            yield events
        yield list(self._items.end("incomplete" if self._is_cut else "completed"))

    @property
    def _is_cut(self) -> bool:
        return self._reason is FinishReason.LENGTH

    def _finished(self) -> dict[str, Any]:
        """The finished response; stored if the request asks for it."""
        usage = self._usage()
        details = usage["prompt_tokens_details"] | {"cache_write_tokens": 0}
        body = self._body | {
            "status": "incomplete" if self._is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if self._is_cut else None,
            "output": self._items.items,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": details,
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
        }
        if self._is_stored:
            messages = [*self._messages, self._items.message()]
            self._service.responses.put(StoredResponse(body, messages))
        return body

    def _bytes(self, events: Iterable[Event]) -> bytes:
        parts = []
        for event in events:
            numbered = event | {"sequence_number": self._num_events}
            self._num_events += 1
            data = msgspec.json.encode(numbered)
            encoded = b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)
            parts.append(self._numbered(encoded))
        return b"".join(parts)


def _body(service: Service, prepared: Prepared, request: ResponsesRequest) -> dict[str, Any]:
    """The fields of a response before its output, most of them those of its request."""
    params = prepared.params[0]
    tools = request.tools or []
    choice = request.tool_choice or "auto"
    return {
        "id": f"resp_{prepared.ids.root}",
        "object": "response",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": service.model.name,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": request.effort, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "temperature": params.temperature,
        "text": {"format": request.format_of_text},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [{"parameters": None, "strict": None} | tool.model_dump() for tool in tools],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }


async def prepare_response(service: Service, request: ResponsesRequest) -> Prepared:
    """Check a request, and tokenize its chat.

    Raises:
        ApiError: it can never be served.
    """
    before: list[dict[str, Any]] = []
    if request.previous_response_id is not None:
        before = service.responses.get(
            request.previous_response_id, "previous_response_id"
        ).messages
    chat = request.as_chat(before)
    try:
        prepared = await prepare_chat(service, chat)
    except ApiError as error:
        raise renamed(error) from None
    return replace(prepared, request=request, before=before)


RESPONSES = Endpoint("/v1/responses", ResponsesRequest, prepare_response, ResponseAnswer)
