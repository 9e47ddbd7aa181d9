"""A dispatch that checks, in every step, that each token-expert pair is computed exactly once.

Each token's hidden states carry a tag: the rank that owns it, its number there, and a checksum.
Beside the experts' results, a row of whole numbers made of tag and expert takes the same way back,
and on the token's own rank the unweighted sum of its rows has to be that of its top-k ids. The
launcher also compares how many pairs of each expert were chosen and arrived, since the result of a
pair that nobody chose would not come back.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.engine.comm.checks import Checks
from expertlane.engine.comm.collectives import Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.moe.dispatch import Dispatcher, Payload, RoutedTokens
from expertlane.engine.ops.products import PairGroups
from expertlane.spec.names import CheckPoint

_WIDTH = 16  # of a row of numbers; kernels may want whole vectors
_PRIME = 1021  # numbers stay below it, so that float32 adds them up exactly


class TaggedPayload(Payload):
    """A payload that puts a tag in front of the parts of another payload.

    Args:
        inner: the payload that rounds hidden states.
        rank: global rank of this rank, which owns the tokens that it sends.

    Attributes:
        arrived: [R, 3] int32; tags of the rows that were decoded last; None once taken.
        is_changed: [R]; whether a row's checksum differs from its tag's.
    """

    def __init__(self, inner: Payload, rank: int) -> None:
        self._inner, self._rank = inner, rank
        self.arrived: Tensor | None = None
        self.is_changed: Tensor | None = None

    def encode(self, x: Tensor) -> list[Tensor]:
        """The tags, then the parts of the inner payload."""
        parts = self._inner.encode(x)
        return [self.tags(parts), *parts]

    def decode(self, parts: Any, dtype: torch.dtype) -> Tensor:
        """Hidden states decoded by the inner payload; the tags are kept in `arrived`."""
        tags, *rest = parts
        self.arrived = tags.clone()
        self.is_changed = _row_sums(rest) != tags[:, 2]
        return self._inner.decode(rest, dtype)

    def tags(self, parts: list[Tensor]) -> Tensor:
        """The tags [T, 3] int32: rank, number and checksum of each token."""
        sums = _row_sums(parts)
        numbers = torch.arange(len(sums), dtype=torch.int32, device=sums.device)
        return torch.stack([torch.full_like(numbers, self._rank), numbers, sums], 1)


def _row_sums(parts: list[Tensor]) -> Tensor:
    """Checksums [num_rows] int32: bytes times odd weights, so that any one changed byte shows."""
    total = torch.zeros(len(parts[0]), dtype=torch.int64, device=parts[0].device)
    for part in parts:
        # A clone: of a part with one column, `contiguous` may leave strides that no view takes.
        whole = part.clone(memory_format=torch.contiguous_format)
        values = whole.view(torch.uint8).int()
        weights = torch.arange(1, 2 * values.shape[1], 2, dtype=torch.int32, device=values.device)
        total = total * 31 + (values * weights).sum(1)
    return total.bitwise_and(0x7FFFFFFF).int()


class _Sent(NamedTuple):
    """The handle of a checked dispatch for `combine`.

    Attributes:
        inner: the handle of the form that is checked.
        layer: hidden layer.
        numbers: [P, 16]; the check's row for each pair that arrived, in the order of results.
        expected: [T, 16]; the sums of the rows that should come back for each token.
    """

    inner: Any
    layer: int
    numbers: Tensor
    expected: Tensor


class CheckedDispatcher(Dispatcher):
    """Another dispatcher, with a check that each pair is sent and comes back exactly once.

    Args:
        inner: a dispatcher of any form, with this payload.
    """

    def __init__(
        self,
        inner: Dispatcher,
        payload: TaggedPayload,
        mesh: ParallelMesh,
        placement: Placement,
        checks: Checks,
    ) -> None:
        self._inner, self._tagged, self._mesh, self._checks = inner, payload, mesh, checks
        self._held = placement.experts_of_rank[mesh.at.ep_rank]

    def result_buffer(self, num_pairs: int, rows: Tensor) -> Tensor | None:
        """The inner dispatcher's buffer for results."""
        return self._inner.result_buffer(num_pairs, rows)

    def is_row(self, sent: _Sent) -> Tensor | None:
        """[R]; True for rows that arrived and are no padding; None where none is."""
        return self._inner.is_row(sent.inner)

    def dispatch(self, tokens: RoutedTokens) -> Steps[tuple[Tensor, PairGroups, _Sent]]:
        """Dispatch tokens by the inner dispatcher, and check the tags of those that arrive."""
        layer = self._mesh.recorder.layer
        own = self._tagged.tags([tokens.x])
        rows, pairs, sent = yield from self._inner.dispatch(tokens)
        tags, self._tagged.arrived = self._tagged.arrived, None
        if tags is None:  # nothing travels where one rank has all
            tags = own
        else:
            self._check_rows(layer, tags, self._inner.is_row(sent))
        self._checks.pairs(layer, tokens.topk_ids, self._held, pairs.counts)
        held = torch.tensor(self._held, device=tags.device)
        experts = held.repeat_interleave(pairs.counts)
        rows_of, order = pairs.rows[: len(experts)], pairs.order[: len(experts)]
        numbers = torch.zeros(len(pairs.order), _WIDTH, device=tags.device)
        numbers[order] = _numbers(tags[rows_of].long(), experts)
        num_tokens, top_k = tokens.topk_ids.shape
        chosen = _numbers(own.long().repeat_interleave(top_k, 0), tokens.topk_ids.flatten())
        expected = chosen.view(num_tokens, top_k, _WIDTH).sum(1) * self._mesh.layout.etp
        return rows, pairs, _Sent(sent, layer, numbers, expected)

    def combine(self, sent: _Sent, results: Tensor) -> Steps[Tensor]:
        """Combine results, then the check's rows, by the inner dispatcher; compare their sums."""
        combined = yield from self._inner.combine(sent.inner, results)
        unweighted = replace(sent.inner, weights=torch.ones_like(sent.inner.weights))
        came = yield from self._inner.combine(unweighted, sent.numbers)
        if num := int((came != sent.expected).any(1).sum()):
            text = (
                f"{num:,} of {len(came):,} tokens did not get exactly one result from each of "
                "their experts"
            )
            self._checks.fault(CheckPoint.COMBINE, sent.layer, text)
        return combined

    def _check_rows(self, layer: int, tags: Tensor, is_row: Tensor | None) -> None:
        changed = self._tagged.is_changed
        assert changed is not None, "they were decoded"
        if is_row is not None:
            tags, changed = tags[is_row], changed[is_row]
        if num := int(changed.sum()):
            text = f"{num:,} of {len(tags):,} rows changed in transfer"
            self._checks.fault(CheckPoint.DISPATCH, layer, text)
        if not len(tags):
            return
        tokens, counts = torch.unique(tags[:, :2], dim=0, return_counts=True)
        for rank, number in tokens[counts > 1].tolist()[:1]:
            text = f"token {number} of rank {rank} arrived {int(counts.max())} times"
            self._checks.fault(CheckPoint.DISPATCH, layer, text)


def _numbers(tags: Tensor, experts: Tensor) -> Tensor:
    """The check's row [P, 16] float32 of each pair: whole numbers below `_PRIME`.

    Args:
        tags: [P, 3]; tag of each pair's token.
        experts: [P]; logical expert of each pair.
    """
    rank, token, _ = tags.unbind(1)
    numbers = torch.zeros(len(tags), _WIDTH, dtype=torch.int64, device=tags.device)
    of_pair = (rank * 5 + token) * 7 + experts * 11
    columns = (
        torch.ones_like(rank),
        *(experts, experts * experts),
        *(rank, token, token // _PRIME, of_pair, of_pair * of_pair),
    )
    for place, column in enumerate(columns):
        numbers[:, place] = column % _PRIME
    return numbers.float()
