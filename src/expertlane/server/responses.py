"""Answers of `/v1/responses`: items of output, whole or as events."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import msgspec
from fastapi import Response
from starlette.types import Send

from expertlane.schedule.request import FinishReason
from expertlane.server.answers import Endpoint, Prepared, Source, send_part, taken
from expertlane.server.completions import ChatAnswer, prepare_chat
from expertlane.server.errors import ApiError, json_response
from expertlane.server.response_requests import ResponsesRequest, renamed
from expertlane.server.service import Service, StoredResponse

Event = dict[str, Any]
_TEXTS = {  # by the name of a message's field: prefix of ids, type of its part, stem of events
    "content": ("msg", "output_text", "response.output_text"),
    "reasoning_content": ("rs", "reasoning_text", "response.reasoning_text"),
}


class ResponseAnswer(ChatAnswer):
    """An answer of `/v1/responses`."""

    param = "input"

    def __init__(self, service: Service, prepared: Prepared) -> None:
        request = prepared.request
        assert isinstance(request, ResponsesRequest), "it is of this route"
        super().__init__(service, prepared, request.as_chat(prepared.before))
        self._items = ResponseItems(partial(prepared.id_of, "item"))
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
        "id": f"resp_{prepared.root}",
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


class ResponseItems:
    """Turns new text and calls into items and events; an item ends when another begins.

    Args:
        id_of: gives 32 hexadecimal digits for the number of an item.

    Attributes:
        items: the answer's items so far, in their order.
    """

    def __init__(self, id_of: Callable[[int], str]) -> None:
        self._id_of = id_of
        self.items: list[dict[str, Any]] = []
        self._open: str | None = None  # the field that the last item is of
        self._num_calls = 0

    def feed(self, fields: dict[str, Any], logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Events of the new parts of a message.

        Args:
            fields: its new parts, from `ChatParts.feed`.
            logprobs: log-probabilities of their tokens; used for text of the answer itself alone.
        """
        for name, value in fields.items():
            if name == "tool_calls":
                for call in value:
                    yield from self._feed_call(call)
            elif value or logprobs:
                yield from self._feed_text(name, value, logprobs if name == "content" else [])

    def end(self, status: Literal["completed", "incomplete"]) -> Iterator[Event]:
        """Events of the end; an answer has one item at least."""
        if not self.items:
            yield from self._begin_text("content")
        yield from self._close(status)

    def message(self) -> dict[str, Any]:
        """All items as one message of a chat."""
        found: dict[str, Any] = {"role": "assistant", "content": ""}
        for item in self.items:
            if item["type"] == "function_call":
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "function": function}
                found.setdefault("tool_calls", []).append(call)
            else:
                name = "content" if item["type"] == "message" else "reasoning_content"
                text = "".join(part["text"] for part in item["content"])
                found[name] = found.get(name, "") + text
        return found

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _add(self, item: dict[str, Any]) -> Event:
        self.items.append(item)
        shown = item | ({"content": []} if "content" in item else {})
        return {
            "type": "response.output_item.added",
            "output_index": len(self.items) - 1,
            "item": shown,
        }

    def _begin_text(self, name: str) -> Iterator[Event]:
        yield from self._close("completed")
        self._open = name
        prefix, kind, _ = _TEXTS[name]
        part: dict[str, Any] = {"type": kind, "text": ""}
        item = {
            "id": f"{prefix}_{self._id_of(len(self.items))}",
            "status": "in_progress",
            "content": [part],
        }
        if name == "content":
            part |= {"annotations": [], "logprobs": []}
            item |= {"type": "message", "role": "assistant"}
        else:
            item |= {"type": "reasoning", "summary": []}
        yield self._add(item)
        of_part = self._at | {"content_index": 0, "part": dict(part)}
        yield {"type": "response.content_part.added"} | of_part

    def _feed_text(self, name: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if self._open != name:
            yield from self._begin_text(name)
        part = self.items[-1]["content"][0]
        part["text"] += text
        event = {"type": f"{_TEXTS[name][2]}.delta", "content_index": 0, "delta": text} | self._at
        if name == "content":
            part["logprobs"] += logprobs
            event["logprobs"] = logprobs
        yield event

    def _feed_call(self, call: dict[str, Any]) -> Iterator[Event]:
        function = call["function"]
        if self._open != "tool_calls" or call.get("id") is not None:
            yield from self._close("completed")
            self._open = "tool_calls"
            item = {
                "id": f"fc_{self._id_of(len(self.items))}",
                "type": "function_call",
                "status": "in_progress",
                "call_id": call["id"],
                "name": function["name"],
                "arguments": "",
            }
            yield self._add(item)
        arguments = function.get("arguments") or ""
        self.items[-1]["arguments"] += arguments
        yield {"type": "response.function_call_arguments.delta", "delta": arguments} | self._at

    def _close(self, status: str) -> Iterator[Event]:
        """End the item that is open, if one is."""
        if self._open is None:
            return
        item, name = self.items[-1], self._open
        self._open = None
        item["status"] = status
        if name == "tool_calls":
            given = {"arguments": item["arguments"], "name": item["name"]}
            yield {"type": "response.function_call_arguments.done"} | given | self._at
        else:
            part = item["content"][0]
            of_part = self._at | {"content_index": 0}
            more = {"logprobs": part["logprobs"]} if name == "content" else {}
            yield {"type": f"{_TEXTS[name][2]}.done", "text": part["text"]} | more | of_part
            yield {"type": "response.content_part.done", "part": part} | of_part
        at = {"output_index": len(self.items) - 1, "item": item}
        yield {"type": "response.output_item.done"} | at


RESPONSES = Endpoint("/v1/responses", ResponsesRequest, prepare_response, ResponseAnswer)
