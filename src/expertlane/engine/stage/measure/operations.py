"""Measurement of operations and of transfers, by the kernels and groups that the engine uses."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import numpy as np
import torch
from torch import Tensor

from expertlane.cost.step.operation import OpKind, TransferKind
from expertlane.engine.comm.clocks import clock_for
from expertlane.engine.comm.collectives import Group
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.ops.backend import DTYPES, backend_for
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.products import Activation, Expert, Linear
from expertlane.engine.ranks.commands import (
    MeasureContention,
    MeasureLaunches,
    MeasureOperations,
    MeasureTransfers,
    Point,
    TransferPoint,
)
from expertlane.engine.stage.context import RankContext
from expertlane.engine.stage.measure.machine import synchronize
from expertlane.schedule.plan import Batch
from expertlane.spec.layout import Layout

_COLD_BYTES = 192 << 20  # of weights or cache, used in turn: more than caches hold
_GPU_COLD_BYTES = 1 << 30
_MOST = 40  # repetitions of an operation in a round
_BURST = 20  # operations queued at once where a GPU's own time is wanted
_CYCLES_PER_S, _MOST_HELD_S = 2e9, 0.05  # of a GPU that is held while they are queued
_BLOCK_SIZE = 16
_MOST_SETS, _MOST_CACHES = 64, 16  # of weights, and of blocks, used in turn


@dataclass(frozen=True, eq=False)
class _Bench:
    """Device and memory of a rank's measurements.

    Attributes:
        cold: by dtype, [n] values, more than caches hold.
    """

    device: torch.device
    cold: dict[str, Tensor]

    def turns(self, shape: tuple[int, ...], dtype: str) -> Iterator[Tensor]:
        """Views of a shape into the cold values, in an endless cycle."""
        values, size = self.cold[dtype], int(np.prod(shape))
        starts = range(0, max(1, len(values) - size + 1), max(size, 1))
        return cycle([values[start : start + size].view(shape) for start in starts])


def measure_operations(context: RankContext, command: MeasureOperations) -> list[float]:
    """Measure seconds of each operation, [num_points]; the median of one round's repetitions."""
    mesh = first_ranks(context, command.num_ranks)
    if mesh is None:
        return []
    device = context.platform.device
    num_bytes = _GPU_COLD_BYTES if device.type == "cuda" else _COLD_BYTES
    cold = {}
    for name in {point.dtype for point in command.points}:
        dtype = DTYPES[name]
        cold[name] = torch.full((num_bytes // dtype.itemsize,), 0.01, dtype=dtype, device=device)
    bench, seconds = _Bench(device, cold), []
    with torch.inference_mode():
        for point in command.points:
            work = _WORK[point.kind](bench, point)
            barrier(mesh, device)
            seconds.append(time_s(context, work, command.point_s))
    return seconds


def first_ranks(context: RankContext, num_ranks: int) -> ParallelMesh | None:
    """The mesh of the first `num_ranks` ranks; None on the others. Collective over all ranks."""
    layout = Layout(dp=num_ranks)
    context.meshes.make(layout)
    if context.rank >= num_ranks:
        return None
    clock = clock_for(context.platform.device)
    recorder = Recorder(context.rank, 1, 1, context.progress, clock, num_ranks)
    return ParallelMesh(layout, context.meshes, context.rank, num_ranks, recorder)


def barrier(mesh: ParallelMesh, device: torch.device) -> None:
    """Wait until all ranks of the mesh have come here."""
    token = torch.zeros(1, 1, device=device)
    mesh.stage.all_gather(token, [1] * mesh.stage.size).wait()
    synchronize(device)


def time_s(context: RankContext, work: Callable[[], object], most_s: float) -> float:
    """Median seconds of repetitions that take `most_s` together, one at least."""
    if context.platform.device.type == "cuda":
        return _gpu_time_s(context, work, most_s)
    work()
    seconds: list[float] = []
    until = time.perf_counter() + most_s
    while True:
        began = time.perf_counter()
        work()
        now = time.perf_counter()
        seconds.append(now - began)
        if len(seconds) == _MOST or now + seconds[-1] > until:
            break
    context.progress.touch()
    return median(seconds)


def _gpu_time_s(context: RankContext, work: Callable[[], object], most_s: float) -> float:
    """Median seconds of an operation on a GPU, without its launch.

    Operations are queued in bursts, while a sleep holds the device until all are queued.
    """
    device, clock = context.platform.device, clock_for(context.platform.device)
    work()  # compiles
    _, once_s = _burst_s(work, 1, device)
    burst = max(1, min(_BURST, int(most_s / max(once_s, 1e-9))))
    queued_s, _ = _burst_s(work, burst, device)
    seconds: list[float] = []
    until = time.perf_counter() + most_s
    while not seconds or time.perf_counter() < until:
        context.progress.touch()
        clock.restart()
        held_s = min(1.5 * queued_s, _MOST_HELD_S)
        torch.cuda._sleep(int(held_s * _CYCLES_PER_S))  # type: ignore[no-untyped-call]
        begin = clock.mark()
        for _ in range(burst):
            work()
        end = clock.mark()
        clock.settle()
        seconds.append(clock.seconds(begin, end) / burst)
    context.progress.touch()
    return median(seconds)


def _burst_s(work: Callable[[], object], num: int, device: torch.device) -> tuple[float, float]:
    """The host's seconds to queue an operation `num` times, and until all are done."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(num):
        work()
    queued_s = time.perf_counter() - began
    synchronize(device)
    return queued_s, time.perf_counter() - began


def measure_launches(context: RankContext, command: MeasureLaunches) -> tuple[float, float]:
    """Measure seconds that a GPU's host takes to launch a kernel, and a graph of several."""
    device = context.platform.device
    x = torch.zeros(16, device=device)
    graph = torch.cuda.CUDAGraph()
    x.add_(1)
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # nccl's threads go on
        for _ in range(_BURST):
            x.add_(1)

    def host_s(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(_BURST):
            began = time.perf_counter()
            for _ in range(_BURST):
                work()
            seconds.append((time.perf_counter() - began) / _BURST)
            torch.cuda.synchronize(device)
        return median(seconds)

    context.progress.touch()
    return host_s(lambda: x.add_(1)), host_s(graph.replay)


def _gemm(bench: _Bench, point: Point) -> Callable[[], object]:
    at = point.by_name
    m, n, k = at["m"], at["n"], at["k"]
    linears = _linears(bench, point.dtype, n, k)
    x = torch.full((m, k), 0.5, dtype=DTYPES[point.dtype], device=bench.device)
    return lambda: next(linears)(x)


def _linears(bench: _Bench, dtype: str, n: int, k: int) -> Iterator[Linear]:
    """Linears [n, k] with cold weights, in an endless cycle."""
    device = bench.device
    first = backend_for(device).linear(torch.zeros(n, k, dtype=DTYPES[dtype], device=device))
    views = bench.turns(tuple(first.tensors()[0].shape), dtype)
    size = first.num_bytes
    num = min(_MOST_SETS, max(1, len(bench.cold[dtype]) * first.itemsize // size))
    return cycle([first.with_tensors([next(views)]) for _ in range(num)])


def _experts(bench: _Bench, point: Point) -> Callable[[], object]:
    at = point.by_name
    device, dtype = bench.device, DTYPES[point.dtype]
    hidden, inner, active = at["hidden"], at["inner"], at["active"]
    ups = _linears(bench, point.dtype, inner, hidden)
    downs = _linears(bench, point.dtype, hidden, inner)

    def expert() -> Expert:
        gate = next(ups) if at["matrices"] == 3 else None
        return Expert(up=next(ups), down=next(downs), gate=gate)

    activation = Activation("silu" if at["matrices"] == 3 else "gelu")
    weights = at["matrices"] * hidden * inner * dtype.itemsize
    cold_bytes = bench.cold[point.dtype].nbytes
    num_sets = max(1, min(_MOST_SETS // active, cold_bytes // (weights * active)))
    ops = backend_for(device)
    held = [[expert() for _ in range(active)] for _ in range(num_sets)]
    sets = cycle([ops.experts(each, activation) for each in held])
    pairs = at["pairs"]
    rows = torch.full((pairs, hidden), 0.5, dtype=dtype, device=device)
    ids = (torch.arange(pairs, device=device) % active).int()[:, None]
    grouped = ops.group_pairs(ids, 0, 1, active)
    return lambda: next(sets)(rows, grouped)


def _memory(bench: _Bench, point: Point) -> Callable[[], object]:
    """An operation bound by memory: a norm, which reads and writes each value once."""
    dtype = DTYPES[point.dtype]
    size = 64
    while size < 1024 and size * size * dtype.itemsize * 8 < point.by_name["bytes"]:
        size *= 2
    num_rows = max(1, point.by_name["bytes"] // (2 * size * dtype.itemsize))
    device = bench.device
    x = torch.full((num_rows, size), 0.5, dtype=dtype, device=device)
    weight = torch.ones(size, device=device)
    ops = backend_for(device)
    return lambda: ops.rms_norm(x, weight, 1e-6)


def _attention(bench: _Bench, point: Point) -> Callable[[], object]:
    at = point.by_name
    is_latent = "key_dim" in at
    device, dtype = bench.device, DTYPES[point.dtype]
    heads, kv_heads = at["heads"], at.get("kv_heads", 1)
    key_dim = at["key_dim"] if is_latent else at["head_dim"]
    value_dim = at["value_dim"] if is_latent else key_dim
    seqs, tokens = at["seqs"], at.get("tokens", at["seqs"])
    length, num_new = at["positions"] // seqs, tokens // seqs
    cache, num_blocks, num_sets = _cache(bench, point, length, key_dim, value_dim)
    ops = backend_for(device)
    batches = [_batch(seqs, num_new, length, each * num_blocks, device) for each in range(num_sets)]
    turns = cycle(batches)
    query = torch.full((tokens, heads, key_dim), 0.1, dtype=dtype, device=device)
    key = torch.full((tokens, kv_heads, key_dim), 0.1, dtype=dtype, device=device)
    value = torch.full((tokens, kv_heads, cache.values.shape[-1]), 0.1, dtype=dtype, device=device)
    params = AttentionParams(value_dim, scale=key_dim**-0.5)
    return lambda: ops.paged_attention(query, key, value, cache, next(turns), params)


def _cache(
    bench: _Bench, point: Point, length: int, key_dim: int, value_dim: int
) -> tuple[KVCache, int, int]:
    """A KV cache, in the cold values if it fits; the blocks of a set, and the number of sets.

    Decoding uses another set of blocks each time. New prompts use one set, as their keys have just
    been written anyway.
    """
    at, dtype = point.by_name, DTYPES[point.dtype]
    kv_heads, stored_dim = at.get("kv_heads", 1), value_dim if "kv_heads" in at else 0
    num_blocks = at["seqs"] * -(-length // _BLOCK_SIZE)
    block_values = _BLOCK_SIZE * kv_heads * (key_dim + stored_dim)
    cold = bench.cold[point.dtype]
    num_sets = 1
    if "tokens" not in at:
        num_sets = max(1, min(_MOST_CACHES, len(cold) // (num_blocks * block_values)))
    device = bench.device
    sizes = num_blocks * num_sets, _BLOCK_SIZE, kv_heads, key_dim, stored_dim
    cache = KVCache(*sizes, dtype, device)
    if num_blocks * num_sets * block_values <= len(cold):
        keys, values = torch.split(
            cold[: cache.keys.numel() + cache.values.numel()],
            [cache.keys.numel(), cache.values.numel()],
        )
        cache.keys, cache.values = keys.view(cache.keys.shape), values.view(cache.values.shape)
    return cache, num_blocks, num_sets


def _batch(
    seqs: int, num_new: int, length: int, first_block: int, device: torch.device
) -> PagedBatch:
    """A batch of equal sequences, with the properties that are computed once for all layers."""
    width = -(-length // _BLOCK_SIZE)
    tables = np.arange(seqs * width, dtype=np.int32).reshape(seqs, width) + first_block
    batch = Batch(
        seq_ids=np.arange(seqs),
        num_scheduled_tokens=np.full(seqs, num_new),
        num_computed_tokens=np.full(seqs, length - num_new),
        token_ids=np.zeros(seqs * num_new, dtype=np.int64),
        block_tables=tables,
        yields_token=np.ones(seqs, dtype=np.bool_),
    )
    made = PagedBatch(batch, _BLOCK_SIZE, device)
    assert len(made.slots), "made once"
    if device.type == "cpu":
        assert len(made.sequences.lengths), "made once"
    assert made.groups, "made once"
    return made


_WORK: dict[OpKind, Callable[[_Bench, Point], Callable[[], object]]] = {
    OpKind.GEMM: _gemm,
    OpKind.EXPERTS: _experts,
    OpKind.MEMORY: _memory,
    OpKind.DECODE_ATTENTION: _attention,
    OpKind.PREFILL_ATTENTION: _attention,
    OpKind.LATENT_DECODE: _attention,
    OpKind.LATENT_PREFILL: _attention,
}


_LEAST_TRANSFERS, _MOST_TRANSFERS = 5, 60  # repetitions in a round
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
    return min(_MOST_TRANSFERS, max(_LEAST_TRANSFERS, int(point_s / slowest)))


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
