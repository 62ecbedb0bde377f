"""The I/O thread of an EngineClient: owns its sockets, keeps the engine's pulse."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from cupy_engine.messages import Command

from . import wire
from .wire import Delivery, EngineStatus

logger = logging.getLogger(__name__)

PING_INTERVAL_S = 0.1
SILENCE_LIMIT_S = 10.0
EAGER_PING_INTERVAL_S = 0.05  # until it is ready


class Listener(Protocol):
    """Who is told, on the I/O thread."""

    def on_delivery(self, delivery: Delivery) -> None: ...
    def on_status(self, status: EngineStatus) -> None: ...
    def on_lost(self) -> None: ...


class EngineConnection(threading.Thread):
    """Carries commands and replies, and asks the engine how it is every ``PING_INTERVAL_S``.

    ``life``: counts the engine processes that have ended. A command is for one life; the next engine never gets it.
    ``status``: its latest answer, which came at ``heard_s`` (monotonic). ``is_lost``: its end of the socket has closed,
    which the kernel does when a process ends, however it ends. ``is_silent``: no answer for ``SILENCE_LIMIT_S``, or for
    ``stall_timeout_s`` if that is less: it is stopped, or the machine is.
    """

    def __init__(
        self, folder: Path, client_id: int, listener: Listener, *, stall_timeout_s: float = SILENCE_LIMIT_S
    ) -> None:
        super().__init__(name="engine-client", daemon=True)
        self._folder = folder
        self._identity = wire.identity(client_id).encode()
        self._listener = listener
        self._max_silence_s = min(SILENCE_LIMIT_S, stall_timeout_s)
        self._outbox: collections.deque[tuple[int, bytes]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._wake).atexit = False
        self._is_closing = False
        self._is_retiring = False
        self.heard_s = 0.0
        self._news = threading.Condition()
        self.status: EngineStatus | None = None
        self.is_lost = False
        self.life = 0

    @property
    def is_silent(self) -> bool:
        return self.status is not None and time.monotonic() - self.heard_s > self._max_silence_s

    def await_news(self, timeout_s: float) -> None:
        """Wait for the engine's next answer."""
        with self._news:
            self._news.wait(timeout_s)

    def send(self, commands: Sequence[Command], life: int) -> None:
        """Queue commands for the engine if this is its ``life`` still; any thread may call this."""
        self._outbox.extend((life, wire.encode(command)) for command in commands)
        os.eventfd_write(self._wake, 1)

    def note_end(self) -> None:
        """The engine has said that it ends: send it nothing more."""
        if self.status is not None:
            self.status = msgspec.structs.replace(self.status, state="stopping")

    def retire(self) -> None:
        """End when the engine does."""
        self._is_retiring = True

    def close(self) -> None:
        self._is_closing = True
        os.eventfd_write(self._wake, 1)
        self.join()

    def run(self) -> None:
        try:
            self._run()
        except Exception:
            logger.exception("the connection to the engine broke")
            self._lose()

    def _run(self) -> None:
        with zmq.Context() as context, contextlib.ExitStack() as sockets:
            self._engine = self._connect(context, wire.ENGINE_SOCKET, max_unsent=0)
            sockets.callback(lambda: self._engine.close())
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
                if self._monitor in ready and self._has_ended():
                    self._read_replies()  # what it had said before
                    self._lose()
                    if self._is_retiring:
                        break
                    poller.unregister(self._engine)
                    self._engine.close()  # what was not sent would wait in it for the next engine
                    self._engine = self._connect(context, wire.ENGINE_SOCKET, max_unsent=0)
                    poller.register(self._engine, zmq.POLLIN)

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
            life, payload = self._outbox.popleft()
            if life == self.life:
                self._engine.send(payload)

    def _read_replies(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._listener.on_delivery(wire.delivery_decoder.decode(self._engine.recv(zmq.DONTWAIT)))

    def _ping(self) -> None:
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

    def _has_ended(self) -> bool:
        """Whether the monitor says that the engine process has gone."""
        event = recv_monitor_message(self._monitor)["event"]
        self.is_lost = event == zmq.EVENT_DISCONNECTED
        return self.is_lost

    def _lose(self) -> None:
        self.is_lost = True
        self.status = None
        self.life += 1
        self._listener.on_lost()
