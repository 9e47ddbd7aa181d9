"""Times of the steps of many scenarios, priced together: few calls over long arrays."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.execution import Execution, Terms
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import Device, Profile
from expertlane.cost.laws.times import Basis, Times
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.pricing import law_dtype
from expertlane.cost.step.operation import SIZES, Floats, Kind, Operation, TransferKind
from expertlane.plan.scenario import ScenarioSteps
from expertlane.spec.names import ProjectedCause, Stage

_PLACE = {cause: place for place, cause in enumerate(ProjectedCause)}
_CAUSE_OF_STAGE = {
    Stage.DISPATCH: ProjectedCause.DISPATCH_COMBINE,
    Stage.COMBINE: ProjectedCause.DISPATCH_COMBINE,
    Stage.COLLECTIVES: ProjectedCause.TP_COLLECTIVES,
}


@dataclass(frozen=True, eq=False)
class Priced:
    """What a list of steps takes, or several of them; C causes, three bounds (low, likely, high).

    Attributes:
        compute_s, transfer_s: [C, 3, S]; in the order of `ProjectedCause`.
        slowed_s: [S]; what all of these transfers would cost computing that runs beside them.
        experts_s: [S]; likely time of the grouped products of experts.
        bound_s: [S]; of the likely time, what rests on bounds alone.
        num_kernels: launches where nothing is captured in a graph.
        in_series_s: [3]; the engine's own work around steps, where all is in series.
    """

    compute_s: Floats
    transfer_s: Floats
    slowed_s: Floats
    experts_s: Floats
    bound_s: Floats
    num_kernels: int
    in_series_s: Floats

    @classmethod
    def sum(cls, parts: Iterable[tuple[int, "Priced"]]) -> "Priced":
        """Of some that are each done a number of times; one at least."""
        (num, first), *others = parts
        total = [num * getattr(first, each.name) for each in fields(cls)]
        for num, other in others:
            total = [
                so_far + num * getattr(other, each.name)
                for so_far, each in zip(total, fields(cls), strict=True)
            ]
        return cls(*total)


class _Entry(NamedTuple):
    """Where a time belongs: the list of steps and the step in it."""

    of_list: int
    of_step: int


def price(
    profile: Profile, types: NumberTypes, terms: Terms, lists: Sequence[ScenarioSteps]
) -> list[Priced]:
    """Prices of each list of steps, in order."""
    links = LinkModel(profile)
    operations = _price_operations(DeviceModel(profile), types, lists)
    transfers = _price_transfers(links, lists)
    priced = []
    for place, steps in enumerate(lists):
        size = steps.mesh.size
        compute, moved = np.zeros((2, len(ProjectedCause), 3, size))
        slowed, experts, bound = np.zeros((3, size))
        for number, operation in enumerate(steps.steps):
            assert isinstance(operation, Operation)
            times = operations[_Entry(place, number)]
            seconds = _bounds(times, size)
            for cause, share in _causes(profile.device, types, operation):
                compute[_PLACE[cause]] += seconds * share
            experts += seconds[1] * (operation.kind is Kind.EXPERTS)
            bound += seconds[1] * (times.basis is Basis.BOUND)
        for number, transfer in enumerate(steps.transfers):
            times = transfers[_Entry(place, number)]
            seconds = _bounds(times, size)
            moved[_PLACE[_CAUSE_OF_STAGE[transfer.stage]]] += seconds
            slowed += seconds[1] * links.contention(transfer).value
            bound += seconds[1] * (times.basis is Basis.BOUND)
        num_kernels = sum(each.num_kernels for each in (*steps.steps, *steps.transfers))
        in_series = np.zeros(3)
        if terms.execution is Execution.SERIAL:
            in_series = sum((terms.overhead_s(each) for each in steps.steps), in_series)
            in_series = in_series + len(steps.transfers) * terms.of_transfers_s
        priced.append(Priced(compute, moved, slowed, experts, bound, num_kernels, in_series))
    return priced


def _bounds(times: Times, size: int) -> Floats:
    """[3, S]."""
    return np.stack(
        [np.broadcast_to(each, size) for each in (times.low, times.seconds, times.high)]
    )


def _price_operations(
    device: DeviceModel, types: NumberTypes, lists: Sequence[ScenarioSteps]
) -> dict[_Entry, Times]:
    alike: defaultdict[tuple[Kind, str], list[tuple[_Entry, Operation, int]]] = defaultdict(list)
    for place, steps in enumerate(lists):
        for number, step in enumerate(steps.steps):
            assert isinstance(step, Operation)
            key = step.kind, law_dtype(types, step)
            alike[key].append((_Entry(place, number), step, steps.mesh.size))
    priced = {}
    for (kind, dtype), entries in alike.items():
        sizes = {
            name: np.concatenate([np.broadcast_to(each.sizes[name], n) for _, each, n in entries])
            for name in SIZES[kind]
        }
        whole = device.times(kind, dtype, sizes)
        end = 0
        for entry, _, num in entries:
            begin, end = end, end + num
            priced[entry] = _part(whole, slice(begin, end))
    return priced


def _price_transfers(links: LinkModel, lists: Sequence[ScenarioSteps]) -> dict[_Entry, Times]:
    """Both hops of a hierarchical dispatch together, as `cost.pricing` does."""
    entries = [
        (_Entry(place, number), transfer)
        for place, steps in enumerate(lists)
        for number, transfer in enumerate(steps.transfers)
    ]
    found = links.times_of([transfer for _, transfer in entries])
    priced = {entry: times for (entry, _), times in zip(entries, found, strict=True)}
    hops: defaultdict[tuple[int, Stage], list[_Entry]] = defaultdict(list)
    for entry, transfer in entries:
        if transfer.kind is TransferKind.ALL_TO_ALL:
            hops[entry.of_list, transfer.stage].append(entry)
    of_entry = dict(entries)
    for pair in hops.values():
        if len(pair) == 2:
            between, inside = sorted(pair, key=lambda e: -int(of_entry[e].load.num_nodes.max()))
            priced[between], priced[inside] = links.forwarded(of_entry[between], of_entry[inside])
    return priced


def _causes(
    device: Device, types: NumberTypes, operation: Operation
) -> list[tuple[ProjectedCause, Floats]]:
    """Shares [S] of an operation's time; as `cost.why` splits it."""
    dtype = operation.dtype or types.weights
    computing = operation.flops / device.flops_per_s[dtype]
    read_bytes = operation.weight_bytes + operation.kv_bytes
    is_reading = read_bytes / device.memory_bytes_per_s > computing
    of_weights = np.where(is_reading, operation.weight_bytes / np.maximum(read_bytes, 1), 0.0)
    of_cache = np.where(is_reading, operation.kv_bytes / np.maximum(read_bytes, 1), 0.0)
    is_expert = operation.stage is Stage.EXPERTS
    cause = ProjectedCause.EXPERT_COMPUTE if is_expert else ProjectedCause.OTHER_COMPUTE
    return [
        (ProjectedCause.WEIGHT_READS, of_weights),
        (ProjectedCause.KV_READS, of_cache),
        (cause, (~is_reading).astype(np.float64)),
    ]


def _part(times: Times, places: slice) -> Times:
    return Times(
        times.seconds[places],
        times.low[places],
        times.high[places],
        times.basis,
        times.is_extrapolated[places],
    )
