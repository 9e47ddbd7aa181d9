"""Sizes of attention: sequences, positions, and query-key pairs."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.cost.step.operation import Ints
from expertlane.spec.model import LatentAttention


@dataclass(frozen=True, eq=False)
class AttentionSizes:
    """Sizes of attention under one window; each [R].

    Attributes:
        decode_seqs: sequences with one new token.
        decode_positions: cached positions that they read, which are their query-key pairs too.
        prefill_seqs, prefill_tokens: the other sequences and their new tokens.
        prefill_pairs, prefill_positions: query-key pairs of one head, and positions seen by any.
        num_decode_groups, num_prefill_groups: calls that the engine makes of each, at most.
        num_queries: new tokens of a decoding sequence, above 1 where drafts are verified; a
            decode's query-key pairs are so many times its positions.
    """

    decode_seqs: Ints
    decode_positions: Ints
    prefill_seqs: Ints
    prefill_tokens: Ints
    prefill_pairs: Ints
    prefill_positions: Ints
    num_decode_groups: int
    num_prefill_groups: int
    num_queries: int | Ints = 1


def pairs_and_positions(num_new: Ints, num_cached: Ints, window: int | None) -> tuple[Ints, Ints]:
    """Query-key pairs of sequences' new tokens, of one head, and positions that any of them sees.

    Args:
        num_new, num_cached: [S].
        window: latest positions that a token sees; None for all.

    Returns:
        [S] both.
    """
    after = num_cached + num_new
    pairs = _pairs_up_to(after, window) - _pairs_up_to(num_cached, window)
    return pairs, after if window is None else np.minimum(after, num_new + window - 1)


def takes_less_expanded(
    num_new: Ints, num_cached: Ints, latent: LatentAttention
) -> npt.NDArray[np.bool_]:
    """[S]; whether prompts take fewer FLOPs with keys and values of each head.

    Those are made from the latents of all positions, and are narrower; in the latent each new token
    takes two products as wide in place of them. Sequences of one new token stay there.

    Args:
        num_new, num_cached: [S].
    """
    pairs, positions = pairs_and_positions(num_new, num_cached, None)
    rank, rope, value = latent.kv_lora_rank, latent.qk_rope_head_dim, latent.v_head_dim
    product = rank * (latent.qk_nope_head_dim + value)
    in_latent = pairs * (2 * rank + rope) + num_new * product
    expanded = pairs * (latent.qk_nope_head_dim + rope + value) + positions * product
    is_less: npt.NDArray[np.bool_] = (expanded < in_latent) & (num_new > 1)
    return is_less


def _pairs_up_to(length: Ints, window: int | None) -> Ints:
    """[S]; pairs of all tokens of sequences of this length: sum of min(i, window)."""
    if window is None:
        return length * (length + 1) // 2
    full: Ints = np.minimum(length, window)
    return full * (full + 1) // 2 + (length - full) * window
