"""Whether a waiting sequence fits beside those that run, and what it starts with when it comes in."""

from __future__ import annotations

from collections.abc import Sequence as Many

from cupy_engine.block_manager import BlockManager
from cupy_engine.expected_growth import ExpectedGrowth
from cupy_engine.plan_builder import PlanBuilder, name_of
from cupy_engine.request import Sequence, SequenceStatus
from cupy_engine.seats import Seats


class Admission:
    """Seats and blocks of newcomers: a request's sequences come in together, on the first one's blocks.

    Args:
        growth: foresees who would have to make room again; default: whoever fits can stay.
    """

    def __init__(self, manager: BlockManager, seats: Seats, growth: ExpectedGrowth | None) -> None:
        self._manager = manager
        self._seats = seats
        self._growth = growth

    def party(self, sequence: Sequence) -> list[Sequence]:
        """The sequence and those of its request that wait for it to finish the prompt: all need seats."""
        siblings = sequence.request.sequences if sequence.index == 0 else []
        return [sequence, *(s for s in siblings if s.status is SequenceStatus.FORKING)]

    def fits(self, sequence: Sequence) -> bool:
        """Whether there are seats for its party, and blocks for all its tokens."""
        if len(self.party(sequence)) > self._seats.num_free:
            return False
        return self._num_free_blocks_for(sequence) <= self._manager.num_free_blocks

    def can_stay(self, sequence: Sequence, running: Many[Sequence]) -> bool:
        """Whether its party, which fits, is not expected to make room again for others that run."""
        if self._growth is None or not running:
            return True
        return self._growth.leaves_room_for(self.party(sequence), self._num_free_blocks_for(sequence), running)

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

    def _num_free_blocks_for(self, sequence: Sequence) -> int:
        if sequence.status is SequenceStatus.SWAPPED:
            return self._num_blocks(sequence)
        return self._manager.num_blocks_beside(self._cached_prefix(sequence), sequence.num_tokens)

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
