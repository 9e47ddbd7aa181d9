"""The cores that a rank computes on; another share of them where the number of ranks changes."""

import errno
import threading

import torch

from expertlane.engine.ops.cores import Share, allowed_cpus, pin, share_of, unpin
from expertlane.errors import CapacityError, no_room


class Cores:
    """Of a rank, as it is forked: pinned to nothing.

    Attributes:
        share: of the cores that the ranks of this node have.
        are_taken: whether it computes with that.
        is_pinned: whether its threads stay on the hardware threads of its share.

    Raises:
        UserError: as `share_of`.
    """

    def __init__(self, local_rank: int, num_local_ranks: int) -> None:
        self._allowed, self._num_threads = allowed_cpus(), torch.get_num_threads()
        self._held: list[int] = []  # locks that tell other engines
        self.share: Share = share_of(local_rank, num_local_ranks)
        self.are_taken = self.is_pinned = False

    def take(self, local_rank: int, num_local_ranks: int) -> None:
        """Compute with a share of the cores.

        Raises:
            CapacityError: this user may not start that many threads.
        """
        self.leave()
        self.share = share_of(local_rank, num_local_ranks, allowed=self._allowed)
        # No more threads than OMP_NUM_THREADS either, which torch took at its import.
        num_threads = max(1, min(self._num_threads, self.share.num_threads))
        _check_threads(num_threads - 1)
        torch.set_num_threads(num_threads)
        self.is_pinned = pin(self.share.cpus, held=self._held)
        self.are_taken = True

    def stay_small(self) -> None:
        """Use one thread, since other ranks use all cores."""
        torch.set_num_threads(1)

    def leave(self) -> None:
        """Be pinned to nothing, so that another rank may take what this one has."""
        self.are_taken = False
        if self.is_pinned:
            self.is_pinned = False
            unpin(self._allowed, self._held)


def _check_threads(number: int) -> None:
    """Start so many threads at once, and end them: OpenMP ends a process that cannot.

    Raises:
        CapacityError: there is no room for them.
    """
    is_over = threading.Event()
    threads = [threading.Thread(target=is_over.wait) for _ in range(number)]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        reason = no_room(OSError(errno.EAGAIN, str(error)))
        raise CapacityError(f"cannot start {number} threads of a rank: {reason}") from None
    finally:
        is_over.set()
        for thread in started:
            thread.join()
