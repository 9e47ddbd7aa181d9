"""A rank's main loop: take a command, run it, answer."""

import contextlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from multiprocessing.connection import wait
from operator import or_
from typing import Any

import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from expertlane.comm.mesh import Meshes
from expertlane.comm.progress import NO_LAYER, ProgressBoard, ProgressReporter
from expertlane.comm.region import Region
from expertlane.comm.shared_memory import CompiledEndpoint, Endpoint, SharedTransport
from expertlane.comm.torch_transport import TorchTransport
from expertlane.comm.transport import PeerLostError, Transport
from expertlane.comm.uncompiled import UncompiledEndpoint
from expertlane.engine.commands import Command
from expertlane.engine.fork_server import RankSettings
from expertlane.engine.messages import (
    Channel,
    Decoder,
    Failure,
    FailureKind,
    Heartbeat,
    MessageKind,
    Ready,
    encode,
)
from expertlane.errors import TerminatedError, UserError
from expertlane.ops.backend import (
    SHARED_MEMORY,
    Platform,
    choose_platform,
    compiled_messages,
)
from expertlane.ops.host import num_cores
from expertlane.spec.names import Stage

# The launcher's own bound ends a hang; the groups' bound only backs it up, so it is longer.
_GROUP_TIMEOUT_MARGIN_S = 30.0
_HEARTBEAT_S = 1.0
_NUM_SPINS = 2000  # looks at shared memory before a wait sleeps
_LINGER_S = 10.0


@dataclass(eq=False)
class RankContext:
    """What lives in a rank between commands.

    Attributes:
        meshes: process groups; made once, since making them is collective and slow.
        deployed: what `engine.stage` put here; None before.
    """

    settings: RankSettings
    platform: Platform
    progress: ProgressReporter
    meshes: Meshes
    deployed: Any = None

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.settings.rank


# What a rank does for each command; the answer is of the command's own result type.
Handlers = Mapping[type[Command[Any]], Callable[[RankContext, Any], Any]]
Send = Callable[[MessageKind, object], None]


def _sender(channel: Channel) -> Send:
    """Sends messages to the launcher, from several threads too; its end is noticed elsewhere."""
    lock = threading.Lock()

    def send(kind: MessageKind, value: object) -> None:
        encoded = encode(kind, value)
        with lock, contextlib.suppress(OSError):
            channel.send(encoded)

    return send


def _open_board(
    settings: RankSettings, send: Callable[[MessageKind, object], None]
) -> ProgressBoard:
    """The launcher's board; on another node, one of its own that is reported by heartbeats."""
    if settings.board_fd is not None:
        return ProgressBoard(settings.world_size, settings.board_fd)
    board = ProgressBoard(settings.world_size)

    def beat() -> None:
        while True:
            send(MessageKind.HEARTBEAT, Heartbeat(board.cells(settings.rank)))
            time.sleep(_HEARTBEAT_S)

    threading.Thread(target=beat, daemon=True).start()
    return board


def _connect(settings: RankSettings, platform: Platform, store: Store | None) -> Transport:
    bound_s = settings.timeout_s + _GROUP_TIMEOUT_MARGIN_S
    if platform.transport.startswith(SHARED_MEMORY):
        return _share_memory(settings, bound_s)
    if store is None:
        assert settings.store_path is not None, "local ranks meet in a file"
        store = FileStore(settings.store_path, settings.world_size)
    dist.init_process_group(
        platform.transport,
        store=store,
        rank=settings.rank,
        world_size=settings.world_size,
        timeout=timedelta(seconds=bound_s),
        device_id=platform.device if platform.device.type == "cuda" else None,
    )
    several_nodes = settings.num_local_ranks < settings.world_size
    over_links = several_nodes and platform.transport == "gloo"
    return TorchTransport(platform.device.type, settings.rank, over_links=over_links)


def _share_memory(settings: RankSettings, bound_s: float) -> SharedTransport:
    assert settings.memory_fd is not None, "all ranks have inherited it"
    region = Region(settings.num_local_ranks)
    memory, rank = region.map(settings.memory_fd), settings.local_rank
    endpoint: Endpoint
    if (library := compiled_messages()) is not None:
        has_core = settings.num_local_ranks <= num_cores()
        endpoint = CompiledEndpoint(library, memory, region, rank, _NUM_SPINS if has_core else 0)
    else:
        sizes = region.groups_bytes, region.heap_bytes
        endpoint = UncompiledEndpoint(memory, *sizes, rank, settings.wake_fds)
    return SharedTransport(endpoint, region, settings.rank - rank, settings.rank, bound_s)


def run_rank(
    channel: Channel, settings: RankSettings, handlers: Handlers, store: Store | None = None
) -> int:
    """Answer commands until the launcher goes away or one fails; returns the exit code.

    Args:
        store: where the ranks meet; None for local ranks, which meet in `settings.store_path`.
    """
    send = _sender(channel)
    commands: Decoder[Command[Any]] = Decoder(reduce(or_, handlers))
    try:
        progress = _open_board(settings, send).reporter(settings.rank)
        platform = choose_platform(
            settings.local_rank,
            settings.num_local_ranks,
            settings.dtype,
            shares_memory=settings.memory_fd is not None,
        )
        meshes = Meshes(_connect(settings, platform, store))
        context = RankContext(settings, platform, progress, meshes)
        progress.enter(Stage.IDLE, NO_LAYER)
        send(MessageKind.READY, Ready(socket.gethostname(), os.getpid()))
        while (command := _next_command(channel, commands)) is not None:
            send(MessageKind.RESULT, handlers[type(command)](context, command))
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except UserError as error:
        failure = Failure(FailureKind.USER, str(error))
    except PeerLostError as error:
        failure = Failure(FailureKind.PEER, str(error))
    except TerminatedError as error:
        failure = Failure(FailureKind.TERMINATED, str(error))
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        failure = Failure(FailureKind.BUG, line, traceback.format_exc())
    send(MessageKind.FAILURE, failure)
    # A rank that ends by itself looks like the cause to torchrun, so leave it to the launcher.
    wait([channel.fileno()], _LINGER_S)
    return 1


def _next_command(channel: Channel, commands: Decoder[Command[Any]]) -> Command[Any] | None:
    """None when the launcher is done, or gone."""
    try:
        message = channel.receive()
    except (EOFError, OSError):
        return None
    return commands.decode(message)
