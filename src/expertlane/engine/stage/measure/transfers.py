"""Measurement of transfers, by the groups that the engine uses."""

import time
from collections.abc import Callable
from statistics import median

import torch

from expertlane.cost.step.operation import TransferKind
from expertlane.engine.comm.collectives import Group
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ranks.commands import MeasureContention, MeasureTransfers, TransferPoint
from expertlane.engine.stage.measure.machine import synchronize
from expertlane.engine.stage.measure.operations import barrier, first_ranks
from expertlane.engine.stage.worker import RankContext

_LEAST, _MOST = 5, 60  # repetitions in a round
_GPU_BURST = 8  # repetitions between two waits for a GPU
_ROW_BYTES = 64


def measure_transfers(context: RankContext, command: MeasureTransfers) -> list[float]:
    """Measure seconds of each transfer, [num_points]; 0 on ranks that take no part."""
    seconds = []
    for point in command.points:
        mesh = first_ranks(context, point.num_ranks)
        seconds.append(0.0 if mesh is None else _measure(context, mesh, point, command.point_s))
    return seconds


def _measure(
    context: RankContext, mesh: ParallelMesh, point: TransferPoint, point_s: float
) -> float:
    device = context.platform.device
    with torch.inference_mode():
        work = _work(mesh.stage, point, device)
        barrier(mesh, device)
        work()
        num = _agreed_number(mesh.stage, work, point_s, device)
        burst, seconds = _GPU_BURST if device.type == "cuda" else 1, []
        for _ in range(-(-num // burst)):
            began = time.perf_counter()
            for _ in range(burst):
                work()
            synchronize(device)
            seconds.append((time.perf_counter() - began) / burst)
    context.progress.touch()
    return median(seconds) / (2 if point.kind is TransferKind.SEND else 1)


def _agreed_number(
    group: Group, work: Callable[[], object], point_s: float, device: torch.device
) -> int:
    """Repetitions that fit into `point_s`; the same on all ranks."""
    began = time.perf_counter()
    work()
    synchronize(device)
    took = torch.tensor([[time.perf_counter() - began]], dtype=torch.float64, device=device)
    slowest = float(group.all_gather(took, [1] * group.size).wait().max())
    return min(_MOST, max(_LEAST, int(point_s / slowest)))


def measure_contention(context: RankContext, command: MeasureContention) -> list[float]:
    """Measure the share of computing, 0 … 1, that an all-to-all of each size takes away."""
    mesh = first_ranks(context, command.num_ranks)
    if mesh is None:
        return []
    shares = []
    with torch.inference_mode():
        for num_bytes in command.sizes:
            barrier(mesh, context.platform.device)
            shares.append(_contention(context, mesh.stage, num_bytes, command.point_s))
    return shares


def _contention(context: RankContext, group: Group, num_bytes: int, point_s: float) -> float:
    device, size = context.platform.device, group.size
    rows = torch.zeros(size * max(1, num_bytes // _ROW_BYTES), _ROW_BYTES, device=device)
    rows = rows.to(torch.uint8)
    of_all = [len(rows) // size] * size
    weight = torch.zeros(512, 512, dtype=context.platform.dtype, device=device)
    linear = backend_for(device).linear(weight)
    x = torch.zeros(64, 512, dtype=context.platform.dtype, device=device)

    def transfer() -> None:
        group.all_to_all(rows, of_all, of_all).wait()
        synchronize(device)

    def timed(work: Callable[[], object], num: int) -> float:
        seconds = []
        for _ in range(num):
            transfer()  # so that ranks begin together
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return median(seconds)

    num = _agreed_number(group, transfer, point_s, device)
    alone_s = timed(transfer, num)

    def product() -> None:
        linear(x)
        synchronize(device)

    once = torch.tensor([[timed(product, num), alone_s]], device=device)
    once_s, alone_s = group.all_gather(once, [1] * size).wait().amax(dim=0).tolist()
    times = max(1, round(2 * alone_s / once_s))

    def compute() -> None:
        for _ in range(times):
            linear(x)
        synchronize(device)

    def both() -> None:
        pending = group.all_to_all(rows, of_all, of_all)
        compute()
        pending.wait()
        synchronize(device)

    lost_s = timed(both, num) - timed(compute, num)
    context.progress.touch()
    return float(min(1.0, max(0.0, lost_s / alone_s)))


def _work(group: Group, point: TransferPoint, device: torch.device) -> Callable[[], object]:
    size, num_rows = group.size, max(1, point.num_bytes // point.row_bytes)
    dtype = torch.bfloat16
    width = point.row_bytes // dtype.itemsize
    rows = torch.zeros(num_rows, width, dtype=dtype, device=device)
    of_all = [num_rows] * size
    if point.kind is TransferKind.ALL_GATHER:
        return lambda: group.all_gather(rows, of_all).wait()
    every = rows.repeat(size, 1)
    if point.kind is TransferKind.ALL_TO_ALL:
        return lambda: group.all_to_all(every, of_all, of_all).wait()
    if point.kind is TransferKind.REDUCE_SCATTER:
        return lambda: group.reduce_scatter(every, of_all).wait()

    def there_and_back() -> None:  # two sends, each begun when the last one has come
        for sender in (0, 1):
            if group.rank == sender:
                sent = group.send(rows, 1 - sender)
                assert sent is not None, "there are rows"
                sent.wait()
            else:
                group.receive(rows, sender).wait()

    return there_and_back
