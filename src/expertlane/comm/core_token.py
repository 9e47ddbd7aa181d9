"""At most one rank a core computes at a time, so that what each of them takes is measured alone."""

import fcntl

from expertlane.ops.host import num_cores


class CoreToken:
    """The right to compute on a core, which the ranks of that core pass on.

    It is a lock on a byte of a file that all of them have open: the system frees it when its owner
    dies. A rank must give it back before it blocks.

    Args:
        file: descriptor of a file that the ranks of a node share.
    """

    def __init__(self, file: int, local_rank: int) -> None:
        self._file = file
        self._core = local_rank % num_cores()
        self._is_held = False

    def acquire(self) -> None:
        """Wait for the core; no effect on a rank that has it."""
        if not self._is_held:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._core)
            self._is_held = True

    def release(self) -> None:
        """Give the core to the next; no effect on a rank that has none."""
        if self._is_held:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._core)
            self._is_held = False
