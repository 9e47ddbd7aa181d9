"""The bytes of single tokens, which may be parts of characters."""

from collections.abc import Mapping
from functools import cached_property

import tokenizers

_SPACE = "▁"  # of SentencePiece, in names of tokens


def _byte_of_character() -> dict[str, int]:
    """How byte-level tokenizers write bytes: those that print as they are, others from U+0100."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    found = {chr(byte): byte for byte in printed}
    return found | {chr(0x100 + place): byte for place, byte in enumerate(others)}


class TokenBytes:
    """By token id; empty of unknown ones.

    Args:
        core: of the library.
        byte_tokens: those that stand for a raw byte.
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
