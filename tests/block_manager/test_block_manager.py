"""The block manager as its users see it: exact ids, reference counts, copies and evictions, in blocks of 4 tokens."""

import pytest

from cupy_engine.block_manager import BlockManager, Reservation, hash_block, root_hash

BLOCK_SIZE = 4


def new_manager(num_blocks=8, num_host_blocks=0, **options):
    return BlockManager(num_blocks, BLOCK_SIZE, num_host_blocks, **options)


def hashes(token_ids, salt=""):
    result, parent = [], root_hash(salt)
    for start in range(0, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        parent = hash_block(parent, token_ids[start : start + BLOCK_SIZE])
        result.append(parent)
    return result


def run(manager, sequence_id, token_ids, salt=""):
    """Open a sequence on whatever is cached, write all its tokens, make its full blocks findable."""
    chain = hashes(token_ids, salt)
    prefix = manager.find_prefix(chain)
    manager.open(sequence_id, prefix)
    reservation = manager.reserve(sequence_id, len(prefix) * BLOCK_SIZE, len(token_ids))
    assert reservation is not None
    manager.register(sequence_id, chain, len(token_ids))
    manager.check_integrity()
    return manager.block_table(sequence_id)


def ref_counts(manager):
    return [block.ref_count for block in manager.pool.blocks]


def free_order(manager):
    return manager.pool.free_list.block_ids()


# Growing


def test_a_sequence_takes_a_block_when_the_last_one_is_full():
    manager = new_manager()
    manager.open(7)
    assert manager.reserve(7, 0, 3) == Reservation(0, [0])
    assert manager.reserve(7, 3, 4) == Reservation(1, [])
    assert manager.reserve(7, 4, 5) == Reservation(1, [1])
    assert manager.reserve(7, 5, 14) == Reservation(2, [2, 3])
    assert manager.block_table(7) == [0, 1, 2, 3]


def test_reserving_again_changes_nothing():
    manager = new_manager()
    manager.open(7)
    manager.reserve(7, 0, 6)
    assert manager.reserve(7, 2, 5) == Reservation(2, [])
    assert manager.num_free_blocks == 6


def test_without_enough_blocks_reserve_is_none_and_changes_nothing():
    manager = new_manager(num_blocks=3)
    manager.open(1)
    manager.reserve(1, 0, 5)
    assert manager.reserve(1, 5, 13) is None
    assert manager.block_table(1) == [0, 1]
    assert free_order(manager) == [2]
    assert manager.reserve(1, 5, 12) == Reservation(2, [2])


def test_interleaved_sequences_own_their_blocks_alone():
    manager = new_manager()
    for sequence_id in (1, 2):
        manager.open(sequence_id)
    for start in (0, 4):
        for sequence_id in (1, 2):
            manager.reserve(sequence_id, start, start + 4)
    assert manager.block_table(1) == [0, 2]
    assert manager.block_table(2) == [1, 3]
    assert ref_counts(manager) == [1, 1, 1, 1, 0, 0, 0, 0]


# Fork and copy-on-write


def test_a_fork_shares_every_block():
    manager = new_manager()
    run(manager, 1, range(6))
    assert manager.fork(1, 2) == [0, 1]
    assert ref_counts(manager)[:2] == [2, 2]
    manager.check_integrity()


def test_the_first_writer_to_a_shared_partial_block_copies_it_and_the_last_one_keeps_it():
    manager = new_manager()
    run(manager, 1, range(6))
    manager.fork(1, 2)
    manager.fork(1, 3)
    assert ref_counts(manager)[:2] == [3, 3]
    assert manager.reserve(1, 6, 7) == Reservation(1, [2], copies=[(1, 2)])
    assert manager.reserve(2, 6, 7) == Reservation(1, [3], copies=[(1, 3)])
    assert manager.reserve(3, 6, 7) == Reservation(2, [])
    assert [manager.block_table(i) for i in (1, 2, 3)] == [[0, 2], [0, 3], [0, 1]]
    assert ref_counts(manager)[:4] == [3, 1, 1, 1]
    manager.check_integrity()


def test_a_fork_at_a_block_border_copies_nothing():
    manager = new_manager()
    run(manager, 1, range(8))
    manager.fork(1, 2)
    assert manager.reserve(1, 8, 9) == Reservation(2, [2])
    assert manager.reserve(2, 8, 9) == Reservation(2, [3])
    assert ref_counts(manager)[:4] == [2, 2, 1, 1]


def test_a_write_over_the_border_copies_and_takes_at_once():
    manager = new_manager()
    run(manager, 1, range(6))
    manager.fork(1, 2)
    assert manager.reserve(2, 6, 10) == Reservation(1, [2, 3], copies=[(1, 2)])


def test_a_copy_without_a_free_block_is_none_until_the_sharer_leaves():
    manager = new_manager(num_blocks=2)
    run(manager, 1, range(6))
    manager.fork(1, 2)
    assert manager.reserve(2, 6, 7) is None
    assert ref_counts(manager) == [2, 2]
    manager.free(1)
    assert manager.reserve(2, 6, 7) == Reservation(2, [])


def test_forks_of_forks():
    manager = new_manager()
    run(manager, 1, range(5))
    manager.fork(1, 2)
    manager.reserve(2, 5, 6)
    manager.fork(2, 3)
    assert [manager.block_table(i) for i in (1, 2, 3)] == [[0, 1], [0, 2], [0, 2]]
    assert ref_counts(manager)[:3] == [3, 1, 2]


# Prefix cache


def test_a_second_request_finds_the_full_blocks_of_the_first():
    manager = new_manager()
    assert run(manager, 1, [*range(8), 50, 51]) == [0, 1, 2]
    assert run(manager, 2, [*range(8), 60, 61]) == [0, 1, 3]
    assert ref_counts(manager)[:4] == [2, 2, 1, 1]


def test_a_prefix_ends_at_the_first_different_block():
    manager = new_manager()
    run(manager, 1, range(12))
    assert manager.find_prefix(hashes(range(12))) == [0, 1, 2]
    assert manager.find_prefix(hashes([*range(4), 99, *range(5, 12)])) == [0]
    assert manager.find_prefix(hashes([99, *range(1, 12)])) == []


def test_equal_blocks_after_different_prefixes_are_different():
    manager = new_manager()
    run(manager, 1, [1, 1, 1, 1, 2, 2, 2, 2])
    assert manager.find_prefix(hashes([2, 2, 2, 2])) == []
    assert hashes([1, 1, 1, 1, 2, 2, 2, 2])[1] != hashes([2, 2, 2, 2])[0]


def test_a_salt_hides_a_prefix_from_every_other_salt():
    manager = new_manager()
    run(manager, 1, range(8), salt="alice")
    assert manager.find_prefix(hashes(range(8), "bob")) == []
    assert manager.find_prefix(hashes(range(8), "")) == []
    assert run(manager, 2, range(8), salt="bob") == [2, 3]
    assert manager.find_prefix(hashes(range(8), "alice")) == [0, 1]


def test_only_full_blocks_whose_tokens_are_computed_are_found():
    manager = new_manager()
    manager.open(1)
    manager.reserve(1, 0, 12)
    manager.register(1, hashes(range(12)), 7)
    assert manager.find_prefix(hashes(range(12))) == [0]
    manager.register(1, hashes(range(12)), 12)
    assert manager.find_prefix(hashes(range(12))) == [0, 1, 2]


def test_tokens_still_being_drawn_have_no_hash_and_are_not_found():
    manager = new_manager()
    manager.open(1)
    manager.reserve(1, 0, 9)
    manager.register(1, hashes(range(7)), 9)  # tokens 7 and 8 are in flight
    assert manager.pool.num_cached == 1


def test_freed_blocks_stay_findable_and_are_evicted_from_the_tail_of_the_least_recently_used():
    manager = new_manager(num_blocks=6)
    run(manager, 1, range(8))
    run(manager, 2, range(100, 108))
    manager.free(1)
    manager.free(2)
    assert free_order(manager) == [4, 5, 1, 0, 3, 2]
    assert manager.num_free_blocks == 6
    assert run(manager, 3, range(200, 212)) == [4, 5, 1]
    assert manager.find_prefix(hashes(range(8))) == [0]  # lost its tail first
    assert manager.find_prefix(hashes(range(100, 108))) == [2, 3]
    manager.check_integrity()


def test_a_hit_makes_a_prefix_young_again():
    manager = new_manager(num_blocks=4)
    run(manager, 1, range(8))
    run(manager, 2, range(100, 108))
    manager.free(1)
    manager.free(2)
    assert run(manager, 3, range(8)) == [0, 1]
    manager.free(3)
    assert free_order(manager) == [3, 2, 1, 0]


def test_a_prefix_with_a_gap_ends_at_the_gap():
    manager = new_manager(num_blocks=4)
    run(manager, 1, range(12))
    manager.free(1)
    manager.pool.share(1)
    manager.pool.release(1, forget=True)
    assert manager.find_prefix(hashes(range(12))) == [0]


def test_a_free_prefix_is_taken_from_the_free_blocks_but_a_shared_one_is_a_gift():
    manager = new_manager(num_blocks=4)
    run(manager, 1, range(8))
    assert manager.num_blocks_beside([0, 1], 16) == 2
    assert manager.num_blocks_beside([0, 1], 17) == 3
    assert manager.num_blocks_beside([], 9) == 3
    manager.free(1)
    assert manager.num_blocks_beside([0, 1], 16) == 4
    assert manager.num_blocks_beside([0, 1], 17) == 5


def test_a_copied_block_is_not_confused_with_the_cached_original():
    """The copy is for writing; what is found stays the block that nobody writes to."""
    manager = new_manager()
    run(manager, 1, range(8))
    manager.fork(1, 2)
    assert manager.reserve(2, 7, 8) == Reservation(1, [2], copies=[(1, 2)])
    assert manager.find_prefix(hashes(range(8))) == [0, 1]


def test_without_prefix_caching_nothing_is_found():
    manager = new_manager(enable_prefix_caching=False)
    run(manager, 1, range(8))
    assert run(manager, 2, range(8)) == [2, 3]
    manager.free(1)
    assert manager.pool.num_cached == 0


def test_a_failed_sequence_is_not_found_again():
    manager = new_manager()
    run(manager, 1, range(8))
    run(manager, 2, range(100, 108))
    manager.free(1, forget=True)
    assert manager.find_prefix(hashes(range(8))) == []
    assert manager.find_prefix(hashes(range(100, 108))) == [2, 3]
    manager.reset_prefix_cache()
    assert manager.find_prefix(hashes(range(100, 108))) == []
    assert manager.block_table(2) == [2, 3]
    manager.check_integrity()


# Swap


def test_swap_out_and_in():
    manager = new_manager(num_blocks=4, num_host_blocks=4)
    run(manager, 1, range(6))
    assert manager.swap_out(1) == [(0, 0), (1, 1)]
    assert manager.num_swapped_blocks(1) == 2
    assert manager.num_free_blocks == 4
    manager.check_integrity()
    run(manager, 2, range(100, 105))  # takes 2 and 3
    assert manager.swap_in(1) == [(0, 1), (1, 0)]  # the oldest free blocks: its own, tail first
    assert manager.block_table(1) == [1, 0]
    assert manager.host_pool.num_free == 4
    assert manager.reserve(1, 6, 7) == Reservation(2, [])
    manager.check_integrity()


def test_what_was_swapped_out_is_found_on_the_device_until_evicted():
    manager = new_manager(num_blocks=4, num_host_blocks=4)
    run(manager, 1, range(8))
    manager.swap_out(1)
    assert manager.find_prefix(hashes(range(8))) == [0, 1]
    assert run(manager, 2, range(8)) == [0, 1]
    assert manager.swap_in(1) == [(0, 2), (1, 3)]


def test_what_comes_back_is_registered_anew():
    manager = new_manager(num_blocks=2, num_host_blocks=2)
    run(manager, 1, range(8))
    manager.swap_out(1)
    run(manager, 2, range(100, 108))
    manager.free(2)
    manager.swap_in(1)
    assert manager.pool.num_cached == 0
    manager.register(1, hashes(range(8)), 8)
    assert manager.find_prefix(hashes(range(8))) == manager.block_table(1)


def test_swap_is_none_where_there_is_no_room():
    manager = new_manager(num_blocks=4, num_host_blocks=2)
    run(manager, 1, range(9))
    assert manager.swap_out(1) is None
    assert manager.block_table(1) == [0, 1, 2]
    run(manager, 2, range(100, 102))
    assert manager.swap_out(2) == [(3, 0)]
    manager.reserve(1, 9, 16)
    assert manager.swap_in(2) is None
    assert manager.num_swapped_blocks(2) == 1
    manager.check_integrity()


def test_swapping_one_of_two_forks_leaves_the_other_its_blocks():
    manager = new_manager(num_blocks=4, num_host_blocks=4)
    run(manager, 1, range(6))
    manager.fork(1, 2)
    assert manager.swap_out(2) == [(0, 0), (1, 1)]
    assert ref_counts(manager) == [1, 1, 0, 0]
    assert manager.swap_in(2) == [(0, 2), (1, 3)]
    assert ref_counts(manager) == [1, 1, 1, 1]


def test_a_swapped_sequence_can_be_freed():
    manager = new_manager(num_blocks=2, num_host_blocks=2)
    run(manager, 1, range(6))
    manager.swap_out(1)
    manager.free(1)
    assert manager.host_pool.num_free == 2
    manager.check_integrity()


# For people


def test_waste_is_the_share_of_places_without_a_token():
    manager = new_manager()
    assert manager.waste() == 0.0
    run(manager, 1, range(5))
    assert manager.waste() == pytest.approx(3 / 8)
    manager.fork(1, 2)
    assert manager.waste() == pytest.approx(3 / 8)  # a shared block counts once
    manager.reserve(2, 5, 7)
    assert manager.waste() == pytest.approx(4 / 12)


def test_render_draws_tables_and_pool():
    manager = new_manager(num_blocks=6, num_host_blocks=2)
    run(manager, 1, range(6))
    manager.fork(1, 2)
    run(manager, 3, range(100, 104))
    manager.free(3)
    run(manager, 4, [200])
    manager.swap_out(4)
    assert manager.render(width=4).splitlines() == [
        "2 of 6 blocks of 4 tokens in use, 25.0% waste inside",
        "  sequence 1: 6 tokens [0, 1]",
        "  sequence 2: 6 tokens [0, 1]",
        "  sequence 4: 1 tokens on the host [0]",
        "  22c.",
        "  ..",
    ]


def test_broken_invariants_assert():
    manager = new_manager()
    manager.open(1)
    with pytest.raises(AssertionError, match="has a table already"):
        manager.open(1)
    manager.pool.take()
    with pytest.raises(AssertionError, match="block 0: 1 references, not 0"):
        manager.check_integrity()
