"""Which KV block holds which tokens of which sequence: block tables, sharing, copy-on-write, prefix cache, swap.

    sequence 7   tokens   0..15   16..31   32..40          block_size 16
                 blocks   [ 3  ,   9    ,   4  ]           3 and 9 full and findable by content, 4 partly filled
    fork 7 → 8            [ 3  ,   9    ,   4  ]           every count goes up by one
    8 writes token 41     [ 3  ,   9    ,   5  ]           4 was shared: its content is copied to 5 first

The manager knows ids only; the plan it helps to make moves the data. PagedAttention: Kwon et al., SOSP 2023.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from cupy_engine.block_pool import BlockPool


class Reservation(msgspec.Struct, gc=False):
    """What changed in a sequence's block table: columns ``first_changed`` on now hold ``block_ids``.

    ``copies`` are (source, destination) blocks to copy before the step writes.
    """

    first_changed: int
    block_ids: list[int]
    copies: list[tuple[int, int]] = []


@dataclass(slots=True)
class _Table:
    block_ids: list[int]
    num_tokens: int = 0  # as far as the manager has been told
    num_registered: int = 0


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """SHA-256 over the parent block's hash and this block's token ids: equal hashes mean equal prefixes."""
    return hashlib.sha256(parent + array("I", token_ids).tobytes()).digest()


def root_hash(salt: str) -> bytes:
    """The parent of a sequence's first block. Another salt never finds this one's blocks."""
    return hashlib.sha256(salt.encode()).digest()


class BlockManager:
    """Block tables by sequence id over a device pool and a host pool.

    Methods that need blocks return ``None`` when there are not enough, and then have changed nothing.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_host_blocks: int = 0, enable_prefix_caching: bool = True
    ) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks)
        self.host_pool = BlockPool(num_host_blocks)
        self._tables: dict[int, _Table] = {}
        self._swapped: dict[int, _Table] = {}

    @property
    def num_blocks(self) -> int:
        return len(self.pool.blocks)

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    def num_free_without(self, sequence_ids: Sequence[int]) -> int:
        """Blocks that would be free if these running sequences left: those that are theirs alone, and the free ones."""
        shares = Counter(block_id for i in sequence_ids for block_id in self._tables[i].block_ids)
        return self.pool.num_free + sum(self.pool.ref_count(block_id) == n for block_id, n in shares.items())

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def block_table(self, sequence_id: int) -> list[int]:
        return list(self._tables[sequence_id].block_ids)

    def num_blocks_of(self, sequence_id: int) -> int:
        return len(self._tables[sequence_id].block_ids)

    def find_prefix(self, block_hashes: Sequence[bytes]) -> list[int]:
        """Blocks that already hold the leading blocks with these hashes. Takes no reference: open at once."""
        found: list[int] = []
        if self.enable_prefix_caching:
            for block_hash in block_hashes:
                block_id = self.pool.find(block_hash)
                if block_id is None:
                    break
                found.append(block_id)
        return found

    def num_blocks_beside(self, prefix: Sequence[int], num_tokens: int) -> int:
        """Of the free blocks, how many a new sequence of ``num_tokens`` takes that starts with this cached prefix."""
        num_shared = sum(self.pool.ref_count(block_id) > 0 for block_id in prefix)
        return self.num_blocks_for(num_tokens) - num_shared

    def open(self, sequence_id: int, prefix: Sequence[int] = ()) -> None:
        """Start a block table with a cached prefix, which is shared."""
        assert sequence_id not in self._tables, f"sequence {sequence_id} has a table already"
        for block_id in prefix:
            self.pool.share(block_id)
        self._tables[sequence_id] = _Table(list(prefix), len(prefix) * self.block_size, len(prefix))

    def steady_until(self, sequence_id: int, num_unknown: int = 0) -> int:
        """Positions before this one can be written one after the other without a word to the manager.

        Their block is there, it is the sequence's alone, and none becomes findable, which it does when it is full of
        known tokens: all but the last ``num_unknown`` are known when the next is written.
        """
        table = self._tables[sequence_id]
        if self.pool.ref_count(table.block_ids[-1]) > 1:
            return 0
        end = len(table.block_ids) * self.block_size
        next_findable = (table.num_registered + 1) * self.block_size
        return min(end, next_findable - 1 + num_unknown) if self.enable_prefix_caching else end

    def reserve(self, sequence_id: int, start: int, end: int) -> Reservation | None:
        """Make positions ``[start, end)`` writable: blocks exist there and belong to this sequence alone."""
        table = self._tables[sequence_id]
        first = start // self.block_size
        num_old = len(table.block_ids)
        shared = [i for i in range(first, num_old) if self.pool.ref_count(table.block_ids[i]) > 1]
        num_new = max(0, self.num_blocks_for(end) - num_old)
        if num_new + len(shared) > self.pool.num_free:
            return None
        copies = [(table.block_ids[i], self._replace_shared(table, i)) for i in shared]
        table.block_ids.extend(self.pool.take() for _ in range(num_new))
        table.num_tokens = max(table.num_tokens, end)
        first_changed = shared[0] if shared else num_old
        return Reservation(first_changed, table.block_ids[first_changed:], copies)

    def advance(self, sequence_id: int, num_tokens: int) -> None:
        """Take in how far a running sequence has been written meanwhile; only :meth:`waste` and :meth:`render` care."""
        self._tables[sequence_id].num_tokens = num_tokens

    def _replace_shared(self, table: _Table, column: int) -> int:
        new_id = self.pool.take()
        self.pool.release(table.block_ids[column])
        table.block_ids[column] = new_id
        return new_id

    def register(self, sequence_id: int, block_hashes: Sequence[bytes], num_tokens: int) -> None:
        """Make the full blocks among the first ``num_tokens`` tokens findable; ``block_hashes`` are the sequence's."""
        table = self._tables[sequence_id]
        if not self.enable_prefix_caching:
            return
        num_full = min(num_tokens // self.block_size, len(block_hashes))
        for i in range(table.num_registered, num_full):
            self.pool.register(table.block_ids[i], block_hashes[i])
        table.num_registered = max(table.num_registered, num_full)

    def fork(self, parent_id: int, child_id: int) -> list[int]:
        """Give the child a table that shares all the parent's blocks; returns it."""
        parent = self._tables[parent_id]
        assert child_id not in self._tables, f"sequence {child_id} has a table already"
        for block_id in parent.block_ids:
            self.pool.share(block_id)
        self._tables[child_id] = _Table(list(parent.block_ids), parent.num_tokens, parent.num_registered)
        return list(parent.block_ids)

    def free(self, sequence_id: int, *, forget: bool = False) -> None:
        """Drop a sequence, running or swapped. Its last blocks become the oldest, so prefixes outlive tails.

        ``forget``: what it computed is not to be trusted and must not be found again.
        """
        table = self._tables.pop(sequence_id, None)
        pool = self.pool
        if table is None:
            table, pool = self._swapped.pop(sequence_id), self.host_pool
        for block_id in reversed(table.block_ids):
            pool.release(block_id, forget=forget)

    def swap_out(self, sequence_id: int) -> list[tuple[int, int]] | None:
        """Move a sequence to host blocks; returns (device block, host block) pairs to copy."""
        table = self._tables[sequence_id]
        if len(table.block_ids) > self.host_pool.num_free:
            return None
        host_ids = [self.host_pool.take() for _ in table.block_ids]
        pairs = list(zip(table.block_ids, host_ids, strict=True))
        self.free(sequence_id)
        self._swapped[sequence_id] = _Table(host_ids, table.num_tokens)
        return pairs

    def swap_in(self, sequence_id: int) -> list[tuple[int, int]] | None:
        """Bring a swapped sequence back; returns (host block, device block) pairs to copy."""
        table = self._swapped[sequence_id]
        if len(table.block_ids) > self.pool.num_free:
            return None
        device_ids = [self.pool.take() for _ in table.block_ids]
        pairs = list(zip(table.block_ids, device_ids, strict=True))
        self.free(sequence_id)
        self._tables[sequence_id] = _Table(device_ids, table.num_tokens)
        return pairs

    def num_swapped_blocks(self, sequence_id: int) -> int:
        return len(self._swapped[sequence_id].block_ids)

    def reset_prefix_cache(self) -> None:
        """Forget all cached content, after a step failed half-way."""
        self.pool.forget_all()

    def waste(self) -> float:
        """Internal fragmentation: the share of token places in blocks in use that hold no token."""
        tokens_in_block: dict[int, int] = {}
        for table in self._tables.values():
            for i, block_id in enumerate(table.block_ids):
                num = min(self.block_size, max(0, table.num_tokens - i * self.block_size))
                tokens_in_block[block_id] = max(tokens_in_block.get(block_id, 0), num)
        num_places = len(tokens_in_block) * self.block_size
        return 1 - sum(tokens_in_block.values()) / num_places if num_places else 0.0

    def render(self, width: int = 64) -> str:
        """A picture of the block tables and of the pool, for people.

        In the map ``1``–``9`` and ``+`` count references, ``c`` is free but cached, ``.`` is free and empty.
        """
        used = self.num_blocks - self.num_free_blocks
        lines = [
            f"{used} of {self.num_blocks} blocks of {self.block_size} tokens in use, {self.waste():.1%} waste inside"
        ]
        for sequence_id, table in sorted(self._tables.items()):
            lines.append(f"  sequence {sequence_id}: {table.num_tokens} tokens {table.block_ids}")
        for sequence_id, table in sorted(self._swapped.items()):
            lines.append(f"  sequence {sequence_id}: {table.num_tokens} tokens on the host {table.block_ids}")
        marks = "".join(_mark(b.ref_count, b.block_hash is not None) for b in self.pool.blocks)
        return "\n".join(lines + ["  " + marks[i : i + width] for i in range(0, len(marks), width)])

    def check_integrity(self) -> None:
        """Assert that every block is accounted for. Cheap enough for tests and idle moments."""
        self.pool.check_integrity(Counter(b for table in self._tables.values() for b in table.block_ids))
        self.host_pool.check_integrity(Counter(b for table in self._swapped.values() for b in table.block_ids))
        assert not self._tables.keys() & self._swapped.keys(), "a sequence is in both places"
        for sequence_id, table in self._tables.items():
            assert table.num_tokens <= len(table.block_ids) * self.block_size, f"sequence {sequence_id} overflows"


def _mark(ref_count: int, is_cached: bool) -> str:
    if ref_count:
        return str(ref_count) if ref_count <= 9 else "+"
    return "c" if is_cached else "."
