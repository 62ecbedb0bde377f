"""A worker's line to the supervisor: the roster as it is now, and commands about it."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from cupy_engine.errors import EngineDeadError

from . import wire
from .deployment import (
    Deployment,
    LoadRequest,
    Roster,
    RosterRequest,
    SupervisorCommand,
    UnloadRequest,
    reply_decoder,
)
from .supervisor_socket import CONTROL_SOCKET

logger = logging.getLogger(__name__)

ASK_INTERVAL_S = 0.25
SILENCE_LIMIT_S = 2.0
RESTART_INTERVAL_S = 2.0
MAX_UNSENT = 8


class RosterClient:
    """Knows the roster. Made before a fork if need be: it connects at first use.

    Args:
        folder: the supervisor's.
        restart: starts a supervisor if there is none; called, on the I/O thread, when this one does not answer.

    ``on_change``: callables that get each new roster, on the I/O thread.
    """

    def __init__(self, folder: Path, restart: Callable[[], object]) -> None:
        self._folder = folder
        self._restart = restart
        self._lock = threading.Lock()
        self._pid: int | None = None
        self.on_change: list[Callable[[Roster], None]] = []

    def connect(self) -> None:
        """Start the I/O thread, if this process has not yet."""
        with self._lock:
            if self._pid == os.getpid():
                return
            self._tokens = itertools.count(1)
            self._outbox: collections.deque[SupervisorCommand] = collections.deque()
            self._waiting: dict[int, queue.SimpleQueue[str | None]] = {}
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._is_closing = False
            self._roster: Roster | None = None
            self._heard_s = time.monotonic()
            self._news = threading.Condition()
            self._thread = threading.Thread(target=self._run, name="roster", daemon=True)
            self._pid = os.getpid()
            self._thread.start()

    def close(self) -> None:
        if self._pid == os.getpid():
            self._is_closing = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.close(self._wake)
            self._pid = None

    # For request threads

    @property
    def roster(self) -> Roster | None:
        """The latest; ``None`` until the supervisor has answered."""
        self.connect()
        return self._roster

    def refresh(self, timeout_s: float = 1.0) -> Roster | None:
        """The roster as it is now, not as it was a moment ago."""
        self.connect()
        with self._news:
            self._send(RosterRequest())
            self._news.wait(timeout_s)
        return self._roster

    def load(self, deployment: Deployment, timeout_s: float) -> str | None:
        """Have a deployment served; returns when it is, or why it is not."""
        return self._carry_out(LoadRequest(self._new_token(), deployment), timeout_s)

    def unload(self, deployment_id: str, timeout_s: float) -> str | None:
        """Have it served no more; returns when its engines have ended, or why they do not."""
        return self._carry_out(UnloadRequest(self._new_token(), deployment_id), timeout_s)

    def _new_token(self) -> int:
        self.connect()
        return next(self._tokens)

    def _carry_out(self, command: LoadRequest | UnloadRequest, timeout_s: float) -> str | None:
        box = self._waiting[command.token] = queue.SimpleQueue()
        try:
            self._send(command)
            return box.get(timeout=timeout_s)
        except queue.Empty:
            raise EngineDeadError(f"this was not done within {timeout_s:g} s; it goes on") from None
        finally:
            self._waiting.pop(command.token, None)

    def _send(self, command: SupervisorCommand) -> None:
        self._outbox.append(command)
        os.eventfd_write(self._wake, 1)

    # The I/O thread

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, MAX_UNSENT)
            socket.setsockopt(zmq.RECONNECT_IVL, 20)
            socket.connect(wire.address(self._folder, CONTROL_SOCKET))
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(self._wake, zmq.POLLIN)
            next_ask_s = next_restart_s = 0.0
            while not self._is_closing:
                now_s = time.monotonic()
                if now_s >= next_ask_s:
                    if not self._outbox:
                        self._outbox.append(RosterRequest())
                    next_ask_s = now_s + ASK_INTERVAL_S
                if now_s - self._heard_s > SILENCE_LIMIT_S and now_s >= next_restart_s:
                    next_restart_s = now_s + RESTART_INTERVAL_S
                    self._revive()
                with contextlib.suppress(zmq.Again):
                    while self._outbox:
                        socket.send(wire.encode(self._outbox[0]), zmq.DONTWAIT)
                        self._outbox.popleft()
                ready = dict(poller.poll(int(ASK_INTERVAL_S * 1000)))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                self._read(socket)

    def _read(self, socket: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                reply = reply_decoder.decode(socket.recv(zmq.DONTWAIT))
                self._heard_s = time.monotonic()
                if isinstance(reply, Roster):
                    self._on_roster(reply)
                elif box := self._waiting.get(reply.token):
                    box.put(reply.error)

    def _on_roster(self, roster: Roster) -> None:
        if roster != self._roster:
            if self._roster is not None and roster.supervisor != self._roster.supervisor:
                self._give_up_commands()
            self._roster = roster
            for call in self.on_change:
                call(roster)
        with self._news:
            self._news.notify_all()

    def _give_up_commands(self) -> None:
        """A new supervisor knows nothing of what its predecessor was told."""
        for box in list(self._waiting.values()):
            box.put("the supervisor was started again meanwhile, and what is served may be as before: try again")

    def _revive(self) -> None:
        try:
            self._restart()
        except EngineDeadError:  # the server has ended, and this process will, too
            self._is_closing = True
        except Exception:
            logger.exception("the supervisor does not answer, and cannot be started")
