"""Drives an EngineCore on one thread: commands in from an inbox, steps while there is work, replies out."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from cupy_engine.core import EngineCore
from cupy_engine.live_view import live_view
from cupy_engine.messages import AbortRequest, Command, GenerateRequest, RefusalReport, Reply, StatsReply, StatsRequest

logger = logging.getLogger("cupy_engine")

IDLE_WAIT_S = 0.2


class Inbox(Protocol):
    """Where commands come from: a queue in this process or a socket."""

    def receive(self, timeout_s: float | None) -> list[Command]:
        """All commands that are there. 0 does not wait; ``None`` waits until something comes."""


class CoreLoop:
    """Runs a core until told to stop.

    ``deliver`` is called on the loop's thread with the replies of each round, and must not block.
    """

    def __init__(self, core: EngineCore, inbox: Inbox, deliver: Callable[[Sequence[Reply]], None]) -> None:
        self.core = core
        self._inbox = inbox
        self._deliver = deliver
        self._stop_at_s: float | None = None

    def stop(self, drain_timeout_s: float = 0.0) -> None:
        """Finish what runs, for at most this long, fail the rest, and return from :meth:`run`.

        Safe from other threads and signal handlers. A second call can only shorten the time.
        """
        stop_at_s = time.monotonic() + drain_timeout_s
        self._stop_at_s = stop_at_s if self._stop_at_s is None else min(stop_at_s, self._stop_at_s)

    def run(self) -> None:
        with _settled_heap():
            while not self._is_over():
                self._round()
        self._deliver(self.core.fail_all("the engine is shutting down"))

    def _is_over(self) -> bool:
        if self._stop_at_s is None:
            return False
        return not self.core.has_work or time.monotonic() >= self._stop_at_s

    def _round(self) -> None:
        replies: list[Reply] = []
        for command in self._inbox.receive(0 if self.core.has_work else IDLE_WAIT_S):
            reply = self._handle(command)
            if reply is not None:
                replies.append(reply)
        if self.core.has_work:
            replies += self.core.step()
        if replies:
            self._deliver(replies)

    def _handle(self, command: Command) -> Reply | None:
        if isinstance(command, GenerateRequest):
            return self.core.add(command)
        if isinstance(command, AbortRequest):
            self.core.abort(command)
            return None
        if isinstance(command, RefusalReport):
            for reason, count in command.num_by_reason.items():
                self.core.metrics.on_rejected(reason, count)
            return None
        assert isinstance(command, StatsRequest)
        scheduler = self.core.scheduler
        return StatsReply(
            token=command.token,
            stats=self.core.stats(),
            metrics=self.core.metrics.snapshot(scheduler),
            live=live_view(scheduler) if command.wants_live else None,
        )


@contextmanager
def _settled_heap() -> Iterator[None]:
    """Keep the garbage collector from looking through all that has been built: that holds a step up by tens of ms."""
    gc.collect()  # what is garbage now would stay
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
