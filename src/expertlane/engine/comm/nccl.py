"""nccl's process group, and its own collectives for whole groups.

Streams are those of torch's process group, not ours: each group has one of its own, on which a
transfer begins once the computing stream has come to where it was asked for; a wait has the
computing stream, not the host, wait for its end. A second stream of ours would add two events to
each transfer and overlap nothing more. Never run on a GPU (docs/validation.md); padding is tested
on gloo's process group.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from expertlane.engine.comm.epoch import Epoch
from expertlane.engine.comm.torch_link import (
    MANY_BYTES,
    Backend,
    TorchLink,
    TorchWork,
    blaming_peers,
)

_MOST_PADDED = 1.25  # padded over real rows, in a transfer of many bytes; not measured
_SUMMED = (torch.float16, torch.bfloat16)  # summed by nccl across nodes


class Nccl:
    """A process group of nccl. Its abort has never run: docs/validation.md.

    Args:
        store: the rendezvous of its ranks.
        place: this rank's place in the group, of `size`.
    """

    def __init__(
        self, store: Store, place: int, size: int, timeout: timedelta, device: torch.device
    ) -> None:
        from torch.distributed import ProcessGroupNCCL

        # The epoch tells ranks that another is lost; by default torch would end their processes.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        options.is_high_priority_stream = True  # beside kernels that fill the GPU
        self.group: Any = ProcessGroupNCCL(store, place, size, options)
        self.group.eager_connect_single_device(device)

    @contextlib.contextmanager
    def together(self, works: list[Any]) -> Iterator[None]:
        """Begin several sends and receives as one; `works` becomes the one wait for all of them."""
        self.group._start_coalescing()
        yield
        works[:] = [self.group._end_coalescing()]

    def abort(self) -> None:
        """Abort all operations: kernels that wait for other ranks end, with any values."""
        self.group.abort()


class NcclLink(TorchLink):
    """A link with nccl's own all-gather, and its reduce-scatter of 16-bit values across nodes.

    `Group` computes other sums: inside a node every rank sends as many bytes either way, and nccl
    rounds after each rank (docs/design_decisions.md).

    Args:
        spans_nodes: the ranks of the group are on several nodes.
    """

    def __init__(
        self,
        backend: Backend,
        place: int,
        size: int,
        device: torch.device,
        epoch: Epoch,
        *,
        spans_nodes: bool,
    ) -> None:
        super().__init__(backend, place, size, device, epoch, over_links=False)
        self._spans_nodes = spans_nodes

    def padded_to(self, num_rows_of: Sequence[int], row_bytes: int) -> int | None:
        most = max(num_rows_of)
        is_small = most * row_bytes < MANY_BYTES
        is_worth = is_small or most * self._size <= _MOST_PADDED * sum(num_rows_of)
        return most if is_worth else None

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> TorchWork:
        width = rows.shape[1]
        most = self.padded_to(num_rows_of, width * rows.itemsize)
        if most is None:
            return super().all_gather(rows, received, num_rows_of)
        if not most:
            return TorchWork([], self._epoch)
        is_even = min(num_rows_of) == most
        whole = received if is_even else rows.new_empty(self._size * most, width)
        sent = _padded(rows, most)
        with blaming_peers(self._epoch):
            work = self._group._allgather_base(whole, sent)
        if is_even:
            return TorchWork([work], self._epoch, sent=sent)
        return _PaddedGather([work], self._epoch, sent, whole, received, num_rows_of)

    def reduce_scatter(
        self, rows: Tensor, num_rows_of: Sequence[int]
    ) -> tuple[TorchWork, Tensor] | None:
        width = rows.shape[1]
        most = self.padded_to(num_rows_of, width * rows.itemsize)
        if not (self._spans_nodes and rows.dtype in _SUMMED and most):
            return None
        if min(num_rows_of) < most:
            parts = [_padded(part, most) for part in torch.split(rows, list(num_rows_of))]
            rows = torch.cat(parts)
        own = rows.new_empty(most, width)
        with blaming_peers(self._epoch):
            work = self._group._reduce_scatter_base(own, rows)
        return TorchWork([work], self._epoch, sent=rows), own[: num_rows_of[self._place]]


class _PaddedGather(TorchWork):
    """An all-gather of parts padded to equal size; the padding is cut off after the wait.

    Args:
        whole: [size * most, width]; the padded parts received.
        received: [sum(num_rows_of), width]; filled with their real rows.
    """

    def __init__(
        self,
        works: Sequence[Any],
        epoch: Epoch,
        sent: Tensor,
        whole: Tensor,
        received: Tensor,
        num_rows_of: Sequence[int],
    ) -> None:
        super().__init__(works, epoch, sent=sent)
        self._whole, self._into, self._num_rows_of = whole, received, num_rows_of

    def wait(self) -> None:
        super().wait()
        parts = self._whole.view(len(self._num_rows_of), -1, self._whole.shape[1])
        kept = [part[:num] for part, num in zip(parts, self._num_rows_of, strict=True)]
        torch.cat(kept, out=self._into)


def _padded(rows: Tensor, num_rows: int) -> Tensor:
    """Rows padded to [num_rows, width] with uninitialized rows."""
    if len(rows) == num_rows:
        return rows
    padded = rows.new_empty(num_rows, rows.shape[1])
    padded[: len(rows)] = rows
    return padded
