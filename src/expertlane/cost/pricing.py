"""From a step's program to work with times: what the device and the links say of each step."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np

from expertlane.cost.device import DeviceModel
from expertlane.cost.links import LinkModel
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.operation import Kind, Operation, Step, Transfer, TransferKind
from expertlane.cost.profile import Profile
from expertlane.cost.program import PartProgram, Section, StepProgram
from expertlane.cost.times import Times
from expertlane.cost.work import Block, StageWork, TimedStep, blocks_of
from expertlane.spec.names import Stage

_MOST_KNOWN = 4096

_READ_THE_CACHE = (
    Kind.PREFILL_ATTENTION,
    Kind.DECODE_ATTENTION,
    Kind.LATENT_PREFILL,
    Kind.LATENT_DECODE,
)


def law_dtype(types: NumberTypes, operation: Operation) -> str:
    """The type that an operation's law is for."""
    if operation.kind in _READ_THE_CACHE:
        return types.kv
    return operation.dtype or types.weights


class Pricing:
    """Gives each step of a program its times; layers that share their steps are priced once.

    So are steps of the same sizes in different layers, and operations in different programs.
    Both hops of a hierarchical dispatch or combine are priced together (`LinkModel.forwarded`).
    """

    def __init__(self, profile: Profile, types: NumberTypes) -> None:
        self.profile = profile
        self.types = types
        self._device = DeviceModel(profile)
        self._links = LinkModel(profile)
        self._known: OrderedDict[Hashable, Times] = OrderedDict()  # operations

    def work(self, program: StepProgram) -> list[list[StageWork]]:
        """[num_stages][num_micro_batches]."""
        return [
            [
                StageWork(
                    [self._part(part, stage.mesh.size) for part in stage.parts],
                    None if stage.hand_over is None else self._links.hand_over(stage.hand_over),
                )
                for stage in of_micro_batches
            ]
            for of_micro_batches in program.stages
        ]

    def dtype(self, operation: Operation) -> str:
        """The type that an operation's law is for."""
        return law_dtype(self.types, operation)

    def _part(self, part: PartProgram, num_ranks: int) -> list[Block]:
        priced: dict[int, Sequence[TimedStep]] = {}
        transfers: dict[Hashable, Times] = {}
        for section in part.sections:
            if id(section.steps) not in priced:
                priced[id(section.steps)] = self._section(section, num_ranks, transfers)
        return blocks_of([(each.layer, priced[id(each.steps)]) for each in part.sections])

    def _section(
        self, section: Section, num_ranks: int, transfers: dict[Hashable, Times]
    ) -> list[TimedStep]:
        forwarded = self._forwarded(section.steps)
        timed = []
        for step in section.steps:
            if isinstance(step, Operation):
                timed.append(TimedStep(step, self._operation(step, num_ranks)))
            else:
                times = forwarded.get(id(step)) or self._transfer(step, transfers)
                timed.append(TimedStep(step, times, self._links.contention(step).value))
        return timed

    def _operation(self, step: Operation, num_ranks: int) -> Times:
        dtype = self.dtype(step)
        sizes = [
            size.tobytes() if isinstance(size, np.ndarray) else size for size in step.sizes.values()
        ]
        key = step.kind, dtype, num_ranks, *step.sizes, *sizes
        times = self._known.get(key)
        if times is None:
            times = _of_ranks(self._device.times(step.kind, dtype, step.sizes), num_ranks)
            self._known[key] = times
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        return times

    def _transfer(self, step: Transfer, known: dict[Hashable, Times]) -> Times:
        """Of a part's transfers those of tensor-parallel groups are alike in all layers."""
        if step.stage is not Stage.COLLECTIVES:
            return self._links.times(step)
        key = step.kind, step.group.tobytes(), step.sent_bytes.tobytes()
        if key not in known:
            known[key] = self._links.times(step)
        return known[key]

    def _forwarded(self, steps: Sequence[Step]) -> dict[int, Times]:
        """Times of pairs of all-to-alls in one stage, one over nodes and one inside, by id."""
        times: dict[int, Times] = {}
        transfers = [step for step in steps if isinstance(step, Transfer)]
        for stage in {each.stage for each in transfers}:
            hops = [
                each
                for each in transfers
                if each.stage is stage and each.kind is TransferKind.ALL_TO_ALL
            ]
            if len(hops) != 2:
                continue
            between, inside = sorted(hops, key=lambda hop: -int(hop.load.num_nodes.max()))
            times[id(between)], times[id(inside)] = self._links.forwarded(between, inside)
        return times


def _of_ranks(times: Times, num_ranks: int) -> Times:
    """[R] also where all ranks have the same sizes."""
    if times.seconds.shape == times.low.shape == times.high.shape == (num_ranks,):
        return times
    return Times(
        seconds=np.broadcast_to(times.seconds, (num_ranks,)),
        low=np.broadcast_to(times.low, (num_ranks,)),
        high=np.broadcast_to(times.high, (num_ranks,)),
        basis=times.basis,
        is_extrapolated=np.broadcast_to(times.is_extrapolated, (num_ranks,)),
    )
