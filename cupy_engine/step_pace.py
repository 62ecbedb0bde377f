"""How many tokens a step may compute so that those who stream get their next one in time."""

from __future__ import annotations

_KEPT = 0.98  # of what is known, at each step
_MARGIN = 0.9  # of the target is planned for: steps of one size differ


class StepPace:
    """Learns a step's time as ``fixed + per_token * num_tokens`` from steps as they run, by least squares.

    Older steps count less and less, since longer contexts make the same step slower.

    Args:
        target_s: most time between two tokens of a stream.
    """

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s * _MARGIN
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, num_tokens: int, duration_s: float) -> None:
        """A step of ``num_tokens`` took ``duration_s``."""
        self._weight = self._weight * _KEPT + 1
        self._x = self._x * _KEPT + num_tokens
        self._y = self._y * _KEPT + duration_s
        self._xx = self._xx * _KEPT + num_tokens * num_tokens
        self._xy = self._xy * _KEPT + num_tokens * duration_s

    def max_tokens(self) -> int | None:
        """The largest step that should take no longer than the target; ``None`` until a step has been seen."""
        if not self._y:
            return None
        fixed_s, per_token_s = self._line()
        return max(0, int((self._target_s - fixed_s) / per_token_s))

    def room(self, num_running: int) -> int:
        """How many more sequences may decode beside those that run."""
        most = self.max_tokens()
        return num_running + 1 if most is None else max(0, most - num_running)

    def _line(self) -> tuple[float, float]:
        """Fixed seconds and seconds per token; steps of one size are taken to be all per token, which errs upwards."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance > 1e-6 * mean_x * mean_x:
            per_token_s = (self._xy / self._weight - mean_x * mean_y) / variance
            fixed_s = mean_y - per_token_s * mean_x
            if per_token_s > 0 and fixed_s >= 0:
                return fixed_s, per_token_s
        return 0.0, mean_y / mean_x
