"""Log-probabilities of given tokens from any server, and of those that it generates.

Teacher forcing has three forms, of which a server takes the first that it answers: vLLM's
`prompt_logprobs` and OpenAI's old `echo` with `logprobs`, both on `/v1/completions`, and SGLang's
own `/generate` with `return_logprob`. Where there is none, only generated tokens are known, with
the likeliest beside each. Prompts go as token ids; where a server takes text alone, as text, with
the tokens that it says it saw.
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from expertlane.client.connection import ClosedEarly, ConnectionFailed, Connections, error_message
from expertlane.client.server import Server
from expertlane.endpoint.scored import Prompt
from expertlane.errors import ExpertlaneError, UserError

T = TypeVar("T")

Method = Literal["prompt_logprobs", "echo", "input_token_logprobs", "generated tokens"]
COMPLETIONS, NATIVE = "/v1/completions", "/generate"
# What is asked for with generated tokens, the best first: likely tokens beside each (OpenAI's most
# are 5, and some servers have fewer), and their ids.
_IDS = {"return_tokens_as_token_ids": True, "return_token_ids": True}
_BESIDE: tuple[dict[str, Any], ...] = ({"logprobs": 5} | _IDS, {"logprobs": 5}, {"logprobs": 1})
_NATIVE_TOP = 5
_TOKEN_ID = re.compile(r"token_id:(\d{1,9})")
_NOT_IN_JSON = re.compile(rb"[\s:,\[](NaN|-?Infinity)\b")
_ENGINE = re.compile(rb'engine="(\d{1,4})"')
_MOST_RANKS = 64
_ATTEMPTS = 3  # of a request that a busy server refuses
_BUSY = (429, 503)
_REFUSALS = ("HTTP 400", "HTTP 422")
_PAUSE_S = 0.5
_IMPOSSIBLE = -1e4  # in place of minus infinity: JSON has none


class AnswerFailure(ExpertlaneError):
    """The server did not answer a request as it has answered others.

    Attributes:
        reason: what came in place of an answer.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class PromptRefusal(AnswerFailure, UserError):
    """The server takes no such prompt, though it takes others."""


class NaNAnswer(AnswerFailure):
    """Log-probabilities came, and some are no numbers: the server computes NaN."""


class FormatError(Exception):
    """An answer without what was asked for."""


class NaNError(FormatError):
    """An answer in which log-probabilities are no numbers."""


@dataclass(frozen=True, eq=False)
class PromptForm:
    """A prompt as it goes to the server.

    Attributes:
        token_ids: as the server sees it.
        text: in place of token ids; None where it takes those.
    """

    token_ids: Prompt
    text: str | None = None

    @property
    def body(self) -> "str | list[int]":
        """The value of `prompt`."""
        return list(self.token_ids) if self.text is None else self.text


@dataclass(frozen=True, eq=False)
class Continuation:
    """A greedy continuation.

    Attributes:
        token_ids: the generated tokens.
        logprobs: [len(token_ids)].
        top: of each the likeliest tokens' log-probabilities, by id; may be empty.
    """

    token_ids: list[int]
    logprobs: NDArray[np.float64]
    top: list[dict[int, float]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Endpoint:
    """A server that log-probabilities are asked from.

    Attributes:
        method: how it tells them.
        can_generate: whether it tells those of generated tokens, with their ids.
        beside: what is asked for with them, of `_BESIDE`.
        ranks: numbers of data-parallel ranks that requests can be sent to; empty where none can.
        timeout_s: seconds that a request may take.
        refusals: ways to score given tokens that it does not answer, with what it answers instead.
    """

    server: Server
    method: Method
    can_generate: bool = True
    beside: int = 0
    ranks: tuple[int, ...] = ()
    timeout_s: float = 120.0
    refusals: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """URL and software."""
        own = str(self.server.connections.url)
        return f"{own} ({self.server.software})" if self.server.software else own

    @property
    def is_forced(self) -> bool:
        """Whether it scores given tokens."""
        return self.method != "generated tokens"

    def of_rank(self, rank: int, headers: Mapping[str, str]) -> "Endpoint":
        """This server, with each request sent to one data-parallel rank (by vLLM's header)."""
        own = {**headers, "X-data-parallel-rank": str(rank)}
        connections = Connections(self.server.connections.url, own)
        return replace(self, server=replace(self.server, connections=connections))

    async def score(
        self, prompts: Sequence[PromptForm], concurrency: int, on_done: Callable[[], None]
    ) -> list[NDArray[np.float64]]:
        """Log-probabilities of prompts' tokens but the first, [len - 1] each, in their order.

        Raises:
            Failed: a request was not answered.
        """
        ask = _SCORES[self.method]
        return await self._all(lambda sent: ask(self, sent), prompts, concurrency, on_done)

    async def generate(
        self,
        prompts: Sequence[PromptForm],
        length: int,
        concurrency: int,
        on_done: Callable[[], None],
    ) -> list[Continuation]:
        """Greedy continuations, in the prompts' order.

        Raises:
            Failed: a request was not answered.
        """
        native = self.method == "input_token_logprobs"
        ask = _continue_natively if native else _continue
        return await self._all(lambda sent: ask(self, sent, length), prompts, concurrency, on_done)

    async def _all(
        self,
        ask: Callable[[PromptForm], Awaitable[T]],
        prompts: Sequence[PromptForm],
        concurrency: int,
        on_done: Callable[[], None],
    ) -> list[T]:
        """Answers in the prompts' order, `concurrency` at a time; the first failure ends all."""
        places = asyncio.Semaphore(concurrency)

        async def one(sent: PromptForm) -> T:
            async with places:
                found = await self._answered(ask(sent), len(sent.token_ids))
            on_done()
            return found

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(each)) for each in prompts]
        except* ExpertlaneError as errors:
            raise errors.exceptions[0] from None
        return [each.result() for each in tasks]

    async def _answered(self, answer: Awaitable[T], num_tokens: int) -> T:
        url = self.server.connections.url
        try:
            async with asyncio.timeout(self.timeout_s):
                return await answer
        except TimeoutError:
            words = f"did not answer a prompt of {num_tokens:,} tokens in {self.timeout_s:g} s"
            raise AnswerFailure(f"{url} {words}", words) from None
        except FormatError as error:
            words = f"{url}, a prompt of {num_tokens:,} tokens: {error}"
            if str(error).startswith(_REFUSALS):
                raise PromptRefusal(
                    f"{words}. Is the reference of this model?", str(error)
                ) from None
            kind = NaNAnswer if isinstance(error, NaNError) else AnswerFailure
            raise kind(words, str(error)) from None

    async def ask(self, path: str, fields: Mapping[str, Any]) -> Any:
        """Send JSON and read the JSON of a good answer.

        Raises:
            Unread: it is none.
        """
        body = msgspec.json.encode(fields)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                answer = await self.server.connections.ask("POST", path, body)
            except ClosedEarly as error:
                if attempt == 1:  # a kept connection may be closed just as it is used again
                    continue
                raise FormatError(f"no answer: {error}") from None
            except ConnectionFailed as error:
                raise FormatError(f"no answer: {error}") from None
            if answer.status not in _BUSY or attempt == _ATTEMPTS:
                break
            await asyncio.sleep(_PAUSE_S * attempt)
        data = bytes(answer.body)
        if answer.status != 200:
            raise FormatError(f"HTTP {answer.status} {error_message(data)}")
        try:
            return msgspec.json.decode(data)
        except msgspec.DecodeError:
            if _NOT_IN_JSON.search(data) is not None:
                raise NaNError("the answer is no JSON: NaN or Infinity is in it") from None
            raise FormatError("the answer is no JSON") from None

    def fields(self, sent: PromptForm, max_tokens: int) -> dict[str, Any]:
        """A greedy request of completions."""
        own: dict[str, Any] = {
            "model": self.server.model,
            "prompt": sent.body,
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        return own | ({"ignore_eos": True} if self.server.form.ignores_eos else {})


async def _by_prompt_logprobs(endpoint: Endpoint, sent: PromptForm) -> NDArray[np.float64]:
    fields = endpoint.fields(sent, 1) | {"prompt_logprobs": 1}
    choice = _choice(await endpoint.ask(COMPLETIONS, fields))
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(sent.token_ids):
        raise FormatError("the answer has no prompt_logprobs of every token")
    found = []
    for token_id, entry in zip(sent.token_ids[1:], entries[1:], strict=True):
        own = entry.get(str(token_id)) if isinstance(entry, dict) else None
        found.append(_number(own.get("logprob") if isinstance(own, dict) else None))
    return _all_known(found)


async def _by_echo(endpoint: Endpoint, sent: PromptForm) -> NDArray[np.float64]:
    fields = endpoint.fields(sent, 1) | {"echo": True, "logprobs": 1}
    logprobs = _choice(await endpoint.ask(COMPLETIONS, fields)).get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    num = len(sent.token_ids)
    # The prompt's tokens, then one generated, which some leave out at the end of a sequence.
    if not isinstance(values, list) or not num <= len(values) <= num + 1:
        raise FormatError("the echo has not the prompt's number of tokens")
    return _all_known([_number(each) for each in values[1:num]])


async def _natively(endpoint: Endpoint, sent: PromptForm) -> NDArray[np.float64]:
    found = await endpoint.ask(NATIVE, _native_fields(sent, 1) | {"logprob_start_len": 0})
    entries = _meta(found).get("input_token_logprobs")
    if not isinstance(entries, list) or len(entries) != len(sent.token_ids):
        raise FormatError("the answer has no input_token_logprobs of every token")
    for token_id, entry in zip(sent.token_ids, entries, strict=True):
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] != token_id:
            raise FormatError("input_token_logprobs are of other tokens")
    return _all_known([_number(each[0]) for each in entries[1:]])


def _all_known(logprobs: Sequence[float]) -> NDArray[np.float64]:
    """Log-probabilities of which each is a number: many writers of JSON make NaN `null`."""
    found = np.array(logprobs)
    unknown = np.flatnonzero(np.isnan(found))
    if len(unknown):
        kind = FormatError if len(unknown) == len(found) else NaNError  # all: it has none to tell
        raise kind(
            f"the answer has null, or nothing, as the log-probability of {len(unknown):,} of "
            f"{len(found):,} tokens"
        )
    return found


_SCORES: dict[Method, Callable[[Endpoint, PromptForm], Awaitable[NDArray[np.float64]]]] = {
    "prompt_logprobs": _by_prompt_logprobs,
    "echo": _by_echo,
    "input_token_logprobs": _natively,
}


async def _continue(endpoint: Endpoint, sent: PromptForm, length: int) -> Continuation:
    fields = endpoint.fields(sent, length) | _BESIDE[endpoint.beside]
    choice = _choice(await endpoint.ask(COMPLETIONS, fields))
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict) or not isinstance(logprobs.get("tokens"), list):
        raise FormatError("the answer has no logprobs of its tokens")
    ids = _ids_of(endpoint.server, choice.get("token_ids"), logprobs["tokens"])
    values = [_number(each) for each in logprobs.get("token_logprobs") or ()]
    if len(values) != len(ids):
        raise FormatError("the answer has not a log-probability for every token")
    top = logprobs.get("top_logprobs")
    tops = [
        _by_id(endpoint.server, each if isinstance(each, dict) else {})
        for each in (top if isinstance(top, list) and len(top) == len(ids) else [{}] * len(ids))
    ]
    return Continuation(ids, _all_known(values), tops)


async def _continue_natively(endpoint: Endpoint, sent: PromptForm, length: int) -> Continuation:
    fields = _native_fields(sent, length)
    fields |= {"top_logprobs_num": _NATIVE_TOP, "logprob_start_len": -1}
    meta = _meta(await endpoint.ask(NATIVE, fields))
    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list) or not all(_is_pair(each) for each in entries):
        raise FormatError("the answer has no output_token_logprobs")
    tops = meta.get("output_top_logprobs")
    top = [
        {each[1]: _number(each[0]) for each in of or () if _is_pair(each)}
        for of in (tops if isinstance(tops, list) and len(tops) == len(entries) else ())
    ]
    values = _all_known([_number(each[0]) for each in entries])
    return Continuation([each[1] for each in entries], values, top)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) >= 2 and isinstance(entry[1], int)


def _native_fields(sent: PromptForm, length: int) -> dict[str, Any]:
    own = {"input_ids": list(sent.token_ids)} if sent.text is None else {"text": sent.text}
    params = {"max_new_tokens": length, "temperature": 0, "ignore_eos": True}
    return {**own, "sampling_params": params, "return_logprob": True}


def _choice(found: Any) -> dict[str, Any]:
    choices = found.get("choices") if isinstance(found, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise FormatError("the answer has not one choice")
    return choices[0]


def _meta(found: Any) -> dict[str, Any]:
    meta = found.get("meta_info") if isinstance(found, dict) else None
    if not isinstance(meta, dict):
        raise FormatError("the answer has no meta_info")
    return meta


def _number(value: Any) -> float:
    """A log-probability; NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return max(float(value), _IMPOSSIBLE) if not math.isnan(value) else math.nan


def _ids_of(server: Server, token_ids: Any, names: Sequence[Any]) -> list[int]:
    """Ids of generated tokens: as the server tells them, else by the tokenizer."""
    is_told = isinstance(token_ids, list) and len(token_ids) == len(names)
    if is_told and all(isinstance(each, int) for each in token_ids):
        return list(token_ids)
    found = [_id_of(server, each) for each in names]
    if any(each is None for each in found):
        raise FormatError("the answer's tokens have no ids; give the tokenizer with --tokenizer")
    return [each for each in found if each is not None]


def _id_of(server: Server, name: Any) -> int | None:
    if not isinstance(name, str):
        return None
    if (match := _TOKEN_ID.fullmatch(name)) is not None:
        return int(match[1])
    tokenizer = server.vocabulary.tokenizer
    if tokenizer is None:
        return None
    found = tokenizer.encode(name, add_special_tokens=False)
    return found[0] if len(found) == 1 else None


def _by_id(server: Server, top: Mapping[str, Any]) -> dict[int, float]:
    named = ((_id_of(server, name), _number(value)) for name, value in top.items())
    return {token: value for token, value in named if token is not None}


async def find_endpoint(server: Server, probe: Prompt, timeout_s: float) -> Endpoint:
    """Find how a server tells log-probabilities; tried once, with a short prompt.

    Raises:
        UserError: it tells none.
        NotNumbers: it tells some that are no numbers.
    """
    refusals = []
    plain = Endpoint(server, "generated tokens", timeout_s=timeout_s)
    (sent,) = await settle(plain, [probe])
    for method in _SCORES:
        tried = replace(plain, method=method)
        try:
            found = await tried.score([sent], 1, lambda: None)
        except NaNAnswer:
            raise
        except AnswerFailure as error:
            refusals.append(f"{method}: {error.reason}")
            continue
        if (found[0] <= 1e-3).all():
            plain = tried
            break
        refusals.append(f"{method}: probabilities above 1")
    unforced = tuple(refusals)
    can_generate = False
    for beside in range(len(_BESIDE) if plain.method != "input_token_logprobs" else 1):
        tried = replace(plain, beside=beside)
        try:
            await tried.generate([sent], 2, 1, lambda: None)
        except AnswerFailure as error:
            refusals.append(error.reason)
            continue
        plain, can_generate = tried, True
        break
    if not plain.is_forced and not can_generate:
        raise UserError(
            f"{server.connections.url} tells no log-probabilities, of neither given nor generated "
            f"tokens: {refusals[-1]}"
        )
    ranks = await _ranks(server) if plain.is_forced else ()
    return replace(plain, can_generate=can_generate, ranks=ranks, refusals=unforced)


async def _ranks(server: Server) -> tuple[int, ...]:
    """Data-parallel ranks of vLLM, by the engines of its metrics; empty for one, or another."""
    if "vllm" not in server.software.lower():
        return ()
    try:
        answer = await server.connections.ask("GET", "/metrics")
    except (ConnectionFailed, ClosedEarly):
        return ()
    found = sorted({int(each) for each in _ENGINE.findall(bytes(answer.body))})
    return tuple(found[:_MOST_RANKS]) if answer.status == 200 and len(found) > 1 else ()


async def settle(endpoint: Endpoint, prompts: Iterable[Prompt]) -> list[PromptForm]:
    """Prompts as they go to the server, with the tokens that it sees.

    Raises:
        UserError: it takes text alone, and there is no tokenizer, or it sees other tokens.
    """
    if endpoint.server.form.as_tokens:
        return [PromptForm(list(each)) for each in prompts]
    tokenizer = endpoint.server.vocabulary.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{endpoint.server.connections.url} takes no token ids; give the model's folder with "
            "--tokenizer"
        )
    found = []
    for prompt in prompts:
        text = tokenizer.decode(list(prompt))
        found.append(PromptForm(await _seen(endpoint, text), text))
    return found


async def _seen(endpoint: Endpoint, text: str) -> list[int]:
    """Tokens of a text as the server tells, else by the tokenizer if their number agrees."""
    tokenizer = endpoint.server.vocabulary.tokenizer
    assert tokenizer is not None, "checked by the caller"
    try:
        found = await endpoint.ask("/tokenize", {"model": endpoint.server.model, "prompt": text})
        own = found.get("tokens") if isinstance(found, dict) else None
        if isinstance(own, list) and own and all(isinstance(each, int) for each in own):
            return own
    except FormatError:
        pass
    fields = endpoint.fields(PromptForm([], text), 1)
    try:
        found = await endpoint.ask(COMPLETIONS, fields)
    except FormatError as error:
        raise UserError(f"{endpoint.server.connections.url} refuses a text: {error}") from None
    usage = found.get("usage") if isinstance(found, dict) else None
    num = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    for special in (True, False):
        ids = list(tokenizer.encode(text, add_special_tokens=special))
        if len(ids) == num:
            return ids
    raise UserError(
        f"{endpoint.server.connections.url} sees {num} tokens in a text in which --tokenizer sees "
        f"{len(ids)}; give the served model's own"
    )
