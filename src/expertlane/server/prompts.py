"""Texts of requests as tokens: in other threads where they are long, and no more than fit."""

import asyncio
import threading
from collections.abc import Sequence

from expertlane.errors import UserError
from expertlane.text.tokenizer import LONG_TEXT, Tokenizer

_CHARACTERS = 4  # of a token, in most languages
_SLACK = 2  # what is cut has some other tokens at its end
_HUGE = 1_000_000  # characters; a tokenizer takes some hundred bytes for each


class TooLongError(UserError):
    """A text has more tokens than are taken."""


class PromptEncoder:
    """A tokenizer with a bound: it takes about 200 bytes a character, whatever comes of it.

    Args:
        most: tokens of a text that are of use.
    """

    def __init__(self, tokenizer: Tokenizer, most: int) -> None:
        self._tokenizer = tokenizer
        self._most = most
        self._longest = tokenizer.longest_token
        self._huge = asyncio.Semaphore(1)

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, factor: int = 1
    ) -> list[list[int]]:
        """Token ids of texts; many characters hold nobody else up.

        Args:
            factor: how many times `most` to take.

        Raises:
            UserError: one has many more tokens than are taken, or is no Unicode.
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
