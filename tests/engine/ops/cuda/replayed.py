"""Graphs without a GPU: operations are logged, and done again on the same memory.

What a replay does is what a CUDA graph does: no Python of the model runs, so whatever the host knew
when the graph was recorded is as it was then. Ranks may be threads: each records its own.
"""

import threading
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_flatten

from expertlane.engine.ops import bookkeeping
from expertlane.engine.ops.cuda import launch

# Whose result's size, or value, the host would wait for.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero")


# An event: what was asked for is done at once.
PASSED = SimpleNamespace(query=lambda: True, synchronize=lambda: None)


class ReplayedGraphs:
    """As `CudaGraphs`.

    Attributes:
        num_recorded, num_replayed: graphs so far, and launches of them.
    """

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def capture(self, run, until):
        run()
        until(PASSED)
        log, by_torch = _Log(), mock.patch.object(bookkeeping, "stable_order", _stable_order)
        with log, by_torch, mock.patch.object(launch, "_run", launched):
            run()
        self.num_recorded += 1

        def replay():
            self.num_replayed += 1
            with torch.inference_mode():
                log.replay()

        return replay


def _stable_order(values, num_values):
    """As on a GPU: numpy sorts on a CPU, and is in no log."""
    return torch.argsort(values, stable=True)


class _Log(TorchDispatchMode):
    """Operations of torch, launches of Triton and transfers, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in _WAITS, f"the host would wait for {func}"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            is_empty = getattr(func, "__name__", "").startswith(("empty", "new_empty"))
            for ours, theirs in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if not isinstance(ours, torch.Tensor) or not ours.numel():
                    continue
                if is_empty:
                    _poison(ours)
                elif ours.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr():
                    ours.copy_(theirs)


def _poison(room: torch.Tensor) -> None:
    """As memory may be that another graph has used."""
    if room.is_floating_point():
        room.fill_(torch.nan)


def recorded(action, *args):
    """Do what is no operation of torch; a graph that is recorded meanwhile does it again."""
    logs = [each for each in _get_current_dispatch_mode_stack() if isinstance(each, _Log)]
    _without_modes(action, *args)
    for log in logs:
        log.calls.append((_without_modes, (action, *args), {}, None))


def launched(kernel, grid, arguments, options):
    """In place of `launch._run`."""
    recorded(_launch, kernel, grid, arguments, options)


def _without_modes(action, *args):
    with _disable_current_modes():
        action(*args)


_INTERPRETER = threading.Lock()  # Triton's serves one thread at a time


def _launch(kernel, grid, arguments, options):
    with _INTERPRETER:
        kernel[grid](*arguments, **options)
