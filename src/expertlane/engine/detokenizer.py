"""Text that grows with its tokens: whole characters only, and nothing beyond a stop string."""

import codecs
from collections.abc import Sequence
from itertools import islice

from expertlane.engine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_BYTES = 4


class IncrementalDetokenizer:
    """The text of one request, a token at a time.

    All pieces together are what decoding the prompt and all tokens at once gives beyond the
    prompt's text, cut before the first stop string. Bytes that are no UTF-8 become U+FFFD; in
    a run of byte tokens (`<0xE4>`) with such a byte, what is whole stays readable, where the
    tokenizers library gives one U+FFFD for each byte of the run.

    Args:
        prompt_token_ids: they decide whether a text begins here, which loses its first space
            with some tokenizers, and may end inside a character: that one is then given too.
        stop: strings that end the text. The first to be complete counts; of two that end
            together, the longer.
        skip_special_tokens: leave control tokens out of the text.

    Attributes:
        stopped: whether a stop string has appeared; tokens after it are ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._stop = stop
        beginnings = {string[:end] for string in stop for end in range(1, len(string))}
        self._beginnings = sorted(beginnings, key=len, reverse=True)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []  # the last tokens, beginning where a character does
        self._num_given = 0  # characters of the window's text
        self._held = ""  # whole characters that may begin a stop string
        self._pieces: list[str] = []
        for token_id in self._end_of_prompt(prompt_token_ids):
            self._feed(token_id)

    @property
    def text(self) -> str:
        """All that has been given so far."""
        return "".join(self._pieces)

    def append(self, token_id: int) -> str:
        """The new text that is certain after one more token."""
        if self.stopped or not self._has_text(token_id):
            return ""
        return self._give(self._feed(token_id))

    def finish(self) -> str:
        """What was held back, as no token follows."""
        if self.stopped:
            return ""
        return self._give(self._incomplete(), is_last=True)

    def _end_of_prompt(self, token_ids: Sequence[int]) -> list[int]:
        """As many tokens as an incomplete character can have."""
        with_text = (token_id for token_id in reversed(token_ids) if self._has_text(token_id))
        return list(islice(with_text, _MAX_CHARACTER_BYTES))[::-1]

    def _has_text(self, token_id: int) -> bool:
        return token_id not in self._skipped and self._tokenizer.has_token(token_id)

    def _feed(self, token_id: int) -> str:
        """The characters that a token completes."""
        byte = self._tokenizer.byte_tokens.get(token_id)
        if byte is not None:
            return self._feed_byte(token_id, byte)
        broken = self._utf8.decode(b"", final=True)
        self._window.append(token_id)
        text = self._decode(self._window)
        # Only the last U+FFFD can be a character whose other bytes are still to come.
        is_held = text.endswith(_REPLACEMENT)
        piece = text[self._num_given : len(text) - is_held]
        self._window = self._window[-_MAX_CHARACTER_BYTES:] if is_held else [token_id]
        self._num_given = len(self._decode(self._window)) - is_held
        return broken + piece

    def _feed_byte(self, token_id: int, byte: bytes) -> str:
        before = self._decode(self._window)[self._num_given :]
        piece = self._utf8.decode(byte)
        if piece and not self._window:
            piece = self._decode([token_id])  # a text's first space may be dropped
        self._window = [token_id]
        self._num_given = len(self._decode(self._window))
        return before + piece

    def _incomplete(self) -> str:
        """U+FFFD for a character that the tokens so far have not completed."""
        pending = self._utf8.decode(b"", final=True)
        pending += self._decode(self._window)[self._num_given :]
        self._window = []
        return pending

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _give(self, new: str, is_last: bool = False) -> str:
        """Take new characters in, and give those that no stop string can still take back."""
        held = self._held + new
        ends = [
            (start + len(string), start)
            for string in self._stop
            if (start := held.find(string)) >= 0
        ]
        if ends:
            self.stopped = True
            piece = held[: min(ends)[1]]
        else:
            matching = (len(part) for part in self._beginnings if held.endswith(part))
            num_certain = len(held) - (0 if is_last else next(matching, 0))
            piece, self._held = held[:num_certain], held[num_certain:]
        self._pieces.append(piece)
        return piece
