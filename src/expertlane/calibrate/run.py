"""Measure the machine at hand: rounds of everything in turn, then a profile of the medians.

`Grid` has the sizes of operations and transfers that are measured.
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain, product, zip_longest
from typing import TypeVar

import numpy as np

from expertlane import __version__
from expertlane.calibrate.fit import (
    link_sheets,
    operation_laws,
    peak_flops_per_s,
    read_bytes_per_s,
    term_of,
    transfer_laws,
)
from expertlane.calibrate.steps import StepSample, launch_term, measure_steps, overhead_terms
from expertlane.cost.laws.device import moved_bytes
from expertlane.cost.laws.profile import DRIVER_S, GRAPH_LAUNCH_S, LAUNCH_S, Device, Profile, Term
from expertlane.cost.laws.times import Surface
from expertlane.cost.step.operation import Floats, OpKind, TransferKind, flops_of
from expertlane.engine.launch import describe_ranks
from expertlane.engine.ops.host import ForeignLoad, num_cores
from expertlane.engine.ranks.commands import (
    MeasureContention,
    MeasureLaunches,
    MeasureOperations,
    MeasureTransfers,
    Point,
    TransferPoint,
)
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import UserError
from expertlane.progress import Progress

_TRANSFERS = (  # the engine has no all-reduce
    TransferKind.ALL_GATHER,
    TransferKind.REDUCE_SCATTER,
    TransferKind.ALL_TO_ALL,
    TransferKind.SEND,
)


@dataclass(frozen=True)
class Grid:
    """Sizes to measure; those of attention are those of one rank.

    Attributes:
        gemm_m, gemm_nk: rows, and shapes of weights [n, k].
        router_nk: shapes of the router's float32 weights.
        expert_shapes: (hidden, inner) of experts, each by tokens for an expert × experts.
        memory_bytes: moved by small operations.
        heads: (query heads, key/value heads, head_dim).
        latent_heads: (query heads, key_dim, value_dim), for decodes of `latent_seqs`.
        decode_seqs, decode_positions: sequences, and positions of each.
        prefill_seqs, prefill_tokens: sequences, and new tokens of each.
        transfer_bytes: bytes to each other rank.
        contended_bytes: bytes of transfers that computing goes on beside.
        most_flops, most_bytes: limits; no operation that takes more is measured.
        num_rounds: repetitions of the whole grid.
        point_s: seconds for the repetitions of one operation in a round.
        step_seqs: sequences of a rank in the small model's steps, which give the overheads.
        step_layers: few and many; of the small model.
    """

    gemm_m: tuple[int, ...]
    gemm_nk: tuple[tuple[int, int], ...]
    router_nk: tuple[tuple[int, int], ...]
    expert_tokens: tuple[int, ...]
    expert_counts: tuple[int, ...]
    expert_shapes: tuple[tuple[int, int], ...]
    memory_bytes: tuple[int, ...]
    heads: tuple[tuple[int, int, int], ...]
    latent_heads: tuple[tuple[int, int, int], ...]
    latent_seqs: tuple[int, ...]
    decode_seqs: tuple[int, ...]
    decode_positions: tuple[int, ...]
    prefill_seqs: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    transfer_bytes: tuple[int, ...]
    contended_bytes: tuple[int, ...]
    most_flops: float
    most_bytes: float
    num_rounds: int
    point_s: float
    step_seqs: tuple[int, ...]
    step_layers: tuple[int, int]

    def points(self, dtype: str) -> list[Point]:
        """All operations whose FLOPs and bytes are few enough, those first that say most.

        Kinds take turns, so that as many as there is time for are a coarser grid of all.
        """
        memory = [Point(OpKind.MEMORY, dtype, (size,)) for size in self.memory_bytes]
        every = [*self._products(dtype), *self._experts(dtype), *self._attention(dtype), *memory]
        of_kind: dict[tuple[OpKind, str], list[Point]] = {}
        for point in filter(self._is_small, every):
            of_kind.setdefault((point.kind, point.dtype), []).append(point)
        in_turn = zip_longest(*map(_coarse_first, of_kind.values()))
        return [point for point in chain.from_iterable(in_turn) if point is not None]

    def _is_small(self, point: Point) -> bool:
        num_bytes = moved_bytes(point.kind, point.dtype, point.by_name)
        num_flops = flops_of(point.kind, point.by_name)
        return bool(num_flops <= self.most_flops and num_bytes <= self.most_bytes)

    def _products(self, dtype: str) -> Iterator[Point]:
        for m, (n, k) in product(self.gemm_m, self.gemm_nk):
            yield Point(OpKind.GEMM, dtype, (m, n, k))
        for m, (n, k) in product(self.gemm_m, self.router_nk):
            if dtype != "float32" or (n, k) not in self.gemm_nk:
                yield Point(OpKind.GEMM, "float32", (m, n, k))

    def _experts(self, dtype: str) -> Iterator[Point]:
        shapes = product(self.expert_tokens, self.expert_counts, self.expert_shapes)
        for tokens, active, (hidden, inner) in shapes:
            yield Point(OpKind.EXPERTS, dtype, (tokens * active, active, hidden, inner, 3))

    def _attention(self, dtype: str) -> Iterator[Point]:
        for seqs, length in product(self.decode_seqs, self.decode_positions):
            positions = seqs * length
            for heads in self.heads:
                yield Point(OpKind.DECODE_ATTENTION, dtype, (seqs, positions, *heads))
            for heads in self.latent_heads if seqs in self.latent_seqs else ():
                yield Point(OpKind.LATENT_DECODE, dtype, (seqs, positions, *heads))
        for seqs, length in product(self.prefill_seqs, self.prefill_tokens):
            sizes = (seqs, seqs * length * (length + 1) // 2, seqs * length, seqs * length)
            for heads in self.heads:
                yield Point(OpKind.PREFILL_ATTENTION, dtype, (*sizes, *heads))
            for heads in self.latent_heads:
                yield Point(OpKind.LATENT_PREFILL, dtype, (*sizes, *heads))

    def transfers(self, num_ranks: int) -> list[TransferPoint]:
        """All transfers, over 2, 4, 8 … ranks up to `num_ranks`, and over so many."""
        counts = sorted({2**i for i in range(1, num_ranks.bit_length())} | {num_ranks})
        return [
            TransferPoint(kind, count, size)
            for count in counts
            if 1 < count <= num_ranks
            for kind in _TRANSFERS
            for size in self.transfer_bytes
            if kind is not TransferKind.SEND or count == 2
        ]


def _coarse_first(points: Sequence[Point]) -> list[Point]:
    """The last and the first, then those half-way between what came before, and so on."""
    num_bits = max(1, (len(points) - 1).bit_length())
    reversed_bits = (int(f"{each:0{num_bits}b}"[::-1], 2) for each in range(2**num_bits))
    places = [len(points) - 1, *reversed_bits]
    return [points[place] for place in dict.fromkeys(places) if place < len(points)]


CPU_GRID = Grid(
    gemm_m=(1, 4, 16, 64, 256, 1024),
    gemm_nk=((256, 256), (1024, 256), (256, 1024), (1024, 1024), (4096, 1024), (1024, 4096)),
    router_nk=((8, 512), (8, 2048), (64, 512), (64, 2048)),
    expert_tokens=(1, 4, 16, 64, 256),
    expert_counts=(1, 4, 16),
    expert_shapes=((256, 256), (512, 512), (1024, 256), (1024, 1024), (2048, 1024)),
    memory_bytes=tuple(4**i for i in range(4, 13)),
    heads=((4, 4, 64), (16, 16, 64), (16, 4, 64), (32, 8, 128)),
    latent_heads=((4, 576, 512), (16, 576, 512)),
    latent_seqs=(1, 16, 64),
    decode_seqs=(1, 4, 16, 64, 128),
    decode_positions=(16, 64, 256, 1024),
    prefill_seqs=(1, 4, 16),
    prefill_tokens=(16, 64, 256, 1024),
    transfer_bytes=tuple(4**i for i in range(3, 13)),
    contended_bytes=(4096, 65536, 1 << 20),
    most_flops=1e10,
    most_bytes=1e9,
    num_rounds=5,
    point_s=0.004,
    step_seqs=(2, 8, 32),
    step_layers=(2, 5),
)
GPU_GRID = replace(
    CPU_GRID,
    gemm_m=(1, 8, 64, 512, 4096),
    gemm_nk=(
        *((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096), (16384, 4096), (8192, 8192)),
        (32768, 8192),
    ),
    router_nk=((8, 2048), (8, 8192), (256, 2048), (256, 8192)),
    expert_tokens=(1, 16, 128, 1024),
    expert_counts=(1, 8, 32),
    expert_shapes=((1024, 512), (2048, 2048), (4096, 1024), (4096, 2048), (8192, 32768)),
    memory_bytes=tuple(4**i for i in range(4, 15)),
    heads=((8, 8, 64), (32, 8, 128), (32, 4, 128), (16, 16, 512), (2, 2, 512)),
    latent_heads=((16, 576, 512), (128, 576, 512)),
    decode_positions=(64, 512, 4096),
    prefill_tokens=(64, 512, 4096),
    transfer_bytes=tuple(4**i for i in range(3, 14)),
    most_flops=2e13,
    most_bytes=5e9,
    point_s=0.01,
)


ResultT = TypeVar("ResultT")

QUIET = 0.05  # share of the cores that other processes may take
_MOST_TRIES = 2
AGAIN_SHARE = 0.25  # share of the time for measuring, spent on measuring again


class QuietMeasuring:
    """Measures again what other processes disturbed, a few times each and for so long in all.

    Attributes:
        again_s: seconds of measuring again.
        num_kept, num_disturbed: measurements, and those of them that were disturbed every time.
        foreign_cpu_share: the most that other processes took of all cores during what was kept.
    """

    def __init__(self, most_again_s: float = 60.0) -> None:
        self.again_s = 0.0
        self.num_kept = self.num_disturbed = 0
        self.foreign_cpu_share = 0.0
        self._most_again_s = most_again_s

    @property
    def disturbed_share(self) -> float:
        """The share of the kept measurements that were disturbed."""
        return self.num_disturbed / self.num_kept if self.num_kept else 0.0

    def measure(self, measure: Callable[[], ResultT]) -> ResultT:
        """The measurement that was disturbed least."""
        tries: list[tuple[ResultT, float]] = []
        while True:
            foreign, began_s = ForeignLoad(), time.monotonic()
            result = measure()
            took_s = time.monotonic() - began_s
            tries.append((result, foreign.share()))
            if len(tries) > 1:
                self.again_s += took_s
            is_quiet = tries[-1][1] <= QUIET
            if is_quiet or len(tries) == _MOST_TRIES or self.again_s + took_s > self._most_again_s:
                break
        result, share = min(tries, key=lambda each: each[1])
        self.num_kept += 1
        self.num_disturbed += share > QUIET
        self.foreign_cpu_share = max(self.foreign_cpu_share, share)
        return result


def rounds_in_time(most: int, within_s: float) -> Iterator[int]:
    """Yield round numbers: one, then more while the longest so far still fits in the time left."""
    began_s = ended_s = time.monotonic()
    longest_s = 0.0
    for number in range(most):
        if number and ended_s - began_s + longest_s > within_s:
            return
        yield number
        now_s = time.monotonic()
        longest_s, ended_s = max(longest_s, now_s - ended_s), now_s


_FIRST_SHARE = 0.4  # share of the time within which the first round may begin further operations
_AT_ONCE = 16  # operations that are measured between two looks at the time
_PARTS = 3  # of a round, as progress counts them; without transfers 2


def num_devices() -> int:
    """GPUs of this machine, else cores."""
    import torch

    return torch.cuda.device_count() or num_cores()


@dataclass(eq=False)
class RoundTimes:
    """Measurements of the rounds so far.

    Attributes:
        operations, transfers: [rounds][num_points]; seconds.
        contention: [rounds]; a share.
        launches: [rounds]; seconds of a kernel's launch and a graph's; empty but on a GPU.
        steps: [rounds][num_samples].
    """

    operations: list[Floats] = field(default_factory=list)
    transfers: list[Floats] = field(default_factory=list)
    contention: list[float] = field(default_factory=list)
    launches: list[tuple[float, float]] = field(default_factory=list)
    steps: list[list[StepSample]] = field(default_factory=list)


class Calibration:
    """Rounds of measuring on a pool's ranks, which may take turns with other work.

    Args:
        num_ranks: the first ranks of the pool measure, all at once.
        grid: sizes; None for those that suit the machine.
        within_s: for all rounds; where it is short, fewer sizes are measured.

    Attributes:
        machine: the machine, as the first rank sees it.
        cores: core of each rank, where ranks are pinned.
        quiet: repeats measurements that other processes disturbed.
        took_s: seconds of all rounds; 0 until they have run.
    """

    def __init__(
        self, pool: RankPool, num_ranks: int, grid: Grid | None = None, within_s: float = 240.0
    ) -> None:
        self._pool = pool
        self._num_ranks = num_ranks
        machines = describe_ranks(pool)
        self.machine = machines[0]
        if self.machine.ranks_on_device > 1:
            raise UserError(
                f"{self.machine.ranks_on_device} ranks share a GPU, so their times are no "
                f"profile; valid: --ranks {num_devices()}"
            )
        self.grid = grid or (GPU_GRID if self.machine.on_gpu else CPU_GRID)
        self.cores = [each.cpus[0] if each.cpus else None for each in machines]
        self._points = self.grid.points(self.machine.dtype)
        self._is_settled = False  # set once it is known how many of them there is time for
        self._transfer_points = self.grid.transfers(num_ranks)
        self.measured = RoundTimes()
        self.quiet = QuietMeasuring(AGAIN_SHARE * within_s)
        self._within_s = within_s
        self.took_s = 0.0

    def run(self, progress: Progress | None = None) -> None:
        """All rounds, or as many as there is time for on a machine that others keep busy."""
        progress = progress or Progress()
        parts = _PARTS if self._num_ranks > 1 else 2
        progress.task("measuring", parts * self.grid.num_rounds)
        began_s = time.monotonic()
        for _ in rounds_in_time(self.grid.num_rounds, self._within_s):
            self.measure_round(progress)
        self.took_s = time.monotonic() - began_s
        progress.done()

    def measure_round(self, progress: Progress | None = None) -> None:
        """Everything once; what other processes disturbed is measured again, within bounds."""
        progress = progress or Progress()
        found = self.measured
        found.operations.append(self.quiet.measure(self._operations))
        progress.advance()
        if self._num_ranks > 1:
            found.transfers.append(self.quiet.measure(self._transfers))
            progress.advance()
            found.contention.append(self.quiet.measure(self._contention))
        if self.machine.on_gpu:
            (launches,) = self._pool.call(MeasureLaunches(), ranks=[0])
            found.launches.append(launches)
        found.steps.append(
            self.quiet.measure(
                lambda: measure_steps(
                    self._pool, self._num_ranks, self.grid.step_seqs, self.grid.step_layers
                )
            )
        )
        progress.advance()

    def _operations(self) -> Floats:
        """[num_points]; mean over ranks. The first call settles how many points there are."""
        until = time.monotonic() + _FIRST_SHARE * self._within_s
        found: list[Floats] = []
        for begin in range(0, len(self._points), _AT_ONCE):
            points = tuple(self._points[begin : begin + _AT_ONCE])
            seconds = self._pool.call(MeasureOperations(points, self.grid.point_s, self._num_ranks))
            found.append(np.mean(seconds[: self._num_ranks], axis=0))
            if not self._is_settled and time.monotonic() > until:
                self._points = self._points[: begin + len(points)]
                break
        self._is_settled = True
        return np.concatenate(found)

    def _transfers(self) -> Floats:
        """[num_points]; mean over the ranks that take part."""
        points = self._transfer_points
        seconds = self._pool.call(MeasureTransfers(tuple(points), self.grid.point_s))
        return np.array(
            [
                np.mean([of_rank[place] for of_rank in seconds[: point.num_ranks]])
                for place, point in enumerate(points)
            ]
        )

    def _contention(self) -> float:
        """The share of compute lost beside transfers: the median over ranks and sizes."""
        shares = self._pool.call(
            MeasureContention(self._num_ranks, self.grid.contended_bytes, self.grid.point_s)
        )
        return float(np.median(shares[: self._num_ranks]))

    def profile(self, name: str) -> Profile:
        """The medians of all rounds so far as a profile."""
        found, origin = self.measured, self._origin()
        operations = np.array(found.operations)
        likely = np.median(operations, axis=0)
        machine, num_ranks = self.machine, self._num_ranks
        device = Device(
            name=f"{machine.device} rank of {machine.cpu_name}"
            if not machine.on_gpu
            else machine.device,
            memory_bytes=float(
                machine.memory_bytes if machine.on_gpu else machine.memory_bytes // num_ranks
            ),
            memory_bytes_per_s=read_bytes_per_s(self._points, likely),
            flops_per_s=peak_flops_per_s(self._points, likely),
            origin=f"highest rates of any product: {origin}",
        )
        surfaces, terms = operation_laws(self._points, operations, device, origin)
        links, transfers = {}, np.array(found.transfers)
        if transfers.size:
            links = link_sheets(self._transfer_points, np.median(transfers, axis=0), origin)
        profile = Profile(name, device, num_ranks, links, surfaces, terms)
        if transfers.size:
            of_links = transfer_laws(self._transfer_points, transfers, profile, origin)
            profile = _with(profile, *of_links)
            share = term_of(np.array(found.contention), origin)
            profile = _with(profile, {}, {f"contention.{kind}": share for kind in TransferKind})
        return _with(profile, {}, self._overheads(profile, origin))

    def _overheads(self, profile: Profile, origin: str) -> dict[str, Term]:
        found = overhead_terms(self.measured.steps, profile, self.machine.dtype, origin)
        if not self.machine.on_gpu:
            return found
        least_s, graph_launch_s = np.array(self.measured.launches).T
        return {
            DRIVER_S: found[DRIVER_S],
            LAUNCH_S: launch_term(self.measured.steps, self.machine.dtype, least_s, origin),
            GRAPH_LAUNCH_S: term_of(graph_launch_s, origin),
        }

    def _origin(self) -> str:
        machine, ranks = self.machine, self._num_ranks
        what = machine.device if machine.on_gpu else machine.cpu_name
        driver = f", driver {machine.driver}" if machine.driver else ""
        pinned = ", each on a core of its own" if None not in self.cores else ""
        rounds, quiet = len(self.measured.operations), self.quiet
        disturbed = ""
        if quiet.num_disturbed:
            disturbed = (
                f", {quiet.disturbed_share:.0%} of the measurements disturbed by other programs, "
                f"which took up to {quiet.foreign_cpu_share:.0%} of the cores"
            )
        return (
            f"expertlane calibrate {__version__}, {datetime.now(UTC).date()}: {what}{driver}, "
            f"{ranks} rank{'s' if ranks > 1 else ''} at once{pinned}, {machine.dtype}, "
            f"{machine.kernels} kernels, {machine.backend}, torch {machine.torch_version}, "
            f"Python {platform.python_version()}, "
            f"{len(self._points)} operations, "
            f"median of {rounds} round{'s' if rounds > 1 else ''}{disturbed}"
        )


def _with(profile: Profile, surfaces: dict[str, Surface], terms: dict[str, Term]) -> Profile:
    return replace(
        profile, surfaces={**profile.surfaces, **surfaces}, terms={**profile.terms, **terms}
    )
