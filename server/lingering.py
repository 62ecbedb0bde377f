"""Connections on which the last word is said: half closed, until their clients have read it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable

LINGER_S = 2.0
_PIECE_BYTES = 1 << 16


class LingeringConnections:
    """Closes connections when their clients have closed their ends, or have had time to.

    Closed at once, a connection is reset if its client has sent more than was read, and the client may lose the end of
    its answer (RFC 9112, section 9.6). Nobody waits here: gunicorn would wait for each client on its main thread, and
    one that keeps its end open would hold up all others.

    Args:
        poller: calls what is registered with it, with the connection.
        on_close: called for each connection that has been closed.
    """

    def __init__(self, poller: selectors.BaseSelector, on_close: Callable[[], None]) -> None:
        self._poller = poller
        self._on_close = on_close
        self._deadlines_s: dict[socket.socket, float] = {}  # the earliest first
        self._buffer = bytearray(_PIECE_BYTES)

    def add(self, connection: socket.socket) -> None:
        try:
            connection.shutdown(socket.SHUT_WR)
            connection.setblocking(False)
            self._poller.register(connection, selectors.EVENT_READ, self._drop)
        except (OSError, ValueError):  # it is broken or closed already
            self._close(connection)
            return
        self._deadlines_s[connection] = time.monotonic() + LINGER_S
        self._drop(connection)

    def close_late(self) -> None:
        """Close those whose clients have had their time."""
        now_s = time.monotonic()
        for connection in [each for each, deadline_s in self._deadlines_s.items() if deadline_s <= now_s]:
            self._forget(connection)

    def _drop(self, connection: socket.socket) -> None:
        """Read what comes, for nobody, until the client closes its end."""
        try:
            is_over = not connection.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            is_over = True
        if is_over:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        del self._deadlines_s[connection]
        self._poller.unregister(connection)
        self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.close()
        self._on_close()
