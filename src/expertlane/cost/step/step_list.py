"""Steps of a layer, put down one after the other with their counts."""

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np

from expertlane.cost.number_types import ITEM_BYTES, NumberTypes
from expertlane.cost.step.launches import EAGER, Launches
from expertlane.cost.step.operation import (
    Floats,
    Ints,
    Kind,
    Operation,
    Step,
    Transfer,
    TransferKind,
)
from expertlane.cost.step.stage_mesh import Axis, StageMesh
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage, Traffic


class RankArrays(Protocol):
    """What operations ask of where ranks sit."""

    @property
    def layout(self) -> Layout:
        """Of the deployment."""
        ...

    @property
    def size(self) -> int:
        """Length of all arrays, R."""
        ...

    @property
    def tp_rank(self) -> Ints:
        """[R]."""
        ...


class StepWriter(ABC):
    """Puts down operations; how transfers look is its subclasses' matter.

    Attributes:
        steps: so far.
    """

    def __init__(
        self, mesh: RankArrays, types: NumberTypes, layer: int, launches: Launches = EAGER
    ) -> None:
        self.mesh = mesh
        self.types = types
        self.launches = launches
        self.steps: list[Step] = []
        self._layer = layer
        self.transfer_kernels = {
            TransferKind.ALL_GATHER: launches.gathered,
            TransferKind.REDUCE_SCATTER: launches.reduced,
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
        return self.launches.norm if is_wide else self.launches.widened_norm

    def gemm(
        self,
        stage: Stage,
        m: Ints,
        n: Ints | int,
        k: Ints | int,
        *,
        dtype: str | None = None,
        num_kernels: int = 1,
    ) -> None:
        """A product [m, k] · [k, n]; sizes of all ranks, [R] or one number.

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

    def memory(self, stage: Stage, num_bytes: Ints, num_kernels: int = 1) -> None:
        """Bytes [R] read and written, with nothing that is counted."""
        self.operation(Kind.MEMORY, stage, {"bytes": num_bytes}, num_kernels=num_kernels)

    def operation(
        self,
        kind: Kind,
        stage: Stage,
        sizes: dict[str, Ints | int],
        *,
        flops: Ints | None = None,
        weight_bytes: Ints | None = None,
        kv_bytes: Ints | None = None,
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

    @abstractmethod
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
        """Every rank sends its `rows` [R] to all of its group.

        Args:
            payload, metadata: bytes of a row; [R] or one number.
        """

    @abstractmethod
    def reduce_scatter(self, stage: Stage, axis: Axis, rows: Ints, payload: int) -> None:
        """Every rank gets, and adds up, its `rows` [R] of all of its group."""


class StepList(StepWriter):
    """What the ranks of a stage do in turn.

    Transfers within groups of one rank are left out, as the engine's are.
    """

    mesh: StageMesh

    def __init__(
        self, mesh: StageMesh, types: NumberTypes, layer: int, launches: Launches = EAGER
    ) -> None:
        super().__init__(mesh, types, layer, launches)

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
        self.transfer(
            TransferKind.ALL_GATHER,
            stage,
            axis,
            rows[:, None],
            np.reshape(payload, (-1, 1)),
            np.reshape(metadata, (-1, 1)),
            num_steps_before_wait=num_steps_before_wait,
        )

    def reduce_scatter(self, stage: Stage, axis: Axis, rows: Ints, payload: int) -> None:
        """As `StepWriter.reduce_scatter`."""
        self.transfer(TransferKind.REDUCE_SCATTER, stage, axis, rows[None], payload)

    def all_to_all(
        self, stage: Stage, axis: Axis, rows: Ints, payload: int, metadata: int = 0
    ) -> None:
        """Rows [R, R] by source and destination; those outside the groups do not count."""
        self.transfer(TransferKind.ALL_TO_ALL, stage, axis, rows, payload, metadata)

    def transfer(
        self,
        kind: TransferKind,
        stage: Stage,
        axis: Axis,
        rows: Ints,
        payload: Ints | int,
        metadata: Ints | int = 0,
        *,
        num_steps_before_wait: int = 0,
    ) -> None:
        """Rows and bytes that broadcast to [R, R]; nothing in groups of one."""
        mesh = self.mesh
        if mesh.group_size(axis) == 1:
            return
        rows = rows * mesh.peers(axis)
        sent = np.zeros((len(Traffic), mesh.size, mesh.size), dtype=np.int64)
        sent[Traffic.PAYLOAD] = rows * payload
        sent[Traffic.METADATA] = rows * metadata
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


def _floats(size: Ints | int) -> Floats | float:
    return size.astype(np.float64) if isinstance(size, np.ndarray) else float(size)
