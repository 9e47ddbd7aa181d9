"""Traces of all ranks by torch's profiler, begun and ended by the launcher."""

import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from expertlane.engine.elastic.recovery import Arranged
from expertlane.engine.ranks.commands import StartProfile, StopProfile, WrittenTrace
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import UserError


@dataclass(frozen=True)
class Profiled:
    """Traces of one profile.

    Attributes:
        folder: theirs alone.
        traces: by rank.
    """

    folder: Path
    traces: dict[int, WrittenTrace]


class Profiler:
    """Has all ranks write traces; used in the thread that has the pool.

    Ranks of other nodes write to the same path there.

    Args:
        folder: each profile gets a folder of its own in it.

    Attributes:
        is_running: a profile is under way.
    """

    def __init__(self, pool: RankPool, arranged: Arranged, folder: Path) -> None:
        self._pool, self._arranged, self._folder = pool, arranged, folder
        self.is_running = False

    def start(self) -> None:
        """Begin a profile.

        Raises:
            UserError: one is under way, or ranks cannot be profiled.
            RankError: a rank was lost.
        """
        if self.is_running:
            raise UserError("a profile is under way; end it before another")
        self.is_running = True  # of ranks that have begun, though another be lost meanwhile
        whys = self._pool.call(StartProfile(), ranks=self._arranged.now.members.numbers)
        if why := next(filter(None, whys), ""):
            self.stop()
            raise UserError(f"ranks cannot be profiled: {why}")

    def stop(self) -> Profiled:
        """End the profile, and write a trace of each rank.

        Raises:
            UserError: none is under way, or there can be no folder for it.
            RankError: a rank was lost.
        """
        if not self.is_running:
            raise UserError("no profile is under way")
        folder = self._new_folder()
        self.is_running = False
        members = self._arranged.now.members
        ticket = self._pool.submit(StopProfile(str(folder)), ranks=members.numbers)
        self._pool.collect(ticket)
        traces = {rank: ticket.results[number] for rank, number in enumerate(members.numbers)}
        return Profiled(folder, traces)

    def _new_folder(self) -> Path:
        now = time.strftime("%Y%m%d-%H%M%S")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for number in count(1):
                folder = self._folder / (now if number == 1 else f"{now}-{number}")
                if not folder.exists():
                    folder.mkdir()
                    break
        except OSError as error:
            raise UserError(f"cannot write to {self._folder}: {error.strerror}") from None
        return folder
