"""What runs on a rank while experts move: weights travel beside steps, then all switch at once.

Transfers go over the `ep` group, between ranks of one etp_rank. Commands come in the same order on
every rank, between steps: `start_moves` starts the transfers of some moves and returns at once, so
that they go on under the steps that follow; `finish_moves` waits for them; `apply_placements` takes
what arrived into use. A rank holds what arrives beside what it has until then.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertlane.comm.collectives import Pending
from expertlane.comm.progress import NO_LAYER
from expertlane.engine.commands import ApplyPlacements, FinishMoves, StartMoves, TimeOneMove
from expertlane.engine.worker import RankContext
from expertlane.ops.experts import Expert
from expertlane.spec.names import Stage


@dataclass(eq=False)
class _Arriving:
    layer: int
    expert: int
    pending: Pending


@dataclass(eq=False)
class Migration:
    """What is under way on a rank.

    Attributes:
        arrived: by hidden layer and logical expert, what is not in use yet.
    """

    sending: list[Pending] = field(default_factory=list)
    arriving: list[_Arriving] = field(default_factory=list)
    arrived: dict[int, dict[int, Expert]] = field(default_factory=dict)


def start_moves(context: RankContext, command: StartMoves) -> None:
    """Start to send and receive the experts of some moves."""
    stage, migration = context.deployed.stage, context.deployed.migration
    ep, blocks = stage.mesh.ep, stage.moe_blocks
    for move in command.moves:
        block = blocks.get(move.layer)
        if block is None or ep.rank not in (move.source, move.rank):
            continue
        if move.source == ep.rank:
            held = block.placement.experts_of_rank[ep.rank].index(move.expert)
            sending = ep.send(_as_bytes(block.experts.held[held]), move.rank)
            assert sending is not None, "an expert has weights"
            migration.sending.append(sending)
        else:
            room = _as_bytes(block.experts.held[0])  # all experts of a rank have one shape
            pending = ep.receive(torch.empty_like(room), move.source)
            migration.arriving.append(_Arriving(move.layer, move.expert, pending))


def finish_moves(context: RankContext, _: FinishMoves | None = None) -> None:
    """Wait for what was started."""
    migration: Migration = context.deployed.migration
    blocks = context.deployed.stage.moe_blocks
    context.progress.enter(Stage.SETUP, NO_LAYER)
    for sending in migration.sending:
        sending.wait()
    for arriving in migration.arriving:
        like = blocks[arriving.layer].experts.held[0]
        expert = _from_bytes(arriving.pending.wait(), like)
        migration.arrived.setdefault(arriving.layer, {})[arriving.expert] = expert
    migration.sending, migration.arriving = [], []
    context.progress.enter(Stage.IDLE, NO_LAYER)


def apply_placements(context: RankContext, command: ApplyPlacements) -> None:
    """Take new placements into use; what is not held any more is freed."""
    migration: Migration = context.deployed.migration
    for layer, block in context.deployed.stage.moe_blocks.items():
        placement = command.placements[layer]
        assert placement is not None, "an MoE layer has a placement"
        if placement != block.placement:
            block.switch(placement, migration.arrived.get(layer, {}))
    migration.arrived = {}


def time_one_move(context: RankContext, _: TimeOneMove) -> tuple[int, float]:
    """Bytes of an expert, and seconds in which each rank sends one to the next of its ep group."""
    stage = context.deployed.stage
    ep, blocks = stage.mesh.ep, list(stage.moe_blocks.values())
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
