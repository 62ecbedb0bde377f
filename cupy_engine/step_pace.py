"""How many sequences may run so that those who stream get their tokens in time."""

from __future__ import annotations

_KEPT = 0.995  # of what is known, at each step
_MARGIN = 0.9  # of what a target leaves to sequences is given out: steps of one size differ
_INERTIA = 0.5  # sequences by which an answer must be off to change: who was told of a seat should find it


class StepPace:
    """Learns a step's time as ``fixed + per_token * num_tokens`` from steps as they run, by least squares.

    Each sequence brings a token per step, and its share of the prompts that are computed in between: as many tokens as
    steps had per sequence lately. Older steps count less and less, since longer contexts make the same step slower.

    Args:
        target_s: time that a stream should wait for a token, on average.
    """

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self._weight = self._x = self._y = self._xx = self._xy = self._num_sequences = 0.0
        self._most: int | None = None  # the latest answer

    def observe(self, num_tokens: int, num_sequences: int, duration_s: float) -> None:
        """A step computed ``num_tokens`` of ``num_sequences``."""
        self._weight = self._weight * _KEPT + 1
        self._x = self._x * _KEPT + num_tokens
        self._y = self._y * _KEPT + duration_s
        self._xx = self._xx * _KEPT + num_tokens * num_tokens
        self._xy = self._xy * _KEPT + num_tokens * duration_s
        self._num_sequences = self._num_sequences * _KEPT + num_sequences

    def max_sequences(self) -> int | None:
        """As many as can run in time, at least 1; ``None`` if that is all or nothing is known yet.

        Where even a step of nothing would be too slow, few sequences do not help anybody: then as many may run as
        double its time.
        """
        if not self._y or not self._x:
            return None
        fixed_s, per_token_s = self._line()
        if per_token_s <= 0:
            return None
        spare_s = self._target_s - fixed_s
        per_sequence_s = per_token_s * self._x / self._num_sequences
        most = (_MARGIN * spare_s if spare_s > 0 else fixed_s) / per_sequence_s
        if self._most is None or not self._most - _INERTIA <= most < self._most + 1 + _INERTIA:
            self._most = max(1, int(most))
        return self._most

    def _line(self) -> tuple[float, float]:
        """Fixed seconds and seconds per token; steps of one size are taken to be all per token, which errs upwards."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance <= 1e-6 * mean_x * mean_x:
            return 0.0, mean_y / mean_x
        per_token_s = max(0.0, (self._xy / self._weight - mean_x * mean_y) / variance)
        fixed_s = mean_y - per_token_s * mean_x
        return (fixed_s, per_token_s) if fixed_s >= 0 else (0.0, mean_y / mean_x)
