"""Requests that are on their way: they take a thread when they have come whole.

Else as many clients as there are threads could stop a worker, each by sending half a request and nothing more.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from .request_framing import RequestFraming

ARRIVED = "cupy_engine.arrived_s"  # in a WSGI environment: when the request had come whole (monotonic)
PATIENCE_S = 60.0
CROWDED_PATIENCE_S = 5.0  # while others cannot connect
MAX_WAITING_BYTES = 256 << 20  # of a worker's requests together, and at least of a few of the longest
_PIECE_BYTES = 1 << 16
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Arrival:
    """What has come over a connection: a source for gunicorn's parser, at which it never waits.

    ``ran_dry``: the parser wanted more. Where the next request would begin is unknown then. ``whole_s``: when the
    request was found to have come whole.
    """

    def __init__(self, data: bytearray, framing: RequestFraming) -> None:
        self.data = data
        self.since_s = time.monotonic()
        self.is_over = False  # the client sends nothing more
        self.ran_dry = False
        self.whole_s = 0.0
        self._framing = framing

    def add(self, piece: bytes | memoryview) -> None:
        self.data += piece
        self.is_over = not piece

    @property
    def is_whole(self) -> bool:
        return self.is_over or self._framing.is_whole(self.data)

    def take_expectation(self) -> bool:
        """Whether the client must be told, now, to go on."""
        expected, self._framing.expects_continue = self._framing.expects_continue, False
        return expected

    def recv(self, num_bytes: int) -> bytes:
        piece = bytes(self.data[:num_bytes])
        del self.data[:num_bytes]
        self.ran_dry = self.ran_dry or not piece
        return piece


class Arrivals:
    """All of a worker's connections whose next request has not come whole yet.

    Together they take ``MAX_WAITING_BYTES`` at most: beyond, those that take most are given up.

    Args:
        poller: calls what is registered with it, with the connection's socket.
        max_body_bytes: longer bodies are not waited for.
        dispatch: called with a connection of gunicorn's whose request has come.
        part: called with the socket of one whose client has gone or is too slow.
    """

    def __init__(
        self,
        poller: selectors.BaseSelector,
        max_body_bytes: int,
        dispatch: Callable[[Any], None],
        part: Callable[[socket.socket], None],
    ) -> None:
        self._poller = poller
        self._max_body_bytes = max_body_bytes
        self._dispatch = dispatch
        self._part = part
        self._waiting: dict[Any, Arrival] = {}  # the oldest first
        self._num_bytes = 0  # of all that wait
        self._max_bytes = max(MAX_WAITING_BYTES, 4 * max_body_bytes)
        # recv() would cut each piece from a block of this size, and what is left of that is too small for the next one
        self._buffer = memoryview(bytearray(_PIECE_BYTES))

    def add(self, conn: Any) -> None:
        """Look for the next request of a connection here and now, and when more comes."""
        before = arrival_of(conn)
        data = bytearray(conn.parser.unreader.take_buffered() if conn.parser else b"")
        arrival = Arrival(data + before.data if before else data, RequestFraming(self._max_body_bytes))
        conn.sock.setblocking(False)
        if self._is_settled(conn, arrival):
            self._settle(conn, arrival)
        else:
            self._waiting[conn] = arrival
            self._num_bytes += len(arrival.data)
            self._poller.register(conn.sock, selectors.EVENT_READ, lambda _: self._on_readable(conn))

    def close_late(self, patience_s: float) -> None:
        """Give up on those whose clients have had their time."""
        while self._waiting:
            conn, arrival = next(iter(self._waiting.items()))
            if arrival.since_s + patience_s > time.monotonic():
                return
            self._give_up(conn, arrival)

    def _on_readable(self, conn: Any) -> None:
        arrival = self._waiting.get(conn)
        if arrival is None:  # given up in the same turn of the loop
            return
        num_before = len(arrival.data)
        is_settled = self._is_settled(conn, arrival)
        self._num_bytes += len(arrival.data) - num_before
        if is_settled:
            self._forget(conn)
            self._settle(conn, arrival)
        while self._num_bytes > self._max_bytes:
            self._give_up(*max(self._waiting.items(), key=lambda each: len(each[1].data)))

    def _give_up(self, conn: Any, arrival: Arrival) -> None:
        self._forget(conn)
        if arrival.data:
            _say(conn.sock, _TOO_LATE)
        self._part(conn.sock)

    def _is_settled(self, conn: Any, arrival: Arrival) -> bool:
        """Read what has come; whether that is a request, or the end."""
        if arrival.data and arrival.is_whole:
            return True
        try:
            arrival.add(self._buffer[: conn.sock.recv_into(self._buffer)])
        except BlockingIOError:
            return False
        except OSError:
            arrival.add(b"")
        is_whole = arrival.is_whole
        if not is_whole and arrival.take_expectation():
            _say(conn.sock, _CONTINUE)
        return is_whole

    def _settle(self, conn: Any, arrival: Arrival) -> None:
        if not arrival.data:
            self._part(conn.sock)
            return
        arrival.whole_s = time.monotonic()
        conn.data_ready = True
        conn.init()
        conn.sock.setblocking(True)
        conn.parser.unreader.sock = arrival
        self._dispatch(conn)

    def _forget(self, conn: Any) -> None:
        self._num_bytes -= len(self._waiting.pop(conn).data)
        self._poller.unregister(conn.sock)


def _say(connection: socket.socket, words: bytes) -> None:
    """To a client that listens; others miss nothing."""
    with contextlib.suppress(OSError):
        connection.send(words)


def arrival_of(conn: Any) -> Arrival | None:
    """Where the parser of a connection reads."""
    source = conn.parser.unreader.sock if conn.parser else None
    return source if isinstance(source, Arrival) else None
