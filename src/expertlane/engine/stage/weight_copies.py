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
from expertlane.balance.transition import Part, PartKind, Transition
from expertlane.engine.comm.mesh import groups_of_axis
from expertlane.engine.comm.transport import Link
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.model.weights import EXPERT, HeldWeights
from expertlane.engine.ops.products import Expert, Linear
from expertlane.engine.ranks.commands import StageSpec
from expertlane.engine.stage.context import RankContext
from expertlane.engine.stage.preparing import parts_of, weight_source
from expertlane.spec.tensors import EMBEDDING


class Role(IntEnum):
    """The part of a rank in copying."""

    SENDS = 0  # it has all weights of its place
    RECEIVES = 1  # it has no weights
    MAKES = 2  # it has weights of another place, which it needs until it has made its own


class WeightCopies:
    """The copies of weights among the ranks of a stage: senders and receivers.

    Args:
        rank: the rank in the layout.
        own: the role of this rank.
    """

    def __init__(self, context: RankContext, spec: StageSpec, rank: int, own: Role) -> None:
        self._context, self._spec, self._rank = context, spec, rank
        groups = groups_of_axis(spec.layout, "stage")
        self._ranks = next(ranks for ranks in groups if rank in ranks)
        self._link: Link | None = None
        roles: dict[int, Role] = {}
        if _pays(context, spec) and len(self._ranks) > 1:
            numbers = tuple(spec.members.numbers[each] for each in self._ranks)
            self._link = context.meshes.link(numbers)
            roles = self._ask_all(self._link, own)
        self._receivers = [each for each, role in roles.items() if role is Role.RECEIVES]
        self._holders = [each for each, role in roles.items() if role is Role.SENDS]
        self._own = own
        holders = [spec.members.numbers[each] for each in self._holders]
        self._transition = Transition(spec.arrangement, spec.arrangement, holders)
        self._layers: list[int | None] = [*self._holding(rank).layers, None]

    def _holding(self, rank: int) -> Holding:
        return Holding(self._spec.model, self._spec.layout, rank, self._spec.placements)

    def _ask_all(self, link: Link, own: Role) -> dict[int, Role]:
        size = len(self._ranks)
        own_role = torch.full((1, 1), own, dtype=torch.uint8)
        received = torch.empty((size, 1), dtype=torch.uint8)
        link.all_gather(own_role, received, [1] * size).wait()
        return dict(zip(self._ranks, map(Role, received.view(-1).tolist()), strict=True))

    def _source(self, receiver: int, layer: int | None, key: Hashable) -> int | None:
        """The rank that sends weights to a receiver; None if there is none."""
        layout, members = self._spec.layout, self._spec.members
        if isinstance(key, tuple) and key[0] == EXPERT:
            _, expert, etp, etp_rank = key
            part = Part(layer, PartKind.EXPERT, (etp, etp_rank), expert)
        elif key == EMBEDDING:
            part = Part(layer, PartKind.EMBEDDING)
        else:
            cut = layout.tp, layout.coordinates(receiver).tp_rank
            part = Part(layer, PartKind.SLICE, cut)
        sender = self._transition.sender(part, members.numbers[receiver])
        return None if sender is None else members.rank_of(sender)

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
        to = self._holding(receiver)
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
        if self._link is None or self._own is not Role.RECEIVES or not self._holders:
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
            buffer = _bytes_of(tensor)
            if buffer.numel():
                self._link.receive(buffer, self._ranks.index(source)).wait()
        if isinstance(made, Tensor):
            return arrived[0]
        return made.with_tensors(arrived)


def _pays(context: RankContext, spec: StageSpec) -> bool:
    """True if copying is faster than making the weights; the same on all ranks."""
    is_made = spec.checkpoint is None or spec.weights == "int8"
    return is_made and context.platform.device.type == "cpu"


def _tensors(made: Any) -> Sequence[Tensor]:
    """The tensors of a part that are sent; none of small parts, or those not made from tensors."""
    if isinstance(made, Expert | Linear):
        return made.tensors()
    return [made] if isinstance(made, Tensor) and made.dim() > 1 else []


def _bytes_of(tensor: Tensor) -> Tensor:
    """A view of a tensor's bytes, [1, num_bytes]."""
    return tensor.view(-1).view(torch.uint8)[None]
