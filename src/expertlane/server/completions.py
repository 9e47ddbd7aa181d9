"""Completions and chats: prompts from the bodies of requests, and the form of their answers."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from expertlane.schedule.request import Chunk, FinishReason
from expertlane.server.answers import Answer, Endpoint, GenerationTask, Piece
from expertlane.server.errors import bad_field
from expertlane.server.logprobs import TextOffsets
from expertlane.server.marks import MarkedText, Marks
from expertlane.server.requests import USUAL_VERBOSITY, ChatRequest, CompletionRequest
from expertlane.server.service import Service
from expertlane.server.tools import structured_chat
from expertlane.spec.sampling import TokenLogprobs


class CompletionAnswer(Answer):
    """Texts that continue prompts, after the prompts' own where those are echoed."""

    param = "prompt"
    prefix, kind, kind_of_chunks = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, prepared: GenerationTask) -> None:
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


async def prepare_completion(service: Service, request: CompletionRequest) -> GenerationTask:
    """Check a request, and tokenize its prompts.

    Raises:
        ApiError: it can never be served.
    """
    texts = [each for each in request.prompt if isinstance(each, str)]
    encoded: Iterator[list[int]] = iter(())
    if texts:
        encoded = iter(
            await service.encode(texts, "prompt", add_special_tokens=request.add_special_tokens)
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
    return GenerationTask(request, prompts, params, echoed, grammar)


COMPLETIONS = Endpoint("/v1/completions", CompletionRequest, prepare_completion, CompletionAnswer)


class ChatAnswer(Answer):
    """An answer of `/v1/chat/completions`."""

    param = "messages"
    prefix, kind, kind_of_chunks = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, prepared: GenerationTask) -> None:
        super().__init__(service, prepared)
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
                    partial(prepared.id_of, "call", choice),
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
    """The message of one choice: its text, split into the fields of the API.

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


class ReasoningCount:
    """Counts the tokens of a choice that are reasoning, marks included.

    Args:
        prompt: text of the prompt, whose end tells whether the answer begins inside reasoning.

    Attributes:
        num_tokens: reasoning tokens so far.
    """

    def __init__(self, marks: Marks, prompt: str) -> None:
        self.num_tokens = 0
        self._text = MarkedText(marks, prompt, takes_calls=False)
        self._num_unknown = 0  # tokens so far, while it is not known what they begin

    def feed(self, chunk: Chunk) -> None:
        """Take in a chunk: a token, or the end."""
        was = self._text.kind
        if was not in (None, "reasoning"):
            return
        self._text.feed(chunk.text)
        num = int(chunk.token_id is not None)
        if was == "reasoning":
            self.num_tokens += num
        else:
            self._num_unknown += num
            if self._text.kind == "reasoning":
                self.num_tokens += self._num_unknown
                self._num_unknown = 0


async def prepare_chat(service: Service, request: ChatRequest) -> GenerationTask:
    """Check a request, and tokenize its chat.

    Raises:
        ApiError: it can never be served.
    """
    tools = request.offered_tools
    if tools and service.marks.calls is None:
        text = (
            "tools: the chat template of this model has none of the known marks of calls "
            "(--tool-call-parser names them)"
        )
        raise bad_field("tools", text, "unsupported_parameter")
    prompt, text = await service.encode_chat(
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        add_special_tokens=request.add_special_tokens,
        tools=tools,
        variables=_variables(service, request),
    )
    structured, field = structured_chat(request, service.marks, text, service.model.tokenizer)
    grammar = None if structured is None else await service.compile(structured, field)
    shown = service.shown_token_ids(request)
    params = service.params(
        request, [prompt], "messages", structured=structured, shown_token_ids=shown
    )
    return GenerationTask(request, [prompt], params, [text], grammar)


def _variables(service: Service, request: ChatRequest) -> dict[str, Any]:
    """The variables of the chat template that a request sets.

    Raises:
        ApiError: a field sets one that the template does not have.
    """
    variables, template = dict(request.chat_template_kwargs or {}), service.model.template
    for name, value in request.named_variables.items():
        if template is None or name in template.variables:
            variables[name] = value
        elif value != USUAL_VERBOSITY or name != "verbosity":
            text = f"{name}: the chat template of this model has no such variable"
            raise bad_field(name, text, "unsupported_parameter")
    return variables


CHATS = Endpoint("/v1/chat/completions", ChatRequest, prepare_chat, ChatAnswer)
