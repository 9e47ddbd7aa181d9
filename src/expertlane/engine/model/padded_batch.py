"""Batches of decode steps for graphs: padded to a size, and copied to fixed memory."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.ops.kv_cache import AttentionBounds
from expertlane.engine.ops.transfer import Array, packed, unpacked
from expertlane.schedule.plan import Batch
from expertlane.spec.dispatch import DispatchForm
from expertlane.spec.layout import partition

_PADDING = -1  # in place of a sequence's id
_NOTHING = np.empty(0, dtype=np.int64)
NO_SEQS = Batch(
    *(_NOTHING, _NOTHING, _NOTHING, _NOTHING),
    block_tables=np.empty((0, 1), dtype=np.int32),
    yields_token=np.empty(0, dtype=np.bool_),
)


def places_in(size: int, num_seqs: int, num_parts: int = 1) -> npt.NDArray[np.int64]:
    """[num_seqs]; each sequence's index in a batch padded to `size`.

    Args:
        num_parts: parts that the batch and the padded batch are divided into; padding ends each
            part, so that every sequence stays in its part.
    """
    rooms, own = partition(size, num_parts), partition(num_seqs, num_parts)
    places = [room.start + np.arange(len(part)) for room, part in zip(rooms, own, strict=True)]
    return np.concatenate(places)


def padded(batch: Batch, places: npt.NDArray[np.int64], size: int, scratch_block: int) -> Batch:
    """Pad a batch with one token for each sequence; all sequences yield a token, padding too.

    Args:
        places: [num_seqs]; of `places_in`.
        scratch_block: the block of all sequences of padding.
    """

    def spread(values: Array, of_padding: int) -> Array:
        room = np.full(size, of_padding, dtype=values.dtype)
        room[places] = values
        return room

    width = batch.block_tables.shape[1]
    tables = np.full((size, max(1, width)), -1, dtype=np.int32)
    tables[:, 0] = scratch_block
    tables[places, :width] = batch.block_tables
    return Batch(
        seq_ids=spread(batch.seq_ids, _PADDING),
        num_scheduled_tokens=spread(batch.num_scheduled_tokens, 1),
        num_computed_tokens=spread(batch.num_computed_tokens, 0),
        token_ids=spread(batch.token_ids, 0),
        block_tables=tables,
        yields_token=np.ones(size, dtype=np.bool_),
    )


class StaticInputs:
    """Fixed memory from which a graph reads a padded batch; filled before each launch.

    Args:
        columns: arrays of a batch of that size; the last one is the block tables.
        tables: memory for the block tables, as wide as the longest sequence may be.

    Attributes:
        tensors: the memory of each column; block tables have the full width.
    """

    def __init__(self, columns: Sequence[Array], tables: Tensor) -> None:
        *fixed, _ = columns
        self._fixed = torch.zeros_like(packed(fixed), device=tables.device)
        self._tables = tables
        self.tensors = [*unpacked(self._fixed, fixed), self._tables]

    def fill(self, columns: Sequence[Array]) -> None:
        """Copy a batch's columns there in one transfer; its block tables may be narrower."""
        arrived = packed(columns).to(self._fixed.device, non_blocking=True)
        self._fixed.copy_(arrived[: len(self._fixed)])
        tables = unpacked(arrived, columns)[-1]
        self._tables[:, : tables.shape[1]].copy_(tables)


class GraphInputs:
    """Fixed memory from which the graphs of a stage read batches, for each padded size.

    Args:
        most_seqs, most_blocks: size of the largest block tables.
        scratch_block: the cache's block for sequences of padding.
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        device: torch.device,
        *,
        most_seqs: int,
        most_blocks: int,
        block_size: int,
        scratch_block: int,
    ) -> None:
        self.mesh, self.device = mesh, device
        self.block_size, self.scratch_block = block_size, scratch_block
        self.bounds = AttentionBounds(1, most_blocks * block_size, is_decode=True)
        self._tables = torch.zeros(most_seqs, most_blocks, dtype=torch.int64, device=device)
        self._of_size: dict[int, StaticInputs] = {}

    def of_size(self, size: int, columns: Sequence[Array]) -> StaticInputs:
        """The memory for batches of a size, made when it is first asked for."""
        if size not in self._of_size:
            self._of_size[size] = StaticInputs(columns, self._tables[:size])
        return self._of_size[size]


class PaddedBatch(ForwardBatch):
    """A decode step's batch with padding, in the memory from which a graph reads it.

    Attributes:
        real: the batch without padding.

    Args:
        num_parts: see `places_in`.
    """

    def __init__(
        self,
        real: Batch,
        inputs: GraphInputs,
        size: int,
        form: DispatchForm,
        num_parts: int = 1,
    ) -> None:
        self.real, self._room = real, inputs
        mesh, layout = inputs.mesh, inputs.mesh.layout
        places = places_in(size, real.num_seqs, num_parts)
        self._is_real = np.zeros(size, dtype=np.bool_)
        self._is_real[places] = True
        super().__init__(
            padded(real, places, size, inputs.scratch_block),
            *([size] * layout.dp, layout, mesh.at, inputs.device, inputs.block_size, form),
        )
        self.pages.bounds = inputs.bounds

    @property
    def _own_is_real(self) -> npt.NDArray[np.bool_]:
        own = self._slices[self._at.tp_rank]
        return self._is_real[own.start : own.stop]

    @property
    def num_real_owned(self) -> int:
        """Number of tokens that this rank owns, padding not counted."""
        return int(self._own_is_real.sum())

    def _columns(self) -> list[Array]:
        return [self._own_is_real, *super()._columns()]

    def _place(self) -> None:
        columns = self._columns()
        self._inputs = self._room.of_size(self.batch.num_seqs, columns)
        self.is_real, *rest = self._inputs.tensors
        self._take(rest)

    def fill(self) -> None:
        """Copy its columns to the memory from which the graph reads them."""
        self._inputs.fill(self._columns())
