"""Moves of experts on a rank: weights are sent beside steps, then all are used at once.

Transfers go over the `ep` group, between ranks of one etp_rank. Every rank starts and finishes the
same parts of experts between the same two steps; the transfers overlap with the steps between.
Experts that have arrived are used from the step on that brings the new placements. A rank holds
them beside its own until then, and those that it gives up until that step is committed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlane.balance.holding import Placements
from expertlane.balance.placement import WHOLE, Move, MovedPart, Placement
from expertlane.engine.comm.collectives import Pending
from expertlane.engine.comm.progress import NO_LAYER, ProgressReporter
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.ops.products import Expert
from expertlane.spec.names import Stage

Arrived = dict[int, dict[int, Expert]]  # by hidden layer and logical expert


@dataclass(eq=False)
class PlacementsBefore:
    """Placements that others have replaced, and the experts needed to restore them.

    Attributes:
        layers: by hidden layer, the old placement and the experts held then.
        arrived: experts that had arrived for the new placements.
    """

    layers: dict[int, tuple[Placement, dict[int, Expert]]]
    arrived: Arrived


class Migration:
    """Sends and receives a rank's experts, and switches to new placements."""

    def __init__(self, stage: TransformerStage, progress: ProgressReporter) -> None:
        self._stage = stage
        self._progress = progress
        self._sending: list[Pending] = []
        self._arriving: list[tuple[MovedPart, Pending]] = []
        # By layer and expert: tensors of experts that are sent or received only in part so far.
        self._leaving: dict[tuple[int, int], list[Tensor]] = {}
        self._begun: dict[tuple[int, int], list[Tensor]] = {}
        self._arrived: Arrived = {}  # and not in use yet

    def start_moves(self, parts: Sequence[MovedPart]) -> float:
        """Start to send and receive parts of experts; `Move.layer` is a hidden layer.

        Returns:
            Seconds that it took.
        """
        began_s = time.perf_counter()
        ep, blocks = self._stage.mesh.ep, self._stage.moe_blocks
        for part in parts:
            block = blocks.get(part.move.layer)
            if block is None:
                continue
            key = part.move.layer, part.move.expert
            if part.move.source == ep.rank:
                if key not in self._leaving:
                    held = block.placement.experts_of_rank[ep.rank].index(part.move.expert)
                    self._leaving[key] = _tensors(block.experts.held[held])
                sending = ep.send(_bytes_of(self._leaving[key], part), part.move.rank)
                if part.end == WHOLE:
                    del self._leaving[key]
                if sending is not None:
                    self._sending.append(sending)
            elif part.move.rank == ep.rank:
                if key not in self._begun:  # all experts of a rank have one shape
                    self._begun[key] = [*map(torch.empty_like, _tensors(block.experts.held[0]))]
                buffer = torch.empty_like(_bytes_of(self._begun[key], part))
                self._arriving.append((part, ep.receive(buffer, part.move.source)))
        return time.perf_counter() - began_s

    def finish_moves(self) -> float:
        """Wait for the transfers that were started.

        Returns:
            Seconds that it took.
        """
        began_s = time.perf_counter()
        blocks = self._stage.moe_blocks
        self._progress.enter(Stage.SETUP, NO_LAYER)
        for sending in self._sending:
            sending.wait()
        for part, pending in self._arriving:
            layer, expert = part.move.layer, part.move.expert
            _put_bytes(self._begun[layer, expert], part, pending.wait())
            if part.end == WHOLE:
                like, tensors = blocks[layer].experts.held[0], self._begun.pop((layer, expert))
                self._arrived.setdefault(layer, {})[expert] = like.with_tensors(tensors)
        self._sending, self._arriving = [], []
        self._progress.enter(Stage.IDLE, NO_LAYER)
        return time.perf_counter() - began_s

    def forget(self) -> None:
        """Drop transfers under way, and experts that arrived for placements not yet in use."""
        self._sending, self._arriving = [], []
        self._leaving, self._begun, self._arrived = {}, {}, {}

    def apply_placements(self, placements: Placements) -> PlacementsBefore:
        """Use new placements, [num_hidden_layers]; gives those that they replace."""
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
        """Undo the last `apply_placements`."""
        blocks = self._stage.moe_blocks
        for layer, (placement, held) in before.layers.items():
            blocks[layer].apply_placement(placement, held)
        self._arrived = before.arrived

    def time_one_move(self) -> tuple[int, float, float]:
        """Time a move in which each rank sends an expert to the next rank of its ep group.

        Returns:
            Bytes of an expert, seconds for it, and seconds for the smallest part of one.
        """
        ep, blocks = self._stage.mesh.ep, list(self._stage.moe_blocks.values())
        if not blocks:
            return 0, 0.0, 0.0
        held = blocks[0].experts.held[0]
        num_bytes, seconds = 0, []
        for end in (WHOLE, 1):
            began_s = time.perf_counter()
            tensors, part = _tensors(held), MovedPart(Move(0, 0, 0, 0, 0), 0, end)
            own = _bytes_of(tensors, part)
            sending = ep.send(own, (ep.rank + 1) % ep.size)
            arrived = ep.receive(torch.empty_like(own), (ep.rank - 1) % ep.size).wait()
            _put_bytes([*map(torch.empty_like, tensors)], part, arrived)
            if sending is not None:
                sending.wait()
            seconds.append(time.perf_counter() - began_s)
            num_bytes = max(num_bytes, own.numel())
        return num_bytes, seconds[0], seconds[1]


def _tensors(expert: Expert) -> list[Tensor]:
    return [tensor.contiguous() for tensor in expert.tensors()]


def _pieces(tensors: Sequence[Tensor], part: MovedPart) -> list[Tensor]:
    """Views of the bytes of a part of an expert, whose tensors are taken as concatenated."""
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    begin, end = (each * num_bytes // WHOLE for each in (part.begin, part.end))
    pieces, first = [], 0
    for tensor in tensors:
        own = tensor.view(-1).view(torch.uint8)
        pieces.append(own[max(begin - first, 0) : max(end - first, 0)])
        first += len(own)
    return pieces


def _bytes_of(tensors: Sequence[Tensor], part: MovedPart) -> Tensor:
    """A copy of a part's bytes, [1, num_bytes]; [0, 0] where the part is less than a byte."""
    packed = torch.cat(_pieces(tensors, part))
    return packed.view(int(len(packed) > 0), len(packed))


def _put_bytes(tensors: Sequence[Tensor], part: MovedPart, received: Tensor) -> None:
    """Fill a part of tensors with received bytes, in the shape of `_bytes_of`."""
    pieces = _pieces(tensors, part)
    arrived = torch.split(received.view(-1), [*map(len, pieces)])
    for piece, bytes_of_piece in zip(pieces, arrived, strict=True):
        piece.copy_(bytes_of_piece)
