"""Answers of `/v1/chat/completions`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from expertlane.schedule.request import Chunk, FinishReason
from expertlane.server.answers import Answer, Piece
from expertlane.server.marks import MarkedText
from expertlane.server.prepared import Prepared
from expertlane.server.requests import ChatRequest
from expertlane.server.service import Service
from expertlane.server.usage import ReasoningCount


class ChatAnswer(Answer):
    """An answer of `/v1/chat/completions`."""

    param = "messages"
    prefix, kind, kind_of_chunks = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        service: Service,
        prepared: Prepared,
        chat: ChatRequest | None = None,
    ) -> None:
        super().__init__(service, prepared, chat)
        request, params = self._request, self._params
        assert isinstance(request, ChatRequest), "it is a chat"
        (text,) = prepared.texts
        self._wants_logprobs = bool(request.logprobs)
        functions = request.callable_functions
        self._parts: list[ChatParts] = []  # none where all text is content
        if functions or service.marks.thoughts is not None:
            schemas = {each.name: each.parameters or {} for each in functions}
            self._parts = [
                ChatParts(
                    MarkedText(service.marks, text, takes_calls=bool(functions), schemas=schemas),
                    partial(prepared.ids.of, "call", choice),
                )
                for choice in range(len(params))
            ]
        self._counts: list[ReasoningCount] = []
        if service.marks.thoughts is not None:
            self._counts = [ReasoningCount(service.marks, text) for _ in params]
        self._num_prompt_top = request.prompt_logprobs

    @property
    def num_reasoning_tokens(self) -> int:
        """Reasoning tokens of all choices."""
        return sum(count.num_tokens for count in self._counts)

    def note(self, place: int, chunk: Chunk) -> None:
        """Count a chunk's token if it is reasoning."""
        if self._counts:
            self._counts[place].feed(chunk)

    def more_of_whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The field `prompt_logprobs`, if it was asked for."""
        prompt = pieces[0].output.prompt_logprobs
        if self._num_prompt_top is None or prompt is None:
            return {}
        return {"prompt_logprobs": self._texts.of_prompt(prompt, self._num_prompt_top)}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A choice with its whole message."""
        found = self._fields(piece)
        calls = found.get("tool_calls")
        for call in calls or ():
            del call["index"]  # which deltas alone have
        content = found.pop("content", None if calls else "")
        message = {"role": "assistant", "content": content, "refusal": None} | found
        return self._choice(piece, {"message": message})

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A choice with the new parts of its message; the first one has the role."""
        delta = self._fields(piece) or {"content": ""}
        if piece.start == 0:
            delta["role"] = "assistant"
        return self._choice(piece, {"delta": delta})

    def _fields(self, piece: Piece) -> dict[str, Any]:
        if not self._parts:
            return {"content": piece.text}
        is_last = piece.finish_reason is not None
        return self._parts[piece.place].feed(piece.text, is_last=is_last)

    def _choice(self, piece: Piece, what: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._wants_logprobs:
            logprobs = {"content": self._texts.of_chat(piece.logprobs), "refusal": None}
        reason: str | None = piece.finish_reason
        if reason == FinishReason.STOP and self._parts and self._parts[piece.place].num_calls:
            reason = "tool_calls"
        more = {"logprobs": logprobs, "finish_reason": reason}
        return self._with_ids(piece, {"index": piece.place} | what | more)


class ChatParts:
    """Splits the text of one choice into the fields of a message.

    Args:
        id_of: gives 32 hexadecimal digits for the number of a call.

    Attributes:
        num_calls: tool calls so far.
    """

    def __init__(self, text: MarkedText, id_of: Callable[[int], str]) -> None:
        self._text, self._id_of = text, id_of
        self.num_calls = 0

    def feed(self, text: str, *, is_last: bool = False) -> dict[str, Any]:
        """The new parts of each field: `content`, `reasoning_content`, `tool_calls`."""
        found: dict[str, Any] = {}
        for part in self._text.feed(text, is_last=is_last):
            if part.kind == "name":
                found.setdefault("tool_calls", []).append(self._call(part.text))
            elif part.kind == "arguments":
                self._add_arguments(found.setdefault("tool_calls", []), part.text)
            elif part.kind == "reasoning":
                found["reasoning_content"] = found.get("reasoning_content", "") + part.text
            else:
                found["content"] = found.get("content", "") + part.text
        return found

    def _call(self, name: str) -> dict[str, Any]:
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            # Kimi's template tells from the id which call a result is of.
            "id": f"functions.{name}:{self.num_calls - 1}"
            if self._text.numbers_calls
            else f"call_{self._id_of(self.num_calls)[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }

    def _add_arguments(self, calls: list[dict[str, Any]], text: str) -> None:
        """Add arguments to the last call, which may have begun in an earlier delta."""
        index = self.num_calls - 1
        if not calls or calls[-1]["index"] != index:
            calls.append({"index": index, "function": {"arguments": ""}})
        calls[-1]["function"]["arguments"] += text
