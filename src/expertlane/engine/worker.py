"""A rank's main loop: take a call, run it, answer."""

import contextlib
import os
import socket
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from expertlane.engine.messages import (
    Call,
    Failure,
    FailureKind,
    Heartbeat,
    RankSettings,
    Result,
)
from expertlane.engine.platform import Platform, choose_platform
from expertlane.errors import TerminatedError, UserError
from expertlane.parallel.collectives import PeerLostError
from expertlane.parallel.mesh import DeviceMeshes
from expertlane.parallel.progress import NO_LAYER, ProgressBoard, ProgressReporter
from expertlane.spec.names import Stage

# The launcher's own bound ends a hang; the groups' bound only backs it up, so it is longer.
_GROUP_TIMEOUT_MARGIN_S = 30.0
_HEARTBEAT_S = 1.0
_LINGER_S = 10.0


@dataclass(eq=False)
class RankContext:
    """What lives in a rank between calls.

    Attributes:
        meshes: process groups; made once, since making them is collective and slow.
        deployed: what `engine.deployed_stage` put here; None before.
    """

    settings: RankSettings
    platform: Platform
    progress: ProgressReporter
    meshes: DeviceMeshes
    deployed: Any = None

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.settings.rank


class _Mouth:
    """A rank's side of the connection to the launcher; more than one thread may speak."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def say(self, message: Result | Failure | Heartbeat) -> None:
        """Send a message whole; a launcher that is gone does not matter here."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.send(message)


def _open_board(settings: RankSettings, mouth: _Mouth) -> ProgressBoard:
    """The launcher's board; on another node, one of its own that is reported by heartbeats."""
    if settings.progress_path is not None and Path(settings.progress_path).exists():
        return ProgressBoard(settings.world_size, Path(settings.progress_path))
    board = ProgressBoard(settings.world_size)

    def beat() -> None:
        while True:
            mouth.say(Heartbeat(board.cells(settings.rank)))
            time.sleep(_HEARTBEAT_S)

    threading.Thread(target=beat, daemon=True).start()
    return board


def _connect(settings: RankSettings, platform: Platform, store: Store | None) -> None:
    if store is None:
        assert settings.store_path is not None, "local ranks meet in a file"
        store = FileStore(settings.store_path, settings.world_size)
    dist.init_process_group(
        platform.backend,
        store=store,
        rank=settings.rank,
        world_size=settings.world_size,
        timeout=timedelta(seconds=settings.timeout_s + _GROUP_TIMEOUT_MARGIN_S),
        device_id=platform.device if platform.device.type == "cuda" else None,
    )


def serve(connection: Connection, settings: RankSettings, store: Store | None = None) -> int:
    """Answer calls until the launcher goes away or one fails; returns the exit code.

    Args:
        store: where the ranks meet; None for local ranks, which meet in `settings.store_path`.
    """
    mouth = _Mouth(connection)
    try:
        progress = _open_board(settings, mouth).reporter(settings.rank)
        platform = choose_platform(settings.local_rank, settings.num_local_ranks, settings.dtype)
        _connect(settings, platform, store)
        context = RankContext(settings, platform, progress, DeviceMeshes(platform.device.type))
        progress.enter(Stage.IDLE, NO_LAYER)
        mouth.say(Result((socket.gethostname(), os.getpid())))
        while (call := _next_call(connection)) is not None:
            mouth.say(Result(resolve_name(call.function)(context, *call.args)))
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
    mouth.say(failure)
    # A rank that ends by itself looks like the cause to torchrun, so leave it to the launcher.
    connection.poll(_LINGER_S)
    return 1


def _next_call(connection: Connection) -> Call | None:
    """None when the launcher is done, or gone."""
    try:
        call: Call = connection.recv()
    except (EOFError, OSError):
        return None
    return call
