"""Copies of weights to a new rank, after a loss, from ranks that hold the same ones.

Experts come from ranks with copies of them; attention, embedding, head and shared experts from
another data-parallel rank. All ranks compute the same schedule. Weights that no rank holds are
read.

Copying pays where ranks draw or round weights themselves. Weights that only have to be read come as
fast from the page cache (`docs/recovery.md`), which keeps no other rank busy.
"""

import time
from collections.abc import Hashable, Iterator, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from expertlane.balance.holding import Holding
from expertlane.engine.comm.mesh import groups_of_axis
from expertlane.engine.comm.transport import Link
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.model.weights import EXPERT, HeldWeights
from expertlane.engine.ops.products import Expert, Linear
from expertlane.engine.ranks.commands import StageSpec
from expertlane.engine.stage.preparing import parts_of, weight_source
from expertlane.engine.stage.worker import RankContext


class Part(IntEnum):
    """The role of a rank in copying."""

    SENDS = 0  # it has all weights of its place
    RECEIVES = 1  # it has no weights
    MAKES = 2  # it has weights of another place, which it needs until it has made its own


class WeightCopies:
    """The copies of weights among the ranks of a stage: senders and receivers.

    Args:
        rank: the rank in the layout.
        own: the role of this rank.
    """

    def __init__(self, context: RankContext, spec: StageSpec, rank: int, own: Part) -> None:
        self._context, self._spec, self._rank = context, spec, rank
        groups = groups_of_axis(spec.layout, "stage")
        self._ranks = next(ranks for ranks in groups if rank in ranks)
        self._link: Link | None = None
        parts: dict[int, Part] = {}
        if _pays(context, spec) and len(self._ranks) > 1:
            numbers = tuple(spec.members.numbers[each] for each in self._ranks)
            self._link = context.meshes.link(numbers)
            parts = self._ask_all(self._link, own)
        self._receivers = [each for each, part in parts.items() if part is Part.RECEIVES]
        self._holders = [each for each, part in parts.items() if part is Part.SENDS]
        self._own = own
        sizes = spec.model, spec.layout
        self._held = {each: Holding(*sizes, each, spec.placements) for each in self._ranks}
        self._layers: list[int | None] = [*self._held[rank].layers, None]

    def _ask_all(self, link: Link, own: Part) -> dict[int, Part]:
        size = len(self._ranks)
        told = torch.full((1, 1), own, dtype=torch.uint8)
        received = torch.empty((size, 1), dtype=torch.uint8)
        link.all_gather(told, received, [1] * size).wait()
        return dict(zip(self._ranks, map(Part, received.view(-1).tolist()), strict=True))

    def _source(self, receiver: int, layer: int | None, key: Hashable) -> int | None:
        """The rank that sends a part to a receiver; holders take turns. None if there is none."""
        held, to, turn = self._held, self._held[receiver].at, 0 if layer is None else layer
        if isinstance(key, tuple) and key[0] == EXPERT:
            assert layer is not None, "experts are in layers"
            turn += key[1]
            holders = [
                each
                for each in self._holders
                if held[each].at.etp_rank == to.etp_rank and key[1] in held[each].experts(layer)
            ]
        else:
            holders = [each for each in self._holders if held[each].at.tp_rank == to.tp_rank]
        return holders[turn % len(holders)] if holders else None

    def send(self, stage: TransformerStage) -> None:
        """Send the parts of which this rank is the sender."""
        if self._link is None or not self._receivers or not self._holders:
            return
        held = stage.held_weights()
        for layer in self._layers:
            for receiver in self._receivers:
                for key, made in self._in_order(held, layer, receiver):
                    if self._source(receiver, layer, key) == self._rank:
                        self._send(made, receiver)

    def _in_order(
        self, held: HeldWeights, layer: int | None, receiver: int
    ) -> Iterator[tuple[Hashable, Any]]:
        """Parts of a layer that may be sent, in the order in which the receiver makes them."""
        made = held.of_layer(layer)
        is_expert = {key: isinstance(key, tuple) and key[0] == EXPERT for key in made}
        yield from ((key, each) for key, each in made.items() if not is_expert[key])
        to = self._held[receiver]
        for expert in () if layer is None else to.experts(layer):
            key = EXPERT, expert, to.slices.etp, to.slices.etp_rank
            if key in made:
                yield key, made[key]

    def _send(self, made: Any, receiver: int) -> None:
        assert self._link is not None, "there are other ranks"
        for tensor in _tensors(made):
            own = _bytes_of(tensor.contiguous())
            if own.numel():
                self._link.send(own, self._ranks.index(receiver)).wait()
        self._context.progress.touch()

    def receive(self) -> tuple[HeldWeights, float]:
        """Receive weights; gives them and the seconds that it took."""
        began_s, spec, context = time.perf_counter(), self._spec, self._context
        if self._link is None or self._own is not Part.RECEIVES or not self._holders:
            return HeldWeights(), 0.0
        source = weight_source(spec, context.platform, context.progress.touch)
        source.is_ahead, source.fill = True, self._fill
        parts = parts_of(context, spec, self._rank, source)
        for layer in parts.layers:
            parts.layer(layer)
        parts.embedding()
        parts.head()
        return source.held, time.perf_counter() - began_s

    def _fill(self, layer: int | None, key: Hashable, made: Any) -> Any:
        source, tensors = self._source(self._rank, layer, key), _tensors(made)
        if source is None or not tensors:
            return None
        assert self._link is not None, "there are other ranks"
        arrived = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors
        ]
        for tensor in arrived:
            room = _bytes_of(tensor)
            if room.numel():
                self._link.receive(room, self._ranks.index(source)).wait()
        if isinstance(made, Tensor):
            return arrived[0]
        return made.with_tensors(arrived)


def _pays(context: RankContext, spec: StageSpec) -> bool:
    """Whether copying is faster than making the weights; the same on all ranks."""
    is_made = spec.checkpoint is None or (spec.weights == "int8" and not spec.cache_int8)
    return is_made and context.platform.device.type == "cpu"


def _tensors(made: Any) -> Sequence[Tensor]:
    """The tensors of a part that are sent; none of small parts, or those not made from tensors."""
    if isinstance(made, Expert | Linear):
        return made.tensors()
    return [made] if isinstance(made, Tensor) and made.dim() > 1 else []


def _bytes_of(tensor: Tensor) -> Tensor:
    """A view of a tensor's bytes, [1, num_bytes]."""
    return tensor.view(-1).view(torch.uint8)[None]
