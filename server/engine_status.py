"""Beside the engine's loop: a thread that says how the engine is doing, and ends it when its owner has gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from .wire import STATUS_SOCKET, EngineStatus, address, encode

ORPHAN_GRACE_S = 3.0


class StatusThread(threading.Thread):
    """Answers every Ping with ``report()``; watches the owner's pidfd.

    When the owner process is gone, this process gets SIGQUIT, which ends it at once; if it hangs in some library call,
    it is ended the hard way ``ORPHAN_GRACE_S`` later.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        folder: Path,
        owner: int,
        report: Callable[[], EngineStatus],
    ) -> None:
        super().__init__(name="engine-status", daemon=True)
        self._context = context
        self._folder = folder
        self._owner = owner
        self._report = report

    def run(self) -> None:
        with self._context.socket(zmq.ROUTER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(address(self._folder, STATUS_SOCKET))
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(self._owner, zmq.POLLIN)
            try:
                while True:
                    ready = dict(poller.poll())
                    if self._owner in ready:
                        break
                    worker, *_ = socket.recv_multipart()
                    socket.send_multipart((worker, encode(self._report())))
            except zmq.ContextTerminated:
                return
        os.kill(os.getpid(), signal.SIGQUIT)
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)
