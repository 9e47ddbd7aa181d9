"""Paged keys and values of one data-parallel rank: which blocks are held, shared, or reusable."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

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
        self._ref_counts = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._registered: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached content included."""
        return len(self._blank) + len(self._reusable)

    @property
    def num_used(self) -> int:
        """Blocks held by at least one sequence."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that can be shared by their digest, held or free."""
        return len(self._registered)

    def ref_count(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._ref_counts[block]

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` positions take."""
        return -(-num_tokens // self.block_size)

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
        num_held = sum(self._ref_counts[block] > 0 for block in shared)
        return num_blocks - num_held

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
        first = max(len(self._blank) - num_new, 0)
        blank = self._blank[first:][::-1]
        del self._blank[first:]
        for block in blank:
            self._ref_counts[block] = 1
        return [*shared, *blank, *(self.append() for _ in range(num_new - len(blank)))]

    def append(self) -> int:
        """Hold one new block.

        Raises:
            ValueError: none is free.
        """
        if self._blank:
            block = self._blank.pop()
        elif self._reusable:
            block, _ = self._reusable.popitem(last=False)
            digest = self._digests[block]
            if digest is not None:
                del self._registered[digest]
                self._digests[block] = None
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
        first = len(self._blank) - len(contents)
        if first < 0:
            raise ValueError(f"{len(contents)} blocks are filled but {len(self._blank)} are blank")
        blocks = self._blank[first:]
        del self._blank[first:]
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
            digest = self._digests[block]
            if digest is not None:
                del self._registered[digest]
                self._digests[block] = None

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, in their order in the sequence.

        Raises:
            ValueError: a block is held by nobody.
        """
        # Last block first: a prefix is worth more than what follows, and useless without it.
        for block in reversed(blocks):
            if self._ref_counts[block] == 0:
                raise ValueError(f"block {block} is held by nobody")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._digests[block] is None:
                    self._blank.append(block)
                else:
                    self._reusable[block] = None
