"""Paged keys and values of one data-parallel rank: which blocks are held, shared, or reusable."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

ROOT = b""  # stands for the parent of a sequence's first block


def block_digest(parent: bytes, tokens: bytes) -> bytes:
    """Name a full block by its content and by all that stands before it.

    Keys and values depend on every earlier token, so two blocks are interchangeable only if their
    whole prefixes are equal. 16 bytes of BLAKE2b: a clash would mean wrong output, so Python's
    64-bit `hash` is not enough.

    Args:
        parent: digest of the block before, or `ROOT`.
        tokens: its token ids, 8 bytes each.
    """
    return blake2b(parent + tokens, digest_size=16).digest()


class BlockManager:
    """Reference counts, free blocks and the prefix cache; every operation is O(1) a block.

    Simulations make one for each step that they price, so nothing here takes time or memory for
    blocks that no sequence ever held, beside one zeroed array.

    A block is *held* while its reference count is above 0. A free block keeps its content: one
    that was registered under a digest can be shared again until it is reused. Blank blocks are
    reused first, then those that hold anything, least recently freed first.

    Attributes:
        num_hits: blocks found in the cache and shared, since the start.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_hits = 0
        self._ref_counts = np.zeros(num_blocks, dtype=np.int32)
        self._digests: dict[int, bytes] = {}
        self._registered: dict[bytes, int] = {}
        self._blank: list[int] = []  # held before; used from its end
        self._num_touched = 0  # blocks from here on were never held, and are used after `_blank`
        self._reusable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached content included."""
        return self._num_blank + len(self._reusable)

    @property
    def _num_blank(self) -> int:
        return len(self._blank) + self.num_blocks - self._num_touched

    @property
    def num_used(self) -> int:
        """Blocks held by at least one sequence."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that can be shared by their digest, held or free."""
        return len(self._registered)

    def ref_count(self, block: int) -> int:
        """Number of sequences that hold a block."""
        return int(self._ref_counts[block])

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix; they are not held yet."""
        found = []
        for digest in digests:
            block = self._registered.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_needed(self, num_blocks: int, shared: Sequence[int]) -> int:
        """Free blocks that a sequence of `num_blocks` takes if the first ones are `shared`."""
        return num_blocks - (int(np.count_nonzero(self._ref_counts[list(shared)])) if shared else 0)

    def allocate(self, num_blocks: int, shared: Sequence[int] = ()) -> list[int]:
        """Hold `num_blocks` blocks, of which the first are `shared` and the others are new.

        Raises:
            ValueError: fewer blocks are free; nothing is allocated.
        """
        needed = self.num_needed(num_blocks, shared)
        if needed > self.num_free:
            raise ValueError(f"{needed} blocks asked for but {self.num_free} are free")
        for block in shared:
            if self._ref_counts[block] == 0:
                del self._reusable[block]
            self._ref_counts[block] += 1
        self.num_hits += len(shared)
        num_new = num_blocks - len(shared)
        blank = self._take_blank(min(num_new, self._num_blank))
        if blank:
            self._ref_counts[blank] = 1
        return [*shared, *blank, *(self.append() for _ in range(num_new - len(blank)))]

    def _take_blank(self, num: int) -> list[int]:
        """Take `num` blank blocks, of which there must be enough, in the order of their use."""
        first = max(len(self._blank) - num, 0)
        taken = self._blank[first:][::-1]
        del self._blank[first:]
        begin = self._num_touched
        self._num_touched += num - len(taken)
        return [*taken, *range(begin, self._num_touched)]

    def append(self) -> int:
        """Hold one new block.

        Raises:
            ValueError: none is free.
        """
        if self._blank:
            block = self._blank.pop()
        elif self._num_touched < self.num_blocks:
            block, self._num_touched = self._num_touched, self._num_touched + 1
        elif self._reusable:
            block, _ = self._reusable.popitem(last=False)
            self._forget(block)
        else:
            raise ValueError(f"all {self.num_blocks} blocks are held")
        self._ref_counts[block] = 1
        return block

    def fill(self, contents: Sequence[bytes | None]) -> None:
        """Give blank blocks the contents that earlier sequences left, least recently freed first.

        Args:
            contents: digests; None for contents that no request shares.

        Raises:
            ValueError: fewer blocks are blank; nothing is filled.
        """
        if len(contents) > self._num_blank:
            raise ValueError(f"{len(contents)} blocks are filled but {self._num_blank} are blank")
        blocks = self._take_blank(len(contents))[::-1]
        self._reusable.update(dict.fromkeys(blocks))
        for block, digest in zip(blocks, contents, strict=True):
            if digest is not None:
                self.register(block, digest)

    def register(self, block: int, digest: bytes) -> None:
        """Let a full, computed block be shared; no effect if another has the same content."""
        if digest not in self._registered:
            self._registered[digest] = block
            self._digests[block] = digest

    def forget(self, blocks: Sequence[int]) -> None:
        """Stop sharing held blocks: no later request gets them."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        digest = self._digests.pop(block, None)
        if digest is not None:
            del self._registered[digest]

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, in their order in the sequence.

        Raises:
            ValueError: a block is held by nobody, or named twice.
        """
        # Last block first: a prefix is worth more than what follows, and useless without it.
        last_first = np.array(blocks, dtype=np.int64)[::-1]
        counts = self._ref_counts[last_first]
        if not counts.all():
            raise ValueError(f"block {last_first[counts == 0][0]} is held by nobody")
        if len(set(blocks)) != len(blocks):
            raise ValueError(f"blocks {sorted(blocks)} are not all different")
        self._ref_counts[last_first] = counts - 1
        let_go: list[int] = last_first[counts == 1].tolist()
        if not self._digests:
            self._blank += let_go
            return
        for block in let_go:
            if block in self._digests:
                self._reusable[block] = None
            else:
                self._blank.append(block)
