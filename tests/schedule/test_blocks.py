import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling
from expertlane.schedule.blocks import BlockManager
from expertlane.schedule.request import ROOT, block_digest


def digests(*blocks: list[int]) -> list[bytes]:
    """The chain of digests of a sequence given block by block."""
    chain = [ROOT]
    for block in blocks:
        chain.append(block_digest(chain[-1], np.array(block).tobytes()))
    return chain[1:]


def cached(manager: BlockManager, *blocks: list[int]) -> list[int]:
    """Hold and register the blocks of a sequence."""
    held = manager.allocate(len(blocks))
    for block, digest in zip(held, digests(*blocks), strict=True):
        manager.register(block, digest)
    return held


def state(manager: BlockManager) -> tuple[int, int, int]:
    return manager.num_used, manager.num_free, manager.num_cached


def test_too_many_blocks_change_nothing():
    manager = BlockManager(2, 1)
    with pytest.raises(ValueError, match=telling("3 blocks 2 free")):
        manager.allocate(3)
    assert state(manager) == (0, 2, 0)
    manager.allocate(2)
    with pytest.raises(ValueError, match=telling("2 blocks held")):
        manager.append()


def test_a_block_is_not_freed_twice():
    manager = BlockManager(2, 1)
    held = manager.allocate(1)
    manager.free(held)
    with pytest.raises(ValueError, match=telling("block 0 held")):
        manager.free(held)


def test_a_digest_depends_on_all_that_stands_before():
    same_end = digests([1, 2], [5, 6])[1], digests([1, 3], [5, 6])[1], digests([5, 6])[0]
    assert len(set(same_end)) == 3
    assert digests([1, 2], [5, 6])[1] == same_end[0]
    assert len(same_end[0]) == 16


def test_the_longest_known_prefix_is_found():
    manager = BlockManager(8, 2)
    held = cached(manager, [1, 2], [3, 4], [5, 6])
    assert manager.find(digests([1, 2], [3, 4], [5, 6], [7, 8])) == held
    assert manager.find(digests([1, 2], [3, 4], [0, 0], [5, 6])) == held[:2]
    assert manager.find(digests([3, 4])) == []
    assert manager.find([]) == []


def test_blank_blocks_go_first_then_those_freed_longest_ago_from_the_end_of_a_prefix():
    manager = BlockManager(5, 1)
    first = cached(manager, [1], [2])
    second = cached(manager, [3], [4])
    manager.free(second)
    manager.free(first)
    assert manager.allocate(5) == [4, second[1], second[0], first[1], first[0]]
    assert manager.num_cached == 0
    assert manager.find(digests([1])) == []


def test_use_makes_a_cached_block_young_again():
    manager = BlockManager(2, 1)
    old, young = cached(manager, [1]), cached(manager, [2])
    manager.free(old)
    manager.free(young)
    manager.free(manager.allocate(1, manager.find(digests([1]))))
    assert manager.allocate(1) == young
    assert manager.find(digests([1])) == old


def test_equal_content_is_registered_once():
    manager = BlockManager(3, 1)
    first, second = cached(manager, [1]), cached(manager, [1])
    assert manager.num_cached == 1
    assert manager.find(digests([1])) == first
    manager.free(second)
    # Its content is known under the other block, so it is blank.
    assert manager.allocate(2) == [second[0], 2]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), max_size=5)), max_size=60),
)
def test_counts_are_exact_whatever_is_done(num_blocks, actions):
    """Sequences over a tiny vocabulary come, share, grow and go; a mirror counts along."""
    manager = BlockManager(num_blocks, 1)
    held: list[list[int]] = []
    content: dict[int, bytes] = {}
    for action, tokens in actions:
        names = digests(*([token] for token in tokens))
        if action <= 1:
            shared, num_hits = manager.find(names), manager.num_hits
            assert [content[block] for block in shared] == names[: len(shared)]
            if manager.num_needed(len(names), shared) <= manager.num_free:
                in_use = {block for blocks in held for block in blocks}
                blocks = manager.allocate(len(names), shared)
                assert blocks[: len(shared)] == shared
                assert not in_use & set(blocks[len(shared) :])
                assert manager.num_hits == num_hits + len(shared)
                for block, name in zip(blocks, names, strict=True):
                    manager.register(block, name)
                    content[block] = name
                held.append(blocks)
        elif action == 2 and held:
            manager.free(held.pop(len(tokens) % len(held)))
        elif action == 3 and held and manager.num_free:
            block = manager.append()
            assert all(block not in blocks for blocks in held)
            content.pop(block, None)
            held[0].append(block)
        counts = [sum(block in blocks for blocks in held) for block in range(num_blocks)]
        assert [manager.ref_count(block) for block in range(num_blocks)] == counts
        assert manager.num_used == sum(count > 0 for count in counts)
        assert manager.num_used + manager.num_free == num_blocks
    for blocks in held:
        manager.free(blocks)
    assert manager.num_free == num_blocks


def test_a_prefix_is_found_up_to_where_a_state_is_kept():
    manager = BlockManager(16, 2, state_blocks=2)
    held, of_all = cached(manager, [1, 2], [3, 4], [5, 6]), digests([1, 2], [3, 4], [5, 6])
    assert manager.find(of_all) == []
    assert manager.find_known(of_all) == held
    manager.keep_state(of_all[1])
    assert manager.find(of_all) == held[:2]
    manager.keep_state(of_all[2])
    assert manager.find(of_all) == held
    manager.keep_state(b"of no block")
    assert manager.num_kept_states == 2


def test_states_take_room_and_kept_ones_make_way():
    manager = BlockManager(10, 1, state_blocks=3)
    manager.hold_state()
    assert (manager.num_free, manager.num_used) == (7, 0)
    held, of_all = cached(manager, [1], [2], [3]), digests([1], [2], [3])
    manager.keep_state(of_all[2])
    assert (manager.num_free, manager.num_used) == (4, 3)
    manager.free(held)
    assert (manager.num_free, manager.num_used) == (7, 0)
    one = manager.allocate(1)  # the last blank one
    assert manager.find(of_all) == held
    manager.free(manager.allocate(1))  # the block used least recently, and its state
    assert manager.find(of_all) == []
    assert manager.find_known(of_all) == held[:2]
    assert manager.num_kept_states == 0
    manager.free(one)
    with pytest.raises(ValueError, match=telling("8 blocks 7 free")):
        manager.allocate(8)
    manager.free_state()
    assert len(manager.allocate(10)) == 10


def test_a_state_without_room_is_not_kept():
    manager = BlockManager(4, 1, state_blocks=2)
    manager.hold_state()
    (held,) = cached(manager, [1])
    manager.keep_state(digests([1])[0])
    assert manager.num_kept_states == 0
    assert (manager.ref_count(held), manager.num_free) == (1, 1)


@given(st.lists(st.tuples(st.sampled_from("akshf"), st.integers(0, 5)), max_size=60))
@settings(deadline=None)
def test_blocks_and_states_never_take_more_than_there_is(moves):
    manager, held, num_states = BlockManager(12, 1, state_blocks=2), [], 0
    of_all = digests(*([number] for number in range(6)))
    for move, number in moves:
        match move:
            case "a" if manager.num_free > number:
                blocks = manager.allocate(number + 1)
                held.append(blocks)
                for block, digest in zip(blocks, of_all, strict=False):
                    manager.register(block, digest)
            case "k":
                manager.keep_state(of_all[number])
            case "s" if manager.num_free >= 2:
                manager.hold_state()
                num_states += 1
            case "h" if num_states:
                manager.free_state()
                num_states -= 1
            case "f" if held:
                manager.free(held.pop(number % len(held)))
        used = sum(map(len, held))
        assert manager.num_used == used
        assert manager.num_free == 12 - used - 2 * num_states >= 0
        assert 2 * manager.num_kept_states <= manager.num_free
        found, known = manager.find(of_all), manager.find_known(of_all)
        assert known[: len(found)] == found
