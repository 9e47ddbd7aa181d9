"""What ranks do when they join a new epoch, held against what `balance.transition` says.

Ranks that a process forks after `watch_ranks` write a line to a file after each `Redeploy`.
"""

import json
from collections.abc import Callable, Collection, Hashable
from pathlib import Path
from typing import Any
from unittest import mock

from expertlane.balance.transition import Arrangement, Part, PartKind, Transition
from expertlane.engine.model.weights import EXPERT, HeldWeights, WeightSource
from expertlane.engine.ranks.commands import HeldBytes, Redeploy, StageSpec
from expertlane.engine.stage import worker
from expertlane.engine.stage.deployed_stage import DeployedStage
from expertlane.engine.stage.weight_copies import Role, WeightCopies
from expertlane.spec.names import Origin
from expertlane.spec.tensors import EMBEDDING, FINAL_NORM, HEAD

Key = tuple[int | None, Hashable]
_COMMON = ("attention_norm", "moe_norm", "router", FINAL_NORM)


def part_of(layer: int | None, key: Hashable, spec: StageSpec, rank: int) -> Part:
    """The part that weights belong to, by their key in `WeightSource.once`."""
    at = spec.layout.coordinates(rank)
    match key:
        case (name, int(expert), int(etp), int(etp_rank)) if name == EXPERT:
            return Part(layer, PartKind.EXPERT, (etp, etp_rank), expert)
        case _ if key == EMBEDDING:
            return Part(layer, PartKind.EMBEDDING)
        case _ if key in _COMMON:
            return Part(layer, PartKind.COMMON)
    assert layer is not None or key[0] == HEAD, key  # type: ignore[index]
    return Part(layer, PartKind.SLICE, (spec.layout.tp, at.tp_rank))


def _arrangement(spec: StageSpec, deployed: DeployedStage | None = None) -> Arrangement:
    placements = list(spec.placements)
    if deployed is not None:
        for layer, block in deployed.stage.moe_blocks.items():
            placements[layer] = block.placement
    return Arrangement.alike(spec.members, tuple(placements), spec.ranks_per_node)


class _Watch:
    """Looks at the `Redeploy` of a rank. Processes that are forked have one each.

    Attributes:
        parked: parts that the rank has kept of a place that it had.
        left: the arrangement that it leaves in this `Redeploy`; None if it leaves none.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.parked: frozenset[Part] = frozenset()
        self.begin()

    def begin(self) -> None:
        self.left: Arrangement | None = None
        self.keeps_cache = False
        self.origins: dict[Key, Origin] = {}
        self.senders: dict[Key, int | None] = {}
        self.roles: dict[int, Role] = {}

    def redeploy(self, handler: Callable[[Any, Redeploy], HeldBytes]) -> Any:
        def watched(context: Any, command: Redeploy) -> HeldBytes:
            self.begin()
            spec, had = command.deploy.spec, context.deployed
            ahead = HeldWeights() if context.preparation is None else context.preparation.take()
            ahead = ahead.copy()
            held = handler(context, command)
            wrong, counts = self.compare(context.rank, spec, ahead, context.deployed is had)
            line = {"process": context.rank, "wrong": wrong, **counts}
            with self.file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            if context.deployed is not None:
                self.parked = frozenset()
            return held

        return watched

    def compare(
        self, own: int, spec: StageSpec, ahead: HeldWeights, stays: bool
    ) -> tuple[list[str], dict[str, int]]:
        """What is not as the transition says, and how many parts were kept, received and read."""
        after, wrong, numbers = _arrangement(spec), [], spec.members.numbers
        rank = spec.members.rank_of(own)
        if rank is None:
            return [], {"keeps": 0, "receives": 0, "reads": 0}
        alive = {numbers[each] for each, role in self.roles.items() if role is Role.SENDS}
        stays = stays and rank is not None
        before = self.left or after
        if stays or self.left is not None:
            alive.add(own)
        part_of_key = {key: part_of(*key, spec, rank) for key in self.origins}
        is_ahead = {key: ahead.find(*key) is not None for key in self.origins}
        made_ahead = {part for key, part in part_of_key.items() if is_ahead[key]}
        made_ahead -= {part for key, part in part_of_key.items() if not is_ahead[key]}
        change = Transition(before, after, alive, {own: self.parked | made_ahead}).of(own)
        is_sent_to = self.roles.get(rank) == Role.RECEIVES
        if stays and change.keeps != after.parts_of(own):
            wrong.append(f"process {own} stays and lacks {after.parts_of(own) - change.keeps}")
        if not stays and {*part_of_key.values()} != after.parts_of(own):
            wrong.append(f"process {own} made {after.parts_of(own) ^ {*part_of_key.values()}}")
        for key, origin in self.origins.items():
            part, may_be = part_of_key[key], {Origin.READ}
            if part in change.keeps:
                may_be = {Origin.KEPT, Origin.AHEAD}
            elif is_ahead[key]:  # and others of the part are not
                may_be = {Origin.AHEAD}
            elif part in change.receives and is_sent_to:
                may_be = {Origin.COPIED}
                if part.kind is PartKind.COMMON:  # too small to be sent
                    may_be.add(Origin.READ)
            if origin not in may_be:
                wrong.append(f"process {own}: {part} was {origin}, not {sorted(may_be)}")
            sender = self.senders.get(key)
            if origin is Origin.COPIED and sender != change.receives.get(part):
                wrong.append(f"process {own}: {part} came from {sender}")
        everyone = {*before.members.numbers} if stays or self.left is not None else ()
        caches = Transition(before, after, everyone).caches
        at = spec.layout.coordinates(rank)
        if (stays or self.keeps_cache) != ((at.replica, at.dp_rank) in caches):
            wrong.append(f"process {own}: it keeps its cache: {stays or self.keeps_cache}")
        counts = change.keeps, change.receives, change.reads
        return wrong, dict(zip(("keeps", "receives", "reads"), map(len, counts), strict=True))


def watch_ranks(file: Path) -> None:
    """Have the ranks that this process will fork compare, and write lines to a file."""
    watch = _Watch(file)
    leave, once = DeployedStage.leave, WeightSource.once
    ask_all, fill = WeightCopies._ask_all, WeightCopies._fill

    def watched_leave(self: DeployedStage, *args: Any) -> Any:
        left = leave(self, *args)
        watch.left = _arrangement(self.spec, self)
        watch.keeps_cache = left.caches is not None
        rank = self.spec.members.numbers[self._mesh._rank]
        watch.parked |= watch.left.parts_of(rank)
        return left

    def watched_once(self: WeightSource, layer: Any, key: Any, *args: Any, **more: Any) -> Any:
        if not self.is_ahead and self.fill is None:
            had = [origin for origin, given in self.given.items() if given.find(layer, key)]
            watch.origins[layer, key] = had[0] if had else Origin.READ
        return once(self, layer, key, *args, **more)

    def watched_ask(self: WeightCopies, *args: Any) -> Any:
        watch.roles = ask_all(self, *args)
        return watch.roles

    def watched_fill(self: WeightCopies, layer: Any, key: Any, made: Any) -> Any:
        source = self._source(self._rank, layer, key)
        numbers = self._spec.members.numbers
        watch.senders[layer, key] = None if source is None else numbers[source]
        return fill(self, layer, key, made)

    for kind, name, new in (
        (DeployedStage, "leave", watched_leave),
        (WeightSource, "once", watched_once),
        (WeightCopies, "_ask_all", watched_ask),
        (WeightCopies, "_fill", watched_fill),
    ):
        mock.patch.object(kind, name, new).start()
    handlers = {**worker.HANDLERS, Redeploy: watch.redeploy(worker.HANDLERS[Redeploy])}
    mock.patch.object(worker, "HANDLERS", handlers).start()


def found(file: Path) -> tuple[list[str], dict[str, int]]:
    """What was wrong on all ranks, and counts of parts, over all lines of a file."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    names: Collection[str] = ("keeps", "receives", "reads")
    counts = {name: sum(line[name] for line in lines) for name in names}
    return [each for line in lines for each in line["wrong"]], {"joined": len(lines), **counts}
