"""The memory that the ranks of a node share for their messages."""

import mmap
from dataclasses import dataclass

_LINE_BYTES = 64


@dataclass(frozen=True)
class Region:
    """The memory that the ranks of a node share; what they do not touch takes none.

    Attributes:
        groups_bytes: for what groups keep, of all ranks.
        heap_bytes: for the messages of each rank.
    """

    num_ranks: int
    groups_bytes: int = 64 << 20
    heap_bytes: int = 128 << 20

    @property
    def num_bytes(self) -> int:
        """Of all; zeros at first."""
        return self.num_ranks * (_LINE_BYTES + self.heap_bytes) + self.groups_bytes

    def heap(self, rank: int) -> range:
        """The bytes of a rank's heap; `rank` counts those of the node."""
        begin = self.num_ranks * _LINE_BYTES + self.groups_bytes + rank * self.heap_bytes
        return range(begin, begin + self.heap_bytes)

    def map(self, fd: int) -> mmap.mmap:
        """The memory in the file of a descriptor."""
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0)
        return mmap.mmap(fd, self.num_bytes, mmap.MAP_SHARED | no_reserve)
