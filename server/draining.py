"""The end of an HTTP worker: what runs may finish within a limit, and the rest is told that there is no more time.

Each worker sees to it by itself: the limit holds whatever has become of the supervisor and the engines.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from cupy_engine.errors import EngineDeadError

from .mailbox import Mailbox

logger = logging.getLogger(__name__)

EXTENSION = "cupy_engine"  # where a Flask application keeps its ModelDirectory
EXIT_MARGIN_S = 3.0  # for a worker to send the last words of its requests, before gunicorn kills it


class Drain:
    """The open requests of a worker, by their mailboxes. Made before a fork if need be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[Mailbox] = set()
        self._is_over = False

    def enter(self, mailbox: Mailbox) -> None:
        with self._lock:
            self._open.add(mailbox)
            is_over = self._is_over
        if is_over:
            mailbox.put(no_more_time)

    def leave(self, mailbox: Mailbox) -> None:
        with self._lock:
            self._open.discard(mailbox)

    def end(self) -> int:
        """Fail what is open, and what may still come; how many requests were open."""
        with self._lock:
            self._is_over = True
            mailboxes = list(self._open)
        for mailbox in mailboxes:
            mailbox.put(no_more_time)
        return len(mailboxes)


def drain_on_sigterm(worker: Any) -> None:
    """Keep the drain limit from the moment on that gunicorn asks ``worker``, which runs in this process, to end."""
    models = getattr(worker.app.wsgi(), "extensions", {}).get(EXTENSION)
    if models is None:
        return
    limit_s = max(0.0, min(models.config.drain_timeout_s, worker.cfg.graceful_timeout - EXIT_MARGIN_S))
    begin = os.eventfd(0, os.EFD_CLOEXEC)
    threading.Thread(target=_end_after, args=(begin, limit_s, models.drain), name="drain", daemon=True).start()
    stop_accepting = worker.handle_exit

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        os.eventfd_write(begin, 1)  # unlike starting a timer, this is safe wherever the signal comes
        stop_accepting(number, frame)

    signal.signal(signal.SIGTERM, on_sigterm)
    signal.siginterrupt(signal.SIGTERM, False)


def _end_after(begin: int, limit_s: float, drain: Drain) -> None:
    os.eventfd_read(begin)
    time.sleep(limit_s)
    if num_ended := drain.end():
        logger.warning("%d requests did not finish within %g s, and were ended", num_ended, limit_s)


def no_more_time() -> EngineDeadError:
    return EngineDeadError("the server is shutting down")
