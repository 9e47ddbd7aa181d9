"""The state of a rank between commands: its cores, its connections in an epoch, its groups."""

import errno
import mmap
import os
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from expertlane.engine.comm.clocks import CoreToken
from expertlane.engine.comm.mesh import Meshes
from expertlane.engine.comm.progress import NO_LAYER, ProgressBoard, ProgressReporter, Region
from expertlane.engine.comm.rank_profile import RankProfile
from expertlane.engine.comm.shared_memory import Endpoint, SharedTransport
from expertlane.engine.comm.torch_transport import (
    FileStore,
    NodesTransport,
    StagedTransport,
    TorchTransport,
)
from expertlane.engine.comm.transport import Epoch, Event, Transport, await_event
from expertlane.engine.ops.backend import (
    SHARED_MEMORY,
    Platform,
    compiled_messages,
)
from expertlane.engine.ops.host import Share, allowed_cpus, pin, share_of, unpin
from expertlane.engine.ranks.rank_settings import RankSettings
from expertlane.errors import CapacityError, no_room
from expertlane.spec.names import Stage

# The launcher's own bound ends a hang; the groups' bound only backs it up, so it is longer.
_GROUP_TIMEOUT_MARGIN_S = 30.0
_NUM_SPINS = 2000  # polls of shared memory before a wait sleeps


def connect(
    settings: RankSettings, platform: Platform, share: Share, board: ProgressBoard, number: int
) -> Transport:
    """Connect to an epoch's transport; does not wait for other ranks.

    Args:
        board: the progress board of this rank's node.
        number: the epoch's; `settings.epoch` is possible only once, as its inherited files are
            closed then.

    Raises:
        EpochEndedError: a later epoch has begun.
    """
    hosts = _connect(settings, platform, share, Epoch(board, number))
    return StagedTransport(hosts, platform.device) if platform.is_staged else hosts


def _connect(
    settings: RankSettings, platform: Platform, share: Share, epoch: Epoch
) -> SharedTransport | TorchTransport | NodesTransport:
    shares_memory = platform.transport.startswith(SHARED_MEMORY)
    if shares_memory and settings.meeting is None:
        return _share_memory(settings, share, epoch)
    among_nodes = TorchTransport(
        torch.device("cpu") if platform.is_staged else platform.device,
        _open_store(settings, epoch),
        settings.rank,
        bound_s(settings),
        epoch,
        ranks_per_node=settings.num_local_ranks,
    )
    if not shares_memory:
        return among_nodes
    in_node = _share_memory(settings, share, epoch)
    return NodesTransport(in_node, among_nodes, settings.rank, settings.num_local_ranks)


def bound_s(settings: RankSettings) -> float:
    """The bound on a rank's own waits for others."""
    return settings.timeout_s + _GROUP_TIMEOUT_MARGIN_S


def _share_memory(settings: RankSettings, share: Share, epoch: Epoch) -> SharedTransport:
    region, rank = Region(settings.num_local_ranks), settings.local_rank
    memory = _map(settings, region, epoch)
    library, _ = compiled_messages()
    assert library is not None, "else the transport is gloo"
    has_core = settings.num_local_ranks <= share.num_cores
    endpoint = Endpoint(library, memory, region, rank, _NUM_SPINS if has_core else 0)
    first, own = settings.rank - rank, settings.rank
    return SharedTransport(endpoint, region, first, own, bound_s(settings), epoch)


def _map(settings: RankSettings, region: Region, epoch: Epoch) -> mmap.mmap:
    if epoch.number == settings.epoch:
        assert settings.memory_fd is not None, "all ranks have inherited it"
        descriptor = settings.memory_fd
    else:
        descriptor = epoch.open_memory()
    try:
        return region.map(descriptor)
    finally:
        os.close(descriptor)  # the mapping has one of its own, and goes with it


def _open_store(settings: RankSettings, epoch: Epoch) -> Store:
    if settings.meeting is not None:
        return settings.meeting.open_for_ranks()
    descriptor = epoch.open_store() if epoch.number else None
    if descriptor is None:
        descriptor = os.open(settings.store_path, os.O_RDWR | os.O_CLOEXEC)
    return FileStore(descriptor, epoch)


class Cores:
    """The cores of a rank; a new process is not pinned.

    Attributes:
        share: the rank's share of its node's cores.
        are_taken: whether it computes with that share.
        is_pinned: whether its threads are pinned to the hardware threads of its share.

    Raises:
        UserError: `EXPERTLANE_PIN` is not valid.
    """

    def __init__(self, local_rank: int, num_local_ranks: int) -> None:
        self._allowed, self._num_threads = allowed_cpus(), torch.get_num_threads()
        self._held: list[int] = []  # descriptors of the locks that other engines see
        self.share: Share = share_of(local_rank, num_local_ranks)
        self.are_taken = self.is_pinned = False

    def take(self, local_rank: int, num_local_ranks: int) -> None:
        """Compute with a share of the cores.

        Raises:
            CapacityError: this user may not start that many threads.
        """
        self.leave()
        self.share = share_of(local_rank, num_local_ranks, allowed=self._allowed)
        # No more threads than OMP_NUM_THREADS either, which torch took at its import.
        num_threads = max(1, min(self._num_threads, self.share.num_threads))
        _check_threads(num_threads - 1)
        torch.set_num_threads(num_threads)
        self.is_pinned = pin(self.share.cpus, held=self._held)
        self.are_taken = True

    def stay_small(self) -> None:
        """Compute with one thread, since other ranks use all cores."""
        torch.set_num_threads(1)

    def leave(self) -> None:
        """Unpin the rank's threads, so that another rank may take its cores."""
        self.are_taken = False
        if self.is_pinned:
            self.is_pinned = False
            unpin(self._allowed, self._held)


def _check_threads(number: int) -> None:
    """Start so many threads at once, and end them: OpenMP ends a process that cannot.

    Raises:
        CapacityError: there is no room for them.
    """
    is_over = threading.Event()
    threads = [threading.Thread(target=is_over.wait) for _ in range(number)]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        reason = no_room(OSError(errno.EAGAIN, str(error)))
        raise CapacityError(f"cannot start {number} threads of a rank: {reason}") from None
    finally:
        is_over.set()
        for thread in started:
            thread.join()


@dataclass(eq=False)
class RankContext:
    """The state of a rank between commands.

    Attributes:
        settings: its start settings, with the numbers of ranks of the current epoch.
        cores: the cores that it computes on.
        board: the progress board of its node.
        meshes: process groups of this epoch; made once, since making them is collective and slow.
        deployed: its `DeployedStage`; None without one.
        parked: weights of a rank that has no place in a smaller layout, until it has one again.
        preparation: its `Preparation` of another layout; None without one.
        profile: its trace under way; None without one.
        epoch: the epoch that the rank has joined; -1 before the first.
    """

    settings: RankSettings
    platform: Platform
    cores: Cores
    board: ProgressBoard
    progress: ProgressReporter
    meshes: Meshes
    deployed: Any = None
    parked: Any = None
    preparation: Any = None
    profile: RankProfile | None = None
    epoch: int = -1

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.settings.rank

    def join_epoch(self, epoch: int) -> None:
        """Connect to the ranks of an epoch, and leave the one before.

        Raises:
            EpochEndedError: a later epoch has begun.
        """
        if epoch != self.settings.epoch:
            self._count_ranks(self.board.files(epoch).num_ranks)
        connected = connect(self.settings, self.platform, self.cores.share, self.board, epoch)
        self.drop_graphs()
        self.meshes.renew(connected)
        self.epoch = epoch
        self.progress.set_waiting(False)  # an abandoned command may have left it set
        self.progress.enter(Stage.IDLE, NO_LAYER)

    def _count_ranks(self, num_local_ranks: int) -> None:
        """Set the number of the node's ranks, and take a new share of its cores.

        The number may be that of an epoch that has ended; `connect` will find that out.
        """
        settings, is_same = self.settings, num_local_ranks == self.settings.num_local_ranks
        others = settings.world_size - settings.num_local_ranks
        self.settings = replace(
            settings, num_local_ranks=num_local_ranks, world_size=others + num_local_ranks
        )
        if self.platform.device.type == "cpu" and not (is_same and self.cores.are_taken):
            self.cores.take(settings.local_rank, num_local_ranks)

    def drop_graphs(self) -> None:
        """Drop graphs before an epoch is left: nccl ends no group that a graph refers to."""
        if self.deployed is not None:
            self.deployed.drop_graphs()

    def await_device(self, event: Event) -> None:
        """Wait for a GPU, which may wait for other ranks.

        Raises:
            EpochEndedError: a later epoch has begun.
            PeerLostError: it took too long.
        """
        self.progress.set_waiting(True)
        await_event(event, Epoch(self.board, self.epoch), bound_s(self.settings))
        self.progress.set_waiting(False)

    def core_token(self) -> CoreToken | None:
        """The token of the core that this rank shares; None on GPUs."""
        settings = self.settings
        if self.platform.device.type != "cpu" or settings.board_fd is None:
            return None
        return CoreToken(settings.board_fd, settings.local_rank, self.cores.share.num_cores)
