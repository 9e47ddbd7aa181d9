"""Tokens, sequences, positions and query-key pairs of ranks in a part of a micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from expertlane.cost.step.operation import Ints
from expertlane.schedule.plan import Batch
from expertlane.spec.mixers import Indexer, LatentAttention


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


class IndexedSizes(NamedTuple):
    """Sizes of attention where an indexer chooses `topk` positions for each token.

    Attributes:
        scored: positions that the indexer scores: of decodes, and of prompts beyond `topk`.
        chosen: positions that it chooses, of the same sequences.
        dense: prompts that end within `topk`: they see all positions, so none is scored. Empty for
            grouped queries, whose kernels score prompts of any length.
    """

    scored: AttentionSizes
    chosen: AttentionSizes
    dense: AttentionSizes


def pairs_and_positions(
    num_new: Ints, num_cached: Ints, window: int | None, block_size: int = 1, rate: int = 1
) -> tuple[Ints, Ints]:
    """Query-key pairs of sequences' new tokens, of one head, and positions that any of them sees.

    Args:
        num_new, num_cached: [S].
        window: positions that a token sees, the latest or those that were chosen; None for all.
        block_size: positions that are chosen together; of its own block a token sees the part up to
            itself.
        rate: positions that share an entry. Above 1, entries are counted in place of positions: a
            token sees at most `window` of them, and those that the last token sees are returned.

    Returns:
        [S] both.
    """
    after = num_cached + num_new
    if rate > 1:
        entries = _entries_up_to(after, window, rate) - _entries_up_to(num_cached, window, rate)
        seen = after // rate
        return entries, seen if window is None else np.minimum(seen, window)
    before = _pairs_up_to(num_cached, window, block_size)
    pairs = _pairs_up_to(after, window, block_size) - before
    if window is None:
        return pairs, after
    seen_by_last = window - block_size + 1 + (after - 1) % block_size
    return pairs, np.minimum(after, num_new - 1 + seen_by_last)


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


def _pairs_up_to(length: Ints, window: int | None, block_size: int = 1) -> Ints:
    """[S]; pairs of all tokens of sequences of this length: sum of min(i, window).

    Beyond the window, which is a number of whole blocks, a token sees of its own block the part up
    to itself, and the others in full.
    """
    if window is None:
        return length * (length + 1) // 2
    full: Ints = np.minimum(length, window)
    num_blocks, in_last = np.divmod(length - full, block_size)
    of_others = (length - full) * (window - block_size)
    of_own = num_blocks * (block_size * (block_size + 1) // 2) + in_last * (in_last + 1) // 2
    pairs: Ints = full * (full + 1) // 2 + of_others + of_own
    return pairs


def _entries_up_to(length: Ints, window: int | None, rate: int) -> Ints:
    """[S]; entries of all tokens of sequences of this length: sum of min(i // rate, window)."""
    full: Ints = length if window is None else np.minimum(length, window * rate)
    entries, further = np.divmod(full, rate)
    pairs: Ints = rate * (entries * (entries - 1) // 2) + entries * (further + 1)
    return pairs if window is None else pairs + (length - full) * window


_POSITION_BITS = 22  # bits that a number of positions takes
_FEW_BLOCKS = 8  # narrower block tables are not kept apart by the engine


@dataclass(frozen=True, eq=False)
class PartSizes:
    """A part of a micro-batch; S sequences of all data-parallel ranks, in rank order.

    Attributes:
        num_new, num_cached: [S]; new tokens, and positions in the cache before them.
        dp_rank: [S].
        yields: [S]; whether a next token is chosen for the sequence.
        num_drafts: of each decoding sequence, tokens beside its last one that were guessed and
            go through the model to be verified; they are in `num_new`.
    """

    dp: int
    tp: int
    num_new: Ints
    num_cached: Ints
    dp_rank: Ints
    yields: npt.NDArray[np.bool_]
    block_size: int = 16
    num_drafts: int = 0

    @classmethod
    def of(
        cls,
        batches: Sequence[Batch],
        tp: int,
        block_size: int = 16,
        num_drafts: int = 0,
    ) -> "PartSizes":
        """The sizes of the same part of every data-parallel rank's batch, [dp].

        Args:
            num_drafts: drafts added to every decode of the batches.
        """
        num_new = np.concatenate([batch.num_scheduled_tokens for batch in batches])
        yields = np.concatenate([batch.yields_token for batch in batches])
        return cls(
            dp=len(batches),
            tp=tp,
            num_new=num_new + num_drafts * ((num_new == 1) & yields),
            num_cached=np.concatenate([batch.num_computed_tokens for batch in batches]),
            dp_rank=np.repeat(np.arange(len(batches)), [batch.num_seqs for batch in batches]),
            yields=yields,
            block_size=block_size,
            num_drafts=num_drafts,
        )

    @classmethod
    def even(
        cls,
        dp: int,
        tp: int,
        seqs_per_dp_rank: int | Sequence[int],
        num_new: int = 1,
        num_cached: int = 0,
        num_drafts: int = 0,
    ) -> "PartSizes":
        """Sequences that are all alike, each yielding a token.

        Args:
            seqs_per_dp_rank: one number, or one for each data-parallel rank.
            num_drafts: drafts added to every decode's `num_new`.
        """
        dp_rank = np.repeat(np.arange(dp), seqs_per_dp_rank)
        return cls(
            dp=dp,
            tp=tp,
            num_new=np.full(len(dp_rank), num_new + num_drafts, dtype=np.int64),
            num_cached=np.full(len(dp_rank), num_cached, dtype=np.int64),
            dp_rank=dp_rank,
            yields=np.ones(len(dp_rank), dtype=np.bool_),
            num_drafts=num_drafts,
        )

    def with_dummies(self) -> "PartSizes":
        """Add a token at the first position on every data-parallel rank that has no sequence.

        With drafts it is as many tokens as those of a decode.
        """
        idle = np.setdiff1d(np.arange(self.dp), self.dp_rank)
        if not len(idle):
            return self
        dp_rank = np.concatenate([self.dp_rank, idle])
        order = np.argsort(dp_rank, kind="stable")

        def filled(values: npt.NDArray[np.generic], value: int) -> npt.NDArray[Any]:
            return np.concatenate([values, np.full(len(idle), value, values.dtype)])[order]

        return replace(
            self,
            num_new=filled(self.num_new, 1 + self.num_drafts),
            num_cached=filled(self.num_cached, 0),
            dp_rank=dp_rank[order],
            yields=filled(self.yields, 1),
        )

    def further(self, num_before: int) -> "PartSizes":
        """The sizes of one more drafting pass, after others: a token of each that yields one."""
        yields = self.yields
        return replace(
            self,
            num_new=np.ones(int(yields.sum()), dtype=np.int64),
            num_cached=(self.num_cached + self.num_new)[yields] + num_before,
            dp_rank=self.dp_rank[yields],
            yields=yields[yields],
            num_drafts=0,
        )

    def total(self, of_seq: npt.NDArray[np.int64 | np.bool_]) -> Ints:
        """[R]; the sum of a value [S] of each sequence over those of a rank."""
        return self._for_ranks(self._sum(of_seq))

    def _sum(self, values: npt.NDArray[np.int64 | np.bool_]) -> Ints:
        """[dp]; sums of values [S] over each data-parallel rank's sequences."""
        return np.bincount(self.dp_rank, values, self.dp).astype(np.int64)  # exact under 2^53

    def _for_ranks(self, of_dp_rank: Ints) -> Ints:
        """[R]; a value [dp] for each rank of the stage."""
        return of_dp_rank.repeat(self.tp)

    @cached_property
    def _tokens(self) -> Ints:
        """[dp]; new tokens."""
        return self._sum(self.num_new)

    @cached_property
    def tokens(self) -> Ints:
        """[R]; new tokens of each rank's data-parallel rank."""
        return self._for_ranks(self._tokens)

    @cached_property
    def owned(self) -> Ints:
        """[R]; tokens that a rank owns between attention and the next attention."""
        size, num_longer = np.divmod(self._tokens, self.tp)
        owned: Ints = size[:, None] + (np.arange(self.tp) < num_longer[:, None])
        return owned.ravel()

    @cached_property
    def num_yielding(self) -> Ints:
        """[R]; tokens of a rank's data-parallel rank that yield a next one."""
        return self._for_ranks(self._sum(self.yields * self._num_queries))

    @cached_property
    def owned_yielding(self) -> Ints:
        """[R]; tokens that a rank owns that yield a next one."""
        starts = np.cumsum(self._tokens) - self._tokens
        num_queries = self._num_queries[self.yields]
        dp_rank = self.dp_rank[self.yields].repeat(num_queries)
        ends = np.cumsum(self.num_new)[self.yields].repeat(num_queries)
        first = np.cumsum(num_queries) - num_queries
        back = 1 + np.arange(len(ends)) - first.repeat(num_queries)
        place = ends - back - starts[dp_rank]
        size, num_longer = (each[dp_rank] for each in np.divmod(self._tokens, self.tp))
        after = place - num_longer * (size + 1)
        tp_rank = np.where(
            after < 0, place // (size + 1), num_longer + after // np.maximum(size, 1)
        )
        return np.bincount(dp_rank * self.tp + tp_rank, minlength=self.dp * self.tp)

    @cached_property
    def _by_window(self) -> dict[tuple[int | None, int], AttentionSizes]:
        return {}

    def attention(self, window: int | None, rate: int = 1) -> AttentionSizes:
        """Sizes under a window: how many latest positions a token sees; None for all.

        Args:
            rate: positions that share an entry; see `pairs_and_positions`.
        """
        if (key := (window, rate)) not in self._by_window:
            self._by_window[key] = self.sizes(window, self._is_decode, ~self._is_decode, rate=rate)
        return self._by_window[key]

    def latent_attention(self, latent: LatentAttention) -> tuple[AttentionSizes, AttentionSizes]:
        """Sizes of attention in the latent, and of prompts whose keys and values are expanded."""
        return _latent(self, latent, self._is_decode)

    def indexed_attention(self, indexer: Indexer) -> IndexedSizes:
        """Sizes of attention with an indexer."""
        return _indexed(self, indexer, self._is_decode)

    @cached_property
    def _is_decode(self) -> npt.NDArray[np.bool_]:
        """[S]; whether a sequence counts as a decode."""
        is_decode: npt.NDArray[np.bool_] = self.num_new == 1 + self.num_drafts
        return is_decode & self.yields if self.num_drafts else is_decode

    @cached_property
    def _num_queries(self) -> Ints:
        """[S]; new tokens that yield a next one, in sequences that yield any."""
        return 1 + self.num_drafts * self._is_decode

    def sizes(
        self,
        window: int | None,
        is_decode: npt.NDArray[np.bool_],
        is_prefill: npt.NDArray[np.bool_],
        block_size: int = 1,
        rate: int = 1,
    ) -> AttentionSizes:
        """Sizes of chosen sequences, [S] each, under a window; see `pairs_and_positions`."""
        seen = pairs_and_positions(self.num_new, self.num_cached, window, block_size, rate)
        groups = self._num_groups(is_decode, is_prefill)
        return _attention_sizes(self, seen, is_decode, is_prefill, groups)

    def _num_groups(
        self, is_decode: npt.NDArray[np.bool_], is_prefill: npt.NDArray[np.bool_]
    ) -> tuple[int, int]:
        """Attention calls of the engine, at most, for decodes and for prompts."""
        width = np.maximum(self.num_cached // self.block_size + 1, _FEW_BLOCKS)
        bucket = np.ceil(np.log2(width)).astype(np.int64)
        chunk = self.num_new * (1 << _POSITION_BITS) + self.num_cached
        decodes = _most_kinds(self.dp_rank[is_decode], bucket[is_decode])
        return decodes, _most_kinds(self.dp_rank[is_prefill], chunk[is_prefill])


def _most_kinds(dp_rank: Ints, kind: Ints) -> int:
    """The most different kinds [n] that any rank [n] has."""
    if not len(kind):
        return 0
    distinct = np.unique(dp_rank * (1 << 2 * _POSITION_BITS) + kind)
    return int(np.bincount(distinct >> 2 * _POSITION_BITS).max())


@dataclass(frozen=True, eq=False)
class Scenarios:
    """Alike sequences on the data-parallel rank that has most; S scenarios in place of R ranks.

    Attributes:
        num_seqs, num_new, num_cached: [S]; sequences, and of each the new tokens and the positions
            cached before them. A scenario is all decodes or all prompts.
        stage_seqs: [S]; sequences of all data-parallel ranks, of which some may be idle.
        num_drafts: as in `PartSizes`; one for all, or [S].
        tp, dp: of the layout, or [S] of several; data-parallel ranks without a sequence compute a
            dummy batch of one, if any.
    """

    tp: int | Ints
    num_seqs: Ints
    num_new: Ints
    num_cached: Ints
    stage_seqs: Ints
    num_drafts: int | Ints = 0
    dp: int | Ints = 1

    def further(self) -> Self:
        """The scenarios of one more drafting pass: one token each, those before it cached."""
        one = np.ones_like(self.num_new)
        cached = self.num_cached + self.num_new
        return replace(self, num_new=one, num_cached=cached, num_drafts=0 * self.num_drafts)

    @property
    def size(self) -> int:
        """S, the number of scenarios."""
        return len(self.num_seqs)

    @property
    def tokens(self) -> Ints:
        """[S]; new tokens of a data-parallel rank."""
        return self.num_seqs * self.num_new

    @property
    def stage_tokens(self) -> Ints:
        """[S]; new tokens of all data-parallel ranks, dummy batches included."""
        num_idle: Ints = np.maximum(self.dp - self.stage_seqs, 0)
        return self.stage_seqs * self.num_new + num_idle * (1 + self.num_drafts)

    @property
    def owned(self) -> Ints:
        """[S]; tokens of the rank that owns most."""
        owned: Ints = -(-self.tokens // self.tp)
        return owned

    @property
    def num_yielding(self) -> Ints:
        """[S]; tokens of a data-parallel rank that yield a next one."""
        return self.num_seqs * (1 + self.num_drafts)

    @property
    def owned_yielding(self) -> Ints:
        """[S]; owned tokens that yield a next one, on average, rounded up."""
        owned: Ints = -(-self.num_yielding // self.tp)
        return owned

    def attention(self, window: int | None, rate: int = 1) -> AttentionSizes:
        """Sizes under a window; see `PartSizes.attention`."""
        is_decode = self.num_new == 1 + self.num_drafts
        return self.sizes(window, is_decode, ~is_decode, rate=rate)

    def latent_attention(self, latent: LatentAttention) -> tuple[AttentionSizes, AttentionSizes]:
        """Sizes in the latent and expanded; see `PartSizes.latent_attention`."""
        return _latent(self, latent, self.num_new == 1 + self.num_drafts)

    def indexed_attention(self, indexer: Indexer) -> IndexedSizes:
        """Sizes of attention with an indexer; see `PartSizes.indexed_attention`."""
        return _indexed(self, indexer, self.num_new == 1 + self.num_drafts)

    def sizes(
        self,
        window: int | None,
        is_decode: npt.NDArray[np.bool_],
        is_prefill: npt.NDArray[np.bool_],
        block_size: int = 1,
        rate: int = 1,
    ) -> AttentionSizes:
        """Sizes of chosen sequences, [S] each, under a window; see `pairs_and_positions`."""
        seen = pairs_and_positions(self.num_new, self.num_cached, window, block_size, rate)
        groups = int((self.num_seqs * is_decode).any()), int((self.num_seqs * is_prefill).any())
        return _attention_sizes(self, seen, is_decode, is_prefill, groups)

    def total(self, of_seq: npt.NDArray[np.int64 | np.bool_]) -> Ints:
        """[S]; the sum of a value [S] of each sequence over a data-parallel rank's."""
        total: Ints = self.num_seqs * of_seq
        return total


# What steps ask of a part of a micro-batch: arrays over ranks, or over scenarios of one rank.
TokenSizes = PartSizes | Scenarios


def _attention_sizes(
    part: TokenSizes,
    seen: tuple[Ints, Ints],
    is_decode: npt.NDArray[np.bool_],
    is_prefill: npt.NDArray[np.bool_],
    num_groups: tuple[int, int],
) -> AttentionSizes:
    """Sizes of a part's chosen sequences, from the pairs and positions that they see."""
    pairs, positions = seen
    return AttentionSizes(
        decode_seqs=part.total(is_decode),
        decode_positions=part.total(positions * is_decode),
        prefill_seqs=part.total(is_prefill),
        prefill_tokens=part.total(part.num_new * is_prefill),
        prefill_pairs=part.total(pairs * is_prefill),
        prefill_positions=part.total(positions * is_prefill),
        num_decode_groups=num_groups[0],
        num_prefill_groups=num_groups[1],
        num_queries=1 + part.num_drafts,
    )


def _latent(
    part: TokenSizes, latent: LatentAttention, is_decode: npt.NDArray[np.bool_]
) -> tuple[AttentionSizes, AttentionSizes]:
    """Sizes of a part's attention in the latent, and of prompts that are expanded."""
    is_expanded = takes_less_expanded(part.num_new, part.num_cached, latent) & ~is_decode
    in_latent = part.sizes(None, is_decode, ~is_decode & ~is_expanded)
    return in_latent, part.sizes(None, np.zeros_like(is_expanded), is_expanded)


def _indexed(part: TokenSizes, indexer: Indexer, is_decode: npt.NDArray[np.bool_]) -> IndexedSizes:
    """Sizes of a part's attention with an indexer."""
    is_within = part.num_cached + part.num_new <= indexer.topk
    is_dense = ~is_decode & is_within & (not indexer.by_group)
    is_long = ~is_decode & ~is_dense
    return IndexedSizes(
        scored=part.sizes(None, is_decode, is_long),
        chosen=part.sizes(indexer.topk, is_decode, is_long, indexer.block_size),
        dense=part.sizes(None, np.zeros_like(is_dense), is_dense),
    )
