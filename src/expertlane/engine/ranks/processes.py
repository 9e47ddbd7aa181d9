"""Helpers for processes: end with the parent, detect stopped ones, defer SIGTERM, no threads."""

import contextlib
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import psutil

_PARENT_CHECK_S = 0.5
_NUM_THREADS = "OPENBLAS_NUM_THREADS"


def import_numpy() -> None:
    """Import numpy without threads, in a process that is forked and never computes itself.

    Where no thread may be started, OpenBLAS prints five lines and sends SIGINT. A torch that uses
    OpenBLAS has a copy of its own, which reads the user's setting.
    """
    before = os.environ.get(_NUM_THREADS)
    os.environ[_NUM_THREADS] = "1"
    importlib.import_module("numpy")
    del os.environ[_NUM_THREADS]
    if before is not None:
        os.environ[_NUM_THREADS] = before


def end_with_parent(parent: int) -> Callable[[], None]:
    """Watch the parent from a thread, and end this process at once when it is gone.

    A parent-death signal would not do: the kernel sends it as soon as the *thread* that started
    this process ends.

    Returns:
        A function that ends the watch.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_PARENT_CHECK_S):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def end_watch() -> None:
        is_over.set()
        thread.join()

    return end_watch


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def unterminated() -> Iterator[None]:
    """A context in which SIGTERM is deferred."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
