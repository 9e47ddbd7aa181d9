"""Silent errors, planted on a rank: what tests of `--check` have to find."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from expertlane.balance.placement import Placement
from expertlane.engine.comm.collectives import CheckedGroup, Pending
from expertlane.engine.model.sampler import SampledBatch
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ranks.commands import Command
from expertlane.engine.stage.context import RankContext
from expertlane.spec.names import Stage

Patch = tuple[Any, str, Callable[..., Any]]
_LAYER = 1  # that errors are planted in
_TOKENS = 5  # whose values are not finite


class Plant(Command[None]):
    """Plant an error on one rank, from the next step on; none on all others, or where it is ''."""

    kind: str
    rank: int


class FlipBit(Command[None]):
    """Flip a bit of the weights of an expert that a rank holds, all or part of it."""

    rank: int
    layer: int
    expert: int


def plant(context: RankContext, command: Plant, stack: ExitStack) -> None:
    """Do so; what was planted before is taken back."""
    stack.close()
    if command.kind and context.rank == command.rank and context.deployed is not None:
        for target, name, new in _KINDS[command.kind](context.deployed):
            stack.enter_context(mock.patch.object(target, name, new))


def flip_bit(context: RankContext, command: FlipBit) -> None:
    block = context.deployed.stage.moe_blocks[command.layer]
    held = block.placement.experts_of_rank[block._mesh.at.ep_rank]
    if context.rank == command.rank and command.expert in held:
        tensor = block.experts.held[held.index(command.expert)].up.weight
        tensor.view(-1).view(torch.uint8)[3] ^= 0x10


def _spoil(values: torch.Tensor) -> torch.Tensor:
    values[0, :_TOKENS] = torch.nan
    return values


def _attention(deployed: Any) -> Iterator[Patch]:
    attention = deployed.stage._layers[_LAYER].attention
    compute, forward = attention.compute, attention.forward

    def spoiled(*given: Any) -> Any:
        return _spoil((yield from forward(*given)))

    yield attention, "forward", spoiled
    yield attention, "compute", lambda *given, **more: _spoil(compute(*given, **more))


def _experts(deployed: Any) -> Iterator[Patch]:
    kind, recorder = type(deployed.stage.moe_blocks[_LAYER].experts), deployed._recorder
    compute = kind.__call__

    def spoiled(*given: Any) -> torch.Tensor:
        results = compute(*given)
        return _spoil(results) if recorder.layer == _LAYER else results

    yield kind, "__call__", spoiled


def _flip(received: torch.Tensor) -> torch.Tensor:
    """A bit of the first row's last value: ids and counts, if any, stand before."""
    if received.numel():
        received[0].view(-1).view(torch.uint8)[-2] ^= 1
    return received


class _Changed(Pending):
    """A transfer of which a bit changes once it is there, and was looked at."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def wait(self) -> torch.Tensor:
        return _flip(self._pending.wait().clone())

    def let_go(self) -> None:
        self._pending.let_go()


def _change_on_the_way(pending: Pending) -> Pending:
    look = pending.look
    pending.look = lambda received: look(_flip(received)) if look else None
    return pending


def _transfer(
    deployed: Any,
    name: str,
    stage: Stage,
    layer: int,
    change: Callable[[Pending], Pending] = _change_on_the_way,
) -> Iterator[Patch]:
    """The first transfer of the stage, whether it waits at once or not."""
    recorder = deployed._recorder
    begin, at_once = getattr(CheckedGroup, name), recorder.wait_at_once

    def changed(group: CheckedGroup, *given: Any, **more: Any) -> Any:
        is_there = (recorder.stage, recorder.layer) == (stage, layer)
        pending = begin(group, *given, **more)
        return change(pending) if is_there else pending

    def changed_at_once(until: Callable[[], torch.Tensor]) -> torch.Tensor:
        received = at_once(until)
        if (recorder.stage, recorder.layer) == (
            stage,
            layer,
        ) and recorder.before is Stage.ATTENTION:
            _flip(received)
        return received

    yield CheckedGroup, name, changed
    if stage is Stage.COLLECTIVES:
        yield recorder, "wait_at_once", changed_at_once


def _twice(deployed: Any) -> Iterator[Patch]:
    """The first token goes twice to the rank that it goes to first, and the second not at all."""
    ops, recorder = backend_for(torch.device("cpu")), deployed._recorder
    outgoing = ops.outgoing

    def changed(*given: Any) -> Any:
        leaving = outgoing(*given)
        if recorder.layer == _LAYER:
            leaving.tokens[1] = leaving.tokens[0]
        return leaving

    yield ops, "outgoing", changed


def _dropped(deployed: Any) -> Iterator[Patch]:
    """The first pair goes nowhere."""
    ops, recorder = backend_for(torch.device("cpu")), deployed._recorder
    choose = ops.choose_copies

    def changed(*given: Any) -> torch.Tensor:
        ids = choose(*given)
        if recorder.layer == _LAYER:
            ids[0, 0] = -1
        return ids

    yield ops, "choose_copies", changed


def _lost(deployed: Any) -> Iterator[Patch]:
    """The result of the first pair is left out at home."""
    ops, recorder = backend_for(torch.device("cpu")), deployed._recorder
    gather_sum = ops.gather_sum

    def changed(values: Any, places: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        if (recorder.stage, recorder.layer) == (Stage.COMBINE, _LAYER):
            places = places.clone()
            places[0, 0] = -1
        return gather_sum(values, places, *rest, **more)

    yield ops, "gather_sum", changed


def _sampler(deployed: Any) -> Iterator[Patch]:
    choose = SampledBatch.choose
    yield SampledBatch, "choose", lambda *given: (choose(*given) + 1) % 200


def _counts(deployed: Any) -> Iterator[Patch]:
    choose = SampledBatch.choose

    def changed(batch: SampledBatch, *given: Any) -> torch.Tensor:
        chosen = choose(batch, *given)
        for group in batch._draws:
            group._num_output_tokens += 1
        return chosen

    yield SampledBatch, "choose", changed


def _placement(deployed: Any) -> Iterator[Patch]:
    block = deployed.stage.moe_blocks[_LAYER]
    held = block.placement.experts_of_rank
    yield block, "placement", Placement(block.placement.num_experts, held[::-1])


_KINDS: dict[str, Callable[[Any], Iterator[Patch]]] = {
    "attention": _attention,
    "experts": _experts,
    "gathered": lambda deployed: _transfer(deployed, "all_gather", Stage.COLLECTIVES, _LAYER),
    "sent": lambda deployed: _transfer(deployed, "all_to_all", Stage.DISPATCH, _LAYER),
    "kept": lambda deployed: _transfer(deployed, "all_to_all", Stage.DISPATCH, _LAYER, _Changed),
    "handed over": lambda deployed: _transfer(deployed, "receive", Stage.HAND_OVER, -1),
    "twice": _twice,
    "dropped": _dropped,
    "lost": _lost,
    "sampler": _sampler,
    "counts": _counts,
    "placement": _placement,
}
