"""Measure the machine at hand: rounds of everything in turn, then a profile of the medians."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from expertlane import __version__
from expertlane.cost.execution import DRIVER_S, GRAPH_LAUNCH_S, LAUNCH_S
from expertlane.cost.operation import TransferKind
from expertlane.cost.profile import Device, Profile, Term
from expertlane.cost.surface import Surface
from expertlane.engine.host import ForeignLoad
from expertlane.engine.messages import RankMachine
from expertlane.engine.pool import RankPool
from expertlane.experiment.calibrate_fit import (
    link_sheets,
    operation_laws,
    peak_flops_per_s,
    read_bytes_per_s,
    term_of,
    transfer_laws,
)
from expertlane.experiment.calibrate_points import CPU_GRID, GPU_GRID, Grid, TransferPoint
from expertlane.experiment.calibrate_steps import StepSample, measure_steps, overhead_terms
from expertlane.experiment.progress import Progress, Silent

Floats = npt.NDArray[np.float64]

_DESCRIBE = "expertlane.engine.rank_machine:describe"
_OPERATIONS = "expertlane.experiment.calibrate_operations"
_TRANSFERS = "expertlane.experiment.calibrate_transfers"
_PARTS = 4  # of a round, as progress counts them


@dataclass(eq=False)
class Measured:
    """What the rounds gave so far.

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

    Attributes:
        machine: what the first rank sees of it.
        cores: of each rank, where it is pinned to one.
    """

    def __init__(self, pool: RankPool, num_ranks: int, grid: Grid | None = None) -> None:
        self._pool = pool
        self._num_ranks = num_ranks
        self.machine: RankMachine = pool.call(_DESCRIBE)[0]
        self.grid = grid or (GPU_GRID if self.machine.on_gpu else CPU_GRID)
        self.cores: list[int | None] = pool.call(f"{_OPERATIONS}:pin_to_core")
        self._points = self.grid.points(self.machine.dtype)
        self._transfer_points = self.grid.transfers(num_ranks)
        self.measured = Measured()
        self._foreign = ForeignLoad()

    def run(self, progress: Progress | None = None) -> None:
        """All rounds."""
        progress = progress or Silent()
        progress.task("measuring", _PARTS * self.grid.num_rounds)
        for _ in range(self.grid.num_rounds):
            self.measure_round(progress)
        progress.done()

    def measure_round(self, progress: Progress | None = None) -> None:
        """Everything once."""
        progress = progress or Silent()
        pool, grid, ranks, found = self._pool, self.grid, range(self._num_ranks), self.measured
        seconds = pool.call(
            f"{_OPERATIONS}:measure_operations", self._points, grid.point_s, self._num_ranks
        )
        found.operations.append(np.mean([seconds[rank] for rank in ranks], axis=0))
        progress.advance()
        if self._transfer_points:
            took = pool.call(
                f"{_TRANSFERS}:measure_transfers", self._transfer_points, grid.point_s
            )
            found.transfers.append(_of_members(took, self._transfer_points))
        progress.advance()
        if self._num_ranks > 1:
            shares = pool.call(
                f"{_TRANSFERS}:measure_contention",
                self._num_ranks,
                grid.contended_bytes,
                grid.point_s,
            )
            found.contention.append(float(np.median([shares[rank] for rank in ranks])))
        if self.machine.on_gpu:
            found.launches.append(pool.call(f"{_OPERATIONS}:measure_launches", ranks=[0])[0])
        progress.advance()
        found.steps.append(measure_steps(pool, self._num_ranks, grid.step_seqs))
        progress.advance()

    @property
    def foreign_cpu_share(self) -> float:
        """What other processes took of the cores since the beginning."""
        return self._foreign.share()

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
        if self._transfer_points:
            links = link_sheets(self._transfer_points, np.median(transfers, axis=0), origin)
        profile = Profile(name, device, num_ranks, links, surfaces, terms)
        if self._transfer_points:
            of_links = transfer_laws(self._transfer_points, transfers, profile, origin)
            profile = _with(profile, *of_links)
            share = term_of(np.array(found.contention), origin)
            profile = _with(profile, {}, {f"contention.{kind}": share for kind in TransferKind})
        return _with(profile, {}, self._overheads(profile, origin))

    def _overheads(self, profile: Profile, origin: str) -> dict[str, Term]:
        found = overhead_terms(self.measured.steps, profile, self.machine.dtype, origin)
        if not self.machine.on_gpu:
            return found
        launch_s, graph_launch_s = np.array(self.measured.launches).T
        return {
            DRIVER_S: found[DRIVER_S],
            LAUNCH_S: term_of(launch_s, origin),
            GRAPH_LAUNCH_S: term_of(graph_launch_s, origin),
        }

    def _origin(self) -> str:
        machine, ranks = self.machine, self._num_ranks
        what = machine.device if machine.on_gpu else machine.cpu_name
        pinned = ", each on a core of its own" if None not in self.cores else ""
        rounds = len(self.measured.operations)
        return (
            f"expertlane calibrate {__version__}, {datetime.now(UTC).date()}: {what}, "
            f"{ranks} rank{'s' if ranks > 1 else ''} at once{pinned}, {machine.dtype}, "
            f"{machine.kernels} kernels, {machine.backend}, torch {machine.torch_version}, "
            f"Python {platform.python_version()}, median of {rounds} rounds"
        )


def _with(profile: Profile, surfaces: dict[str, Surface], terms: dict[str, Term]) -> Profile:
    return replace(
        profile,
        surfaces={**profile.surfaces, **surfaces},
        terms={**profile.terms, **terms},
    )


def _of_members(seconds: Sequence[Sequence[float]], points: Sequence[TransferPoint]) -> Floats:
    """[num_points]; the mean over those ranks that took part."""
    return np.array(
        [
            np.mean([of_rank[place] for of_rank in seconds[: point.num_ranks]])
            for place, point in enumerate(points)
        ]
    )
