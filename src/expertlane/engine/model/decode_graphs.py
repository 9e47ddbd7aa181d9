"""Decode steps of a stage as graphs: recorded once for some numbers of sequences, then launched.

A whole step is one graph where its shapes do not depend on the routing; else each layer has a graph
that ends at its dispatch. A batch is padded to the next recorded number of sequences. A sequence of
padding has one position in a scratch block of the cache; no expert computes its token, and its
results are not read.
All ranks of a stage pad a whole step to the same number, and so do those of a tensor-parallel group
for the graphs of layers: ranks that share a graph's transfers record it at the same time.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.comm.collectives import interleave
from expertlane.engine.comm.counters import Sent
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.model.blocks import MoEBlock, RouterOutput
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.head import HeadResult
from expertlane.engine.model.transformer import DecoderLayer, LayerStart, TransformerStage
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.device import Array, CudaGraphs, packed, unpacked
from expertlane.engine.ops.kv_cache import AttentionBounds, KVCache
from expertlane.schedule.plan import Batch, RankBatch
from expertlane.spec.deployment import DispatchForm, DispatchMode, GraphLimits, is_static_on
from expertlane.spec.layout import partition
from expertlane.spec.names import Phase, Stage

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
    ranges, own = partition(size, num_parts), partition(num_seqs, num_parts)
    places = [of.start + np.arange(len(part)) for of, part in zip(ranges, own, strict=True)]
    return np.concatenate(places)


def padded(batch: Batch, places: npt.NDArray[np.int64], size: int, scratch_block: int) -> Batch:
    """Pad a batch with one token for each sequence; all sequences yield a token, padding too.

    Args:
        places: [num_seqs]; of `places_in`.
        scratch_block: the block of all sequences of padding.
    """

    def spread(values: Array, of_padding: int) -> Array:
        padded_values = np.full(size, of_padding, dtype=values.dtype)
        padded_values[places] = values
        return padded_values

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
        is_filled: whether its columns are in the memory from which the graph reads them.

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
        self.real, self._static_inputs, self.is_filled = real, inputs, False
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
        self._inputs = self._static_inputs.of_size(self.batch.num_seqs, columns)
        self.is_real, *rest = self._inputs.tensors
        self._take(rest)

    def fill(self) -> None:
        """Copy its columns to the memory from which the graph reads them."""
        self._inputs.fill(self._columns())
        self.is_filled = True


class DecodeGraphs:
    """A stage's graphs, and the choice of steps that run as such, by facts that all ranks share.

    Graphs are recorded ahead, or by the first step of their size; the largest first, so that the
    others reuse its memory.

    Args:
        num_blocks: blocks of the cache, without the scratch block.
        records_transfers: whether graphs may contain transfers between ranks.
        await_device: waits, with a bound, for an event of the device, which may wait for ranks.
    """

    def __init__(
        self,
        stage: TransformerStage,
        graphs: CudaGraphs,
        limits: GraphLimits,
        *,
        num_blocks: int,
        block_size: int,
        records_transfers: bool,
        await_device: Callable[[Any], None],
    ) -> None:
        self.stage, self._graphs = stage, graphs
        self._recorder, self._await_device = stage.mesh.recorder, await_device
        self._is_plain = False
        self._takes_steps = records_transfers or stage.mesh.stage.size == 1
        self._takes_layers = records_transfers or stage.mesh.tp.size == 1
        self._sizes = limits.sizes
        self._inputs = GraphInputs(
            stage.mesh,
            stage.device,
            most_seqs=self._sizes[-1],
            most_blocks=-(-limits.max_positions // block_size),
            block_size=block_size,
            scratch_block=num_blocks,
        )
        self._buffers: dict[str, Tensor] = {}
        # By size, and form or layer: whole steps, and beginnings of layers.
        self._launch: dict[tuple[int, DispatchForm | int], Callable[[], None]] = {}

    @classmethod
    def of(
        cls, stage: TransformerStage, limits: GraphLimits | None, **given: Any
    ) -> "DecodeGraphs | None":
        """The graphs of a stage; None where its backend has none, or `limits` is None."""
        graphs = None if limits is None else backend_for(stage.device).graphs()
        return None if limits is None or graphs is None else cls(stage, graphs, limits, **given)

    def begin_step(self, phase: Phase | None) -> None:
        """Begin a step, after the recorder has begun it."""
        self._is_plain = phase is Phase.DECODE and not self._recorder.is_by_stage

    def takes_steps(self, form: DispatchForm) -> bool:
        """Whether a whole step with this form of dispatch can be recorded."""
        return self._takes_steps and is_static_on(self.stage.mesh.layout, form)

    def clear(self) -> None:
        """Drop all graphs, since weights, groups or the cache have changed."""
        self._launch.clear()

    def record(self, size: int, forms: Iterable[DispatchForm]) -> int:
        """Record the graphs of batches padded to a size; gives the number of new graphs."""
        self._recorder.enter(Stage.GRAPH)
        num_before = len(self._launch)
        for form in forms:
            if self.takes_steps(form):
                self._record([size], form, form, self._forward)
            elif self._takes_layers:
                self._buffer("x", self.stage.empty_hidden(1))
                for layer, cache in self.stage.layers:
                    self._record([size], form, layer.index, partial(self._begin, layer, cache))
        return len(self._launch) - num_before

    def padded_step(
        self, batch: Batch, micro_batch: RankBatch, mode: DispatchMode
    ) -> PaddedBatch | None:
        """The batch padded for the graph of a whole step; None if the step has no such graph."""
        if not self._is_plain or mode.overlap:
            return None
        if not any(micro_batch.num_tokens) or not self.takes_steps(mode.form):
            return None
        return self.padded(batch, micro_batch.num_tokens, mode.form)

    def padded(
        self, batch: Batch, num_tokens: Sequence[int], form: DispatchForm, num_parts: int = 1
    ) -> PaddedBatch | None:
        """Pad a batch with one token for each sequence; None if it is empty or too large.

        Args:
            num_tokens: [dp]; tokens of every data-parallel rank's batch.
            num_parts: see `places_in`.
        """
        assert batch.num_tokens == batch.num_seqs, "every sequence has one new token"
        most = max(num_tokens)
        sizes = [size for size in self._sizes if size >= most]
        if not sizes or not most:
            return None
        return PaddedBatch(batch, self._inputs, sizes[0], form, num_parts)

    def run(self, part: PaddedBatch, arrived: Tensor | None) -> Tensor | HeadResult:
        """Run a whole step: `TransformerStage.forward`, without logits of other ranks.

        Args:
            arrived: hidden states from the previous stage; None in the first one.

        Returns:
            Hidden states of all owned tokens, or the head's result of real sequences, whose logits
            the next step overwrites.
        """
        self._recorder.enter(Stage.GRAPH)
        size, form = part.batch.num_seqs, part.dispatch_form
        self._prepare(size, form, form, self._forward)
        if arrived is not None:
            self._buffer("arrived", arrived)[: len(arrived)].copy_(arrived)
        part.fill()
        self._launch[size, form]()
        if self.stage.mesh.is_last_stage:
            num = part.real.num_seqs
            token_ids = self._buffers["token_ids"][:num].clone()
            return HeadResult(token_ids, self._buffers["logits"][:num], None)
        return self._buffers["hidden"][: part.num_owned].clone()

    def beginning_of(self, parts: Sequence[ForwardBatch]) -> LayerStart | None:
        """A function that begins the layers of a decode batch, with a graph up to each dispatch.

        Dispatch, which asks the host for numbers of rows, runs between graphs as usual, on real
        tokens, which stay with their owners. None where the batch does not fit: each
        tensor-parallel group decides for itself.
        """
        if not (self._is_plain and self._takes_layers and len(parts) == 1):
            return None
        batch, form = parts[0].batch, parts[0].dispatch_form
        if self.takes_steps(form):
            return None
        own = [batch.num_seqs] * self.stage.mesh.layout.dp
        part = self.padded(batch, own, form, self.stage.mesh.tp.size)
        return None if part is None else partial(self._begun, part)

    def _begun(
        self, part: PaddedBatch, layer: DecoderLayer, cache: KVCache, x: Tensor
    ) -> RouterOutput | Tensor:
        """The result of `DecoderLayer.begin` for real tokens; the next layer overwrites it."""
        size, num = part.batch.num_seqs, part.num_real_owned
        self._buffer("x", x)[: len(x)].copy_(x)
        begin = partial(self._begin, layer, cache)
        is_new = self._prepare(size, part.dispatch_form, layer.index, begin)
        if is_new or not part.is_filled:
            part.fill()
        self._launch[size, layer.index]()
        if not isinstance(layer.block, MoEBlock):
            return self._buffers["begun"][:num]
        return RouterOutput(
            *(self._buffers[f"routed {name}"][:num] for name in RouterOutput._fields)
        )

    def _begin(self, layer: DecoderLayer, cache: KVCache, part: PaddedBatch) -> None:
        """Run a layer up to its dispatch; this is recorded."""
        (begun,) = interleave([layer.begin(self._buffers["x"][: part.num_owned], part, cache)])
        if isinstance(begun, Tensor):
            self._keep("begun", begun)
            return
        assert isinstance(begun, RouterOutput), "a rank with all experts records whole steps"
        for name, values in begun._asdict().items():
            self._keep(f"routed {name}", values)

    def _prepare(
        self,
        size: int,
        form: DispatchForm,
        kind: DispatchForm | int,
        run: Callable[[PaddedBatch], None],
    ) -> bool:
        """Record a step's graph if it is missing; the largest first. Gives whether any was."""
        # Only graphs of whole steps count for whole steps: ranks may differ in those of layers.
        is_step = isinstance(kind, str)
        is_first = all(isinstance(of, str) != is_step for _, of in self._launch)
        first = (self._sizes[-1],) if is_first else ()
        return self._record({*first, size}, form, kind, run)

    def _record(
        self,
        sizes: Iterable[int],
        form: DispatchForm,
        kind: DispatchForm | int,
        run: Callable[[PaddedBatch], None],
    ) -> bool:
        """Record the missing graphs for batches of these sizes; gives whether any was missing.

        They are recorded on padding alone, so that no sequence's cache is overwritten.
        """
        missing = [each for each in sizes if (each, kind) not in self._launch]
        for each in sorted(missing, reverse=True):
            # A new batch for each run: values that it caches in its first layer are recorded too.
            batch = partial(PaddedBatch, NO_SEQS, self._inputs, each, form)
            batch().fill()
            self._launch[each, kind] = self._captured(partial(_run_on, batch, run))
        return bool(missing)

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        meter = self._recorder.meter
        if meter is None:
            return self._graphs.capture(run, self._await_device)
        sent: Sent = ()

        def metered() -> None:
            nonlocal sent
            sent = meter.sent_by(run)

        replay = self._graphs.capture(metered, self._await_device)

        def launch() -> None:
            meter.add_sent(sent)
            replay()

        return launch

    def _forward(self, part: PaddedBatch) -> None:
        """Run a whole step; this is recorded."""
        stage = self.stage
        if stage.mesh.is_first_stage:
            x = stage.embed(part)
        else:
            x = self._buffer("arrived", stage.empty_hidden(1))[: part.num_owned]
        (result,) = interleave([stage.forward(x, part, needs_logits=False)])
        if isinstance(result, Tensor):
            self._keep("hidden", result)
            return
        assert result.token_ids is not None, "no more was asked for"
        self._keep("token_ids", result.token_ids)
        self._keep("logits", result.logits)

    def _keep(self, name: str, values: Tensor) -> None:
        self._buffer(name, values)[: len(values)].copy_(values)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """A named buffer for the most rows; made before it is used in a graph."""
        if name not in self._buffers:
            shape = self._sizes[-1], *like.shape[1:]
            self._buffers[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self._buffers[name]


def _run_on(make: Callable[[], PaddedBatch], run: Callable[[PaddedBatch], None]) -> None:
    run(make())
