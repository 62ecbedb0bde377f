"""A progress bar for weights: shown on a terminal, and for big models in a log as well, if loading takes a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cupy_engine.device import Array
from cupy_engine.weights import WeightSource

_BIG_BYTES = 1 << 30
_DELAY_S = 1.0
_LOG_INTERVAL_S = 5.0


@contextmanager
def show_progress(source: WeightSource) -> Iterator[WeightSource]:
    """Take from the given view of ``source`` to have it counted."""
    is_terminal = sys.stderr.isatty()
    if not source.num_bytes or not (is_terminal or source.num_bytes >= _BIG_BYTES):
        yield source
        return
    from tqdm import tqdm

    with tqdm(
        total=source.num_bytes,
        desc="weights",
        unit="B",
        unit_scale=True,
        delay=_DELAY_S,
        mininterval=0.1 if is_terminal else _LOG_INTERVAL_S,
    ) as bar:
        yield _CountedWeights(source, bar.update)


class _CountedWeights:
    """A WeightSource over another one that tells how many bytes are taken."""

    def __init__(self, source: WeightSource, on_bytes: Callable[[int], object]) -> None:
        self._source = source
        self._on_bytes = on_bytes

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        array = self._source.take(name, shape)
        self._on_bytes(array.nbytes)
        return array

    def has(self, name: str) -> bool:
        return self._source.has(name)

    @property
    def num_bytes(self) -> int:
        return self._source.num_bytes

    def unused(self) -> list[str]:
        return self._source.unused()

    def close(self) -> None:
        self._source.close()
