"""A pipeline stage seen through one rank that stands for all, in many scenarios at once.

For a planner: the same laws of steps as a real program's (`cost.layer`), over numbers of tokens
instead of ranks, with expected traffic and the busiest rank's experts. S = scenarios.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.cost.number_types import NumberTypes
from expertlane.cost.step.batch_sizes import AttentionSizes, pairs_up_to
from expertlane.cost.step.launches import FUSED
from expertlane.cost.step.operation import Ints, LinkLoad, TransferKind
from expertlane.cost.step.stage_mesh import Axis, StageMesh
from expertlane.cost.step.step_list import StepWriter
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage

Reals = npt.NDArray[np.floating[Any]] | Ints


@dataclass(frozen=True, eq=False)
class LoadedTransfer:
    """A transfer by its loads alone; priced as a `cost.operation.Transfer`."""

    kind: TransferKind
    stage: Stage
    load: LinkLoad
    num_kernels: int


@dataclass(frozen=True, eq=False)
class Scenarios:
    """Alike sequences, of a data-parallel rank that has most; as `cost.batch_sizes.PartSizes`.

    Attributes:
        num_seqs, num_new, num_cached: [S]; sequences, and of each the new tokens and the positions
            cached before them. A scenario is all decodes or all prompts.
        stage_seqs: [S]; sequences of all data-parallel ranks, of which some may be idle.
    """

    tp: int
    num_seqs: Ints
    num_new: Ints
    num_cached: Ints
    stage_seqs: Ints

    @property
    def size(self) -> int:
        """S."""
        return len(self.num_seqs)

    @property
    def tokens(self) -> Ints:
        """[S]; of a data-parallel rank."""
        return self.num_seqs * self.num_new

    @property
    def stage_tokens(self) -> Ints:
        """[S]; of all data-parallel ranks."""
        return self.stage_seqs * self.num_new

    @property
    def owned(self) -> Ints:
        """[S]; of the rank that owns most."""
        owned: Ints = -(-self.tokens // self.tp)
        return owned

    @property
    def num_yielding(self) -> Ints:
        """[S]."""
        return self.num_seqs

    @property
    def owned_yielding(self) -> Ints:
        """[S]; on average."""
        owned: Ints = -(-self.num_seqs // self.tp)
        return owned

    @property
    def asks_logits(self) -> npt.NDArray[np.bool_]:
        """[S]; none asks for more than the likeliest token."""
        return np.zeros(self.size, dtype=np.bool_)

    def attention(self, window: int | None) -> AttentionSizes:
        """As `PartSizes.attention`."""
        after = self.num_cached + self.num_new
        is_decode = self.num_new == 1
        pairs = pairs_up_to(after, window) - pairs_up_to(self.num_cached, window)
        positions = after if window is None else np.minimum(after, self.num_new + window - 1)
        decodes, prompts = self.num_seqs * is_decode, self.num_seqs * ~is_decode
        return AttentionSizes(
            decode_seqs=decodes,
            decode_positions=decodes * positions,
            prefill_seqs=prompts,
            prefill_tokens=prompts * self.num_new,
            prefill_pairs=prompts * pairs,
            prefill_positions=prompts * positions,
            num_decode_groups=int(decodes.any()),
            num_prefill_groups=int(prompts.any()),
        )


@dataclass(frozen=True)
class ScenarioArrays:
    """Stands for the stage's ranks: arrays over scenarios, all of the first rank."""

    layout: Layout
    size: int

    @property
    def tp_rank(self) -> Ints:
        """[S]; the rank with the longest shares."""
        return np.zeros(self.size, dtype=np.int64)


class ScenarioSteps(StepWriter):
    """Puts down operations over scenarios, and transfers by their loads.

    Attributes:
        transfers: so far; apart from `steps`, which are operations alone.
    """

    def __init__(
        self, stage: StageMesh, num_scenarios: int, types: NumberTypes, layer: int = 0
    ) -> None:
        super().__init__(ScenarioArrays(stage.layout, num_scenarios), types, layer, FUSED)
        self.stage = stage
        self.transfers: list[LoadedTransfer] = []

    def all_gather(
        self,
        stage: Stage,
        axis: Axis,
        rows: Ints,
        payload: Ints | int,
        metadata: Ints | int = 0,
        *,
        num_steps_before_wait: int = 0,
    ) -> None:
        """As `StepWriter.all_gather`."""
        self._to_all(TransferKind.ALL_GATHER, stage, axis, rows * (payload + metadata))

    def reduce_scatter(self, stage: Stage, axis: Axis, rows: Ints, payload: int) -> None:
        """As `StepWriter.reduce_scatter`."""
        self._to_all(TransferKind.REDUCE_SCATTER, stage, axis, rows * payload)

    def _to_all(self, kind: TransferKind, stage: Stage, axis: Axis, num_bytes: Ints) -> None:
        near, far, _ = self.stage.peers_by_link(axis)
        self.exchange(kind, stage, axis, num_bytes * near, num_bytes * far)

    def exchange(
        self, kind: TransferKind, stage: Stage, axis: Axis, near: Reals, far: Reals
    ) -> None:
        """Bytes [S] that the busiest rank sends or receives, by link; nothing in groups of one."""
        size = self.stage.group_size(axis)
        if size == 1:
            return
        num_near, num_far, num_nodes = self.stage.peers_by_link(axis)
        num_bytes = np.stack([near, far]).astype(np.float64)
        num = num_bytes.shape[1]
        load = LinkLoad(
            out_bytes=num_bytes,
            in_bytes=num_bytes,
            num_peers=np.repeat([[num_near], [num_far]], num, axis=1),
            group_size=np.full(num, size),
            num_nodes=np.full(num, num_nodes),
        )
        self.transfers.append(LoadedTransfer(kind, stage, load, self.transfer_kernels[kind]))
