"""When an engine that has ended is started again: at once, then after growing delays, and not for ever."""

from __future__ import annotations

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
STEADY_S = 60.0


class RestartDelays:
    """Counts the ends in a row; after an engine that was ready for ``STEADY_S``, a new row begins.

    The delays of a row: 0, 0.5, 1, 2, 4 … 30, 30 seconds, and after ``max_in_a_row`` of them nothing more.
    """

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.num_in_a_row = 0

    def next_s(self, ready_s: float) -> float | None:
        """How long to wait before the next start, after an end; ``None``: the engine stays down.

        Args:
            ready_s: for how long it had been ready.
        """
        if ready_s >= STEADY_S:
            self.num_in_a_row = 0
        self.num_in_a_row += 1
        if self.num_in_a_row > self.max_in_a_row:
            return None
        if self.num_in_a_row == 1:
            return 0.0
        doublings = min(self.num_in_a_row - 2, 30)  # a row may be a million long: no power of two of that size
        return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0**doublings)
