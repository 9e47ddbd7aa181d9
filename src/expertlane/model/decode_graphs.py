"""Decode steps of a stage as graphs: recorded once for some numbers of sequences, then launched.

A whole step is one graph where its shapes do not turn on the routing; else a graph goes up to each
dispatch. A batch is padded to the next of these numbers. A sequence of padding has one position in
a block of the cache that belongs to nobody; no expert computes its token, and nobody reads what
comes of it.
All ranks of a stage pad a whole step to the same number, so they record it in the same step.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from expertlane.comm.collectives import Steps, interleave
from expertlane.comm.meter import Sent
from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.layers import DecoderLayer
from expertlane.model.moe_block import MoEBlock, Routed
from expertlane.model.transformer import HeadResult, RunsLayers, TransformerStage
from expertlane.ops.backend import backend_for
from expertlane.ops.graphs import Graphs
from expertlane.ops.kv_cache import AttentionBounds, KVCache
from expertlane.ops.transfer import Array, packed, unpacked
from expertlane.schedule.plan import Batch
from expertlane.spec.deployment import GraphLimits
from expertlane.spec.dispatch import DispatchForm, is_static_on

_FEW = 8
_PADDING = -1  # in place of a sequence's id


def graph_sizes(most: int) -> list[int]:
    """Numbers of sequences up to `most`, ascending: above 32 at most a quarter is padding."""
    sizes = [size for size in (1, 2, 4) if size < most]
    size = _FEW
    while size < most:
        sizes.append(size)
        size += max(_FEW, size // 4 // _FEW * _FEW)
    return [*sizes, most]


def padded(batch: Batch, size: int, scratch_block: int) -> Batch:
    """A batch of one token each, with sequences of padding behind; all of them yield a token."""
    num = size - batch.num_seqs
    tables = np.full((size, max(1, batch.block_tables.shape[1])), -1, dtype=np.int32)
    tables[: batch.num_seqs, : batch.block_tables.shape[1]] = batch.block_tables
    tables[batch.num_seqs :, 0] = scratch_block
    return Batch(
        seq_ids=np.pad(batch.seq_ids, (0, num), constant_values=_PADDING),
        num_scheduled_tokens=np.pad(batch.num_scheduled_tokens, (0, num), constant_values=1),
        num_computed_tokens=np.pad(batch.num_computed_tokens, (0, num)),
        token_ids=np.pad(batch.token_ids, (0, num)),
        block_tables=tables,
        yields_token=np.ones(size, dtype=np.bool_),
    )


class StaticInputs:
    """Where a graph finds the columns of a padded batch; filled before it is launched.

    Args:
        columns: of a batch of that size; the last is of block tables.
        tables: for those; as wide as the longest sequence may be.

    Attributes:
        tensors: as `columns`, with block tables of that width.
    """

    def __init__(self, columns: Sequence[Array], tables: Tensor) -> None:
        *fixed, _ = columns
        self._fixed = torch.zeros_like(packed(fixed), device=tables.device)
        self._tables = tables
        self.tensors = [*unpacked(self._fixed, fixed), self._tables]

    def fill(self, columns: Sequence[Array]) -> None:
        """In one transfer; block tables may be narrower, as far as sequences go."""
        arrived = packed(columns).to(self._fixed.device, non_blocking=True)
        self._fixed.copy_(arrived[: len(self._fixed)])
        tables = unpacked(arrived, columns)[-1]
        self._tables[:, : tables.shape[1]].copy_(tables)


class PaddedBatch(ForwardBatch):
    """A decode step's batch with padding, at the places where a graph finds it.

    Attributes:
        real: without padding.
    """

    def __init__(self, real: Batch, graphs: "DecodeGraphs", size: int, form: DispatchForm) -> None:
        self.real, self._graphs = real, graphs
        mesh, layout = graphs.stage.mesh, graphs.stage.mesh.layout
        super().__init__(
            padded(real, size, graphs.scratch_block),
            *([size] * layout.dp, layout, mesh.at, graphs.device, graphs.block_size, form),
        )
        self.pages.bounds = AttentionBounds(1, graphs.width * graphs.block_size, is_decode=True)

    def _columns(self) -> list[Array]:
        own = self._slices[self._at.tp_rank]
        is_real = np.arange(own.start, own.stop) < self.real.num_seqs
        return [is_real, *super()._columns()]

    def _place(self) -> None:
        columns = self._columns()
        self._inputs = self._graphs.inputs_of(self.batch.num_seqs, columns)
        self.is_real, *rest = self._inputs.tensors
        self._take(rest)

    def fill(self) -> None:
        """Bring it there."""
        self._inputs.fill(self._columns())


class DecodeGraphs:
    """The graphs of a stage. A step runs as usual and is recorded where its size is new.

    The largest is recorded first: the memory of the others is then a part of its.

    Args:
        num_blocks: of the cache, the one for padding not among them.
        records_transfers: whether graphs may have transfers between ranks in them.
    """

    def __init__(
        self,
        stage: TransformerStage,
        graphs: Graphs,
        limits: GraphLimits,
        *,
        num_blocks: int,
        block_size: int,
        records_transfers: bool,
    ) -> None:
        self.stage, self._graphs = stage, graphs
        travels = max(stage.mesh.stage.size, stage.mesh.tp.size) > 1
        self._takes_steps = records_transfers or not travels
        self.device, self.block_size = stage.device, block_size
        self.width = -(-limits.max_positions // block_size)
        self.scratch_block = num_blocks
        self._sizes = graph_sizes(limits.max_num_seqs)
        self._inputs: dict[int, StaticInputs] = {}
        shape = limits.max_num_seqs, self.width
        self._tables = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._rooms: dict[str, Tensor] = {}
        # By size, and form or layer: whole steps, and beginnings of layers.
        self._launch: dict[tuple[int, DispatchForm | int], Callable[[], None]] = {}

    def takes_steps(self, form: DispatchForm) -> bool:
        """Whether a whole step with that form can be recorded; else beginnings of its layers."""
        return self._takes_steps and is_static_on(self.stage.mesh.layout, form)

    def clear(self) -> None:
        """Forget what was recorded: weights, groups or the cache are others."""
        self._launch.clear()

    def padded(
        self, batch: Batch, num_tokens: Sequence[int], form: DispatchForm
    ) -> PaddedBatch | None:
        """A batch of one token a sequence, as a graph takes it; None where it is too large.

        Args:
            num_tokens: [dp]; of every data-parallel rank's batch.
        """
        assert batch.num_tokens == batch.num_seqs, "every sequence has one new token"
        most = max(num_tokens)
        sizes = [size for size in self._sizes if size >= most]
        return PaddedBatch(batch, self, sizes[0], form) if sizes and most else None

    def inputs_of(self, size: int, columns: Sequence[Array]) -> StaticInputs:
        """Where batches of that size go."""
        if size not in self._inputs:
            self._inputs[size] = StaticInputs(columns, self._tables[:size])
        return self._inputs[size]

    def run(self, part: PaddedBatch, arrived: Tensor | None) -> Tensor | HeadResult:
        """What `TransformerStage.forward` gives, without logits of other ranks.

        Args:
            arrived: hidden states from the stage before; None in the first one.

        Returns:
            Hidden states of all owned tokens, or the head's result of real sequences. Logits are
            gone with the next step.
        """
        form = part.dispatch_form
        self._prepare(part, form, self._forward)
        if arrived is not None:
            self._room("arrived", arrived)[: len(arrived)].copy_(arrived)
        part.fill()
        self._launch[part.batch.num_seqs, form]()
        if self.stage.mesh.is_last_stage:
            num = part.real.num_seqs
            token_ids = self._rooms["token_ids"][:num].clone()
            return HeadResult(token_ids, self._rooms["logits"][:num], None)
        return self._rooms["hidden"][: part.num_owned].clone()

    def layers_of(self, batch: Batch, form: DispatchForm) -> RunsLayers | None:
        """Runs the layers for a batch of one token a sequence, up to each dispatch as a graph.

        Where dispatch asks the host for numbers of rows, it runs between them as usual, on real
        tokens. None where the batch does not suit: each rank decides for itself.
        """
        own = [batch.num_seqs] * self.stage.mesh.layout.dp
        part = self.padded(batch, own, form) if self.stage.mesh.tp.size == 1 else None
        if part is None:
            return None

        def run(x: Tensor, real: ForwardBatch) -> Steps[Tensor]:
            part.fill()
            for layer, cache in self.stage.layers:
                self._room("x", x)[: len(x)].copy_(x)
                begun = self._begun(part, layer, cache)
                if isinstance(begun, Tensor):
                    x = begun
                else:
                    assert isinstance(layer.block, MoEBlock), "only such a block has a router"
                    x = yield from layer.block.finish(begun, real)
            return x

        return run

    def _begun(self, part: PaddedBatch, layer: DecoderLayer, cache: KVCache) -> Routed | Tensor:
        """Of real tokens, as `DecoderLayer.begin`; overwritten by the next layer."""
        size, num = part.batch.num_seqs, part.real.num_seqs

        def begin(padded: PaddedBatch) -> None:
            x = self._rooms["x"][: padded.batch.num_seqs]
            (begun,) = interleave([layer.begin(x, padded, cache)])
            if isinstance(begun, Tensor):
                self._keep("begun", begun)
                return
            for name, values in begun._asdict().items():
                self._keep(f"routed {name}", values)

        if self._prepare(part, layer.index, begin):
            part.fill()
        self._launch[size, layer.index]()
        if not isinstance(layer.block, MoEBlock):
            return self._rooms["begun"][:num]
        return Routed(*(self._rooms[f"routed {name}"][:num] for name in Routed._fields))

    def _prepare(
        self, part: PaddedBatch, kind: DispatchForm | int, run: Callable[[PaddedBatch], None]
    ) -> bool:
        """Record what is not there for a batch of this size; says whether there was anything.

        It runs on padding alone: nothing of a sequence is written over.
        """
        size, form = part.batch.num_seqs, part.dispatch_form
        nothing = part.real.only(np.empty(0, dtype=np.intp))
        # Whole steps alone count for whole steps, which hold collectives: ranks differ in others.
        is_step = isinstance(kind, str)
        is_first = all(isinstance(of, str) != is_step for _, of in self._launch)
        first = (self._sizes[-1],) if is_first else ()
        missing = [each for each in {*first, size} if (each, kind) not in self._launch]
        for each in sorted(missing, reverse=True):
            # A batch anew each time: what it keeps from its first layer on is recorded too.
            batch = partial(PaddedBatch, nothing, self, each, form)
            batch().fill()
            self._launch[each, kind] = self._captured(partial(_run_on, batch, run))
        return bool(missing)

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        meter = self.stage.mesh.recorder.meter
        if meter is None:
            return self._graphs.capture(run)
        sent: Sent = ()

        def metered() -> None:
            nonlocal sent
            sent = meter.sent_by(run)

        replay = self._graphs.capture(metered)

        def launch() -> None:
            meter.add_sent(sent)
            replay()

        return launch

    def _forward(self, part: PaddedBatch) -> None:
        """What is recorded."""
        stage = self.stage
        if stage.mesh.is_first_stage:
            x = stage.embed(part)
        else:
            x = self._room("arrived", stage.empty_hidden(1))[: part.num_owned]
        (result,) = interleave([stage.forward(x, part, needs_logits=False)])
        if isinstance(result, Tensor):
            self._keep("hidden", result)
            return
        assert result.token_ids is not None, "no more was asked for"
        self._keep("token_ids", result.token_ids)
        self._keep("logits", result.logits)

    def _keep(self, name: str, values: Tensor) -> None:
        self._room(name, values)[: len(values)].copy_(values)

    def _room(self, name: str, like: Tensor) -> Tensor:
        """For as many rows as there may be; made before anything is recorded."""
        if name not in self._rooms:
            shape = self._sizes[-1], *like.shape[1:]
            self._rooms[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self._rooms[name]


def _run_on(make: Callable[[], PaddedBatch], run: Callable[[PaddedBatch], None]) -> None:
    run(make())


def decode_graphs(
    stage: TransformerStage,
    limits: GraphLimits | None,
    *,
    num_blocks: int,
    block_size: int,
    records_transfers: bool,
) -> DecodeGraphs | None:
    """A stage's; None where its device has none.

    Args:
        limits: None where no step is to be recorded.
        num_blocks, block_size, records_transfers: as of `DecodeGraphs`.
    """
    graphs = None if limits is None else backend_for(stage.device).graphs()
    if limits is None or graphs is None:
        return None
    return DecodeGraphs(
        stage,
        graphs,
        limits,
        num_blocks=num_blocks,
        block_size=block_size,
        records_transfers=records_transfers,
    )
