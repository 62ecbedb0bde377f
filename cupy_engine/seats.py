"""The worker's slots, as the scheduler gives them out."""

from __future__ import annotations

from cupy_engine.request import Sequence


class Seats:
    """``num_slots`` slots; a sequence sits in one from its admission until it ends or makes room."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, sequence: Sequence) -> None:
        assert sequence.slot < 0, f"sequence {sequence.sequence_id} sits in slot {sequence.slot} already"
        sequence.slot = self._free.pop()
        sequence.last_token_in_slot = False

    def leave(self, sequence: Sequence) -> None:
        """Nothing to do for a sequence without a seat."""
        if sequence.slot >= 0:
            self._free.append(sequence.slot)
            sequence.slot = -1

    def check_integrity(self, taken: list[int]) -> None:
        assert sorted(taken + self._free) == list(range(self._num_slots)), "seats do not add up"
