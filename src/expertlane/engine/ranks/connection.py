"""How a rank joins an epoch: the transport by which it talks to the others until that ends."""

import mmap
import os

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from expertlane.engine.comm.epoch import Epoch
from expertlane.engine.comm.file_store import FileStore
from expertlane.engine.comm.nodes import NodesTransport
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.region import Region
from expertlane.engine.comm.shared_memory import CompiledEndpoint, Endpoint, SharedTransport
from expertlane.engine.comm.staged import StagedTransport
from expertlane.engine.comm.torch_transport import TorchTransport
from expertlane.engine.comm.transport import Transport
from expertlane.engine.comm.uncompiled import UncompiledEndpoint
from expertlane.engine.ops.backend import SHARED_MEMORY, Platform, compiled_messages
from expertlane.engine.ops.cores import Share
from expertlane.engine.ranks.rank_settings import RankSettings

# The launcher's own bound ends a hang; the groups' bound only backs it up, so it is longer.
_GROUP_TIMEOUT_MARGIN_S = 30.0
_NUM_SPINS = 2000  # looks at shared memory before a wait sleeps


def connect(
    settings: RankSettings, platform: Platform, share: Share, board: ProgressBoard, number: int
) -> Transport:
    """Join an epoch; waits for no other rank.

    Args:
        board: of this rank's node.
        number: of the epoch; first `settings.epoch`, once: what was inherited is closed then.

    Raises:
        EpochEndedError: a later one has begun.
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
    endpoint: Endpoint
    if (library := compiled_messages()) is not None:
        has_core = settings.num_local_ranks <= share.num_cores
        endpoint = CompiledEndpoint(library, memory, region, rank, _NUM_SPINS if has_core else 0)
    else:
        sizes = region.groups_bytes, region.heap_bytes
        wake_fds = settings.wake_fds[: region.num_ranks]
        endpoint = UncompiledEndpoint(memory, *sizes, rank, wake_fds)
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
