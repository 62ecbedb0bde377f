"""Many HTTP clients on one thread: requests go out, answers are read as they come and timed event by event.

Cheap, so that on a small machine the server is measured and not its clients: raw sockets, one ``recv`` per event of the
kernel, and of what comes nothing is read but its frames.

A connection that closes before an answer began has taken a request with it. On a new connection that is the server's
fault. On one that was used before, the server may have closed it for having been idle while the request was on its way
(RFC 9112, section 9.6); who sends one request right after another should never see that.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .http_stream import StreamReader

Address = tuple[str, int]
OnEnd = Callable[["Connection"], None]
_TIMEOUT_S = 30.0
_RECEIVE_BYTES = 1 << 16
_DONE = b"[DONE]"


@dataclass(slots=True, eq=False)
class Exchange:
    """A request and what came of it. Times are monotonic.

    ``start_s``: when the request was due. ``is_first``: on its connection. ``status``: 0 if no answer began.
    ``event_times_s``: when each event came, but for the mark of the end. ``last_event``: its data. ``text``: of an
    answer that is no stream. ``is_whole``: it came to its end.
    """

    start_s: float
    is_first: bool = True
    status: int = 0
    event_times_s: list[float] = field(default_factory=list)
    last_event: bytes = b""
    text: str = ""
    end_s: float = 0.0
    is_whole: bool = False
    error: str | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the connection closed without an answer."""
        return self.status == 0

    @property
    def ttft_s(self) -> float:
        return (self.event_times_s[0] if self.event_times_s else self.end_s) - self.start_s

    @property
    def tpot_s(self) -> float:
        """Time per event after the first."""
        times_s = self.event_times_s
        return (times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else 0.0

    @property
    def total_s(self) -> float:
        return self.end_s - self.start_s

    def gaps_s(self) -> list[float]:
        """Times between events; those that came in one piece count as one."""
        times_s = list(dict.fromkeys(self.event_times_s))
        return [later - earlier for earlier, later in pairwise(times_s)]

    def finish(self, now_s: float, reader: StreamReader) -> None:
        """Take down how it ended."""
        self.end_s, self.is_whole, self.text = now_s, reader.is_done, reader.text
        if self.error is not None:
            return
        if self.is_lost:
            self.error = "the connection was closed without an answer"
        elif self.status != 200:
            self.error = f"status {self.status}: {self.text[:300]}"
        elif not self.is_whole:
            self.error = "the connection ended before the answer"


class Connection:
    """A client's connection; it carries one exchange after another, the first at once.

    Args:
        start_s: when the first request was due, if not now.
        reads: or the answer is left to the kernel.
    """

    def __init__(
        self, address: Address, request: bytes, on_end: OnEnd, *, start_s: float | None = None, reads: bool = True
    ) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not reads:  # or the kernel would read for it
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            self.socket.connect(address)
        except OSError:
            self.socket.close()
            raise
        self.descriptor = self.socket.fileno()
        self.on_end = on_end
        self.reads = reads
        self.is_busy = False
        self._readable = select.poll()
        self._readable.register(self.descriptor, select.POLLIN)
        self._send(request, Exchange(time.monotonic() if start_s is None else start_s))

    @property
    def can_go_on(self) -> bool:
        """Whether it takes another request: the answer is over, and the server has not closed the connection."""
        return self._reader.is_done and self._reader.keeps_alive and not self._readable.poll(0)

    def send(self, request: bytes, start_s: float | None = None) -> Exchange:
        """Begin another exchange."""
        return self._send(request, Exchange(time.monotonic() if start_s is None else start_s, is_first=False))

    def receive(self, now_s: float) -> bool:
        """Take what has come; whether the exchange is over."""
        exchange, reader = self.exchange, self._reader
        try:
            data = self.socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        try:
            events = reader.feed(data)
        except ValueError as error:
            exchange.error, events, data = str(error), [], b""
        exchange.status = reader.status
        for event in events:
            if event != _DONE:
                exchange.event_times_s.append(now_s)
                exchange.last_event = event
        if data and not reader.is_done:
            return False
        self.is_busy = False
        exchange.finish(now_s, reader)
        return True

    def _send(self, request: bytes, exchange: Exchange) -> Exchange:
        self.exchange, self._reader, self.is_busy = exchange, StreamReader(), True
        with contextlib.suppress(OSError):  # then there is no answer, which will show
            self.socket.sendall(request)
        return exchange


class Crowd:
    """All clients of one server.

    Args:
        on_end: called with each connection whose exchange is over, unless it was opened with a callable of its own.
    """

    def __init__(self, address: Address, on_end: OnEnd) -> None:
        self._address = address
        self._on_end = on_end
        self._epoll = select.epoll()
        self.connections: dict[int, Connection] = {}

    def open(
        self, request: bytes, *, start_s: float | None = None, reads: bool = True, on_end: OnEnd | None = None
    ) -> Connection:
        """A new client with its first request on the way. Raises OSError if it cannot connect."""
        connection = Connection(self._address, request, on_end or self._on_end, start_s=start_s, reads=reads)
        self.connections[connection.descriptor] = connection
        if reads:
            self._epoll.register(connection.descriptor, select.EPOLLIN)
        return connection

    def is_open(self, connection: Connection) -> bool:
        return self.connections.get(connection.descriptor) is connection

    def close(self, connection: Connection) -> None:
        del self.connections[connection.descriptor]
        connection.socket.close()

    def poll(self, timeout_s: float) -> None:
        """Wait for something to come, and take it in."""
        events = self._epoll.poll(timeout_s)
        now_s = time.monotonic()
        for descriptor, _ in events:
            connection = self.connections.get(descriptor)
            if connection is None:
                continue
            if not connection.is_busy:  # closed by the server, while idle
                self.close(connection)
            elif connection.receive(now_s):
                connection.on_end(connection)

    def run_until(self, end_s: float) -> None:
        """Take in answers until then (monotonic time), or until no client is left."""
        while self.connections and (left_s := end_s - time.monotonic()) > 0:
            self.poll(left_s)

    def close_all(self) -> None:
        for connection in list(self.connections.values()):
            self.close(connection)
        self._epoll.close()


def post(path: str, body: dict[str, Any], api_key: str | None = None) -> bytes:
    """The bytes of a request."""
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
    if api_key is not None:
        head += f"\r\nAuthorization: Bearer {api_key}"
    return head.encode() + b"\r\n\r\n" + payload
