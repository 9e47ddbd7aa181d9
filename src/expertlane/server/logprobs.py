"""Log-probabilities of tokens, in the form of each kind of answer.

Long lists are iterators, which become JSON a few entries at a time.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from expertlane.spec.sampling import PromptLogprobs, TokenLogprobs
from expertlane.text.tokenizer import Tokenizer

_LEAST = -9999.0  # of an impossible token: JSON has no infinity
_KEPT = 4096


class TokenTexts:
    """Texts of single tokens.

    Args:
        tokenizer: None where tokens have no text.
        as_ids: give `token_id:17` in place of a text; unlike texts, these never coincide.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool) -> None:
        self.tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None
        self._bytes = lru_cache(_KEPT)(self._make_bytes)

    def _make_bytes(self, token_id: int) -> bytes:
        if self.tokenizer is None:
            return f"token_id:{token_id}".encode()
        return self.tokenizer.bytes_of(token_id)

    def text(self, token_id: int) -> str:
        """The token's text for people: a part of a character is U+FFFD."""
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._bytes(token_id).decode(errors="replace")

    def _name(self, token_id: int) -> str:
        """The token's text; for a part of a character, `bytes:` and its bytes."""
        if self._as_ids:
            return f"token_id:{token_id}"
        given = self._bytes(token_id)
        try:
            return given.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in given)

    def of_completion(
        self,
        token_ids: Sequence[int],
        known: Sequence[Sequence[TokenLogprobs | None]],
        offsets: "TextOffsets",
        num_top: int,
    ) -> dict[str, Any]:
        """The object `logprobs` of `/v1/completions`: parallel lists, one entry for each token.

        Args:
            known: log-probabilities of the same tokens, one sequence after the other; None for the
                first token of a prompt.
        """
        return {
            "tokens": map(self._name, token_ids),
            "token_logprobs": (
                None if of is None else _finite(of.logprob) for of in chain.from_iterable(known)
            ),
            "top_logprobs": (
                None if of is None else self._top(of, num_top) for of in chain.from_iterable(known)
            ),
            "text_offset": map(offsets.take, token_ids),
        }

    def _top(self, token: TokenLogprobs, num_top: int) -> dict[str, float]:
        """Log-probabilities by text, of the likeliest tokens and the token itself.

        Of tokens with the same text, the likeliest counts.
        """
        found: dict[str, float] = {}
        for token_id, logprob in (*token.top[:num_top], (token.token_id, token.logprob)):
            found.setdefault(self._name(token_id), _finite(logprob))
        return found

    def of_chat(self, tokens: Iterable[TokenLogprobs]) -> Iterator[dict[str, Any]]:
        """The objects of tokens in `logprobs` of `/v1/chat/completions`."""
        return (
            self._entry(each.token_id, each.logprob)
            | {"top_logprobs": [self._entry(*likely) for likely in each.top]}
            for each in tokens
        )

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        given = list(self._bytes(token_id))
        return {"token": self.text(token_id), "logprob": _finite(logprob), "bytes": given}

    def of_prompt(self, prompt: PromptLogprobs, num_top: int) -> Iterator[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: for each token, by id, the likeliest and itself, with ranks."""
        return (
            None if each is None else self._ranked(each, int(prompt.ranks[place]), num_top)
            for place, each in enumerate(prompt)
        )

    def _ranked(self, token: TokenLogprobs, own_rank: int, num_top: int) -> dict[str, Any]:
        likely = [(rank, *each) for rank, each in enumerate(token.top[:num_top], 1)]
        return {
            str(token_id): {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": self.text(token_id),
            }
            for rank, token_id, logprob in ((own_rank, token.token_id, token.logprob), *likely)
        }


class TextOffsets:
    """Offsets, in characters, at which consecutive tokens begin in their text.

    Args:
        echoed: the prompt's text, with which the text begins. A control token takes up characters
            only if this text holds it; the text after it has none.
    """

    def __init__(self, texts: TokenTexts, echoed: str = "") -> None:
        self._texts = texts
        self._echoed = echoed
        self._num = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token_id: int) -> int:
        """The offset of the next token."""
        before, tokenizer = self._num, self._texts.tokenizer
        if tokenizer is None:
            return before
        given = tokenizer.bytes_of(token_id)
        if token_id not in tokenizer.special_token_ids:
            self._num += len(self._utf8.decode(given))
        elif self._echoed.startswith(name := given.decode(), before):
            self._num += len(name)
        return before


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
