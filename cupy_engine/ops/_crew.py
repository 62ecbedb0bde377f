"""A few threads that share one op's work in the NumPy backend.

NumPy lets go of the interpreter lock inside its loops, and a hand-over costs some 40 µs, so it pays to cut an op of a
few hundred microseconds in two. Large matrix products need no help: BLAS has threads of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from queue import SimpleQueue

_MAX_THREADS = 4

_Task = tuple[Callable[..., object], tuple[object, ...]]


class Crew:
    """The calling thread and ``num_threads - 1`` helpers, which start at the first use and end with the process."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._is_busy = threading.Lock()
        self._tasks: list[SimpleQueue[_Task]] = []
        self._outcomes: SimpleQueue[BaseException | None] = SimpleQueue()

    def run(self, function: Callable[..., object], arguments: Sequence[tuple[object, ...]]) -> None:
        """Call ``function`` once with each tuple of arguments (at most ``num_threads``), side by side; wait for all.

        Raises what a call raised. A caller that finds the crew at work for another thread works alone.
        """
        if len(arguments) == 1 or not self._is_busy.acquire(blocking=False):
            for own in arguments:
                function(*own)
            return
        try:
            self._share(function, arguments)
        finally:
            self._is_busy.release()

    def _share(self, function: Callable[..., object], arguments: Sequence[tuple[object, ...]]) -> None:
        self._start(len(arguments) - 1)
        for tasks, handed in zip(self._tasks, arguments[1:], strict=False):
            tasks.put((function, handed))
        try:
            function(*arguments[0])
        finally:
            outcomes = [self._outcomes.get() for _ in arguments[1:]]
        for error in filter(None, outcomes):
            raise error

    def _start(self, num_helpers: int) -> None:
        while len(self._tasks) < num_helpers:
            tasks: SimpleQueue[_Task] = SimpleQueue()
            name = f"cupy-engine-ops-{len(self._tasks) + 1}"
            threading.Thread(target=self._help, args=(tasks,), name=name, daemon=True).start()
            self._tasks.append(tasks)

    def _help(self, tasks: SimpleQueue[_Task]) -> None:
        while True:
            function, arguments = tasks.get()
            try:
                function(*arguments)
            except BaseException as error:
                self._outcomes.put(error)
            else:
                self._outcomes.put(None)
            del function, arguments


def even_cuts(length: int, num_parts: int) -> list[slice]:
    """``range(length)`` in consecutive parts whose sizes differ by at most one, the largest first."""
    size, larger = divmod(length, num_parts)
    edges = [0]
    for part in range(num_parts):
        edges.append(edges[-1] + size + (part < larger))
    return [slice(a, b) for a, b in pairwise(edges)]


_crew: Crew | None = None


def crew() -> Crew:
    """This process's crew: one thread per CPU it may run on, up to four."""
    global _crew
    if _crew is None:
        _crew = Crew(min(_MAX_THREADS, len(os.sched_getaffinity(0))))
    return _crew


def _forget() -> None:
    global _crew
    _crew = None


os.register_at_fork(after_in_child=_forget)  # threads do not survive a fork
