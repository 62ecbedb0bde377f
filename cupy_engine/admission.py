"""Whether a waiting sequence fits beside those that run, and what it starts with when it comes in."""

from __future__ import annotations

from collections.abc import Sequence as Many

from cupy_engine.block_manager import BlockManager
from cupy_engine.plan_builder import PlanBuilder, name_of
from cupy_engine.request import Sequence, SequenceStatus
from cupy_engine.seats import Seats


class Admission:
    """Seats and blocks of newcomers: a request's sequences come in together, on the first one's blocks."""

    def __init__(self, manager: BlockManager, seats: Seats) -> None:
        self._manager = manager
        self._seats = seats

    def party(self, sequence: Sequence) -> list[Sequence]:
        """The sequence and those of its request that wait for it to finish the prompt: all need seats."""
        siblings = sequence.request.sequences if sequence.index == 0 else []
        return [sequence, *(s for s in siblings if s.status is SequenceStatus.FORKING)]

    def fits(self, sequence: Sequence) -> bool:
        """Whether there are seats for its party, and blocks for all its tokens."""
        if len(self.party(sequence)) > self._seats.num_free:
            return False
        if sequence.status is SequenceStatus.SWAPPED:
            return self._num_blocks(sequence) <= self._manager.num_free_blocks
        return self._manager.can_open(self._cached_prefix(sequence), sequence.num_tokens)

    def would_fit_without(self, sequence: Sequence, others: Many[Sequence]) -> bool:
        """Whether it would fit if these running sequences left."""
        num_seats = self._seats.num_free + sum(len(self.party(other)) for other in others)
        num_blocks = self._manager.num_free_without([other.sequence_id for other in others])
        return len(self.party(sequence)) <= num_seats and self._num_blocks(sequence) <= num_blocks

    def admit(self, sequence: Sequence, builder: PlanBuilder) -> None:
        """Seat its party and give it blocks: swapped back in, or a cached prefix to start from. It must fit."""
        for other in self.party(sequence):
            self._seats.take(other)
        manager, sequence_id = self._manager, sequence.sequence_id
        if sequence.status is SequenceStatus.SWAPPED:
            pairs = manager.swap_in(sequence_id)
            assert pairs is not None, "an admitted sequence fits"
            builder.plan.swap_in.extend(pairs)
            builder.note(f"swap in {name_of(sequence)} ({len(pairs)} blocks)")
        else:
            prefix = self._cached_prefix(sequence)
            manager.open(sequence_id, prefix)
            num_cached = sequence.num_computed_tokens = len(prefix) * manager.block_size
            builder.note(f"admit {name_of(sequence)} ({num_cached} of {sequence.num_tokens} tokens cached)")
        sequence.status = SequenceStatus.RUNNING
        builder.seat(sequence)
        builder.write_table(sequence.slot, 0, manager.block_table(sequence_id))

    def _num_blocks(self, sequence: Sequence) -> int:
        num_blocks = self._manager.num_blocks_for(sequence.num_tokens)
        if sequence.status is SequenceStatus.SWAPPED:
            return max(num_blocks, self._manager.num_swapped_blocks(sequence.sequence_id))
        return num_blocks

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks to start from; at least one token is left to compute, for its logits."""
        if sequence.request.needs_every_token:
            return []
        block_size = self._manager.block_size
        hashes = sequence.update_block_hashes(block_size)
        return self._manager.find_prefix(hashes[: (sequence.num_tokens - 1) // block_size])
