"""Text to token ids and back, and what a checkpoint says of its tokens and of sampling."""

import codecs
import os
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import tokenizers

from expertlane.errors import UserError
from expertlane.spec.files import INDEX_BYTES, check_regular, read_json_object
from expertlane.spec.hf_config import ConfigReader

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"
_GENERATION_CONFIG = "generation_config.json"
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
_REPLACEMENT = "\ufffd"
_SPACE = "▁"  # of SentencePiece, in names of tokens
_MAX_CHARACTER_BYTES = 4
LONG_TEXT = 20_000  # characters; some milliseconds


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        core: the library's tokenizer; it neither truncates nor pads from here on.
        eos_token_ids: tokens that end a generation.

    Attributes:
        eos_token_ids: tokens that end a generation.
        special_token_ids: control tokens, which `skip_special_tokens` leaves out.
        byte_tokens: the byte of every token that stands for a raw one, as in `<0x0A>`; empty
            for byte-level tokenizers, whose tokens are all made of bytes.
        vocab_size: number of tokens, added ones included. A model's may be larger.
    """

    def __init__(self, core: tokenizers.Tokenizer, eos_token_ids: Iterable[int] = ()) -> None:
        core.no_truncation()
        core.no_padding()
        self._core = core
        self.eos_token_ids = frozenset(eos_token_ids)
        added = core.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        self.special_token_ids = frozenset(special)
        names = sorted(filter(None, special.values()), key=len, reverse=True)
        self._names = f"({'|'.join(map(re.escape, names))})" if names else ""
        self.byte_tokens = _byte_tokens(core)
        self.vocab_size = core.get_vocab_size()
        self._bytes = TokenBytes(core, self.byte_tokens)
        self._num_characters: dict[int, int] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The tokenizer of a checkpoint.

        Raises:
            UserError: there is none, or one of its files cannot be read.
        """
        path = folder / TOKENIZER
        if not path.is_file():
            raise UserError(
                f"{folder}: there is no {TOKENIZER}; prompts can only be given as token ids"
            )
        check_regular(path, INDEX_BYTES)
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} cannot be read: {error}") from None
        return cls(core, _eos_token_ids(folder, core))

    @property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary writes it."""
        return max(map(len, self._core.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: a special token's name in it becomes that token.
            add_special_tokens: put those around it that the tokenizer asks for, such as the
                beginning of a sequence. Not for a rendered chat: its template writes them.

        Raises:
            UserError: the text holds half a surrogate pair, which is no character.
        """
        try:
            if len(text) <= LONG_TEXT:
                return self._core.encode(text, add_special_tokens=add_special_tokens).ids
            # Other threads wait for `encode` to end, but not for this.
            encoded = self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return encoded[0].ids
        except TypeError:
            if not any("\ud800" <= character <= "\udfff" for character in text):
                raise
            raise UserError(
                f"the text {text[:40]!r} holds half a surrogate pair; give valid Unicode"
            ) from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; unknown ids have none, bytes that are no text become U+FFFD."""
        return self._core.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def num_characters(self, token_id: int) -> int:
        """The characters of a single token, special ones included; counted once."""
        found = self._num_characters.get(token_id)
        if found is None:
            text = self.decode([token_id], skip_special_tokens=False)
            found = self._num_characters[token_id] = len(text)
        return found

    def has_token(self, token_id: int) -> bool:
        """True if the id is known; models have spare ones."""
        return self._core.id_to_token(token_id) is not None

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token, which may be part of a character; empty for an unknown id."""
        return self._bytes[token_id]

    def to_json(self) -> str:
        """The whole tokenizer, as its file has it."""
        text: str = self._core.to_str()
        return text

    def split_special(self, text: str) -> list[tuple[str, int | None]]:
        """A text cut into the names of control tokens, with their ids, and what is between."""
        if not self._names:
            return [(text, None)]
        parts = re.split(self._names, text)
        return [
            (part, self._core.token_to_id(part) if number % 2 else None)
            for number, part in enumerate(parts)
            if part
        ]

    def name(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it, such as `Ġthe`; None for an unknown id."""
        name: str | None = self._core.id_to_token(token_id)
        return name


def _byte_of_character() -> dict[str, int]:
    """Byte of each character with which byte-level tokenizers write bytes (GPT-2's table)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    found = {chr(byte): byte for byte in printed}
    return found | {chr(0x100 + place): byte for place, byte in enumerate(others)}


class TokenBytes:
    """The bytes of single tokens, which may be parts of characters; empty for unknown ids.

    Args:
        core: the library's tokenizer.
        byte_tokens: raw bytes, by the token that stands for each.
    """

    def __init__(self, core: tokenizers.Tokenizer, byte_tokens: Mapping[int, bytes]) -> None:
        self._core = core
        self._byte_tokens = byte_tokens
        decoder = b"" if core.decoder is None else core.decoder.__getstate__()
        self._is_byte_level = b'"ByteLevel"' in decoder
        self._has_spaces = b"Metaspace" in decoder or _SPACE.encode() in decoder

    @cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self._core.get_added_tokens_decoder().items()}

    @cached_property
    def _of_character(self) -> dict[str, int]:
        return _byte_of_character()

    def __getitem__(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added.encode()
        if (byte := self._byte_tokens.get(token_id)) is not None:
            return byte
        name: str | None = self._core.id_to_token(token_id)
        if name is None:
            return b""
        if self._is_byte_level:
            of_character = self._of_character
            if all(character in of_character for character in name):
                return bytes(of_character[character] for character in name)
        if self._has_spaces:
            return name.replace(_SPACE, " ").encode()
        text: str = self._core.decode([token_id], skip_special_tokens=False)
        return text.encode()


class StopMatch(NamedTuple):
    """A stop string in a text: its end in the piece that completed it, and its length."""

    end: int
    size: int


class StopStrings:
    """Search for the first of some strings in a text that comes in pieces.

    Takes time and memory linear in the text and in what of the strings it has matched: the
    algorithm of Knuth, Morris and Pratt, whose tables grow only as far as the text gets into a
    string.

    Args:
        strings: none empty.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._begun = [_StopState(string) for string in strings]

    @property
    def num_begun(self) -> int:
        """Characters at the end of the text that a string may begin with."""
        return max((each.num_matched for each in self._begun), default=0)

    def feed(self, text: str) -> StopMatch | None:
        """The first string to be complete after more text; of two that end together, the longer."""
        found: StopMatch | None = None
        for each in self._begun:
            end = each.feed(text if found is None else text[: found.end])
            if end is not None and (found is None or (end, -each.size) < (found.end, -found.size)):
                found = StopMatch(end, each.size)
        return found


class _StopState:
    """A string, and how many of its first characters the text so far ends with."""

    def __init__(self, string: str) -> None:
        self._string = string
        self.size = len(string)
        self.num_matched = 0
        # By characters matched: how many still are where the next one differs.
        self._fallback = array("l", (0, 0))

    def feed(self, text: str) -> int | None:
        """Where in the text the string is complete; None where it is not yet."""
        string, at = self._string, 0
        while at < len(text):
            if self.num_matched == 0:
                at = text.find(string[0], at)
                if at < 0:
                    return None
            elif string[self.num_matched] != text[at]:
                self.num_matched = self._fallback[self.num_matched]
                continue
            self.num_matched += 1
            at += 1
            if self.num_matched == self.size:
                return at
            self._extend()
        return None

    def _extend(self) -> None:
        """Have the table reach as far as the match."""
        fallback, string = self._fallback, self._string
        while len(fallback) <= self.num_matched:
            character, shorter = string[len(fallback) - 1], fallback[-1]
            while shorter and string[shorter] != character:
                shorter = fallback[shorter]
            fallback.append(shorter + (string[shorter] == character))


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
        min_tokens: stop strings count from this token on; text before it is given as it comes.
        skip_special_tokens: leave control tokens out of the text.
        shown_token_ids: control tokens that are in the text all the same.
        include_stop: the text ends with the stop string that ended it.

    Attributes:
        stopped: whether a stop string has appeared; tokens after it are ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        shown_token_ids: Iterable[int] = (),
        include_stop: bool = False,
    ) -> None:
        self.stopped = False
        self._include_stop = include_stop
        self._tokenizer = tokenizer
        skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._skipped = skipped.difference(shown_token_ids)
        self._stops = StopStrings(stop)
        self._num_free = min_tokens - 1  # tokens to come that no stop string may end in
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []  # the last tokens, beginning where a character does
        self._num_given = 0  # characters of the window's text
        self._held = ""  # whole characters that may begin a stop string
        for token_id in self._end_of_prompt(prompt_token_ids):
            self._feed(token_id)

    def append(self, token_id: int) -> str:
        """The new text that is certain after one more token."""
        is_free = self._num_free > 0
        self._num_free -= 1
        if self.stopped or not self._has_text(token_id):
            return ""
        text = self._feed(token_id)
        return text if is_free else self._give(text)

    def finish(self) -> str:
        """The text held back, when no token follows."""
        if self.stopped:
            return ""
        return self._give(self._incomplete(), is_last=True)

    def _end_of_prompt(self, token_ids: Sequence[int]) -> list[int]:
        """The last tokens with text, as many as an incomplete character can have."""
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
        if is_held:
            self._window = self._window[-_MAX_CHARACTER_BYTES:]
            self._num_given = len(self._decode(self._window)) - 1
        else:
            self._window = [token_id]
            self._num_given = self._tokenizer.num_characters(token_id)
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
        found = self._stops.feed(new)
        held, num_before = self._held + new, len(self._held)
        if found is not None:
            self.stopped = True
            end = num_before + found.end
            return held[: end if self._include_stop else end - found.size]
        num_certain = len(held) - (0 if is_last else self._stops.num_begun)
        self._held = held[num_certain:]
        return held[:num_certain]


def default_sampling(folder: Path) -> dict[str, Any]:
    """Sampling parameters that a checkpoint recommends, by name and unchecked.

    Those that its `generation_config.json` leaves out are left out. Its `do_sample: false`
    becomes a temperature of 0.

    Raises:
        UserError: the file cannot be read.
    """
    config = read_json(folder / _GENERATION_CONFIG)
    found = {key: config[key] for key in _SAMPLING if config.get(key) is not None}
    return found | {"temperature": 0.0} if config.get("do_sample") is False else found


def read_json(path: Path) -> dict[str, Any]:
    """An optional file's JSON object; empty if there is no such file.

    Raises:
        UserError: it cannot be read or is not a JSON object.
    """
    if not os.path.lexists(path):
        return {}
    return read_json_object(path, INDEX_BYTES, lenient=True)


def token_text(token: Any) -> str | None:
    """A token as `tokenizer_config.json` writes it: its text, or an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def configured_eos_token_ids(folder: Path) -> frozenset[int]:
    """The end-of-sequence tokens that a checkpoint's configurations name together.

    Raises:
        UserError: one of the files cannot be read.
    """
    found: set[int] = set()
    for name in (_GENERATION_CONFIG, "config.json"):
        fields = ConfigReader(read_json(folder / name), str(folder / name))
        eos = fields.raw("eos_token_id")
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        found.update(fields.typed(int, "eos_token_id", token_id) for token_id in eos)
    return frozenset(found)


def _eos_token_ids(folder: Path, core: tokenizers.Tokenizer) -> frozenset[int]:
    """The tokens that the configurations name, or the tokenizer's own where they name none."""
    if found := configured_eos_token_ids(folder):
        return found
    text = token_text(read_json(folder / TOKENIZER_CONFIG).get("eos_token"))
    own = None if text is None else core.token_to_id(text)
    return frozenset([] if own is None else [own])


def _byte_tokens(core: tokenizers.Tokenizer) -> dict[int, bytes]:
    """Tokens named `<0x00>` to `<0xFF>`, if the decoder takes them for bytes."""
    found = {}
    for byte in range(256):
        name = f"<0x{byte:02X}>"
        token_id = core.token_to_id(name)
        if token_id is not None and core.decode([token_id], skip_special_tokens=False) != name:
            found[token_id] = bytes([byte])
    return found
