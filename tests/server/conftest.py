"""A real checkpoint behind a real server, and servers without ranks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.model.chat_checkpoint import save_chat_checkpoint
from expertlane.engine.llm import LLM
from expertlane.schedule.request import RequestOutput
from expertlane.spec.sampling import SamplingParams
from expertlane.text.chat_template import ChatTemplate
from expertlane.text.tokenizer import default_sampling
from server.running import (
    DRAWN,
    GREEDY,
    MESSAGES,
    PATIENCE_S,
    PROMPTS,
    ServerInThread,
    StubServer,
    serving,
)

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'developer' %}{{ raise_exception('No developers.') }}{% endif %}"
    "<u>{{ message.content }}{% if shout is defined %}!{% endif %}{% endfor %}"
    "{% if reasoning_effort is defined %}{{ reasoning_effort }}{% endif %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a byte-level tokenizer and a chat template."""
    return save_chat_checkpoint(tmp_path_factory.mktemp("served"), TEMPLATE)


@dataclass
class Served:
    """A server on real ranks, and what the same ranks gave offline before it started."""

    server: ServerInThread
    client: openai.OpenAI
    http: httpx.Client
    greedy: list[RequestOutput]
    drawn: list[RequestOutput]
    chat: RequestOutput


def _chat(llm: LLM, params: SamplingParams) -> RequestOutput:
    template = ChatTemplate.from_folder(llm._folder)
    text = template.render([*MESSAGES])
    prompt = llm.tokenizer.encode(text, add_special_tokens=False)
    return llm.generate([prompt], params)[0]


@pytest.fixture(scope="session")
def served(chatty: Path) -> Iterator[Served]:
    """Two data-parallel ranks."""
    with LLM(chatty, layout="dp=2,ep=2", dtype="float32", num_blocks=128) as llm:
        greedy = llm.generate([*PROMPTS], GREEDY)
        drawn = llm.generate([*PROMPTS], DRAWN)
        chat = _chat(llm, replace(GREEDY, logprobs=3))
        template = ChatTemplate.from_folder(chatty)
        given = llm.tokenizer, template, default_sampling(chatty), llm.watch()
        with (
            serving(llm, *given) as server,
            server.openai() as client,
            httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http,
        ):
            yield Served(server, client, http, greedy, drawn, chat)


@pytest.fixture
def stub_server() -> Iterator[Callable[..., StubServer]]:
    """Makes servers without ranks; all are ended."""
    made: list[StubServer] = []

    def make(*given: Any, **more: Any) -> StubServer:
        made.append(StubServer(*given, **more))
        return made[-1]

    yield make
    for server in made:
        server.stop()
