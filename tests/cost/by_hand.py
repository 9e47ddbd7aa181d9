"""What ranks did, written by hand, and links whose times a reader can follow."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from expertlane.cost.laws.profile import Device, LinkSheet, Profile, Term
from expertlane.cost.laws.times import Basis
from expertlane.cost.step.operation import OUTSIDE, TransferKind
from expertlane.results.step_record import Action, RankOperations, RankRecord
from expertlane.spec.names import Link, Stage
from records import rank_record

NUM_LAYERS = 3
_KINDS = list(TransferKind)


class RankLog:
    """Writes down what a rank does, one thing after the other."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self._world_size = world_size
        self._rows: list[tuple[int, int, int, int, float, int]] = []
        self._transfers: list[tuple[int, int, list[int]]] = []
        self.place(Stage.ATTENTION, 0)

    def place(self, stage: Stage, layer: int = OUTSIDE, micro_batch: int = 0) -> None:
        """Where what follows happens."""
        self._place = int(stage), layer, micro_batch

    def compute(self, cpu_s: float) -> None:
        """Compute so long."""
        self._add(Action.COMPUTE, cpu_s, -1)

    def post(
        self,
        sent: Mapping[int, int],
        first_rank: int = 0,
        kind: TransferKind = TransferKind.ALL_TO_ALL,
    ) -> int:
        """Begin a transfer; `sent`: bytes by global rank."""
        of_rank = [sent.get(rank, 0) for rank in range(self._world_size)]
        self._transfers.append((_KINDS.index(kind), first_rank, of_rank))
        self._add(Action.POST, 0.0, len(self._transfers) - 1)
        return len(self._transfers) - 1

    def send(self, to: int, num_bytes: int) -> None:
        """Begin to send hidden states to the next stage."""
        self.post({to: num_bytes}, self.rank % 2, TransferKind.SEND)

    def wait(self, transfer: int) -> None:
        """Need a transfer's result."""
        self._add(Action.WAIT, 0.0, transfer)

    def arrive(self) -> None:
        """Need what the stage before sends."""
        self._add(Action.ARRIVE, 0.0, -1)

    def _add(self, action: Action, cpu_s: float, transfer: int) -> None:
        self._rows.append((action, *self._place, cpu_s, transfer))

    def record(self, num_micro_batches: int = 1, *, count_idle: bool = False) -> RankRecord:
        """The rank's record of the step."""
        action, stage, layer, micro_batch, cpu_s, transfer = zip(*self._rows, strict=True)
        kind, first_rank, sent = (
            zip(*self._transfers, strict=True) if self._transfers else ([],) * 3
        )
        operations = RankOperations(
            *(np.array(each) for each in (action, stage, layer, micro_batch, cpu_s, transfer)),
            np.array(kind, dtype=np.int64),
            np.array(first_rank, dtype=np.int64),
            np.array(sent, dtype=np.int64).reshape(-1, self._world_size),
        )
        record = rank_record(
            self.rank,
            num_micro_batches=num_micro_batches,
            tokens=((0, 0),) * NUM_LAYERS,
            world_size=self._world_size,
            blocked={(0, NUM_LAYERS, Stage.IDLE): 9.0} if count_idle else None,
        )
        return replace(record, operations=operations)


def logs(num_ranks: int, world_size: int | None = None) -> list[RankLog]:
    """Of ranks from 0 on."""
    return [RankLog(rank, world_size or num_ranks) for rank in range(num_ranks)]


def records_of(ranks: Sequence[RankLog], num_micro_batches: int = 1) -> list[RankRecord]:
    """The records of all of them."""
    return [rank.record(num_micro_batches) for rank in ranks]


def _exact(value: float) -> Term:
    return Term(value, value, value, Basis.BOUND, "made up")


# A collective takes 1 s and a second a byte, a send 3 s; over nodes 2 s or 4 s, and two a byte.
LINKS = Profile(
    "made-up links",
    Device("made up", 1e9, 1e9, {"float32": 1e9}, "made up"),
    8,
    {Link.INTRA_NODE: LinkSheet(1.0, "made up"), Link.INTER_NODE: LinkSheet(0.5, "made up")},
    terms={
        "floor_s.collective.intra_node": _exact(1.0),
        "floor_per_peer_s.collective.intra_node": _exact(0.0),
        "efficiency.collective.intra_node": _exact(1.0),
        "floor_s.collective.inter_node": _exact(2.0),
        "floor_per_doubling_s.collective.inter_node": _exact(0.0),
        "efficiency.collective.inter_node": _exact(1.0),
        "floor_s.send.intra_node": _exact(3.0),
        "efficiency.send.intra_node": _exact(1.0),
        "floor_s.send.inter_node": _exact(4.0),
        "efficiency.send.inter_node": _exact(1.0),
        **{f"contention.{kind}": _exact(0.0) for kind in TransferKind},
    },
)
