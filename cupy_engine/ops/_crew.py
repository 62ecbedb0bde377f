"""A few threads that share one op's work in the NumPy backend.

NumPy lets go of the interpreter lock inside its loops, and waking a helper takes some 40 µs, so it pays to cut an op of
a few hundred microseconds in parts. Large matrix products need no help: BLAS has threads of its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from queue import SimpleQueue

_MAX_THREADS = 4


class _Job:
    """Parts of one op's work, taken by whoever is free."""

    def __init__(self, function: Callable[..., object], parts: Iterable[tuple[object, ...]]) -> None:
        self._function = function
        self._parts = deque(parts)
        self._helpers: list[None] = []  # one entry per helper that has begun
        self._outcomes: SimpleQueue[BaseException | None] = SimpleQueue()

    def work(self) -> None:
        """Do parts until none is left."""
        while True:
            try:
                part = self._parts.popleft()
            except IndexError:
                return
            self._function(*part)

    def help(self) -> None:
        """The same in a helper: announced before the first part is taken, so that the caller knows to wait."""
        self._helpers.append(None)
        try:
            self.work()
        except BaseException as error:
            self._outcomes.put(error)
        else:
            self._outcomes.put(None)

    def wait(self) -> None:
        """Wait for the helpers that have begun; the others will find nothing to do. Raises what a part raised."""
        self._parts.clear()
        errors = [error for _ in self._helpers if (error := self._outcomes.get())]
        if errors:
            raise errors[0]


class Crew:
    """The calling thread and ``num_threads - 1`` helpers, which start at the first use and end with the process."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._start_helpers = threading.Lock()
        self._has_helpers = False

    def run(self, function: Callable[..., object], parts: Sequence[tuple[object, ...]]) -> None:
        """Call ``function`` once with each tuple of arguments, in any order, in any thread; wait for all calls.

        A helper that is slow to wake costs nothing: the caller takes part after part meanwhile.

        Raises:
            Exception: what a call raised; parts not yet begun are then dropped.
        """
        if len(parts) == 1:
            function(*parts[0])
            return
        num_helpers = min(self.num_threads, len(parts)) - 1
        job = _Job(function, parts)
        for _ in range(num_helpers):
            self._hand_out(job)
        try:
            job.work()
        finally:
            job.wait()

    def _hand_out(self, job: _Job) -> None:
        if not self._has_helpers:
            with self._start_helpers:
                self._start()
        self._jobs.put(job)

    def _start(self) -> None:
        for i in range(0 if self._has_helpers else self.num_threads - 1):
            threading.Thread(target=self._help, name=f"cupy-engine-ops-{i}", daemon=True).start()
        self._has_helpers = True

    def _help(self) -> None:
        while True:
            self._jobs.get().help()


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
