"""What runs on a rank while experts move: weights travel beside steps, then all are used at once.

Transfers go over the `ep` group, between ranks of one etp_rank. Every rank starts and finishes the
same moves between the same two steps; they go on under the steps between. What arrived is used from
the step on that brings the new placements. A rank holds it beside what it has until then, and what
it gives up until that step is committed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlane.balance.moves import Move
from expertlane.balance.placement import Placement
from expertlane.balance.placement_file import Placements
from expertlane.comm.collectives import Pending
from expertlane.comm.progress import NO_LAYER, ProgressReporter
from expertlane.model.transformer import TransformerStage
from expertlane.ops.products import Expert
from expertlane.spec.names import Stage

Arrived = dict[int, dict[int, Expert]]  # by hidden layer and logical expert


@dataclass(eq=False)
class _Arriving:
    layer: int
    expert: int
    pending: Pending


@dataclass(eq=False)
class PlacementsBefore:
    """What brings the placements back that others have replaced.

    Attributes:
        layers: by hidden layer, the placement and the experts held then.
        arrived: what had arrived for the new ones.
    """

    layers: dict[int, tuple[Placement, dict[int, Expert]]]
    arrived: Arrived


class Migration:
    """Moves of a rank's experts, and the placements that follow from them."""

    def __init__(self, stage: TransformerStage, progress: ProgressReporter) -> None:
        self._stage = stage
        self._progress = progress
        self._sending: list[Pending] = []
        self._arriving: list[_Arriving] = []
        self._arrived: Arrived = {}  # and not in use yet

    def start_moves(self, moves: Sequence[Move]) -> None:
        """Start to send and receive experts, `Move.layer` being a hidden layer."""
        ep, blocks = self._stage.mesh.ep, self._stage.moe_blocks
        for move in moves:
            block = blocks.get(move.layer)
            if block is None or ep.rank not in (move.source, move.rank):
                continue
            if move.source == ep.rank:
                held = block.placement.experts_of_rank[ep.rank].index(move.expert)
                sending = ep.send(_as_bytes(block.experts.held[held]), move.rank)
                assert sending is not None, "an expert has weights"
                self._sending.append(sending)
            else:
                room = _as_bytes(block.experts.held[0])  # all experts of a rank have one shape
                pending = ep.receive(torch.empty_like(room), move.source)
                self._arriving.append(_Arriving(move.layer, move.expert, pending))

    def finish_moves(self) -> None:
        """Wait for what was started."""
        blocks = self._stage.moe_blocks
        self._progress.enter(Stage.SETUP, NO_LAYER)
        for sending in self._sending:
            sending.wait()
        for arriving in self._arriving:
            like = blocks[arriving.layer].experts.held[0]
            expert = _from_bytes(arriving.pending.wait(), like)
            self._arrived.setdefault(arriving.layer, {})[arriving.expert] = expert
        self._sending, self._arriving = [], []
        self._progress.enter(Stage.IDLE, NO_LAYER)

    def forget(self) -> None:
        """Drop what arrived for placements that never came, and what is on its way."""
        self._sending, self._arriving, self._arrived = [], [], {}

    def apply_placements(self, placements: Placements) -> PlacementsBefore:
        """Take new placements, [num_hidden_layers], into use."""
        before = PlacementsBefore({}, self._arrived)
        for layer, block in self._stage.moe_blocks.items():
            placement = placements[layer]
            assert placement is not None, "an MoE layer has a placement"
            if placement != block.placement:
                own = block.placement.experts_of_rank[self._stage.mesh.at.ep_rank]
                held = dict(zip(own, block.experts.held, strict=True))
                before.layers[layer] = block.placement, held
                block.apply_placement(placement, self._arrived.get(layer, {}))
        self._arrived = {}
        return before

    def restore(self, before: PlacementsBefore) -> None:
        """Take the last `apply_placements` back."""
        blocks = self._stage.moe_blocks
        for layer, (placement, held) in before.layers.items():
            blocks[layer].apply_placement(placement, held)
        self._arrived = before.arrived

    def time_one_move(self) -> tuple[int, float]:
        """Bytes of an expert, and seconds in which each rank sends one to the next of its ep."""
        ep, blocks = self._stage.mesh.ep, list(self._stage.moe_blocks.values())
        if not blocks:
            return 0, 0.0
        own = _as_bytes(blocks[0].experts.held[0])
        began_s = time.perf_counter()
        sending = ep.send(own, (ep.rank + 1) % ep.size)
        ep.receive(torch.empty_like(own), (ep.rank - 1) % ep.size).wait()
        if sending is not None:
            sending.wait()
        return own.numel(), time.perf_counter() - began_s


def _as_bytes(expert: Expert) -> Tensor:
    """[1, num_bytes]."""
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in expert.tensors()]
    return torch.cat(parts).view(1, -1)


def _from_bytes(received: Tensor, like: Expert) -> Expert:
    shapes = like.tensors()
    parts = torch.split(received.view(-1), [tensor.nbytes for tensor in shapes])
    return like.with_tensors(
        [
            part.clone().view(tensor.dtype).view(tensor.shape)  # aligned, and not all of it kept
            for part, tensor in zip(parts, shapes, strict=True)
        ]
    )
