"""Ranks of which some die, stop, fail or dawdle at chosen moments."""

import ctypes
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from engine.elastic.shadow import watch_ranks
from expertlane.engine.comm.progress import ProgressBoard, ProgressReporter
from expertlane.engine.ranks.commands import (
    Deploy,
    FinishMoves,
    LeaveCores,
    Prepare,
    Redeploy,
    RunStep,
    StartMoves,
)
from expertlane.engine.stage import worker
from expertlane.spec.names import Phase, Stage

_LOOK_S = 20e-6
_PATIENCE_STEPS = 3  # after so many steps more, any stage will do
SLOW_S = 0.8  # less than the bound of a hang

KINDS = ("kill", "stop", "raise", "slow")
COMMANDS = {
    "start-up": Deploy,
    "moves begin": StartMoves,
    "moves end": FinishMoves,
    "second": Redeploy,
    "preparing": Prepare,
    "change begins": LeaveCores,
    "change": Redeploy,
}


@dataclass(frozen=True)
class Fault:
    """What happens to a rank, and when.

    Attributes:
        kind: one of `KINDS`.
        command: at the beginning of a command of this name of `COMMANDS`; None in a step.
        phase, step, stage, layer: of a step otherwise: the first one of this phase from `step` on,
            when it is in that stage of that layer, or next comes by.
        is_later: steps count from the first one after `Happened.begin`.
    """

    rank: int
    kind: str
    command: str | None = None
    phase: Phase = Phase.DECODE
    step: int = 0
    stage: Stage = Stage.ATTENTION
    layer: int = 0
    is_later: bool = False


class Happened:
    """When each fault happened, on the monotonic clock in ns, in memory shared by all; 0: not.

    Attributes:
        has_begun: whether faults may happen that are to come later.
    """

    def __init__(self, num_faults: int) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._num_faults = num_faults
        self._times = (ctypes.c_int64 * (num_faults + 1)).from_buffer(self._memory)

    @property
    def has_begun(self) -> bool:
        return bool(self._times[self._num_faults])

    def begin(self) -> None:
        """From now on they may."""
        self._times[self._num_faults] = 1

    def all(self) -> bool:
        """Whether all faults have happened."""
        return all(self._times[: self._num_faults])

    def __getitem__(self, number: int) -> int:
        return self._times[number]

    def note(self, number: int) -> None:
        """It happens now."""
        self._times[number] = time.monotonic_ns()


class PlantedError(Exception):
    """A fault of kind `raise`."""


class _Trap:
    """Springs one fault, once in all epochs."""

    def __init__(self, number: int, fault: Fault, happened: Happened) -> None:
        self.fault = fault
        self._number, self._happened = number, happened
        self.phase: Phase | None = None  # of the step under way
        self.step = -1
        self._first = None if fault.is_later else fault.step
        self._lock = threading.Lock()

    @property
    def is_set(self) -> bool:
        return not self._happened[self._number]

    def begin(self, phase: Phase, step: int) -> None:
        """A step begins."""
        if self._first is None and self._happened.has_begun:
            self._first = step
        self.phase, self.step = phase, step

    @property
    def is_due(self) -> bool:
        """Whether the step is one of those."""
        is_phase = self.phase is self.fault.phase
        return is_phase and self._first is not None and self.step >= self._first

    def matches(self, at: Stage, layer: int) -> bool:
        """Whether a step's position is the moment, or past it."""
        fault = self.fault
        if fault.command is not None or not self.is_due:
            return False
        is_late = self.step >= (self._first or 0) + _PATIENCE_STEPS
        return is_late or (at is fault.stage and layer in (fault.layer, -1))

    def spring(self) -> None:
        with self._lock:
            if not self.is_set:
                return
            self._happened.note(self._number)
        if self.fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.fault.kind == "slow":
            time.sleep(SLOW_S)
        else:
            raise PlantedError("planted")

    def watch(self, board: ProgressBoard) -> None:
        """Look at the rank's line from a thread: C++ changes it without Python."""
        while self.is_set:
            if self.is_due:
                position = board.position(self.fault.rank)
                if self.matches(position.stage, position.layer):
                    return self.spring()
            time.sleep(_LOOK_S)
        return None


class _Reporter(ProgressReporter):
    """Springs faults at changes of stage that Python sees."""

    trap: _Trap | None = None

    def enter(self, stage: Stage, layer: int) -> int:
        now_ns = super().enter(stage, layer)
        if self.trap is not None and self.trap.is_set and self.trap.matches(stage, layer):
            self.trap.spring()
        return now_ns


def install(faults: Sequence[Fault], happened: Happened, transport: str, shadow: Path) -> None:
    """Have the ranks that this process will fork be such ranks.

    Args:
        transport: `shared_memory` or `gloo`.
        shadow: the file of `watch_ranks`.
    """
    watch_ranks(shadow)
    if transport == "gloo":
        os.environ["EXPERTLANE_TRANSPORT"] = "gloo"
    traps = [_Trap(number, fault, happened) for number, fault in enumerate(faults)]
    server_pid = os.getpid()  # it writes lines of ranks that it starts, and is none
    reporter_of = ProgressBoard.reporter

    def reporter(self: ProgressBoard, rank: int) -> ProgressReporter:
        plain = reporter_of(self, rank)
        for trap in traps:
            fault = trap.fault
            if fault.rank != rank or fault.command is not None or os.getpid() == server_pid:
                continue
            if fault.kind in ("kill", "stop"):
                threading.Thread(target=trap.watch, args=(self,), daemon=True).start()
            else:
                plain.__class__ = _Reporter
                plain.trap = trap  # type: ignore[attr-defined]
        return plain

    def wrapped(kind: type, handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def handle(context: Any, command: Any) -> Any:
            for trap in traps:
                fault = trap.fault
                if fault.rank != context.rank or not trap.is_set:
                    continue
                if fault.command is not None and COMMANDS[fault.command] is kind:
                    trap.spring()
                elif kind is RunStep:
                    trap.begin(command.step.phase, command.step.step)
            return handler(context, command)

        return handle

    mock.patch.object(ProgressBoard, "reporter", reporter).start()
    handlers: Mapping[type, Any] = worker.HANDLERS
    planted = {kind: wrapped(kind, handler) for kind, handler in handlers.items()}
    mock.patch.object(worker, "HANDLERS", planted).start()
