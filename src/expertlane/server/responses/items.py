"""The items of an answer, and the events by which a client sees them grow."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

Event = dict[str, Any]
_TEXTS = {  # by the name of a message's field: prefix of ids, type of its part, stem of events
    "content": ("msg", "output_text", "response.output_text"),
    "reasoning_content": ("rs", "reasoning_text", "response.reasoning_text"),
}


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
