"""A server as a client sees it: its models, what it takes, and requests to it."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from expertlane.client.connection import (
    Answer,
    AnswerError,
    ClosedEarly,
    ConnectionFailed,
    Connections,
    TokenTimes,
    error_message,
    read_answer,
)
from expertlane.client.watch import Watch
from expertlane.errors import ExpertlaneError, UserError
from expertlane.spec.hf_config import language_model_of, read_config
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import TimedRequest

if TYPE_CHECKING:
    from expertlane.text.tokenizer import Tokenizer


_MOST_ATTEMPTS = 8
_MOST_TOKENS = 2**24  # of a vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """Tokens that prompts are drawn from.

    Attributes:
        token_ids: ordinary tokens; prompts are drawn as indices into this.
        tokenizer: for prompts that must be text; None where there is none here.
    """

    token_ids: Sequence[int]
    tokenizer: "Tokenizer | None" = None

    @classmethod
    def of_folder(cls, folder: Path) -> "Vocabulary":
        """The vocabulary of a checkpoint's tokenizer.

        Raises:
            UserError: it has no tokenizer that can be read.
        """
        from expertlane.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_folder(folder)
        special = tokenizer.special_token_ids
        return cls([each for each in range(tokenizer.vocab_size) if each not in special], tokenizer)

    @classmethod
    def of_name(cls, name: str) -> "Vocabulary | None":
        """The vocabulary of a preset, or of a checkpoint's folder; None for other names.

        A checkpoint without a tokenizer has as many tokens as its configuration says.

        Raises:
            UserError: the folder's tokenizer or configuration cannot be read.
        """
        if name in PRESETS:
            return cls(range(PRESETS[name].vocab_size))
        folder = Path(name)
        if (folder / "tokenizer.json").is_file():
            return cls.of_folder(folder)
        if (folder / "config.json").is_file():
            size = language_model_of(read_config(folder)).get("vocab_size")
            if isinstance(size, int) and 0 < size <= _MOST_TOKENS:
                return cls(range(size))
        return None

    def __len__(self) -> int:
        return len(self.token_ids)

    def ids(self, places: Sequence[int]) -> list[int]:
        """The tokens at drawn indices."""
        return [self.token_ids[place] for place in places]

    def text(self, places: Sequence[int]) -> str:
        """A text of as many tokens, or nearly: not every token sequence survives decoding.

        Raises:
            UserError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("prompts must be text here; give the model's folder with --tokenizer")
        wanted = self.ids(places)
        decode, encode = self.tokenizer.decode, self.tokenizer.encode
        text = decode(wanted)
        for _ in range(_MOST_ATTEMPTS):
            found = encode(text, add_special_tokens=False)
            if len(found) == len(wanted):
                break
            found = found[: len(wanted)] + wanted[: max(0, len(wanted) - len(found))]
            text = decode(found)
        return text


PROBE_S = 120.0  # a server's first step may compile
_FLUSH_S = 30.0
_SAMPLE_TEXT = (
    "The quick brown fox jumps over the lazy dog; 0123456789 of them were seen by farmers, "
    "sailors and clerks in the year of the great flood, when nobody had yet thought of counting "
    '(or so it is told). "Why," said one, "would anybody want to know? A = b + c * 2 / 7 - 1." '
)


class Unreachable(ExpertlaneError):
    """A server that does not answer."""

    exit_code = 2


class NoRoute(UserError):
    """A server without the API that is asked for."""


@dataclass(frozen=True)
class Form:
    """API and form of requests that a server takes.

    Attributes:
        is_chat: chat completions, else completions.
        as_tokens: prompts are token ids, else text.
        ignores_eos: answers can be made as long as asked for.
    """

    is_chat: bool
    as_tokens: bool
    ignores_eos: bool

    @property
    def path(self) -> str:
        """The route."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"


@dataclass(frozen=True, eq=False)
class Server:
    """A model at a URL.

    Attributes:
        software: software and version by the server's own account; may be empty.
        max_model_len: None where it does not say.
        num_extra: tokens that it adds to a prompt: a chat's template, or a first token.
        watch: reads its metrics; None where it has none of a known engine.
    """

    connections: Connections
    model: str
    software: str
    max_model_len: int | None
    vocabulary: Vocabulary
    form: Form
    num_extra: int = 0
    watch: Watch | None = None

    def body(self, request: TimedRequest) -> bytes:
        """A request as JSON."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.form.ignores_eos:
            fields["ignore_eos"] = True
        places = list(request.prompt_token_ids)
        if self.form.as_tokens:
            fields["prompt"] = self.vocabulary.ids(places)
        else:
            text = self.vocabulary.text(places[: max(1, len(places) - self.num_extra)])
            if self.form.is_chat:
                fields["messages"] = [{"role": "user", "content": text}]
            else:
                fields["prompt"] = text
        return msgspec.json.encode(fields)

    async def generate(self, body: bytes, into: Answer | None = None) -> TokenTimes:
        """Ask, and read the answer.

        Raises:
            AnswerError: there is none.
        """
        try:
            answer = await self.connections.ask("POST", self.form.path, body, into)
        except ConnectionFailed as error:
            raise AnswerError("no connection", str(error)) from None
        except ClosedEarly as error:
            name = "stream ended early" if into is not None and into.body else "no answer"
            raise AnswerError(name, str(error)) from None
        return read_answer(answer)


async def find_server(
    connections: Connections,
    model: str | None,
    tokenizer: Vocabulary | None,
    *,
    is_chat: bool,
    timeout_s: float = PROBE_S,
) -> Server:
    """Look at a server, and try how it takes requests.

    Args:
        model: its name there; None for the only one.
        tokenizer: the model's; None to find one, or to ask the server.
        timeout_s: seconds for all of it.

    Raises:
        Unreachable: it does not answer.
        NoRoute: it has no completions, or no chats.
        UserError: it has no such model, or refuses.
    """
    url = connections.url
    try:
        async with asyncio.timeout(timeout_s):
            card = await _card(connections, model)
            name = str(card["id"])
            software = await _software(connections, str(card.get("owned_by", "")))
            vocabulary = tokenizer or await _vocabulary(connections, card)
            most = card.get("max_model_len")
            found = Server(
                connections,
                name,
                software,
                most if isinstance(most, int) else None,
                vocabulary,
                Form(is_chat, as_tokens=not is_chat, ignores_eos=True),
            )
            tried = await _tried(found, is_chat=is_chat)
            return replace(tried, watch=await Watch.find(connections))
    except TimeoutError:
        raise Unreachable(f"{url} did not answer within {timeout_s:g} s") from None
    except ConnectionFailed as error:
        raise Unreachable(f"cannot connect to {url}: {error}") from None
    except ClosedEarly as error:
        raise Unreachable(f"{url} gave no answer: {error}") from None


async def _card(connections: Connections, model: str | None) -> dict[str, Any]:
    """The model's entry in the server's `/v1/models`."""
    url = connections.url
    answer = await connections.ask("GET", "/v1/models")
    if answer.status in (401, 403):
        raise UserError(
            f"{url} refuses the API key (HTTP {answer.status}): "
            f"{error_message(bytes(answer.body))}; set EXPERTLANE_API_KEY, or give --api-key-file"
        )
    if answer.status != 200:
        message = error_message(bytes(answer.body))
        raise UserError(
            f"{url} does not serve the OpenAI API: /v1/models gave HTTP {answer.status} {message}"
        )
    try:
        data = msgspec.json.decode(bytes(answer.body))["data"]
        cards = {str(each["id"]): dict(each) for each in data}
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{url} does not serve the OpenAI API: its /v1/models has no list of models"
        ) from None
    if model is None:
        # vLLM and SGLang list adapters beside their model, and name it as their parent.
        bases = [each for each in cards.values() if not each.get("parent")]
        if len(bases) != 1:
            raise UserError(f"{url} has {len(cards)} models; give one: {', '.join(cards)}")
        return bases[0]
    if model not in cards:
        raise UserError(f"{url} has no model {model!r}; it has {', '.join(cards) or 'none'}")
    return cards[model]


async def _json(connections: Connections, method: str, path: str, fields: Any = None) -> Any:
    """The JSON body of an answer with status 200; else None."""
    body = b"" if fields is None else msgspec.json.encode(fields)
    answer = await connections.ask(method, path, body)
    if answer.status != 200:
        return None
    try:
        return msgspec.json.decode(bytes(answer.body))
    except msgspec.DecodeError:
        return None


async def _software(connections: Connections, owner: str) -> str:
    found = await _json(connections, "GET", "/version")
    version = found.get("version") if isinstance(found, dict) else None
    return f"{owner} {version}".strip() if isinstance(version, str) else owner


async def _vocabulary(connections: Connections, card: dict[str, Any]) -> Vocabulary:
    for name in (card["id"], card.get("root")):
        known = Vocabulary.of_name(name) if isinstance(name, str) else None
        if known is not None:
            return known
    asked = {"model": card["id"], "prompt": _SAMPLE_TEXT, "add_special_tokens": False}
    found = await _json(connections, "POST", "/tokenize", asked)
    tokens = found.get("tokens") if isinstance(found, dict) else None
    if isinstance(tokens, list) and tokens and all(isinstance(each, int) for each in tokens):
        return Vocabulary(sorted(set(tokens)))
    raise UserError(
        f"{connections.url} does not tell the tokens of {card['id']}; give the model's folder "
        "with --tokenizer"
    )


def _forms(*, is_chat: bool, has_tokenizer: bool) -> Iterator[Form]:
    """Forms of requests to try, the best first."""
    for ignores_eos, as_tokens in product((True, False), (True, False)):
        if not (as_tokens and is_chat) and (as_tokens or has_tokenizer):
            yield Form(is_chat, as_tokens, ignores_eos)


async def _tried(server: Server, *, is_chat: bool) -> Server:
    """The server with the first form that it takes."""
    has_tokenizer = server.vocabulary.tokenizer is not None
    if is_chat and not has_tokenizer:
        raise UserError("chats need text prompts; give the model's folder with --tokenizer")
    length = 4
    probe = TimedRequest([place % len(server.vocabulary) for place in range(length)], 2, 0.0)
    refusal: AnswerError | None = None
    for form in _forms(is_chat=is_chat, has_tokenizer=has_tokenizer):
        tried = replace(server, form=form)
        try:
            found = await tried.generate(tried.body(probe))
        except AnswerError as error:
            refusal = refusal or error
            if error.name in ("HTTP 400", "HTTP 422"):
                continue
            break
        extra = 0 if form.as_tokens else max(0, (found.num_prompt_tokens or length) - length)
        return replace(tried, num_extra=extra)
    assert refusal is not None
    path = Form(is_chat, as_tokens=False, ignores_eos=False).path
    if refusal.name in ("HTTP 404", "HTTP 405"):
        raise NoRoute(f"{server.connections.url} has no {path} ({refusal.name}: {refusal})")
    raise UserError(
        f"{server.connections.url} refuses a request to {path}: {refusal.name}, {refusal}"
    )


def alike(servers: Sequence[Server]) -> list[Server]:
    """The servers with one vocabulary, of the tokens that all have: then prompts are the same.

    Where they have no token in common, each keeps its own.
    """
    own = [each.vocabulary.token_ids for each in servers]
    if all(each == own[0] for each in own):
        return list(servers)
    common = sorted(set(own[0]).intersection(*own[1:]))
    if not common:
        return list(servers)
    return [
        replace(each, vocabulary=replace(each.vocabulary, token_ids=common)) for each in servers
    ]


# SGLang's python/sglang/srt/entrypoints/http_server.py, which refuses while requests run; vLLM's
# vllm/entrypoints/serve/dev, only with VLLM_SERVER_DEV_MODE=1.
_FLUSHES = "/flush_cache", "/reset_prefix_cache"


async def flush_caches(connections: Connections) -> bool:
    """Empty a server's prefix cache; gives whether it was emptied, as it has a route for that."""
    for route in _FLUSHES:
        try:
            async with asyncio.timeout(_FLUSH_S):
                answer = await connections.ask("POST", route)
        except (TimeoutError, ConnectionFailed, ClosedEarly):
            return False
        if answer.status == 200:
            return True
    return False


RECORDER = "expert_distribution_recorder_mode"  # a setting that SGLang alone has
# The second is the name of older versions.
_INFO = "/server_info", "/get_server_info"
# Of python/sglang/srt/server_args.py, those that decide on speed; others have keys and addresses.
SETTINGS = (
    "tp_size", "dp_size", "pp_size", "ep_size", "nnodes", "enable_dp_attention", "context_length",
    "dtype", "quantization", "kv_cache_dtype", "mem_fraction_static", "max_total_tokens",
    "max_running_requests", "chunked_prefill_size", "max_prefill_tokens", "schedule_policy",
    "disable_radix_cache", "disable_cuda_graph", "disable_overlap_schedule", "attention_backend",
    "moe_runner_backend", "moe_a2a_backend", "deepep_mode", "enable_two_batch_overlap",
    "enable_eplb", "ep_num_redundant_experts", "speculative_algorithm", "speculative_num_steps",
    RECORDER,
)  # fmt: skip


async def sglang_settings(connections: Connections) -> dict[str, Any] | None:
    """Those of `SETTINGS` that an SGLang server tells; None of any other server."""
    for route in _INFO:
        try:
            async with asyncio.timeout(_FLUSH_S):
                found = await _json(connections, "GET", route)
        except (TimeoutError, ConnectionFailed, ClosedEarly):
            return None
        if isinstance(found, dict) and RECORDER in found:
            return {name: found[name] for name in SETTINGS if _is_plain(found.get(name, {}))}
    return None


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
