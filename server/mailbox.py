"""Where the engine's replies for one HTTP request arrive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from cupy_engine.messages import SequenceOutput

# Makes the exception where it is raised. As mail it would be held by frames of its own traceback, and with them all of
# its request would wait for the garbage collector.
Failure = Callable[[], Exception]
Mail = list[SequenceOutput] | Failure


class Mailbox:
    """Filled by the I/O thread; emptied by a request thread, or by a receiver that takes over from it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived: queue.SimpleQueue[Mail] = queue.SimpleQueue()
        self._held: list[SequenceOutput] | None = None
        self._receiver: Callable[[Mail], None] | None = None

    def put(self, mail: Mail) -> None:
        with self._lock:
            if self._receiver is not None:
                self._receiver(mail)
            elif self._held is None:
                self._arrived.put(mail)
            elif callable(mail):
                self._arrived.put(self._held)
                self._arrived.put(mail)
                self._held = []
            else:
                self._held += mail
                if any(map(_is_a_turn, mail)):
                    self._arrived.put(self._held)
                    self._held = []

    def get(self, timeout_s: float) -> Mail:
        """The next mail. Raises queue.Empty when there is none for ``timeout_s``."""
        return self._arrived.get(timeout=timeout_s)

    def get_nowait(self) -> Mail:
        """The next mail. Raises queue.Empty if there is none."""
        return self._arrived.get_nowait()

    def hold_back(self) -> None:
        """From now on wake the reader only for a request's first token, to note the time, and when a sequence ends."""
        with self._lock:
            self._held = []

    def redirect(self, receiver: Callable[[Mail], None]) -> None:
        """Hand what has come, and all that will, to ``receiver``: a quick function, called on the I/O thread."""
        with self._lock:
            if self.is_closed:
                return
            while not self._arrived.empty():
                receiver(self._arrived.get_nowait())
            self._receiver = receiver

    def close(self) -> None:
        """Drop what still comes."""
        with self._lock:
            self._receiver = _drop

    @property
    def is_closed(self) -> bool:
        return self._receiver is _drop


def _drop(_mail: Mail) -> None:
    pass


def _is_a_turn(output: SequenceOutput) -> bool:
    """A request's first output, which brings what is known of its prompt, or a sequence's last."""
    return output.finish_reason is not None or output.scheduled_time_s is not None
