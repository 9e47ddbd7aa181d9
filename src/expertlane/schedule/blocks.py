"""The paged blocks of one data-parallel rank's cache, its prefixes, and the states beside them."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


class BlockManager:
    """Reference counts, free blocks and the prefix cache; every operation is O(1) a block.

    Simulations make one for each step that they price, so nothing here takes time or memory for
    blocks that no sequence ever held, beside one zeroed array.

    A block is *held* while its reference count is above 0. A free block keeps its content: one
    that was registered under a digest can be shared again until it is reused. Blank blocks are
    reused first, then those that hold anything, least recently freed first.

    **States.** Where a sequence has a state beside its blocks, that takes the room of
    `state_blocks` blank blocks. A sequence can only continue where a state was kept, so some
    are kept with the block that they follow (`keep_state`), and `find` gives prefixes that end
    there. Kept states are evicted as free blocks' contents are: the least recently used first.

    Args:
        state_blocks: blocks whose room a state takes; 0 where sequences have none.

    Attributes:
        num_hits: blocks found in the cache and shared, since the start.
    """

    def __init__(self, num_blocks: int, block_size: int, state_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_hits = 0
        self._state_blocks = state_blocks
        self._num_states = 0  # of sequences, in use
        self._kept: set[bytes] = set()  # digests of blocks that a kept state follows
        self._ref_counts = np.zeros(num_blocks, dtype=np.int32)
        self._digests: dict[int, bytes] = {}
        self._registered: dict[bytes, int] = {}
        self._blank: list[int] = []  # held before; used from its end
        self._num_touched = 0  # blocks from here on were never held, and are used after `_blank`
        # Free blocks, and kept states by their digests, in the order of eviction.
        self._reusable: OrderedDict[int | bytes, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached content included."""
        return self._num_unheld - self._state_blocks * self._num_states

    @property
    def _num_unheld(self) -> int:
        return len(self._blank) + self.num_blocks - self._num_touched + self._num_filled

    @property
    def _num_filled(self) -> int:
        return len(self._reusable) - len(self._kept)

    @property
    def _num_blank(self) -> int:
        """Blank blocks whose room no state takes."""
        num_states = self._num_states + len(self._kept)
        return self._num_unheld - self._num_filled - self._state_blocks * num_states

    @property
    def num_used(self) -> int:
        """Blocks held by at least one sequence."""
        return self.num_blocks - self._num_unheld

    @property
    def num_cached(self) -> int:
        """Blocks that can be shared by their digest, held or free."""
        return len(self._registered)

    def ref_count(self, block: int) -> int:
        """Number of sequences that hold a block."""
        return int(self._ref_counts[block])

    @property
    def num_kept_states(self) -> int:
        """States that are kept beside those of sequences."""
        return len(self._kept)

    def hold_state(self) -> None:
        """Make room for a sequence's state; enough blocks must be free."""
        self._make_room()
        self._num_states += 1

    def free_state(self) -> None:
        """Let go of the room of a sequence's state."""
        self._num_states -= 1

    def keep_state(self, digest: bytes) -> None:
        """Keep a copy of the state after a block, if the block can be shared and there is room."""
        if digest in self._kept:
            self._reusable.move_to_end(digest)
        elif digest in self._registered and self._state_blocks <= self.num_free:
            self._make_room()
            if digest in self._registered:  # it might have been evicted itself
                self._kept.add(digest)
                self._reusable[digest] = None

    def _make_room(self) -> None:
        """Make blank as many blocks as a state takes."""
        while self._num_blank < self._state_blocks:
            block = self._evict()
            if block is not None:
                self._blank.append(block)

    def _evict(self) -> int | None:
        """Evict the least recently used: a kept state, or the content of the returned block."""
        first, _ = self._reusable.popitem(last=False)
        if isinstance(first, bytes):
            self._kept.remove(first)
            return None
        self._forget(first)
        return first

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix that a sequence can continue from.

        They are not held yet.
        """
        found = self.find_known(digests)
        if self._state_blocks:
            while found and self._digests[found[-1]] not in self._kept:
                found.pop()
        return found

    def find_known(self, digests: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix, whether or not its state is kept."""
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
        if shared and (last := self._digests[shared[-1]]) in self._kept:
            self._reusable.move_to_end(last)
        self.num_hits += len(shared)
        num_new = num_blocks - len(shared)
        blank = self._take_blank(max(0, min(num_new, self._num_blank)))
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
        block: int | None = None
        while block is None:
            if self._num_blank > 0:
                (block,) = self._take_blank(1)
            elif self._reusable:
                block = self._evict()
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
            if digest in self._kept:
                self._kept.remove(digest)
                del self._reusable[digest]

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
            digest = self._digests.get(block)
            if digest is None:
                self._blank.append(block)
                continue
            self._reusable[block] = None
            if digest in self._kept:  # of no use without the block
                self._reusable.move_to_end(digest)
