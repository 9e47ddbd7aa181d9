"""Steps of a layer, one after the other, with their counts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertlane.cost.number_types import ITEM_BYTES, NumberTypes
from expertlane.cost.step.counts import Exchange
from expertlane.cost.step.kernel_sets import ENGINE, KernelSet
from expertlane.cost.step.operation import (
    Amounts,
    ExpectedTransfer,
    Floats,
    Ints,
    Kind,
    Operation,
    RowsByLink,
    Step,
    Transfer,
    TransferKind,
)
from expertlane.cost.step.stage_mesh import Axis, StageMesh
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link, Stage, Traffic


@dataclass(frozen=True)
class OneRank:
    """Stands for all ranks of a stage, in `size` scenarios; it has the longest shares.

    Attributes:
        stage: what it is one of.
    """

    stage: StageMesh
    size: int

    @property
    def layout(self) -> Layout:
        """Of the deployment."""
        return self.stage.layout

    @property
    def tp_rank(self) -> Ints:
        """[S]."""
        return np.zeros(self.size, dtype=np.int64)

    etp_rank = tp_rank

    @property
    def ep_per_node(self) -> int:
        """Ranks of an `ep` group on one node."""
        return self.stage.ep_per_node

    @property
    def num_ep_nodes(self) -> int:
        """Nodes that an `ep` group lies on."""
        return self.stage.num_ep_nodes


# Where ranks sit: coordinates of all of them, or of the one that stands for all.
RankArrays = StageMesh | OneRank


class StepWriter(ABC):
    """Puts down operations; how transfers look is its subclasses' matter.

    Attributes:
        steps: so far; operations, and transfers of the subclass's type.
    """

    steps: list[Any]

    def __init__(
        self, mesh: RankArrays, types: NumberTypes, layer: int, kernels: KernelSet = ENGINE
    ) -> None:
        self.mesh = mesh
        self.types = types
        self.kernels = kernels
        self.steps = []
        self._layer = layer
        self.transfer_kernels = {
            TransferKind.ALL_GATHER: kernels.gathered,
            TransferKind.REDUCE_SCATTER: kernels.reduced,
            TransferKind.ALL_TO_ALL: 1,
        }
        self._none: Ints = np.zeros(mesh.size, dtype=np.int64)

    @property
    def weight_item(self) -> int:
        """Bytes of a weight."""
        return ITEM_BYTES[self.types.weights]

    @property
    def norm_kernels(self) -> int:
        """Launches of one norm of hidden states."""
        is_wide = self.types.activations == "float32"
        return self.kernels.norm if is_wide else self.kernels.widened_norm

    def gemm(
        self,
        stage: Stage,
        m: Amounts,
        n: Amounts | int,
        k: Amounts | int,
        *,
        dtype: str | None = None,
        num_kernels: int = 1,
    ) -> None:
        """A product [m, k] · [k, n]; sizes of all ranks, [A] or one number.

        Args:
            dtype: of the weights, if not the deployment's.
        """
        num_weights = np.asarray(n) * np.asarray(k)
        item = ITEM_BYTES[dtype] if dtype else self.weight_item
        self.steps.append(
            Operation(
                kind=Kind.GEMM,
                stage=stage,
                layer=self._layer,
                sizes={"m": _floats(m), "n": _floats(n), "k": _floats(k)},
                flops=2 * m * num_weights,
                weight_bytes=(m > 0) * (num_weights * item),
                kv_bytes=self._none,
                num_kernels=num_kernels,
                dtype=dtype,
            )
        )

    def memory(self, stage: Stage, num_bytes: Amounts, num_kernels: int = 1) -> None:
        """Bytes [A] read and written, with nothing that is counted."""
        self.operation(Kind.MEMORY, stage, {"bytes": num_bytes}, num_kernels=num_kernels)

    def operation(
        self,
        kind: Kind,
        stage: Stage,
        sizes: dict[str, Amounts | int],
        *,
        flops: Amounts | None = None,
        weight_bytes: Amounts | None = None,
        kv_bytes: Amounts | None = None,
        num_kernels: int = 1,
    ) -> None:
        """Any other operation; counts left out are zeros."""
        self.steps.append(
            Operation(
                kind=kind,
                stage=stage,
                layer=self._layer,
                sizes={name: _floats(size) for name, size in sizes.items()},
                flops=self._none if flops is None else flops,
                weight_bytes=self._none if weight_bytes is None else weight_bytes,
                kv_bytes=self._none if kv_bytes is None else kv_bytes,
                num_kernels=num_kernels,
            )
        )

    def all_gather(
        self,
        stage: Stage,
        axis: Axis,
        rows: Amounts,
        payload: Ints | int,
        metadata: Ints | int = 0,
        *,
        num_steps_before_wait: int = 0,
    ) -> None:
        """Every rank sends its `rows` [A] to all of its group.

        Args:
            payload, metadata: bytes of a row; [A] or one number.
        """
        kind, to_all = TransferKind.ALL_GATHER, self._to_all(axis, rows)
        self._transfer(kind, stage, axis, to_all, payload, metadata, num_steps_before_wait)

    def reduce_scatter(self, stage: Stage, axis: Axis, rows: Amounts, payload: int) -> None:
        """Every rank gets, and adds up, its `rows` [A] of all of its group."""
        from_all = self._to_all(axis, rows).T
        self._transfer(TransferKind.REDUCE_SCATTER, stage, axis, from_all, payload)

    def all_to_all(
        self, stage: Stage, axis: Axis, rows: Exchange, payload: int, metadata: int = 0
    ) -> None:
        """Every rank sends rows of its own to each of its group."""
        self._transfer(TransferKind.ALL_TO_ALL, stage, axis, rows, payload, metadata)

    @abstractmethod
    def _to_all(self, axis: Axis, rows: Amounts) -> Exchange:
        """The exchange in which every rank sends `rows` [A] to each of its group."""

    @abstractmethod
    def _transfer(
        self,
        kind: TransferKind,
        stage: Stage,
        axis: Axis,
        rows: Exchange,
        payload: Ints | int,
        metadata: Ints | int = 0,
        num_steps_before_wait: int = 0,
    ) -> None:
        """Nothing in groups of one rank, as the engine's are left out."""


class StepList(StepWriter):
    """What the ranks of a stage do in turn; arrays over ranks."""

    mesh: StageMesh
    steps: list[Step]

    def _to_all(self, axis: Axis, rows: Amounts) -> Exchange:
        return rows[:, None]

    def _transfer(
        self,
        kind: TransferKind,
        stage: Stage,
        axis: Axis,
        rows: Exchange,
        payload: Ints | int,
        metadata: Ints | int = 0,
        num_steps_before_wait: int = 0,
    ) -> None:
        assert isinstance(rows, np.ndarray), "between each pair of ranks"
        mesh = self.mesh
        if mesh.group_size(axis) == 1:
            return
        rows = rows * mesh.peers(axis)
        sent = np.zeros((len(Traffic), mesh.size, mesh.size), dtype=np.int64)
        sent[Traffic.PAYLOAD] = rows * np.reshape(payload, (-1, 1))
        sent[Traffic.METADATA] = rows * np.reshape(metadata, (-1, 1))
        self.steps.append(
            Transfer(
                kind=kind,
                stage=stage,
                layer=self._layer,
                group=mesh.group(axis),
                node=mesh.node,
                sent_bytes=sent,
                num_kernels=self.transfer_kernels[kind],
                num_steps_before_wait=num_steps_before_wait,
                syncs_host=num_steps_before_wait > 0,  # counts, which size what comes next
                neighbours=mesh.neighbours(axis),
            )
        )


class ExpectedStepList(StepWriter):
    """What one rank of a stage that stands for all does in turn; arrays over scenarios."""

    mesh: OneRank
    steps: list[Operation | ExpectedTransfer]

    def _to_all(self, axis: Axis, rows: Amounts) -> Exchange:
        near, far, _ = self.mesh.stage.peers_by_link(axis)
        return RowsByLink(rows * near, rows * far)

    def _transfer(
        self,
        kind: TransferKind,
        stage: Stage,
        axis: Axis,
        rows: Exchange,
        payload: Ints | int,
        metadata: Ints | int = 0,
        num_steps_before_wait: int = 0,
    ) -> None:
        assert isinstance(rows, RowsByLink), "of one rank"
        if self.mesh.stage.group_size(axis) == 1:
            return
        near, far, num_nodes = self.mesh.stage.peers_by_link(axis)
        sent = np.zeros((len(Traffic), len(Link), self.mesh.size))
        sent[Traffic.PAYLOAD] = rows.near * payload, rows.far * payload
        sent[Traffic.METADATA] = rows.near * metadata, rows.far * metadata
        kernels = self.transfer_kernels[kind]
        self.steps.append(ExpectedTransfer(kind, stage, sent, (near, far), num_nodes, kernels))


def _floats(size: Amounts | int) -> Floats | float:
    return size.astype(np.float64) if isinstance(size, np.ndarray) else float(size)
