"""How busy an engine is, and who is turned away: asked by the worker that a request reaches, then by the engine."""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass

import msgspec

from cupy_engine.errors import QueueFullError

HALF_LIFE_S = 3.0  # of what is remembered about the queue
MAX_RETRY_AFTER_S = 60.0
_WINDOW_S = 10.0  # for which a late first token is remembered, if targets are not long
_KEPT = 0.99  # share of first tokens that shall come in time


class EngineLoad(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How busy an engine is.

    ``num_free``: how many of those who wait, or come now, can run in the next step. ``ended_per_s``: requests that made
    room per second, lately, while it was full; ``None`` until known. ``overrun_s``: from the end of the wait that is
    expected to the first token; it takes less for all but a few.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_free: int = 0
    ended_per_s: float | None = None
    overrun_s: float = 0.0

    @property
    def wait_s(self) -> float:
        """How long a request that came now would wait in the queue, as far as is known."""
        num_ahead = self.num_waiting + 1 - self.num_free
        return num_ahead / self.ended_per_s if num_ahead > 0 and self.ended_per_s else 0.0

    def later(self, seconds: float, num_new: int) -> EngineLoad:
        """What the load should be after some time in which ``num_new`` requests came that are not over yet."""
        num_seated = min(self.num_free, num_new)
        num_ended = 0 if self.num_free else int((self.ended_per_s or 0.0) * seconds)
        num_waiting = max(0, self.num_waiting + num_new - num_seated - num_ended)
        return msgspec.structs.replace(self, num_free=self.num_free - num_seated, num_waiting=num_waiting)


class LoadMeter:
    """Measures how fast a full engine makes room: two sums that forget at the same rate, of requests and of seconds."""

    def __init__(self) -> None:
        self._num_ended = 0.0
        self._seconds = 0.0
        self._last: tuple[float, int] | None = None  # time and count at the last look; None if it was not full then

    def observe(self, now_s: float, num_ended: int, *, is_full: bool) -> None:
        """To be called in every step. ``num_ended`` counts from the start of the engine."""
        if self._last is not None:
            elapsed_s = now_s - self._last[0]
            weight = 0.5 ** (elapsed_s / HALF_LIFE_S)
            self._seconds = self._seconds * weight + elapsed_s
            self._num_ended = self._num_ended * weight + num_ended - self._last[1]
        self._last = (now_s, num_ended) if is_full else None

    @property
    def ended_per_s(self) -> float | None:
        """An optimist's rate: as if the next one were just ending."""
        return (self._num_ended + 1) / self._seconds if self._seconds > 0 else None


class Overruns:
    """By how much first tokens came later than the wait in the queue that was expected.

    Prompts take time to compute, and seats do not become free as evenly as a rate says: those who came in together
    leave together. How much that matters depends on the load, so it is learned from those who waited.

    ``high_s``: hardly any was later.

    Args:
        target_s: when a first token should come, if there is a target.
    """

    def __init__(self, target_s: float | None) -> None:
        self._window_s = max(_WINDOW_S, 4 * (target_s or 0.0))  # some must have come in the meantime
        self._observed: deque[tuple[float, float]] = deque()
        self._sorted: list[float] = []
        self.high_s = 0.0

    def observe(self, now_s: float, overrun_s: float) -> None:
        self._observed.append((now_s, overrun_s))
        bisect.insort(self._sorted, overrun_s)
        self.forget(now_s)

    def forget(self, now_s: float) -> None:
        """Drop what is too old. To be called now and then, also when nothing is observed."""
        ordered = self._sorted
        while self._observed and self._observed[0][0] < now_s - self._window_s:
            _, overrun_s = self._observed.popleft()
            del ordered[bisect.bisect_left(ordered, overrun_s)]
        self.high_s = ordered[int(_KEPT * len(ordered))] if ordered else 0.0


@dataclass(frozen=True, slots=True)
class AdmissionRule:
    """Whom a queue takes.

    Args:
        max_queue_len: most requests that may wait.
        slo_ttft_s: turn away whoever would wait longer than this for a first token.
    """

    max_queue_len: int
    slo_ttft_s: float | None = None

    def check(self, load: EngineLoad, num_new: int = 1) -> None:
        """Raises QueueFullError if ``num_new`` more requests must not come in."""
        if load.num_waiting + num_new > self.max_queue_len:
            message = f"{load.num_waiting} requests wait already, of at most {self.max_queue_len} (max_queue_len)"
            raise QueueFullError(f"{message}; try again later", _retry_after_s(load.wait_s))
        if self.slo_ttft_s is not None and load.wait_s > 0:
            ttft_s = load.wait_s + load.overrun_s
            if ttft_s > self.slo_ttft_s:
                message = f"the first token might take {ttft_s:.1f} s, too long for slo_ttft_s = {self.slo_ttft_s:g}"
                raise QueueFullError(
                    f"{message}; try again later", _retry_after_s(ttft_s - self.slo_ttft_s), "slo_ttft"
                )


def _retry_after_s(wait_s: float) -> float:
    return min(MAX_RETRY_AFTER_S, max(1.0, wait_s))
