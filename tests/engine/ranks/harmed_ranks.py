"""Ranks of which one dies or stops at a drawn access to the memory that they share.

What a rank does between two accesses no other rank can see, so these are all moments that differ.
"""

import ctypes
import mmap
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from expertlane.engine.comm import shared_memory
from expertlane.engine.comm.progress import Region
from expertlane.engine.ops import build
from expertlane.engine.stage import context

_SOURCE = Path(__file__).parent / "harmed_messages.cpp"
_KINDS = ("load", "store", "exchange", "copy", "sleep", "wake")  # as in harmed_messages.cpp, from 1
BEFORE, AFTER = "before", "after"  # the exchange
ALL_KINDS = (BEFORE, *_KINDS, AFTER)
_NUM_EXCHANGES = 200  # after so many more, any moment will do: a rank may never sleep, or wake one


@dataclass(frozen=True)
class Harm:
    """What happens to a rank, and when.

    Attributes:
        number: of the signal that it sends itself.
        exchange: during which of its exchanges, or the first thereafter that has such a moment.
        kind: of access, one of `ALL_KINDS`; in a copy, half is done.
        num_before: accesses of that kind in that exchange that are left alone.
        delay_us: for `sleep`, how long after it fell asleep.
    """

    rank: int
    number: int
    exchange: int
    kind: str
    num_before: int
    delay_us: int


class Happened:
    """What became of it, in memory that a rank shares with whoever forked it.

    Attributes:
        time_ns: when harm was done, on the monotonic clock; 0 if it was not.
        is_late: 1 if the rank came to no such moment, so that another one had to do.
    """

    def __init__(self) -> None:
        memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.time_ns = ctypes.c_int64.from_buffer(memory)
        self.is_late = ctypes.c_int64.from_buffer(memory, 8)


class HarmedEndpoint:
    """An endpoint during one of whose exchanges it happens.

    Args:
        library: counts accesses within an exchange, once `harm_at` was called.
    """

    def __init__(self, endpoint: Any, library: ctypes.CDLL, harm: Harm, happened: Happened) -> None:
        self._endpoint, self._library = endpoint, library
        self._harm, self._happened = harm, happened
        self._num_begun, self._num_left = 0, -1  # calls that are left alone; -1 if not counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._endpoint, name)

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return self._endpoint.begin(*args, **kwargs)

    def exchange(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        exchanged = self._endpoint.exchange(*args, **kwargs)
        self._at(AFTER)
        return exchanged

    def wait(self, exchange: Any, timeout_s: float) -> tuple[int, int]:
        waited: tuple[int, int] = self._endpoint.wait(exchange, timeout_s)
        self._at(AFTER)
        return waited

    def _count(self) -> None:
        harm, number = self._harm, ctypes.c_int64
        self._num_begun += 1
        if self._num_begun == harm.exchange and harm.kind in _KINDS:
            self._library.harm_at(
                *(1 + _KINDS.index(harm.kind), number(harm.num_before), number(harm.delay_us)),
                *(harm.number, ctypes.byref(self._happened.time_ns)),
            )
        elif self._num_begun == harm.exchange:
            self._num_left = harm.num_before
        elif self._num_begun > harm.exchange + _NUM_EXCHANGES:
            self._happened.is_late.value = 1
            self._happen()
        self._at(BEFORE)

    def _at(self, kind: str) -> None:
        """A call is about to begin, or has ended."""
        if kind == self._harm.kind and self._num_left >= 0:
            self._num_left -= 1
            if self._num_left < 0:
                self._happen()

    def _happen(self) -> None:
        self._happened.time_ns.value = time.monotonic_ns()
        signal.raise_signal(self._harm.number)


def build_harmed_messages(folder: Path) -> Path | None:
    """The library of `harmed_messages.cpp`; None where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    library = folder / "harmed_messages.so"
    command = [*shlex.split(compiler), "-O2", "-std=c++17", "-fPIC", "-shared", "-pthread"]
    subprocess.run([*command, str(_SOURCE), "-o", str(library)], check=True)
    return library


def install(harm: Harm, happened: Happened, library: Path, heap_bytes: int) -> None:
    """Have the ranks that this process will fork be such ranks.

    Args:
        library: of `harmed_messages.cpp`.
        heap_bytes: for the messages of each rank; fewer make pieces of them.
    """
    functions = build._loaded(library)
    make = shared_memory.SharedTransport

    def transport(endpoint: Any, region: Region, first: int, rank: int, *rest: Any) -> Any:
        if rank == harm.rank:
            endpoint = HarmedEndpoint(endpoint, functions, harm, happened)
        return make(endpoint, region, first, rank, *rest)

    mock.patch.object(context, "compiled_messages", return_value=(functions, "")).start()
    mock.patch.object(context, "Region", partial(Region, heap_bytes=heap_bytes)).start()
    mock.patch.object(context, "SharedTransport", transport).start()
