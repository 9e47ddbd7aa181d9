"""Dispatch and combine: tokens are sent to the ranks of their experts, and results come back.

No form drops tokens, whatever the load. Shapes: T tokens of this rank, N tokens of the stage,
K = top_k, R rows that arrive at the experts' rank, P token-expert pairs there, H = hidden_size.

The payload is hidden states in the model's dtype, or rounded to a narrower one. Only dispatch is
narrowed; results come back in the model's dtype, as in DeepSeek-V3 (arXiv:2412.19437, section
3.3.2), which also scales float8 by blocks of 128 values.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.balance.copies import CopyChoice
from expertlane.balance.placement import Placement
from expertlane.cost.step.operation import SCALED_VALUES, PayloadBytes
from expertlane.engine.comm.collectives import Group, Pending, Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.bookkeeping import Outgoing
from expertlane.engine.ops.device import is_recorded
from expertlane.engine.ops.products import PairGroups
from expertlane.spec.deployment import PayloadType

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
