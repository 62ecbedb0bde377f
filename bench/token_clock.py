"""When tokens come, by the engine's own notice."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from cupy_engine import Engine
from cupy_engine.request import Sequence

from .replaced import replaced


class TokenClock:
    """Notes the time of every token of every sequence."""

    def __init__(self) -> None:
        self._times_s: dict[int, list[float]] = defaultdict(list)

    @classmethod
    @contextmanager
    def watching(cls, engine: Engine) -> Iterator[TokenClock]:
        """A clock that hears what the engine's metrics hear, as long as the context lasts."""
        clock, metrics = cls(), engine._core.metrics
        counted = metrics.on_tokens

        def on_tokens(sequences: list[Sequence]) -> None:
            counted(sequences)
            now_s = time.monotonic()
            for sequence in sequences:
                clock._times_s[sequence.sequence_id].append(now_s)

        with replaced(metrics, "on_tokens", on_tokens):
            yield clock

    def gaps_s(self) -> list[float]:
        """The time between each two tokens of a sequence."""
        return [later - earlier for times in self._times_s.values() for earlier, later in pairwise(times)]
