"""The worker's slots, as the scheduler gives them out."""

from __future__ import annotations

from cupy_engine.adaptive_limit import AdaptiveLimit
from cupy_engine.request import Sequence
from cupy_engine.step_pace import StepPace


class Seats:
    """``num_slots`` slots; a sequence sits in one from its admission until it ends or makes room.

    Args:
        pace: keeps seats empty where more sequences would be too slow; whoever comes first gets in, however many seats
            it needs.
        limit: keeps more of them empty where first tokens come late.
    """

    def __init__(self, num_slots: int, pace: StepPace | None = None, limit: AdaptiveLimit | None = None) -> None:
        self._num_slots = num_slots
        self._pace = pace
        self._limit = limit
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Negative where more are taken than may be by now."""
        num_taken = self._num_slots - len(self._free)
        return self.max_taken - num_taken if num_taken else self._num_slots

    @property
    def max_taken(self) -> int:
        """How many may be taken beside others."""
        most = self._pace.max_sequences() if self._pace is not None else None
        most = self._num_slots if most is None else min(self._num_slots, most)
        return most if self._limit is None else self._limit.max_sequences(most)

    def take(self, sequence: Sequence) -> None:
        assert sequence.slot < 0, f"sequence {sequence.sequence_id} sits in slot {sequence.slot} already"
        sequence.slot = self._free.pop()
        sequence.last_token_in_slot = False

    def leave(self, sequence: Sequence) -> None:
        """Nothing to do for a sequence without a seat."""
        if sequence.slot >= 0:
            self._free.append(sequence.slot)
            sequence.slot = -1
            sequence.steady_until = 0

    def check_integrity(self, taken: list[int]) -> None:
        assert sorted(taken + self._free) == list(range(self._num_slots)), "seats do not add up"
