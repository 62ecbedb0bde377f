"""Random traces: whatever happens, each sequence reads its own tokens and every block is accounted for.

A model of the device stands beside the manager: it holds, per block, what was written there, and does the copies and
swaps that the manager orders. A sequence's content, read through its table, must be its tokens after every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cupy_engine.block_manager import BlockManager, hash_block, root_hash

SALTS = ["", "alice"]


@dataclass
class Written:
    """A sequence as the model knows it: its tokens all lie in blocks."""

    salt: str
    token_ids: list[int]
    hashes: list[bytes] = field(default_factory=list)


class BlockManagerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 4),
        num_host_blocks=st.integers(0, 8),
        enable_prefix_caching=st.booleans(),
    )
    def start(self, num_blocks, block_size, num_host_blocks, enable_prefix_caching):
        self.manager = BlockManager(num_blocks, block_size, num_host_blocks, enable_prefix_caching)
        self.device = [[None] * block_size for _ in range(num_blocks)]
        self.host = [[None] * block_size for _ in range(num_host_blocks)]
        self.running: dict[int, Written] = {}
        self.swapped: dict[int, Written] = {}
        self.next_id = 0

    def update_hashes(self, written):
        size = self.manager.block_size
        for start in range(len(written.hashes) * size, len(written.token_ids) - size + 1, size):
            parent = written.hashes[-1] if written.hashes else root_hash(written.salt)
            written.hashes.append(hash_block(parent, written.token_ids[start : start + size]))

    def snapshot(self):
        pools = [(pool.free_list.block_ids(), [b.ref_count for b in pool.blocks]) for pool in self.pools()]
        return pools, {i: self.manager.block_table(i) for i in self.running}

    def pools(self):
        return self.manager.pool, self.manager.host_pool

    def write(self, sequence_id, token_ids):
        """Append tokens; a refusal must change nothing."""
        written, before = self.running[sequence_id], self.snapshot()
        start, end = len(written.token_ids), len(written.token_ids) + len(token_ids)
        reservation = self.manager.reserve(sequence_id, start, end)
        if reservation is None:
            assert self.snapshot() == before
            return
        for source, destination in reservation.copies:
            self.device[destination] = list(self.device[source])
        table = self.manager.block_table(sequence_id)
        assert table[reservation.first_changed :] == reservation.block_ids
        assert table[: reservation.first_changed] == before[1][sequence_id][: reservation.first_changed]
        written.token_ids.extend(token_ids)
        for position in range(start, end):
            block, offset = divmod(position, self.manager.block_size)
            self.device[table[block]][offset] = (written.salt, tuple(written.token_ids[: position + 1]))
        self.update_hashes(written)
        self.manager.register(sequence_id, written.hashes, end)

    @rule(salt=st.sampled_from(SALTS), token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def open(self, salt, token_ids):
        wanted = Written(salt, token_ids)
        self.update_hashes(wanted)
        prefix = self.manager.find_prefix(wanted.hashes)
        fits = self.manager.num_blocks_beside(prefix, len(token_ids)) <= self.manager.num_free_blocks
        sequence_id, self.next_id = self.next_id, self.next_id + 1
        self.manager.open(sequence_id, prefix)
        num_cached = len(prefix) * self.manager.block_size
        self.running[sequence_id] = Written(salt, token_ids[:num_cached], wanted.hashes[: len(prefix)])
        self.write(sequence_id, token_ids[num_cached:])
        assert fits == (len(self.running[sequence_id].token_ids) == len(token_ids))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def grow(self, data, token_ids):
        self.write(data.draw(st.sampled_from(sorted(self.running))), token_ids)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fork(self, data):
        parent_id = data.draw(st.sampled_from(sorted(self.running)))
        parent = self.running[parent_id]
        child_id, self.next_id = self.next_id, self.next_id + 1
        assert self.manager.fork(parent_id, child_id) == self.manager.block_table(parent_id)
        self.running[child_id] = Written(parent.salt, list(parent.token_ids), list(parent.hashes))

    @precondition(lambda self: self.running or self.swapped)
    @rule(data=st.data(), forget=st.booleans())
    def free(self, data, forget):
        sequence_id = data.draw(st.sampled_from(sorted([*self.running, *self.swapped])))
        self.manager.free(sequence_id, forget=forget)
        self.running.pop(sequence_id, None)
        self.swapped.pop(sequence_id, None)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def swap_out(self, data):
        sequence_id = data.draw(st.sampled_from(sorted(self.running)))
        before = self.snapshot()
        pairs = self.manager.swap_out(sequence_id)
        if pairs is None:
            assert self.snapshot() == before
            return
        for device_id, host_id in pairs:
            self.host[host_id] = list(self.device[device_id])
        self.swapped[sequence_id] = self.running.pop(sequence_id)

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data):
        sequence_id = data.draw(st.sampled_from(sorted(self.swapped)))
        before = self.snapshot()
        pairs = self.manager.swap_in(sequence_id)
        if pairs is None:
            assert self.snapshot() == before
            return
        for host_id, device_id in pairs:
            self.device[device_id] = list(self.host[host_id])
        written = self.running[sequence_id] = self.swapped.pop(sequence_id)
        self.manager.register(sequence_id, written.hashes, len(written.token_ids))

    @rule()
    def reset_prefix_cache(self):
        self.manager.reset_prefix_cache()
        assert self.manager.pool.num_cached == 0

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        if not hasattr(self, "manager"):
            return
        self.manager.check_integrity()
        assert self.manager.render()
        for sequence_id, written in self.running.items():
            table = self.manager.block_table(sequence_id)
            for position in range(len(written.token_ids)):
                block, offset = divmod(position, self.manager.block_size)
                content = self.device[table[block]][offset]
                assert content == (written.salt, tuple(written.token_ids[: position + 1]))

    def teardown(self):
        for sequence_id in [*getattr(self, "running", {}), *getattr(self, "swapped", {})]:
            self.manager.free(sequence_id)
        for pool in self.pools() if hasattr(self, "manager") else ():
            assert pool.num_free == len(pool.blocks)


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
