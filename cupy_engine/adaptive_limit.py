"""How many sequences may run so that newcomers get their first tokens in time."""

from __future__ import annotations

_LATE = 0.01  # share of first tokens that may be late
_LOWERED = 1 / 16  # of what could run: for a late one
_RAISED = _LOWERED * _LATE / (1 - _LATE)  # for one in time
_LEAST = 0.5  # of what could run: lateness that has other causes costs no more than that


class AdaptiveLimit:
    """Follows how many first tokens are late, whatever makes them so: steps, or processes that want the same cores.

    Each late one lowers the limit, each of the others raises it, by so much less that it rests where one in a hundred
    is late. (Stochastic approximation of a quantile: Robbins and Monro, "A Stochastic Approximation Method", 1951.)

    Args:
        target_s: when a first token should come.
    """

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self._share = 1.0  # of what could run

    def observe(self, ttft_s: float) -> None:
        """A request that found a seat got its first token. Who waits for one does not count: fewer would not help."""
        change = -_LOWERED if ttft_s > self._target_s else _RAISED
        self._share = min(1.0, max(_LEAST, self._share + change))

    def max_sequences(self, most: int) -> int:
        """As many of ``most`` as may run, at least 1."""
        return max(1, round(most * self._share))
