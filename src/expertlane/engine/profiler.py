"""Profile all ranks with torch's profiler, from the launcher."""

import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from expertlane.engine.elastic.recovery import CurrentArrangement
from expertlane.engine.ranks.commands import StartProfile, StopProfile, WrittenTrace
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import UserError


@dataclass(frozen=True)
class ProfileTraces:
    """The traces of one profile.

    Attributes:
        folder: a new folder with nothing else in it.
        traces: each rank's trace, by rank.
    """

    folder: Path
    traces: dict[int, WrittenTrace]


class Profiler:
    """Starts and stops the profiler on all ranks; used in the thread that has the pool.

    Ranks on other nodes write to the same path there.

    Args:
        folder: folder in which each profile gets a new subfolder.

    Attributes:
        is_running: True while ranks are profiled.
    """

    def __init__(self, pool: RankPool, arranged: CurrentArrangement, folder: Path) -> None:
        self._pool, self._arranged, self._folder = pool, arranged, folder
        self.is_running = False

    def start(self) -> None:
        """Start the profiler on all ranks.

        Raises:
            UserError: it runs already, or ranks cannot be profiled.
            RankError: a rank was lost.
        """
        if self.is_running:
            raise UserError("a profile is under way; end it before another")
        self.is_running = True  # some ranks profile, even if another one is lost now
        whys = self._pool.call(StartProfile(), ranks=self._arranged.now.members.numbers)
        if why := next(filter(None, whys), ""):
            self.stop()
            raise UserError(f"ranks cannot be profiled: {why}")

    def stop(self) -> ProfileTraces:
        """Stop the profiler, and write a trace of each rank.

        Raises:
            UserError: it does not run, or no folder can be made.
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
        return ProfileTraces(folder, traces)

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
