"""Layout of the memory that the ranks of a node share for their messages."""

import mmap
from dataclasses import dataclass

_LINE_BYTES = 64


@dataclass(frozen=True)
class Region:
    """Sizes of the memory that the ranks of a node share; pages not touched take no memory.

    Attributes:
        groups_bytes: for the state of groups, of all ranks together.
        heap_bytes: for the messages of each rank.
    """

    num_ranks: int
    groups_bytes: int = 64 << 20
    heap_bytes: int = 128 << 20

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole region; its file must be zeros at first."""
        return self.num_ranks * (_LINE_BYTES + self.heap_bytes) + self.groups_bytes

    def heap(self, rank: int) -> range:
        """Offsets of a rank's heap; `rank` counts within the node."""
        begin = self.num_ranks * _LINE_BYTES + self.groups_bytes + rank * self.heap_bytes
        return range(begin, begin + self.heap_bytes)

    def map(self, fd: int) -> mmap.mmap:
        """Map the region from its file."""
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0)
        return mmap.mmap(fd, self.num_bytes, mmap.MAP_SHARED | no_reserve)
