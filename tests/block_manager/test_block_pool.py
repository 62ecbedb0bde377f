"""The pool: who gets which block, what stays findable, and in which order free blocks are taken."""

import pytest

from cupy_engine.block_pool import BlockPool


def take(pool, count):
    return [pool.take() for _ in range(count)]


def test_blocks_are_taken_in_order_of_their_ids_at_first():
    pool = BlockPool(4)
    assert pool.free_list.block_ids() == [0, 1, 2, 3]
    assert take(pool, 3) == [0, 1, 2]
    assert pool.num_free == 1


def test_released_blocks_go_to_the_young_end():
    pool = BlockPool(4)
    take(pool, 4)
    for block_id in (2, 0, 3):
        pool.release(block_id)
    assert pool.free_list.block_ids() == [2, 0, 3]
    assert take(pool, 2) == [2, 0]


def test_a_block_is_free_only_when_its_last_reference_goes():
    pool = BlockPool(2)
    block_id = pool.take()
    pool.share(block_id)
    assert pool.ref_count(block_id) == 2
    pool.release(block_id)
    assert pool.free_list.block_ids() == [1]
    pool.release(block_id)
    assert pool.free_list.block_ids() == [1, 0]


def test_a_free_block_is_found_by_its_content_until_it_is_taken():
    pool = BlockPool(2)
    block_id = pool.take()
    pool.register(block_id, b"content")
    pool.release(block_id)
    assert pool.find(b"content") == block_id == 0
    assert pool.num_cached == 1
    assert take(pool, 2) == [1, 0]
    assert pool.find(b"content") is None
    assert pool.num_cached == 0


def test_sharing_a_free_block_takes_it_out_of_the_middle_of_the_free_list():
    pool = BlockPool(3)
    for block_id in take(pool, 3):
        pool.register(block_id, bytes([block_id]))
        pool.release(block_id)
    pool.share(1)
    assert pool.free_list.block_ids() == [0, 2]
    assert pool.ref_count(1) == 1
    pool.release(1)
    assert pool.free_list.block_ids() == [0, 2, 1]  # used last, so evicted last


def test_of_blocks_with_equal_content_the_first_registered_is_found():
    pool = BlockPool(3)
    take(pool, 2)
    pool.register(0, b"same")
    pool.register(1, b"same")
    assert pool.find(b"same") == 0
    pool.release(1)
    assert pool.find(b"same") == 0
    assert take(pool, 2) == [2, 1]
    assert pool.find(b"same") == 0  # taking the twin did not forget the registered one


def test_a_registered_block_keeps_its_first_content():
    pool = BlockPool(1)
    pool.take()
    pool.register(0, b"one")
    pool.register(0, b"two")
    assert (pool.find(b"one"), pool.find(b"two")) == (0, None)


def test_a_forgotten_block_is_not_found_though_it_is_still_in_use():
    pool = BlockPool(2)
    pool.register(pool.take(), b"content")
    pool.share(0)
    pool.release(0, forget=True)
    assert pool.find(b"content") is None
    assert pool.ref_count(0) == 1


def test_forget_all_leaves_references_alone():
    pool = BlockPool(3)
    for block_id in take(pool, 2):
        pool.register(block_id, bytes([block_id]))
    pool.release(1)
    pool.forget_all()
    assert pool.num_cached == 0
    assert pool.ref_count(0) == 1
    pool.check_integrity({0: 1})


def test_broken_invariants_assert():
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="more often than taken"):
        pool.release(0)
    pool.take()
    with pytest.raises(AssertionError, match="empty"):
        pool.take()
    with pytest.raises(AssertionError, match="block 0: 1 references, not 2"):
        pool.check_integrity({0: 2})
