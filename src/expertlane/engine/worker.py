"""A rank's main loop: take a call, run it, answer."""

import contextlib
import os
import socket
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from expertlane.engine.messages import Call, Failure, FailureKind, RankSettings, Result
from expertlane.engine.platform import Platform, choose_platform
from expertlane.errors import UserError
from expertlane.parallel.collectives import PeerLostError
from expertlane.parallel.mesh import DeviceMeshes
from expertlane.parallel.progress import NO_LAYER, ProgressBoard, ProgressReporter
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage

# The launcher's own bound ends a hang; the groups' bound only backs it up, so it is longer.
_GROUP_TIMEOUT_MARGIN_S = 30.0


@dataclass(eq=False)
class RankContext:
    """What lives in a rank between calls.

    Attributes:
        meshes: process groups by layout; made once, since making them is collective and slow.
        deployed: what `engine.deployed_stage` put here; None before.
    """

    settings: RankSettings
    platform: Platform
    progress: ProgressReporter
    meshes: dict[Layout, DeviceMeshes] = field(default_factory=dict)
    deployed: Any = None

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.settings.rank


def _open_board(settings: RankSettings) -> ProgressBoard:
    path = settings.progress_path
    shared = path is not None and Path(path).exists()  # a rank of another node cannot see it
    return ProgressBoard(settings.world_size, Path(path) if path and shared else None)


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
    progress = _open_board(settings).reporter(settings.rank)
    try:
        platform = choose_platform(settings.local_rank, settings.num_local_ranks, settings.dtype)
        _connect(settings, platform, store)
        context = RankContext(settings, platform, progress)
        progress.enter(Stage.IDLE, NO_LAYER)
        connection.send(Result((socket.gethostname(), os.getpid())))
        while True:
            call: Call = connection.recv()
            connection.send(Result(resolve_name(call.function)(context, *call.args)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the launcher is done, or gone
    except UserError as error:
        failure = Failure(FailureKind.USER, str(error))
    except PeerLostError as error:
        failure = Failure(FailureKind.PEER, str(error))
    except Exception as error:
        failure = Failure(
            FailureKind.BUG, f"{type(error).__name__}: {error}", traceback.format_exc()
        )
    with contextlib.suppress(OSError):
        connection.send(failure)
    return 1
