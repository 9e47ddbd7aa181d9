"""The model of a server, the tokenizing of its prompts, and settings for requests."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertlane.engine.elastic.scaling import Scaling
from expertlane.engine.engine import Engine
from expertlane.engine.profiler import Profiler
from expertlane.engine.rank_watch import RankWatch
from expertlane.errors import UserError
from expertlane.schedule.request import Limits
from expertlane.server.journal.file import JournalFile
from expertlane.server.logs import Observer
from expertlane.text.chat_template import ChatTemplate
from expertlane.text.tokenizer import LONG_TEXT, Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, with its tokenizer and chat template, as requests use it.

    Attributes:
        name: the name by which requests call it.
        template: its chat template; None where it has none.
        recommended: the checkpoint's sampling settings, for fields that a request leaves out.
        watch: totals of the ranks, for metrics and the live page; None where there are none.
        scaling: changes the layout; None where it cannot change.
        profiler: has the ranks write traces; None where they have no folder for them.
    """

    name: str
    engine: Engine[Any]
    limits: Limits
    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    recommended: Mapping[str, Any] | None = None
    watch: RankWatch | None = None
    scaling: Scaling | None = None
    profiler: Profiler | None = None

    @property
    def max_model_len(self) -> int:
        """The largest sum of a request's prompt and output tokens."""
        return self.limits.max_positions


@dataclass(frozen=True)
class ServerOptions:
    """Settings for requests.

    Attributes:
        api_keys: keys of which requests must give one; if empty, they need none.
        allowed_hosts: names by which the server is reached, besides loopback ones; `*` for any.
        max_num_queued: number of waiting requests from which on others are refused.
        request_timeout_s: the longest that a request may take, waiting included; None for any time.
        drain_s: seconds that running requests may go on after the first signal to end.
        stall_s: seconds for which ranks may keep requests waiting before `/health` says so.
        observe: called with every request once it has its answer.
        on_event: called with every event of the server, by kind and text.
        journal: the journal by which requests go on if this process dies; None for none.
        reconnect_s: seconds that requests of a journal go on, and finished answers stay, while no
            client reads them.
        tool_call_parser, reasoning_parser: names of forms in `call_forms`, or `none`; None for
            the forms whose marks the chat template has.
    """

    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_num_queued: int = 4096
    request_timeout_s: float | None = None
    drain_s: float = 30.0
    stall_s: float = 4.0  # less than the five seconds for which `drill` lets it be wrong
    observe: Observer | None = None
    on_event: Callable[[str, str], None] | None = None
    journal: JournalFile | None = None
    reconnect_s: float = 60.0
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None


_CHARACTERS = 4  # characters of a token, in most languages
_SLACK = 2  # a cut text may have other tokens at its end
_HUGE = 1_000_000  # characters; a tokenizer takes some hundred bytes for each


class TooLongError(UserError):
    """A text has more tokens than a prompt may have."""


class PromptEncoder:
    """Tokenizing of texts of bounded length, since a tokenizer takes about 200 bytes a character.

    Args:
        most: tokens that a prompt may have; texts with many more are refused.
    """

    def __init__(self, tokenizer: Tokenizer, most: int) -> None:
        self._tokenizer = tokenizer
        self._most = most
        self._longest = tokenizer.longest_token
        self._huge = asyncio.Semaphore(1)

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, factor: int = 1
    ) -> list[list[int]]:
        """Token ids of texts; long texts do not block the event loop.

        Args:
            factor: multiple of `most` that a text may have.

        Raises:
            UserError: one has many more tokens than it may, or is no Unicode.
        """
        num_characters = sum(map(len, texts))
        most = self._most * factor
        for text in texts:
            if len(text) > most * self._longest:
                raise TooLongError(
                    f"it has {len(text):,} characters; {most:,} tokens, of at most "
                    f"{self._longest} characters, are taken"
                )
        is_unwanted = threading.Event()
        if num_characters <= LONG_TEXT:
            return self._encode(texts, add_special_tokens, most, is_unwanted)
        arguments = texts, add_special_tokens, most, is_unwanted
        try:
            if num_characters <= _HUGE:
                return await asyncio.to_thread(self._encode, *arguments)
            async with self._huge:
                return await asyncio.to_thread(self._encode, *arguments)
        finally:
            is_unwanted.set()

    def _encode(
        self,
        texts: Sequence[str],
        add_special_tokens: bool,
        most: int,
        is_unwanted: threading.Event,
    ) -> list[list[int]]:
        found = []
        for text in texts:
            if is_unwanted.is_set():
                break
            self._check(text, most, is_unwanted)
            found.append(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return found

    def _check(self, text: str, most: int, is_unwanted: threading.Event) -> None:
        """Refuse a text by its beginning, in time that does not depend on the rest."""
        size = max(LONG_TEXT, _CHARACTERS * most)
        while size < len(text) and not is_unwanted.is_set():
            beginning = self._tokenizer.encode(text[:size], add_special_tokens=False)
            if len(beginning) > _SLACK * most:
                raise TooLongError(
                    f"it has {len(text):,} characters, the first {size:,} of which are "
                    f"{len(beginning):,} tokens; at most {most:,} are taken"
                )
            size *= 2
