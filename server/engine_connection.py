"""The I/O thread of an EngineClient: owns its sockets, keeps the engine's pulse."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from cupy_engine.messages import Command, Reply

from . import wire
from .wire import EngineStatus

logger = logging.getLogger(__name__)

PING_INTERVAL_S = 0.1
SILENCE_LIMIT_S = 10.0
EAGER_PING_INTERVAL_S = 0.05  # until it is ready


class Listener(Protocol):
    """Who is told, on the I/O thread."""

    def on_replies(self, replies: list[Reply]) -> None: ...
    def on_status(self, status: EngineStatus) -> None: ...
    def on_lost(self, state: Literal["dead", "unresponsive"]) -> None: ...


class EngineConnection(threading.Thread):
    """Carries commands and replies, and asks the engine how it is every ``PING_INTERVAL_S``.

    ``status``: its latest answer, which came at ``heard_s`` (monotonic). ``is_lost``: its end of the socket has closed,
    which the kernel does when a process ends, however it ends. ``is_silent``: no answer for ``SILENCE_LIMIT_S``: it is
    stopped, or the machine is.
    """

    def __init__(self, folder: Path, client_id: int, listener: Listener) -> None:
        super().__init__(name="engine-client", daemon=True)
        self._folder = folder
        self._identity = wire.identity(client_id)
        self._listener = listener
        self._outbox: collections.deque[bytes] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_closing = False
        self.heard_s = 0.0
        self._news = threading.Condition()
        self.status: EngineStatus | None = None
        self.is_lost = False

    @property
    def is_silent(self) -> bool:
        return self.status is not None and time.monotonic() - self.heard_s > SILENCE_LIMIT_S

    def await_news(self, timeout_s: float) -> None:
        """Wait for the engine's next answer."""
        with self._news:
            self._news.wait(timeout_s)

    def send(self, commands: Sequence[Command]) -> None:
        """Queue commands for the engine; any thread may call this."""
        self._outbox.extend(map(wire.encode, commands))
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        self._is_closing = True
        os.eventfd_write(self._wake, 1)
        self.join()
        os.close(self._wake)

    def run(self) -> None:
        try:
            self._run()
        except Exception:
            logger.exception("the connection to the engine broke")
            self.is_lost = True
            self._listener.on_lost("dead")

    def _run(self) -> None:
        with zmq.Context() as context, contextlib.ExitStack() as sockets:
            self._engine = sockets.enter_context(self._connect(context, wire.ENGINE_SOCKET, max_unsent=0))
            self._pulse = sockets.enter_context(self._connect(context, wire.STATUS_SOCKET, max_unsent=4))
            events = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED
            self._monitor = sockets.enter_context(self._pulse.get_monitor_socket(events))
            sockets.callback(self._pulse.disable_monitor)
            poller = zmq.Poller()
            for source in (self._wake, self._engine, self._pulse, self._monitor):
                poller.register(source, zmq.POLLIN)
            next_ping_s = 0.0
            while not self._is_closing:
                is_ready = self.status is not None and self.status.state == "ready"
                interval_s = PING_INTERVAL_S if is_ready else EAGER_PING_INTERVAL_S
                if time.monotonic() >= next_ping_s:
                    self._ping()
                    next_ping_s = time.monotonic() + interval_s
                ready = dict(poller.poll(int(interval_s * 1000)))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                self._flush()
                if self._engine in ready:
                    self._read_replies()
                if self._pulse in ready:
                    self._read_status()
                if self._monitor in ready:
                    self._read_monitor()

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]], name: str, max_unsent: int) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._identity)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, max_unsent)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.connect(wire.address(self._folder, name))
        return socket

    def _flush(self) -> None:
        while self._outbox:
            self._engine.send(self._outbox.popleft())

    def _read_replies(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._listener.on_replies(wire.replies_decoder.decode(self._engine.recv(zmq.DONTWAIT)))

    def _ping(self) -> None:
        if self.is_silent:
            self._listener.on_lost("unresponsive")
        with contextlib.suppress(zmq.Again):
            self._pulse.send(wire.encode(wire.Ping()), zmq.DONTWAIT)

    def _read_status(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self.status = wire.status_decoder.decode(self._pulse.recv(zmq.DONTWAIT))
                self.heard_s = time.monotonic()
        if self.status is not None:
            self._listener.on_status(self.status)
            with self._news:
                self._news.notify_all()

    def _read_monitor(self) -> None:
        event = recv_monitor_message(self._monitor)["event"]
        if event == zmq.EVENT_DISCONNECTED:
            is_expected = self.status is not None and self.status.state == "stopping"
            logger.log(logging.INFO if is_expected else logging.ERROR, "the engine process has ended")
            self.is_lost = True
            self.status = None
            self._listener.on_lost("dead")
        elif event == zmq.EVENT_CONNECTED:
            self.is_lost = False
