"""How an engine process is doing, as its supervisor finds out: by asking, and by how long no answer comes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import zmq

from . import wire
from .wire import EngineStatus

BEAT_INTERVAL_S = 0.25
MAX_COUNTED_S = 2 * BEAT_INTERVAL_S
MAX_SILENCE_S = 10.0


class Pulse:
    """Asks one engine process for its status at every beat.

    ``silent_s``: time without an answer. It is counted beat by beat, so that a supervisor that did not run for a while
    itself (the machine slept, or was overloaded) blames nobody for it.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"supervisor-%d" % os.getpid())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 4)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(wire.address(folder, wire.STATUS_SOCKET))
        self.status: EngineStatus | None = None
        self.silent_s = 0.0

    def beat(self, elapsed_s: float) -> None:
        """Take in what has been answered, and ask again. ``elapsed_s``: since the last beat."""
        self.silent_s += min(elapsed_s, MAX_COUNTED_S)
        with contextlib.suppress(zmq.Again):
            while True:
                self.status = wire.status_decoder.decode(self._socket.recv(zmq.DONTWAIT))
                self.silent_s = 0.0
        with contextlib.suppress(zmq.Again):
            self._socket.send(wire.encode(wire.Ping()), zmq.DONTWAIT)

    def close(self) -> None:
        self._socket.close()
