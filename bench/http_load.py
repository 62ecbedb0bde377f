"""Many HTTP clients on one thread: requests go out, answers are timed piece by piece.

Cheap, so that on a small machine the server is measured and not its clients: one ``recv`` per event of the kernel, no
parsing beyond the status, the number of server-sent events and the end of the answer.
"""

from __future__ import annotations

import json
import random
import re
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Address = tuple[str, int]
OnEnd = Callable[["Connection"], None]
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_LENGTH = re.compile(rb"\r\nContent-Length: (\d+)\r\n", re.IGNORECASE)
_EVENT = b"data: "
_LAST_CHUNK = b"\r\n0\r\n\r\n"


@dataclass(slots=True, eq=False)
class Exchange:
    """A request and the times at which its answer came. ``status`` is 0 if there was none.

    ``gaps_s``: time between pieces of a streamed answer.
    """

    start_s: float
    status: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    num_events: int = 0
    gaps_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.start_s

    @property
    def total_s(self) -> float:
        return self.last_s - self.start_s


class Connection:
    """A client's connection; it carries one exchange after another."""

    def __init__(self, address: Address, on_end: OnEnd, *, reads: bool = True) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(30)
        if not reads:  # or the kernel would read for it
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(address)
        self.on_end = on_end
        self.reads = reads
        self.exchange: Exchange | None = None
        self._head = self._tail = b""
        self._num_missing = -1  # bytes of an answer whose length is known

    def send(self, request: bytes) -> Exchange:
        self._head, self._tail, self._num_missing = b"", b"", -1
        self.exchange = Exchange(time.monotonic())
        self.socket.sendall(request)
        return self.exchange

    def receive(self) -> bool:
        """Take what has come; whether the exchange is over."""
        exchange = self.exchange
        assert exchange is not None
        try:
            piece = self.socket.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            piece = b""
        now_s = time.monotonic()
        if exchange.num_events and piece:
            exchange.gaps_s.append(now_s - exchange.last_s)
        exchange.last_s = now_s
        if exchange.status == 0:
            self._read_head(piece)
        exchange.num_events += piece.count(_EVENT)
        if exchange.first_s == 0.0 and (exchange.num_events or self._num_missing >= 0):
            exchange.first_s = now_s
        if self._num_missing >= 0:
            self._num_missing -= len(piece)
            return self._num_missing <= 0
        self._tail = (self._tail + piece)[-len(_LAST_CHUNK) :]
        return not piece or self._tail == _LAST_CHUNK

    def _read_head(self, piece: bytes) -> None:
        assert self.exchange is not None
        self._head += piece
        head, separator, _ = self._head.partition(b"\r\n\r\n")
        if separator and (found := _STATUS.match(head)):
            self.exchange.status = int(found[1])
            if length := _LENGTH.search(head + b"\r\n"):
                self._num_missing = int(length[1]) + len(head) + len(separator) - len(self._head) + len(piece)


class Load:
    """A crowd of clients.

    Args:
        on_end: called with each connection whose exchange is over, unless it was opened with a callable of its own.
    """

    def __init__(self, address: Address, on_end: OnEnd) -> None:
        self._address = address
        self._on_end = on_end
        self._epoll = select.epoll()
        self.connections: dict[int, Connection] = {}

    def open(self, request: bytes, *, reads: bool = True, on_end: OnEnd | None = None) -> Connection:
        """A new client with its first request on the way; one that does not read leaves its answer to the kernel."""
        connection = Connection(self._address, on_end or self._on_end, reads=reads)
        self.connections[connection.socket.fileno()] = connection
        if reads:
            self._epoll.register(connection.socket, select.EPOLLIN)
        connection.send(request)
        return connection

    def close(self, connection: Connection) -> None:
        del self.connections[connection.socket.fileno()]
        connection.socket.close()

    def run_until(self, end_s: float) -> None:
        """Take in answers until then (monotonic time), or until no client is left."""
        while self.connections and (left_s := end_s - time.monotonic()) > 0:
            for descriptor, _ in self._epoll.poll(left_s):
                connection = self.connections.get(descriptor)
                if connection is not None and connection.receive():
                    connection.on_end(connection)

    def close_all(self) -> None:
        for connection in list(self.connections.values()):
            self.close(connection)


def post(path: str, body: dict[str, Any]) -> bytes:
    """The bytes of a request."""
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
    return head.encode() + b"\r\n\r\n" + payload


def closed_loop(address: Address, requests: Iterator[bytes], num_clients: int, duration_s: float) -> list[Exchange]:
    """The exchanges that end within ``duration_s``, of clients that send one request after another."""
    done: list[Exchange] = []

    def again(connection: Connection) -> None:
        assert connection.exchange is not None
        done.append(connection.exchange)
        if connection.exchange.status:
            connection.send(next(requests))
        else:  # closed without an answer
            load.close(connection)
            load.open(next(requests))

    load = Load(address, again)
    for _ in range(num_clients):
        load.open(next(requests))
    load.run_until(time.monotonic() + duration_s)
    load.close_all()
    return done


def open_loop(
    address: Address, requests: Iterator[bytes], per_s: float, duration_s: float, seed: int = 0
) -> list[Exchange]:
    """The exchanges of requests that arrive at random, ``per_s`` on average, whatever becomes of those before."""
    done: list[Exchange] = []

    def keep(connection: Connection) -> None:
        assert connection.exchange is not None
        done.append(connection.exchange)
        load.close(connection)

    load, rng = Load(address, keep), random.Random(seed)
    start_s = next_s = time.monotonic()
    while next_s < start_s + duration_s:
        load.open(next(requests))
        next_s += rng.expovariate(per_s)
        load.run_until(next_s)
        time.sleep(max(0.0, next_s - time.monotonic()))
    load.run_until(time.monotonic() + 60)
    load.close_all()
    return done


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie; NaN if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
