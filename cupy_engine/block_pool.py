"""A pool of KV blocks: reference counts, content hashes, and a free list from which the least recently used goes first.

    in use    ref_count > 0
    cached    ref_count == 0, hash set      still findable by content until evicted
    empty     ref_count == 0, no hash

Cached and empty blocks stand together in one doubly linked list, oldest first; both a take from the front and an unlink
from the middle (a cached block is found again) are O(1).
"""

from __future__ import annotations


class Block:
    """One KV block. ``previous`` and ``next`` link it into the free list while nobody refers to it."""

    __slots__ = ("block_hash", "block_id", "next", "previous", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.block_hash: bytes | None = None
        self.previous: Block = self
        self.next: Block = self


class FreeList:
    """Doubly linked list of blocks, least recently used first, around a sentinel."""

    def __init__(self) -> None:
        self._sentinel = Block(-1)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, block: Block) -> None:
        last, end = self._sentinel.previous, self._sentinel
        last.next, block.previous = block, last
        block.next, end.previous = end, block
        self._length += 1

    def unlink(self, block: Block) -> None:
        block.previous.next, block.next.previous = block.next, block.previous
        block.previous = block.next = block
        self._length -= 1

    def pop_oldest(self) -> Block:
        block = self._sentinel.next
        assert block is not self._sentinel, "the free list is empty"
        self.unlink(block)
        return block

    def block_ids(self) -> list[int]:
        """Ids in the order in which they will be taken."""
        ids = []
        block = self._sentinel.next
        while block is not self._sentinel:
            ids.append(block.block_id)
            block = block.next
        return ids


class BlockPool:
    """``num_blocks`` blocks with reference counts and a content index."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.free_list = FreeList()
        self._block_by_hash: dict[bytes, Block] = {}
        for block in self.blocks:
            self.free_list.append(block)

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, cached ones included."""
        return len(self.free_list)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by content, whether in use or not."""
        return len(self._block_by_hash)

    def ref_count(self, block_id: int) -> int:
        return self.blocks[block_id].ref_count

    def take(self) -> int:
        """The least recently used free block; what was cached in it is forgotten. There must be one."""
        block = self.free_list.pop_oldest()
        self._forget(block)
        block.ref_count = 1
        return block.block_id

    def share(self, block_id: int) -> None:
        """One more reference, to a block in use or found by content."""
        block = self.blocks[block_id]
        if block.ref_count == 0:
            self.free_list.unlink(block)
        block.ref_count += 1

    def release(self, block_id: int, *, forget: bool = False) -> None:
        """One reference less; the last one puts the block at the free list's young end, findable unless ``forget``."""
        block = self.blocks[block_id]
        assert block.ref_count > 0, f"block {block_id} is released more often than taken"
        if forget:
            self._forget(block)
        block.ref_count -= 1
        if block.ref_count == 0:
            self.free_list.append(block)

    def find(self, block_hash: bytes) -> int | None:
        block = self._block_by_hash.get(block_hash)
        return None if block is None else block.block_id

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Make a full block findable. If equal content is registered already, that block stays the one found."""
        block = self.blocks[block_id]
        if block.block_hash is None and block_hash not in self._block_by_hash:
            block.block_hash = block_hash
            self._block_by_hash[block_hash] = block

    def forget_all(self) -> None:
        """Nothing is findable any more; references stay."""
        for block in list(self._block_by_hash.values()):
            self._forget(block)

    def _forget(self, block: Block) -> None:
        if block.block_hash is not None:
            del self._block_by_hash[block.block_hash]
            block.block_hash = None

    def check_integrity(self, expected_ref_counts: dict[int, int]) -> None:
        """Assert that counts, free list and content index agree with each other and with ``expected_ref_counts``."""
        free_ids = self.free_list.block_ids()
        assert len(free_ids) == len(set(free_ids)) == len(self.free_list), "the free list repeats a block"
        for block in self.blocks:
            expected = expected_ref_counts.get(block.block_id, 0)
            assert block.ref_count == expected, f"block {block.block_id}: {block.ref_count} references, not {expected}"
        assert set(free_ids) == {b.block_id for b in self.blocks if b.ref_count == 0}, "free list and counts disagree"
        hashed = {b.block_hash: b for b in self.blocks if b.block_hash is not None}
        assert hashed == self._block_by_hash, "the content index disagrees with the blocks"
