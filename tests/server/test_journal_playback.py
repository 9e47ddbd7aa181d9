"""An answer that is made again from its chunks has the same events, to the byte."""

import asyncio
import json
from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.stub_runner import StubEngine, letters
from expertlane.schedule.request import Chunk, FinishReason
from expertlane.server.answers import GenerationTask
from expertlane.server.completions import CHATS, COMPLETIONS
from expertlane.server.journal.file import BeginRecord, Record, StepRecord, framed, records_of
from expertlane.server.journal.kept import KeptRequest
from expertlane.server.setup import ServedModel, ServerOptions
from expertlane.spec.sampling import PromptLogprobs, PromptPart, SamplingParams, TokenLogprobs
from expertlane.text.chat_template import ChatTemplate
from server.running import ServerInThread, events_in

SAID = (
    "<think>why é</think>so it is: "
    '<tool_call>{"name": "look", "arguments": {"at": "ö"}}</tool_call>\n'
    '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
)
TOOL = {"type": "object", "properties": {"at": {"type": "string"}}}
CHAT = {
    "messages": [{"role": "user", "content": "a"}],
    "tools": [{"type": "function", "function": {"name": "look", "parameters": TOOL}}],
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "return_token_ids": True,
    "logprobs": True,
    "top_logprobs": 1,
    "stream": True,
}
COMPLETION = {
    "prompt": [[1, 2, 3], [4]],
    "n": 2,
    "echo": True,
    "logprobs": 1,
    "stream": True,
    "stream_options": {"include_usage": True},
}
ASKED = {
    "chat": (CHATS, CHAT, [[1, 2]], ["a"]),
    "completion": (COMPLETIONS, COMPLETION, [[1, 2, 3], [4]], ["bcd", "e"]),
}


@pytest.fixture(scope="module")
def service():
    engine = StubEngine(tokenizer=letters())
    template = ChatTemplate("{{ messages }}", {}, "test")
    model = ServedModel("stub", engine, engine.limits, letters(), template)
    options = ServerOptions(tool_call_parser="hermes", reasoning_parser="think")
    server = ServerInThread(model, options)
    yield server.service
    server.stop()


def kept_of(kind, rows=None, *, is_stream=True):
    """A request that has got nothing, or what a journal has."""
    endpoint, body, prompts, texts = ASKED[kind]
    body = {k: v for k, v in body.items() if is_stream or k != "stream_options"}
    request = endpoint.body.model_validate_json(json.dumps(body | {"stream": is_stream}))
    wants = 1 if kind == "completion" else None
    params = [SamplingParams(logprobs=1, prompt_logprobs=wants, seed=1)] * len(prompts)
    params *= body.get("n", 1)
    dumped = request.model_dump_json(by_alias=True, exclude_unset=True).encode()
    begun = BeginRecord(
        1, b"", "mine", True, endpoint.path, dumped, prompts, params, texts, [], "0" * 32, 5, 0.0
    )
    (_, begun) = next(records_of(framed(begun)))  # it goes through bytes
    request = endpoint.body.model_validate_json(begun.body)
    prepared = GenerationTask(
        request, begun.prompts, begun.params(), begun.texts, created=5, root=begun.root
    )
    kept = KeptRequest(begun, prepared, endpoint, lambda ids: None, lambda kept: None)
    if rows is not None:
        kept.recall(rows)
    return kept


def test_requests_of_older_journals():
    params = [SamplingParams(seed=seed, max_tokens=seed) for seed in (1, 2)]
    fields = [1, b"", "mine", True, "/v1/completions", b"{}", [[1], [2]], params, [], [], "0", 5]
    older = msgspec.msgpack.encode(["begun", *fields, 0.0])
    written = framed(BeginRecord(*fields[:7], params[:1], *fields[8:], 0.0, [1, 2], [1, 2]))
    begun = msgspec.msgpack.decode(older, type=Record)
    (_, now) = next(records_of(written))
    assert begun.params() == now.params() == params
    assert begun.num_choices == now.num_choices == 2


def say(kept, pieces):
    """As an engine does; the choices of a step one after another."""
    for output, params in zip(kept.outputs, kept.prepared.params, strict=True):
        output.num_cached_tokens = 1
        if params.prompt_logprobs is not None:
            num = len(output.prompt_token_ids)
            output.prompt_logprobs = kept_prompt(output, num)
    rows = []
    for number, text in enumerate(pieces):
        reason = FinishReason.STOP if number == len(pieces) - 1 else None
        for request_id, output in zip(kept.request_ids, kept.outputs, strict=True):
            output.token_ids.append(number % 26)
            output.logprobs.append(TokenLogprobs(number % 26, -0.1 - number, ((3, -0.25),)))
            output.text += text
            output.finish_reason = reason
            chunk = Chunk(request_id, number % 26, text, reason)
            rows.append(kept.row(chunk))
            kept.add(chunk)
    (_, came) = next(records_of(framed(StepRecord(rows))))
    return came.rows


def kept_prompt(output, num):
    found = PromptLogprobs(output.prompt_token_ids, 1)
    numbers = found.whole().ranks + range(num)
    ones = numbers[:, None]
    found.add(PromptPart(0, -0.5 * numbers, numbers, ones, -0.25 * ones))
    return found


def played(service, kept, after=0):
    """What a connection gets."""
    answer = kept.endpoint.answer(service, kept.prepared)
    answer.kept = kept.read(after)
    return sent(answer)


def sent(answer):
    """The body of an answer."""
    parts = []

    async def send(message):
        parts.append(message.get("body", b""))

    async def receive():
        await asyncio.Event().wait()

    asyncio.run(answer({"type": "http"}, receive, send))
    return b"".join(parts)


class GivenSource:
    """A source whose chunks come in given parts."""

    def __init__(self, outputs, parts):
        self.outputs, self._parts = outputs, list(parts)

    async def take(self):
        return self._parts.pop(0) if self._parts else []

    def end(self, error):
        pass

    def cancel(self):
        pass


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.ERROR])
@pytest.mark.parametrize("kind", ASKED)
def test_an_end_without_a_token_may_come_together_with_the_last_one(
    service, monkeypatch, kind, reason
):
    """Also an error: what came before it is sent."""

    def events(are_together):
        kept = kept_of(kind)
        say(kept, ["<think>why</think>", "so it"])
        chunks = [
            (kept.place_of(chunk), replace(chunk, finish_reason=None)) for chunk in kept.chunks
        ]
        num = len(kept.outputs)
        parts = [chunks[:num], chunks[num:]]
        ends = []
        for place, output in enumerate(kept.outputs):
            output.finish_reason, output.error = reason, "too costly"
            ends.append((place, Chunk(output.request_id, None, " is", reason, "too costly")))
        if are_together:
            parts[-1] += ends
        else:
            parts.append(ends)

        async def generate(*arguments):
            return GivenSource(kept.outputs, parts)

        monkeypatch.setattr(service, "generate", generate)
        return sent(kept.endpoint.answer(service, kept.prepared))

    found = events(True)
    assert found == events(False)
    assert b"so it" in found
    if reason is FinishReason.STOP:
        choices = [choice for delta in events_in(found) for choice in delta["choices"]]
        reasons = [choice["finish_reason"] for choice in choices]
        num_ends = len(ASKED[kind][2]) * ASKED[kind][1].get("n", 1)
        assert reasons == [None] * 2 * num_ends + ["stop"] * num_ends


@pytest.mark.parametrize("kind", ASKED)
@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, len(SAID) - 1), max_size=30), after=st.integers(0, 60))
def test_the_same_events(service, kind, cuts, after):
    """From the first, and after any; by the process that had the tokens, and by the next one."""
    places = [0, *sorted(cuts), len(SAID)]
    pieces = [SAID[i:j] for i, j in pairwise(places)]
    kept = kept_of(kind)
    rows = say(kept, pieces)
    whole = played(service, kept)
    events = [b"%b\n\n" % event for event in whole.split(b"\n\n")[:-1]]
    assert [event.split(b"\n")[0] for event in events] == [
        b"id: mine:%d" % number for number in range(1, len(events) + 1)
    ]
    assert played(service, kept, after) == b"".join(events[after:])
    again = kept_of(kind, rows)
    assert again.is_complete
    assert played(service, again) == whole
    assert list(again.rows()) == rows
    plain = played(service, kept_of(kind, rows, is_stream=False))
    assert plain == played(service, kept_of(kind, rows, is_stream=False))


def test_calls_and_reasoning_are_there(service):
    """What the marks say, and ids that stay."""
    kept = kept_of("chat")
    say(kept, [SAID[i : i + 3] for i in range(0, len(SAID), 3)])
    events = events_in(played(service, kept))
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert "".join(each.get("reasoning_content") or "" for each in deltas) == "why é"
    ids = [call["id"] for each in deltas for call in each.get("tool_calls", ()) if "id" in call]
    assert len(set(ids)) == 2
