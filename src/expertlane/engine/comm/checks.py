"""A rank's search for silent errors: guards, checksums, and records of its transfers.

An error that a rank sees alone, as a value that is not finite, is a fault. One that only shows in a
comparison with other ranks, as a checksum, is found by the launcher: checksums go to it with the
step's outcome, and `results.step_checks` compares them.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertlane.engine.comm.progress import NO_LAYER
from expertlane.results.step_checks import Alike, Place, RankChecks, TransferSums
from expertlane.spec.names import CheckLevel, CheckPoint


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's values in contiguous order."""
    if not tensor.numel():
        return 0
    whole = tensor.detach().cpu().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # a view of one value may have no stride
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


class Checks:
    """Faults, checksums, transfers and counts of pairs that a rank records in each step.

    Args:
        level: any but `off`.
        num_experts: logical experts of an MoE layer.
        etp_rank: this rank's; see `RankChecks`.
        first_layer: the first layer of this pipeline stage.

    Attributes:
        is_full: transfers and pairs are checked too.
    """

    def __init__(
        self, level: CheckLevel, num_experts: int, etp_rank: int, first_layer: int
    ) -> None:
        self.is_full = level == "full"
        self._num_experts, self._etp_rank = num_experts, etp_rank
        self._first_layer = first_layer
        self._micro_batch = 0
        self._places: list[Place] = []
        self._texts: list[str] = []
        self._alike: defaultdict[tuple[int, ...], list[tuple[Place, int]]] = defaultdict(list)
        self._moved: defaultdict[tuple[int, ...], list[tuple[Any, ...]]] = defaultdict(list)
        self._num_moves: defaultdict[tuple[int, ...], int] = defaultdict(int)
        self._pairs: dict[int, np.ndarray] = {}  # by layer: chosen, arrived

    def begin_step(self) -> None:
        """Clear records left by an earlier step, which may not have been finished."""
        self._micro_batch = 0
        self._places, self._texts, self._pairs = [], [], {}
        self._alike.clear()
        self._moved.clear()
        self._num_moves.clear()

    def set_micro_batch(self, micro_batch: int) -> None:
        """Record for this micro-batch from now on."""
        self._micro_batch = micro_batch

    def place(self, point: CheckPoint, layer: int = NO_LAYER) -> Place:
        """The place of a check: micro-batch, layer and point.

        Hidden states handed over from the stage before belong to that stage's last layer.
        """
        if point is CheckPoint.HAND_OVER:
            layer = self._first_layer - 1
        return Place.of(self._micro_batch, layer, point)

    def fault(self, point: CheckPoint, layer: int, text: str) -> None:
        """Record a fault; of a step's faults only the one at the first place is reported."""
        self._places.append(self.place(point, layer))
        self._texts.append(text)

    def finite(self, values: Tensor, point: CheckPoint, layer: int = NO_LAYER) -> None:
        """Record a fault if values are NaN or infinite."""
        # One pass: a sum of finite values may be infinite, but no other is finite.
        if math.isfinite(values.sum(dtype=torch.float32).item()):
            return
        if num := int(values.isfinite().logical_not_().sum()):
            text = "1 value is" if num == 1 else f"{num:,} values are"
            self.fault(point, layer, f"{text} not finite")

    def alike(self, ranks: Sequence[int], total: int, place: Place) -> None:
        """Record a checksum that should be equal on all these ranks."""
        if len(ranks) > 1:
            self._alike[tuple(ranks)].append((place, total))

    def begin_transfer(self, ranks: Sequence[int]) -> int:
        """The number of the group's next transfer, equal on all its ranks."""
        self._num_moves[tuple(ranks)] += 1
        return self._num_moves[tuple(ranks)]

    def moved(
        self,
        ranks: Sequence[int],
        number: int,
        place: Place,
        parts: Iterable[tuple[int, Tensor]],
        *,
        is_sent: bool,
    ) -> None:
        """Record checksums of parts sent to other ranks, or received from them.

        Args:
            ranks: global ranks of the group.
            number: the transfer's, of `begin_transfer`.
            parts: pairs of a global rank and the part that it gets or sent.
        """
        rows = self._moved[tuple(ranks)]
        for peer, part in parts:
            rows.append((place, number, peer, is_sent, checksum(part)))

    def pairs(self, layer: int, chosen: Tensor, experts: Sequence[int], arrived: Tensor) -> None:
        """Count the pairs of a layer.

        Args:
            chosen: [T, K]; logical experts of this rank's tokens.
            experts: [num_held]; logical experts that this rank holds.
            arrived: [num_held]; pairs that arrived for each of them.
        """
        counts = self._pairs.setdefault(layer, np.zeros((2, self._num_experts), dtype=np.int64))
        counts[0] += np.bincount(chosen.cpu().numpy().ravel(), minlength=self._num_experts)
        counts[1, list(experts)] += arrived.cpu().numpy()

    def end_step(self) -> RankChecks:
        """The step's records."""
        order = sorted(range(len(self._places)), key=lambda each: self._places[each])
        pairs = np.array(list(self._pairs.values()), dtype=np.int64)
        counts = pairs.reshape(-1, 2, self._num_experts)
        return RankChecks(
            places=_places(self._places[each] for each in order[:1]),
            texts=[self._texts[each] for each in order[:1]],
            alike=[
                Alike(list(ranks), _places(p for p, _ in rows), np.array([s for _, s in rows]))
                for ranks, rows in self._alike.items()
            ],
            etp_rank=self._etp_rank,
            layers=np.array(list(self._pairs), dtype=np.int64),
            chosen=np.ascontiguousarray(counts[:, 0]),
            arrived=np.ascontiguousarray(counts[:, 1]),
            transferred=[_transferred(ranks, rows) for ranks, rows in self._moved.items() if rows],
        )


def _places(places: Iterable[Place]) -> np.ndarray:
    return np.array(list(places), dtype=np.int64).reshape(-1, 3)


def _transferred(ranks: tuple[int, ...], rows: Sequence[tuple[Any, ...]]) -> TransferSums:
    places, *columns = zip(*rows, strict=True)
    numbers, peers, is_sent, sums = map(np.array, columns)
    return TransferSums(list(ranks), _places(places), numbers, peers, is_sent, sums)
