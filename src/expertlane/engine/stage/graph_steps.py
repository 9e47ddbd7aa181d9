"""Which of a rank's steps, and which parts of them, are launched as graphs."""

from collections.abc import Sequence

import torch

from expertlane.engine.comm.collectives import Pending
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.model.decode_graphs import DecodeGraphs
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.padded_batch import PaddedBatch
from expertlane.engine.model.transformer import HeadResult, RunsLayers
from expertlane.schedule.plan import Batch, RankBatch
from expertlane.spec.dispatch import DispatchForm, DispatchMode
from expertlane.spec.names import Phase, Stage


class GraphSteps:
    """Chooses what is a graph, by what all ranks of all stages see alike; records, and launches.

    Args:
        graphs: of the rank's stage.
    """

    def __init__(self, graphs: DecodeGraphs, recorder: Recorder) -> None:
        self._graphs, self._recorder = graphs, recorder
        self._is_plain = self._balances_copies = False
        self.clear = graphs.clear

    def begin_step(self, phase: Phase | None, *, balances_copies: bool) -> None:
        """Called once for each step, after the recorder has begun it."""
        self._is_plain = phase is Phase.DECODE and not self._recorder.is_recording
        self._balances_copies = balances_copies

    def padded(
        self, batch: Batch, micro_batch: RankBatch, mode: DispatchMode
    ) -> PaddedBatch | None:
        """The batch as the graph of a whole step takes it; None where there is no such graph."""
        if not self._is_plain or mode.overlap or self._balances_copies:
            return None
        if not any(micro_batch.num_tokens) or not self._graphs.takes_steps(mode.form):
            return None
        return self._graphs.padded(batch, micro_batch.num_tokens, mode.form)

    def layers_of(self, parts: Sequence[ForwardBatch]) -> RunsLayers | None:
        """Runs layers with a graph up to each dispatch; None where the step has no such graphs."""
        if not self._is_plain or len(parts) != 1:
            return None
        form = parts[0].dispatch_form
        return (
            None if self._graphs.takes_steps(form) else self._graphs.layers_of(parts[0].batch, form)
        )

    def run(self, part: PaddedBatch, arriving: Pending | None) -> torch.Tensor | HeadResult:
        """As `DecodeGraphs.run`, once the hidden states of the stage before are there."""
        arrived = None if arriving is None else arriving.wait()
        self._recorder.enter(Stage.GRAPH)
        return self._graphs.run(part, arrived)

    def record(self, size: int, forms: Sequence[DispatchForm]) -> int:
        """As `DecodeGraphs.record`."""
        self._recorder.enter(Stage.GRAPH)
        return self._graphs.record(size, forms)
