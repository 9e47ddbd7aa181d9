"""Run on ranks by `expertlane calibrate`: seconds of transfers, as the engine's `Group` does them."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from expertlane.cost.operation import TransferKind
from expertlane.engine.worker import RankContext
from expertlane.experiment.calibrate_operations import meet
from expertlane.experiment.calibrate_points import TransferPoint
from expertlane.parallel.clock import clock_for
from expertlane.parallel.collectives import Group
from expertlane.parallel.mesh import ParallelMesh
from expertlane.parallel.recorder import Recorder
from expertlane.spec.layout import Layout

_LEAST, _MOST = 5, 60  # repetitions in a round


def measure_transfers(
    context: RankContext, points: Sequence[TransferPoint], point_s: float
) -> list[float]:
    """Seconds of each transfer, [num_points]; 0 on ranks that take no part.

    Repetitions follow on each other, so all ranks begin each at about the same time.
    """
    seconds = []
    for point in points:
        layout = Layout(dp=point.num_ranks)
        context.meshes.make(layout)
        if context.rank < point.num_ranks:
            seconds.append(_measure(context, layout, point, point_s))
        else:
            seconds.append(0.0)
    return seconds


def _measure(context: RankContext, layout: Layout, point: TransferPoint, point_s: float) -> float:
    device = context.platform.device
    size = point.num_ranks
    recorder = Recorder(context.rank, 1, 1, context.progress, clock_for(device), size)
    mesh = ParallelMesh(layout, context.meshes, context.rank, size, recorder)
    with torch.inference_mode():
        work = _work(mesh.stage, point, device)
        meet(mesh, device)
        work()
        num = _agreed_number(mesh.stage, work, point_s, device)
        seconds = []
        for _ in range(num):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    context.progress.touch()
    return median(seconds)


def _agreed_number(
    group: Group, work: Callable[[], object], point_s: float, device: torch.device
) -> int:
    """Repetitions that fit, the same on all ranks."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = torch.tensor([[time.perf_counter() - began]], dtype=torch.float64, device=device)
    slowest = float(group.all_gather(took, [1] * group.size).wait().max())
    return min(_MOST, max(_LEAST, int(point_s / slowest)))


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
    if point.kind is TransferKind.ALL_REDUCE:  # the engine has none of its own

        def both() -> None:
            part = group.reduce_scatter(every, of_all).wait()
            group.all_gather(part, of_all).wait()

        return both

    def there_and_back() -> None:  # twice a send, over two
        for sender in (0, 1):
            if group.rank == sender:
                sent = group.send(rows, 1 - sender)
                assert sent is not None, "there are rows"
                sent.wait()
            else:
                group.receive(rows, sender).wait()

    return there_and_back
