"""Dispatch and combine: tokens are sent to the ranks of their experts, and results come back.

No form drops tokens, whatever the load. Shapes: T tokens of this rank, N tokens of the stage,
K = top_k, R rows that arrive at the experts' rank, P token-expert pairs there, H = hidden_size.

The payload is hidden states in the model's dtype, or rounded to a narrower one. Only dispatch is
narrowed; results come back in the model's dtype, as in DeepSeek-V3 (arXiv:2412.19437, section
3.3.2), which also scales float8 by blocks of 128 values.

`CheckedDispatcher` checks, in every step, that each token-expert pair is computed exactly once.
Each token's hidden states carry a tag: the rank that owns it, its number there, and a checksum.
Beside the experts' results, a row of whole numbers made of tag and expert takes the same way back,
and on the token's own rank the unweighted sum of its rows has to be that of its top-k ids. The
launcher also compares how many pairs of each expert were chosen and arrived, since the result of a
pair that nobody chose would not come back.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.balance.copies import CopyChoice
from expertlane.balance.placement import Placement
from expertlane.cost.step.operation import SCALED_VALUES, PayloadBytes
from expertlane.engine.comm.checks import Checks
from expertlane.engine.comm.collectives import Group, Pending, Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.bookkeeping import Outgoing
from expertlane.engine.ops.device import is_recorded
from expertlane.engine.ops.products import PairGroups
from expertlane.spec.deployment import PayloadType
from expertlane.spec.names import CheckPoint

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max


class Payload:
    """Rounds hidden states [num_tokens, hidden_size] for dispatch, and counts the rounding error.

    Args:
        kind: the type to round to; no effect if the model's dtype is as narrow already.
    """

    def __init__(self, kind: PayloadType, recorder: Recorder) -> None:
        self._kind = kind
        self._is_narrowed = {item: PayloadBytes.of(kind, item, 1).is_narrowed for item in (2, 4)}
        self._recorder = recorder

    def encode(self, x: Tensor) -> list[Tensor]:
        """The parts that are sent, [num_tokens, columns] each; the last one holds the values.

        float8 values are bytes; before them stands a scale for each block: [num_tokens, blocks]
        float32.
        """
        if not self._is_narrowed[x.itemsize]:
            return [x]
        parts = _to_float8(x) if self._kind == "float8" else [x.bfloat16()]
        if self._recorder.is_recording:
            with self._recorder.uncounted():
                exact = x.double()
                error = self.decode(parts, torch.float32) - exact
                squares = (float(each.square().sum()) for each in (error, exact))
                self._recorder.count_payload_error(*squares)
        return parts

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Hidden states [num_rows, hidden_size] from the parts that `encode` gave.

        Args:
            parts: rows need not be adjacent in memory.
            dtype: the model's.
        """
        if len(parts) == 1:
            return parts[0].to(dtype)
        scales, values = parts
        blocks = _in_blocks(values.view(_FLOAT8).float())
        return (blocks * scales[:, :, None]).flatten(1)[:, : values.shape[1]].to(dtype)


def _in_blocks(x: Tensor) -> Tensor:
    """x [num_rows, columns] as [num_rows, blocks, 128], padded with zeros."""
    padded = F.pad(x, (0, -x.shape[1] % SCALED_VALUES))
    return padded.view(len(x), padded.shape[1] // SCALED_VALUES, SCALED_VALUES)


def _to_float8(x: Tensor) -> list[Tensor]:
    blocks = _in_blocks(x.float())
    scales = blocks.abs().amax(dim=2) / _LARGEST
    scales = scales.where(scales > 0, 1.0)
    values = (blocks / scales[:, :, None]).flatten(1)[:, : x.shape[1]]
    values = values.clamp(-_LARGEST, _LARGEST)  # a subnormal scale rounds down
    return [scales, values.to(_FLOAT8).view(torch.uint8)]


Columns = list[tuple[torch.dtype, int]]


def columns_of(parts: Sequence[Tensor]) -> Columns:
    """The dtype and number of columns of parts [num_rows, columns], for `unpack`."""
    return [(part.dtype, part.shape[1]) for part in parts]


def bytes_of(columns: Columns) -> int:
    """Bytes of a row with these columns."""
    return sum(num * dtype.itemsize for dtype, num in columns)


def unpack(packed: Tensor, columns: Columns) -> list[Tensor]:
    """Views of the parts in packed rows.

    Args:
        packed: [num_rows, bytes of a row] uint8.
        columns: dtype and number of columns of each part.
    """
    parts, begin = [], 0
    for dtype, num in columns:
        end = begin + num * dtype.itemsize
        parts.append(packed[:, begin:end].view(dtype))
        begin = end
    return parts


class CopyChooser:
    """Chooses a copy of the expert, a physical id, for each token-expert pair.

    The choice depends on the batch alone; `balance.copies` defines it.

    Attributes:
        ops: the compute backend.
        num_slots: the most slots of any rank; slot s of rank r has the physical id
            r · num_slots + s.
    """

    def __init__(self, mesh: ParallelMesh, placement: Placement, device: torch.device) -> None:
        self.ops = backend_for(device)
        ep_rank, nodes = mesh.ep.rank, mesh.ep.nodes
        ep, etp = mesh.ep.size, mesh.etp.size
        ep_ranks, etp_ranks = np.divmod(np.arange(mesh.stage.size), etp)
        all_nodes = np.reshape(mesh.stage.nodes, (ep, etp)).T[etp_ranks]
        experts = np.arange(placement.num_experts)
        ranks, num_copies = CopyChoice(placement, ep_ranks, all_nodes).usable(
            np.full_like(experts, mesh.stage.rank), experts
        )
        is_usable = np.arange(num_copies.max()) < num_copies[:, None]
        ranks = np.where(is_usable, ranks[:, : num_copies.max()], ranks[:, :1])
        self.num_slots = max(map(len, placement.experts_of_rank))
        slots = placement.slots()[ranks, experts[:, None]]
        self._table = torch.from_numpy(ranks * self.num_slots + slots).to(device)
        self._num_copies = torch.from_numpy(num_copies).to(device)
        self._offset, self._num_ranks = mesh.stage.rank, mesh.ep.size
        self._recorder = mesh.recorder
        node_ids = sorted(set(nodes))
        self._own_node = node_ids.index(nodes[ep_rank])
        self._nodes = torch.tensor([node_ids.index(node) for node in nodes], device=device)

    def physical_ids(self, topk_ids: Tensor) -> Tensor:
        """Physical ids [T, K] int32 of a batch's pairs; an expert's copies take turns.

        Args:
            topk_ids: [T, K] int64; logical experts.
        """
        ids = self.ops.choose_copies(topk_ids, self._table, self._num_copies, self._offset)
        self._count_fan_out(ids)
        return ids

    def outgoing(self, topk_ids: Tensor) -> Outgoing:
        """Physical ids of a batch's pairs, and the rows for each rank of the ep group.

        Args:
            topk_ids: [T, K] int64; logical experts.
        """
        leaving = self.ops.outgoing(
            topk_ids, self._table, self._num_copies, self._offset, self.num_slots, self._num_ranks
        )
        self._count_fan_out(leaving.ids)
        return leaving

    def _count_fan_out(self, ids: Tensor) -> None:
        if self._recorder.is_recording:
            with self._recorder.uncounted():
                counts = self.ops.fan_out(ids, self.num_slots, self._nodes, self._own_node)
                self._recorder.count_fan_out(*counts)


class RoutedTokens(NamedTuple):
    """A rank's tokens, and the experts that each goes to.

    Attributes:
        x: [T, H].
        topk_ids: [T, K]; logical experts.
        topk_weights: [T, K] float32.
        num_of_stage_rank: [dp·tp]; tokens of each rank of the stage.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    num_of_stage_rank: Sequence[int]


# Pairs whose buffers may have the bound's size, without asking a GPU for their number: results of
# so many take 0.9 GB in DeepSeek-V3.
_MOST_UNASKED = 1 << 16


class Dispatcher(ABC):
    """Dispatch and combine of one form, on one rank."""

    def __init__(
        self, mesh: ParallelMesh, placement: Placement, choice: CopyChooser, payload: Payload
    ) -> None:
        self._mesh = mesh
        self._payload = payload
        self._choice, self._ops = choice, choice.ops
        self._num_local_experts = len(placement.experts_of_rank[mesh.at.ep_rank])

    def _pack(
        self,
        group: Group,
        by_row: Sequence[Tensor],
        by_token: Sequence[Tensor] = (),
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Concatenate the parts of rows in the memory from which `group` sends them.

        Args:
            by_row: each [num_rows, columns], of any dtype; widest alignment first.
            by_token: each [num_tokens, columns]; the hidden states last.
            tokens: [num_rows]; the token of each row.

        Returns:
            [num_rows, bytes of a row] uint8.
        """
        parts = [*((part, None) for part in by_row), *((part, tokens) for part in by_token)]
        width = sum(part.shape[1] * part.itemsize for part, _ in parts)
        packed = group.empty(by_row[0].shape[0], width, by_row[0], torch.uint8)
        self._ops.pack(parts, packed)
        return packed

    def _pairs(self, ids: Tensor, first: int) -> PairGroups:
        """Sort the pairs of rows that arrived by local expert; mostly without asking a GPU.

        Args:
            ids: [R, K] int32; physical ids.
            first: the physical id of this rank's slot 0.
        """
        most = None if ids.device.type == "cpu" else self._most_pairs(ids)
        return self._ops.group_pairs(ids, first, 1, self._num_local_experts, most)

    def _most_pairs(self, ids: Tensor) -> int | None:
        """An upper bound of the pairs; None if buffers of that size would take much memory.

        No token chooses an expert twice. A graph always gets the bound: the number of pairs cannot
        be asked for while it is recorded.
        """
        most = ids.shape[0] * min(ids.shape[1], self._num_local_experts)
        return most if most <= _MOST_UNASKED or is_recorded(ids.device) else None

    def _tell_all(self, counts: Tensor) -> Pending:
        """Begin to gather the counts of all ranks of the stage, a row for each rank."""
        own, stage = counts.view(1, -1), self._mesh.stage
        return stage.all_gather(own, [1] * stage.size, metadata_bytes=own.nbytes)

    @abstractmethod
    def dispatch(self, tokens: RoutedTokens) -> Steps[tuple[Tensor, PairGroups, Any]]:
        """Send this rank's tokens and receive those for its experts.

        Returns:
            The rows that arrived, [R, H], perhaps not adjacent in memory; their pairs by local
            expert; and a handle of the form's own for `combine`.
        """

    def is_row(self, sent: Any) -> Tensor | None:
        """[R]; True for rows that arrived and are no padding; None where none is."""
        return None

    def result_buffer(self, num_pairs: int, rows: Tensor) -> Tensor | None:
        """A buffer [P, H] for the results of `rows`, from which `combine` sends them; or None."""
        return None

    @abstractmethod
    def combine(self, sent: Any, results: Tensor) -> Steps[Tensor]:
        """Return expert outputs to the tokens' ranks, and sum them by the top-k weights.

        Args:
            sent: the handle that `dispatch` gave.
            results: [P, H]; by pair number (row, then choice); partial sums under etp.

        Returns:
            [T, H] in the dtype of `results`.
        """


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
