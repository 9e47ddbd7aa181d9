"""Log-probabilities of tokens, as the two kinds of answers have them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from expertlane.engine.tokenizer import Tokenizer
from expertlane.spec.sampling import TokenLogprobs

_LEAST = -9999.0  # of a token that cannot be: JSON has no infinity
_KEPT = 4096


class TokenTexts:
    """Texts of single tokens.

    Args:
        tokenizer: None where tokens have no text.
        as_ids: give `token_id:17` in place of a text, which is exact.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool) -> None:
        self._tokenizer = None if as_ids else tokenizer
        self._text = lru_cache(_KEPT)(self._make_text)

    def _make_text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def of_completion(self, tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        """Lists side by side, one entry a token.

        Args:
            offset: characters before the first token.
        """
        texts = [self._text(each.token_id) for each in tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(each.logprob) for each in tokens],
            "top_logprobs": [self._top(each) for each in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: TokenLogprobs) -> dict[str, float]:
        """The likeliest by text, and the chosen one; of equal texts the likeliest counts."""
        found: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            found.setdefault(self._text(token_id), _finite(logprob))
        return found

    def of_chat(self, tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """An object a token."""
        return [
            self._entry(each.token_id, each.logprob)
            | {"top_logprobs": [self._entry(*likely) for likely in each.top]}
            for each in tokens
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
