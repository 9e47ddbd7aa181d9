"""What runs on a rank while experts move: weights travel beside steps, then all are used at once.

Transfers go over the `ep` group, between ranks of one etp_rank. Every rank starts and finishes the
same parts of experts between the same two steps; they go on under the steps between. What arrived
is used from the step on that brings the new placements. A rank holds it beside what it has until
then, and what it gives up until that step is committed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlane.balance.moves import WHOLE, Move, Part
from expertlane.balance.placement import Placement
from expertlane.balance.placement_file import Placements
from expertlane.engine.comm.collectives import Pending
from expertlane.engine.comm.progress import NO_LAYER, ProgressReporter
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.ops.products import Expert
from expertlane.spec.names import Stage

Arrived = dict[int, dict[int, Expert]]  # by hidden layer and logical expert


@dataclass(eq=False)
class _Arriving:
    part: Part
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
        # Of experts of which only parts are through, by layer and expert.
        self._leaving: dict[tuple[int, int], list[Tensor]] = {}
        self._begun: dict[tuple[int, int], list[Tensor]] = {}
        self._arrived: Arrived = {}  # and not in use yet

    def start_moves(self, parts: Sequence[Part]) -> float:
        """Start to send and receive parts of experts, `Move.layer` being a hidden layer.

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
                room = torch.empty_like(_bytes_of(self._begun[key], part))
                self._arriving.append(_Arriving(part, ep.receive(room, part.move.source)))
        return time.perf_counter() - began_s

    def finish_moves(self) -> float:
        """Wait for what was started.

        Returns:
            Seconds that it took.
        """
        began_s = time.perf_counter()
        blocks = self._stage.moe_blocks
        self._progress.enter(Stage.SETUP, NO_LAYER)
        for sending in self._sending:
            sending.wait()
        for arriving in self._arriving:
            layer, expert = arriving.part.move.layer, arriving.part.move.expert
            _put_bytes(self._begun[layer, expert], arriving.part, arriving.pending.wait())
            if arriving.part.end == WHOLE:
                like, tensors = blocks[layer].experts.held[0], self._begun.pop((layer, expert))
                self._arrived.setdefault(layer, {})[expert] = like.with_tensors(tensors)
        self._sending, self._arriving = [], []
        self._progress.enter(Stage.IDLE, NO_LAYER)
        return time.perf_counter() - began_s

    def forget(self) -> None:
        """Drop what arrived for placements that never came, and what is on its way."""
        self._sending, self._arriving = [], []
        self._leaving, self._begun, self._arrived = {}, {}, {}

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

    def time_one_move(self) -> tuple[int, float, float]:
        """What a move takes, by one in which each rank sends an expert to the next of its ep.

        Returns:
            Bytes of an expert, seconds, and seconds of the least part.
        """
        ep, blocks = self._stage.mesh.ep, list(self._stage.moe_blocks.values())
        if not blocks:
            return 0, 0.0, 0.0
        held = blocks[0].experts.held[0]
        num_bytes, seconds = 0, []
        for end in (WHOLE, 1):
            began_s = time.perf_counter()
            tensors, part = _tensors(held), Part(Move(0, 0, 0, 0, 0), 0, end)
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


def _pieces(tensors: Sequence[Tensor], part: Part) -> list[Tensor]:
    """The bytes of a part of an expert's tensors, which follow each other; views."""
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    begin, end = (each * num_bytes // WHOLE for each in (part.begin, part.end))
    pieces, first = [], 0
    for tensor in tensors:
        own = tensor.view(-1).view(torch.uint8)
        pieces.append(own[max(begin - first, 0) : max(end - first, 0)])
        first += len(own)
    return pieces


def _bytes_of(tensors: Sequence[Tensor], part: Part) -> Tensor:
    """[1, num_bytes]; a copy; without rows where a part is less than a byte."""
    packed = torch.cat(_pieces(tensors, part))
    return packed.view(int(len(packed) > 0), len(packed))


def _put_bytes(tensors: Sequence[Tensor], part: Part, received: Tensor) -> None:
    """Fill a part in; `received` as `_bytes_of` gives it."""
    pieces = _pieces(tensors, part)
    arrived = torch.split(received.view(-1), [*map(len, pieces)])
    for piece, bytes_of_piece in zip(pieces, arrived, strict=True):
        piece.copy_(bytes_of_piece)
