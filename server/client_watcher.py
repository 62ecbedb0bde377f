"""Who hangs up: one thread that learns from the kernel when a client closes its connection."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable

GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class ClientWatcher:
    """Calls back once, on its own thread, when a watched connection's peer has closed it.

    Nothing is read from the connections, so a pipelined next request or TLS stays intact.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid: int | None = None

    def watch(self, connection: socket.socket, on_gone: Callable[[], None]) -> None:
        self._start()
        self._callbacks[connection.fileno()] = on_gone
        try:
            self._epoll.register(connection.fileno(), GONE | select.EPOLLONESHOT)
        except (OSError, ValueError):  # it has been closed already
            on_gone()

    def forget(self, connection: socket.socket) -> None:
        """Stop watching; must come before the connection is closed. Harmless if it is not watched."""
        descriptor = connection.fileno()
        if self._pid == os.getpid() and self._callbacks.pop(descriptor, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(descriptor)

    def _start(self) -> None:
        with self._lock:
            if self._pid == os.getpid():
                return
            self._callbacks: dict[int, Callable[[], None]] = {}
            self._epoll = select.epoll()
            threading.Thread(target=self._run, args=(self._epoll,), name="client-watcher", daemon=True).start()
            self._pid = os.getpid()

    def _run(self, epoll: select.epoll) -> None:
        while True:
            for descriptor, _ in epoll.poll():
                on_gone = self._callbacks.get(descriptor)
                if on_gone is not None and _has_gone(descriptor):
                    on_gone()


def _has_gone(descriptor: int) -> bool:
    """Asked once more, since an event may be about a connection whose descriptor has a new owner by now."""
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    return bool(poll.poll(0))


def wait_writable(connection: socket.socket, timeout_s: float) -> bool:
    """Whether the connection takes more bytes within ``timeout_s``; ``False`` also if it has broken."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLOUT)
    return any(event & select.POLLOUT for _, event in poll.poll(timeout_s * 1000))
