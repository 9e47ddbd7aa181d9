"""A token for each core, so that only one of the ranks that share it computes at a time.

Each is then measured without the others.
"""

import fcntl


class CoreToken:
    """The right to compute on a core, held by one of the ranks that share it at a time.

    It is a lock on one byte of a file that all of them have open: the kernel releases it when its
    owner dies. A rank must release it before it blocks.

    Args:
        file: descriptor of a file that the ranks of a node share.
        local_rank: the rank within its node; ranks are assigned to cores in turn.
        num_cores: cores of the node.
    """

    def __init__(self, file: int, local_rank: int, num_cores: int) -> None:
        self._file = file
        self._core = local_rank % num_cores
        self._is_held = False

    def acquire(self) -> None:
        """Wait for the core; no effect if this rank holds it."""
        if not self._is_held:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._core)
            self._is_held = True

    def release(self) -> None:
        """Let another rank have the core; no effect if this rank does not hold it."""
        if self._is_held:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._core)
            self._is_held = False
