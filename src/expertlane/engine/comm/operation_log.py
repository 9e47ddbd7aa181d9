"""The operations of a rank in a step, in order, so that they can be replayed on other links.

Computing is timed by the CPU clock of the rank's thread, and not while the transport runs, so that
neither the other ranks on its core nor the transport count.
"""

import time
from collections.abc import Sequence

import numpy as np

from expertlane.cost.step.operation import TransferKind
from expertlane.results.step_record import Action, RankOperations
from expertlane.spec.names import Stage

_KINDS = list(TransferKind)


class OperationLog:
    """The computations, transfers and waits of one rank in one step.

    It starts with a computation; between `pause` and `resume` nothing is timed.

    Args:
        stage: of the first computation.
        layer: of the first computation.
    """

    def __init__(self, stage: Stage, layer: int) -> None:
        self._rows: list[tuple[int, int, int, int, float, int]] = []
        self._transfers: list[tuple[int, int, list[int]]] = []
        self._place = (int(stage), layer, 0)
        self._is_paused = True
        self.resume()

    def enter(self, stage: Stage, layer: int, micro_batch: int) -> None:
        """End the present computation and start another one."""
        self.pause()
        self._place = (int(stage), layer, micro_batch)
        self.resume()

    def pause(self) -> None:
        """End the present computation; until `resume` nothing is timed."""
        if not self._is_paused:
            self._is_paused = True
            self._add(Action.COMPUTE, time.thread_time() - self._since_s, -1)

    def resume(self) -> None:
        """Start timing again, at the same place."""
        self._is_paused = False
        self._since_s = time.thread_time()

    def post(self, kind: TransferKind, first_rank: int, sent_bytes: Sequence[int]) -> int:
        """Record that a transfer starts, while the log is paused.

        Args:
            first_rank: the lowest global rank of its group.
            sent_bytes: [world_size]; to each global rank.

        Returns:
            The transfer's number in this log, which `wait` takes.
        """
        number = len(self._transfers)
        self._transfers.append((_KINDS.index(kind), first_rank, list(sent_bytes)))
        self._add(Action.POST, 0.0, number)
        return number

    def wait(self, transfer: int) -> None:
        """Record that the rank needs a transfer's result, while the log is paused."""
        self._add(Action.WAIT, 0.0, transfer)

    def arrive(self) -> None:
        """Record that the rank needs what the previous stage sends, while the log is paused."""
        self._add(Action.ARRIVE, 0.0, -1)

    def _add(self, action: Action, seconds: float, transfer: int) -> None:
        self._rows.append((action, *self._place, seconds, transfer))

    def operations(self, world_size: int) -> RankOperations:
        """Everything recorded, as arrays; the log must be paused."""
        rows = np.array(self._rows, dtype=np.float64).reshape(-1, 6)
        action, stage, layer, micro_batch = rows[:, :4].T.astype(np.int64)
        kinds, first_ranks, sent = (
            zip(*self._transfers, strict=True) if self._transfers else [()] * 3
        )
        return RankOperations(
            action=action,
            stage=stage,
            layer=layer,
            micro_batch=micro_batch,
            cpu_s=rows[:, 4].copy(),
            transfer=rows[:, 5].astype(np.int64),
            kind=np.array(kinds, dtype=np.int64),
            first_rank=np.array(first_ranks, dtype=np.int64),
            sent_bytes=np.array(sent, dtype=np.int64).reshape(-1, world_size),
        )
