"""From a step's program to work with times: what the device and the links say of each step."""

from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import BOUNDS, LIKELY, Execution, Profile, Terms
from expertlane.cost.laws.times import Times
from expertlane.cost.step.operation import (
    ATTENTION,
    SIZES,
    Floats,
    HandOver,
    NumberTypes,
    OneOfGroup,
    Operation,
    OpKind,
    RankGroups,
    Step,
    Transfer,
    TransferKind,
)
from expertlane.cost.step.program import Section, StepProgram
from expertlane.spec.names import Stage

_NOTHING_LEFT = 1e-30  # not 0: what takes no time takes none beside a transfer either


@dataclass(frozen=True, eq=False)
class TimedStep:
    """An operation or a transfer.

    Attributes:
        times: seconds of each rank's own share of it.
        contention: of a transfer, the share of compute that is lost while it is in flight.
        offset: in a block of several layers, how many before its own.
    """

    step: Step
    times: Times
    contention: float = 0.0
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Block:
    """Layers in a row that repeat the same steps in the same times; often a single layer.

    Attributes:
        steps: steps of a layer, or of a few that differ and repeat together.
        layers: hidden layers that each repetition begins with, or `(OUTSIDE,)`; they stand in
            place of the steps' own.
    """

    steps: Sequence[TimedStep]
    layers: Sequence[int]


@dataclass(frozen=True, eq=False)
class StageWork:
    """Work of a pipeline stage for one micro-batch.

    Attributes:
        parts: one, or the halves that two-batch overlap interleaves; none where no rank has
            a token.
        hand_over: until hidden states are at the next stage, [R] each; None on the last stage.
    """

    parts: Sequence[Sequence[Block]]
    hand_over: Times | None = None


_LONGEST_PERIOD = 8  # layers that repeat together


def blocks_of(sections: Sequence[tuple[int, Sequence[TimedStep]]]) -> list[Block]:
    """The blocks of a part.

    Args:
        sections: hidden layer or `OUTSIDE`, and its steps. Layers that do the same, or that
            alternate, are found by the identity of their steps.
    """
    blocks: list[Block] = []
    ids = [id(steps) for _, steps in sections]
    place = 0
    while place < len(sections):
        period, times = _repetition(ids, place)
        layer = sections[place][0]
        steps = [
            replace(each, offset=offset) if offset else each
            for offset, (_, of_layer) in enumerate(sections[place : place + period])
            for each in of_layer
        ]
        blocks.append(Block(steps, range(layer, layer + period * times, period)))
        place += period * times
    return blocks


def _repetition(ids: Sequence[int], place: int) -> tuple[int, int]:
    """The period that covers most from `place` on, and how often it comes."""
    best = 1, 1
    for period in range(1, min(_LONGEST_PERIOD, (len(ids) - place) // 2) + 1):
        times = 1
        first = ids[place : place + period]
        while ids[place + times * period : place + (times + 1) * period] == first:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = period, times
    return best


class Entry(NamedTuple):
    """A step as the replay reads it.

    Attributes:
        seconds: [B, R]; of a transfer, the longest of each group; overhead in series included.
        launch_s: [B, 1]; of a host that runs ahead; None where none does.
        overhead_s: [B, 1]; of posting a transfer.
        groups: None of an operation.
        offset: as in `TimedStep`.
        lost_share, stretch: [B, 1]; of compute beside a transfer: the share that is lost, and how
            many times as long it takes.
        is_included: a transfer that takes no time, since the one before does both.
    """

    step: Step
    seconds: Floats
    launch_s: Floats | None
    overhead_s: Floats
    groups: RankGroups | None
    offset: int
    lost_share: Floats
    stretch: Floats
    is_included: bool = False


class Compiler:
    """Makes entries of blocks, once for each block, and keeps them as long as the block is."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._blocks: WeakKeyDictionary[Block, list[Entry]] = WeakKeyDictionary()
        self._contentions: dict[float, tuple[Floats, Floats]] = {}

    def entries(self, block: Block) -> list[Entry]:
        """The entries of a block."""
        known = self._blocks.get(block)
        if known is None:
            known = self._blocks[block] = self._compile(block)
        return known

    def _compile(self, block: Block) -> list[Entry]:
        steps = [timed.step for timed in block.steps]
        seconds = np.array([timed.times.bounds for timed in block.steps])
        num_kernels = np.array([step.num_kernels for step in steps])
        launch_s = num_kernels[:, None, None] * self._terms.launch_s[:, None]
        overhead_s = np.zeros_like(launch_s)
        is_serial = self._terms.execution is Execution.SERIAL
        if is_serial:
            overhead_s = np.array([self._terms.overhead_s(step) for step in steps])[..., None]
        work_s = seconds + overhead_s
        is_eager = self._terms.execution is Execution.EAGER
        entries = []
        for place, step in enumerate(steps):
            groups = step.groups if isinstance(step, Transfer) else None
            assert not isinstance(groups, OneOfGroup), "screening has no clock"
            contention = block.steps[place].contention
            if groups is not None:
                work_s[place] = groups.largest(seconds[place])
                if is_serial:  # a blocked rank wakes late: no loss to what computes meanwhile
                    busy_s = work_s[place].max(axis=-1)[LIKELY]
                    work_s[place] = work_s[place] + overhead_s[place]
                    contention *= float(busy_s / max(busy_s + overhead_s[place][LIKELY, 0], 1e-30))
                    overhead_s[place] = 0.0
            entries.append(
                Entry(
                    step,
                    work_s[place],
                    launch_s[place] if is_eager else None,
                    overhead_s[place],
                    groups,
                    block.steps[place].offset,
                    *self._contention(contention),
                    groups is not None and not seconds[place].any(),
                )
            )
        return entries

    def _contention(self, share: float) -> tuple[Floats, Floats]:
        if share not in self._contentions:
            lost = dict(zip(BOUNDS, (0.0, share, 1.0), strict=True))
            self._contentions[share] = _contention([lost[each] for each in self._terms.hiding])
        return self._contentions[share]


def _contention(shares: Sequence[float]) -> tuple[Floats, Floats]:
    """`Entry.lost_share` and `Entry.stretch`, from a share on each clock."""
    lost_share = np.array(shares)[:, None]
    return lost_share, 1 / np.maximum(1 - lost_share, _NOTHING_LEFT)


def transfer_entry(transfer: Transfer, times: Times, contention: float) -> Entry:
    """A transfer that costs the ranks nothing but its time.

    Args:
        times: seconds of each rank's own share of it.
        contention: the share of compute that is lost while it is in flight.
    """
    groups = transfer.groups
    assert isinstance(groups, RankGroups), "of all ranks"
    seconds = np.broadcast_to(groups.largest(times.bounds), times.bounds.shape)
    lost_share, stretch = _contention([contention] * len(BOUNDS))
    no_overhead = np.zeros((len(BOUNDS), 1))
    return Entry(transfer, seconds, None, no_overhead, groups, 0, lost_share, stretch)


_MOST_KNOWN = 4096


def law_dtype(types: NumberTypes, operation: Operation) -> str:
    """The type that an operation's law is for."""
    if operation.kind in ATTENTION:
        return types.kv
    return operation.dtype or types.weights


class Links(Protocol):
    """Source of transfer times, such as `LinkModel`."""

    def times(self, transfer: Transfer) -> Times:
        """Seconds of every rank for its own load."""
        ...

    def forwarded(self, between: Transfer, inside: Transfer) -> tuple[Times, Times]:
        """Seconds of both hops of a hierarchical dispatch or combine."""
        ...

    def hand_over(self, hand_over: HandOver) -> Times:
        """Seconds of every rank's message to the next pipeline stage."""
        ...

    def contention(self, transfer: Transfer, num_ranks: int) -> Floats | float:
        """The share of compute that is lost beside a transfer of a stage's ranks."""
        ...


def operation_times(
    device: DeviceModel, types: NumberTypes, operations: Sequence[tuple[Operation, int]]
) -> list[Times]:
    """Times of operations of so many ranks or scenarios; those of one law in one call."""
    alike: defaultdict[tuple[OpKind, str], list[int]] = defaultdict(list)
    for place, (operation, _) in enumerate(operations):
        alike[operation.kind, law_dtype(types, operation)].append(place)
    found: dict[int, Times] = {}
    for (kind, dtype), places in alike.items():
        own = [operations[place] for place in places]
        sizes = {
            name: np.concatenate([np.broadcast_to(each.sizes[name], (num,)) for each, num in own])
            for name in SIZES[kind]
        }
        times = device.times(kind, dtype, sizes)
        ends = np.cumsum([num for _, num in own]).tolist()
        for place, begin, end in zip(places, [0, *ends[:-1]], ends, strict=True):
            found[place] = times.part(slice(begin, end))
    return [found[place] for place in range(len(operations))]


def forwarded_times(links: Links, transfers: Sequence[Transfer]) -> dict[int, Times]:
    """Times of both hops of each hierarchical dispatch or combine of a layer, by id."""
    times: dict[int, Times] = {}
    for between, inside in _forwarding_hops(transfers):
        times[id(between)], times[id(inside)] = links.forwarded(between, inside)
    return times


class Pricing:
    """Gives each step of a program its times; layers that share their steps are priced once.

    So are steps of the same sizes in different layers, and operations in different programs.
    Both hops of a hierarchical dispatch or combine are priced together (`LinkModel.forwarded`).

    Args:
        links: the profile's own by default.
        only_likely: operations take their likely times on all of the clock's.
    """

    def __init__(
        self,
        profile: Profile,
        types: NumberTypes,
        links: Links | None = None,
        *,
        only_likely: bool = False,
    ) -> None:
        self.profile = profile
        self.types = types
        self._device = DeviceModel(profile)
        self._links: Links = links or LinkModel(profile)
        self._only_likely = only_likely
        self._known: OrderedDict[Hashable, Times] = OrderedDict()  # operations

    def work(self, program: StepProgram) -> list[list[StageWork]]:
        """[num_stages][num_micro_batches]."""
        times = self._operations(program)
        return [
            [
                StageWork(
                    [self._part(part, times) for part in stage.parts],
                    None if stage.hand_over is None else self._links.hand_over(stage.hand_over),
                )
                for stage in of_micro_batches
            ]
            for of_micro_batches in program.stages
        ]

    def _part(self, part: Sequence[Section], operations: Mapping[int, Times]) -> list[Block]:
        priced: dict[int, Sequence[TimedStep]] = {}
        transfers: dict[Hashable, Times] = {}
        for section in part:
            if id(section.steps) not in priced:
                priced[id(section.steps)] = self._section(section, operations, transfers)
        return blocks_of([(each.layer, priced[id(each.steps)]) for each in part])

    def _section(
        self, section: Section, operations: Mapping[int, Times], known: dict[Hashable, Times]
    ) -> list[TimedStep]:
        links, timed = self._links, []
        transfers = [step for step in section.steps if isinstance(step, Transfer)]
        forwarded = forwarded_times(links, transfers)
        for step in section.steps:
            if isinstance(step, Operation):
                timed.append(TimedStep(step, operations[id(step)]))
            else:
                times = forwarded.get(id(step)) or self._transfer(step, known)
                share = links.contention(step, len(step.load.group_size))
                timed.append(TimedStep(step, times, float(np.max(share))))
        return timed

    def _operations(self, program: StepProgram) -> dict[int, Times]:
        """Times by the id of an operation; new ones under a single law are priced together.

        Others are priced one by one: which of their laws is the fastest turns on their sizes.
        """
        num_ranks = program.stages[0][0].mesh.size
        sections = {id(each.steps): each for of in program.of_stages() for each in of.sections()}
        keys = {
            id(step): (self._key(step, num_ranks), step)
            for each in sections.values()
            for step in each.steps
            if isinstance(step, Operation)
        }
        calls: defaultdict[Hashable, dict[Hashable, Operation]] = defaultdict(dict)
        for key, step in keys.values():
            if key not in self._known:
                has_one_law = self._device.has_one_law(step.kind, law_dtype(self.types, step))
                calls[None if has_one_law else key][key] = step
        for of_call in calls.values():
            steps = [(step, num_ranks) for step in of_call.values()]
            priced = operation_times(self._device, self.types, steps)
            self._known.update(zip(of_call, map(self._bounded, priced), strict=True))
        found = {number: self._known[key] for number, (key, _) in keys.items()}
        while len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        return found

    def _key(self, step: Operation, num_ranks: int) -> Hashable:
        """The kind, number type and sizes of an operation, which its times are cached by."""
        sizes = [
            size.tobytes() if isinstance(size, np.ndarray) else size for size in step.sizes.values()
        ]
        return step.kind, law_dtype(self.types, step), num_ranks, *step.sizes, *sizes

    def _bounded(self, times: Times) -> Times:
        if not self._only_likely:
            return times
        return replace(times, bounds=np.broadcast_to(times.seconds, times.bounds.shape))

    def _transfer(self, step: Transfer, known: dict[Hashable, Times]) -> Times:
        """Price a transfer; those of tensor-parallel groups are alike in all layers of a part."""
        if step.stage is not Stage.COLLECTIVES:
            return self._links.times(step)
        key = step.kind, step.groups, step.sent_bytes.tobytes()
        if key not in known:
            known[key] = self._links.times(step)
        return known[key]


def _forwarding_hops(transfers: Sequence[Transfer]) -> Iterator[tuple[Transfer, Transfer]]:
    """Pairs of all-to-alls in one stage of a layer: the one over nodes, the one inside them.

    Halves that are interleaved each have such a pair, and begin theirs in the same order.
    """
    for stage in dict.fromkeys(each.stage for each in transfers):
        hops: defaultdict[Hashable, list[Transfer]] = defaultdict(list)  # by their groups
        for each in transfers:
            if each.stage is stage and each.kind is TransferKind.ALL_TO_ALL:
                hops[each.groups].append(each)
        if len(hops) == 2:
            between, inside = sorted(
                hops.values(), key=lambda hop: -int(hop[0].load.num_nodes.max())
            )
            yield from zip(between, inside, strict=False)
