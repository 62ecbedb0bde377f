"""Requests take a thread when they have come whole: half ones hold up nobody, and what is whole is seen at once."""

from __future__ import annotations

import selectors
import socket
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from cupy_engine.server.arrivals import Arrivals, arrival_of
from cupy_engine.server.request_framing import MAX_HEAD_BYTES, RequestFraming
from gunicorn.config import Config
from gunicorn.workers.gthread import TConn
from hypothesis import given
from hypothesis import strategies as st
from live_server import TINY, LiveServer

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKS = b"5;name=value\r\n0\r\n\r\n\r\nA\r\n0123456789\r\n"
WHOLE = {
    "no body": GET,
    "a body": HEAD + b"content-LENGTH:  5 \r\n\r\nabcde",
    "an empty body": HEAD + b"Content-Length: 0\r\n\r\n",
    "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS + b"0\r\n\r\n",
    "chunks and a trailer": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS + b"00\r\nX: y\r\n\r\n",
}
REFUSED = {  # by the parser, so nothing more is waited for
    "no number": HEAD + b"Content-Length: -5\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "more than is taken": HEAD + b"Content-Length: 1001\r\n\r\n",
    "another coding": HEAD + b"Transfer-Encoding: nonsense\r\n\r\n",
    "no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n",
    "a size without an end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 20_000,
    "too many chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 340,
    "a trailer without an end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"x" * (MAX_HEAD_BYTES + 1),
    "a head without an end": b"x" * (MAX_HEAD_BYTES + 1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_request_is_whole_with_its_last_byte(name: str) -> None:
    framing, request = RequestFraming(1000), WHOLE[name]
    wholes = [framing.is_whole(bytearray(request[:length])) for length in range(len(request) + 1)]
    assert wholes == [False] * len(request) + [True]


@pytest.mark.parametrize("name", WHOLE)
@given(st.data())
def test_in_whatever_pieces_it_comes(name: str, data: st.DataObject) -> None:
    request = WHOLE[name]
    ends = data.draw(st.lists(st.integers(0, len(request) - 1), max_size=5).map(sorted))
    framing = RequestFraming(1000)
    assert not any(framing.is_whole(bytearray(request[:end])) for end in ends)
    assert framing.is_whole(bytearray(request + data.draw(st.binary(max_size=9))))


@pytest.mark.parametrize("name", REFUSED)
def test_what_will_be_refused_is_not_waited_for(name: str) -> None:
    assert RequestFraming(1000).is_whole(bytearray(REFUSED[name]))


class Door:
    """Arrivals over socket pairs."""

    def __init__(self) -> None:
        self.poller = selectors.DefaultSelector()
        self.dispatched: list[TConn] = []
        self.parted: list[socket.socket] = []
        self.arrivals = Arrivals(self.poller, 1000, self.dispatched.append, self.parted.append)
        self._open: list[socket.socket] = []

    def connect(self, first: bytes = b"") -> tuple[TConn, socket.socket]:
        server_side, client = socket.socketpair()
        self._open += [server_side, client]
        client.sendall(first)
        conn = TConn(Config(), server_side, ("127.0.0.1", 1), ("127.0.0.1", 2))
        self.arrivals.add(conn)
        return conn, client

    def turn(self) -> None:
        for key, _ in self.poller.select(0):
            key.data(key.fileobj)

    def close(self) -> None:
        for each in self._open:
            each.close()
        self.poller.close()


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.close()


def test_a_request_is_dispatched_when_its_last_byte_has_come(door: Door) -> None:
    request = WHOLE["a body"]
    conn, client = door.connect(request[:60])
    for byte in request[60:]:
        assert not door.dispatched
        client.sendall(bytes([byte]))
        door.turn()
    assert door.dispatched == [conn]
    parsed = next(conn.parser)
    assert (parsed.path, parsed.body.read()) == ("/v1/completions", b"abcde")
    assert not door.poller.get_map()


def test_the_next_request_may_have_come_with_it(door: Door) -> None:
    conn, _ = door.connect(WHOLE["a body"] + GET)
    assert next(conn.parser).body.read() == b"abcde"
    door.arrivals.add(conn)
    assert door.dispatched == [conn, conn]
    assert next(conn.parser).path == "/health"
    arrival = arrival_of(conn)
    assert arrival is not None
    assert not arrival.ran_dry, "the connection can be kept"


def test_a_client_that_ends_early_leaves_the_parser_dry(door: Door) -> None:
    conn, client = door.connect(WHOLE["a body"][:-1])
    client.shutdown(socket.SHUT_WR)
    door.turn()
    assert door.dispatched == [conn]
    assert next(conn.parser).body.read() == b"abcd"
    assert arrival_of(conn).ran_dry


def test_a_client_that_says_nothing_and_goes(door: Door) -> None:
    conn, client = door.connect()
    client.close()
    door.turn()
    assert (door.dispatched, door.parted) == ([], [conn.sock])


def test_a_client_that_expects_it_is_told_to_go_on(door: Door) -> None:
    conn, client = door.connect(HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.sendall(b"ab")
    door.turn()
    client.sendall(b"cde")
    door.turn()
    assert door.dispatched == [conn]
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.recv(100)


def test_a_small_piece_is_not_cut_from_a_large_block(door: Door) -> None:
    """What is left of each such block is too small for the next one: the heap would grow for ever."""
    _, client = door.connect(b"GET /")
    tracemalloc.start()
    client.sendall(b"x" * 100)
    num_before, _ = tracemalloc.get_traced_memory()
    door.turn()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - num_before < 1 << 14


def test_the_slowest_are_given_up(door: Door) -> None:
    first, client = door.connect(b"GET /")
    time.sleep(0.05)
    second, _ = door.connect()
    door.arrivals.close_late(0.04)
    assert door.parted == [first.sock]
    assert client.recv(100).startswith(b"HTTP/1.1 408 ")
    door.arrivals.close_late(0.0)
    assert door.parted == [first.sock, second.sock]
    assert not door.poller.get_map()


def test_those_that_take_most_make_room(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door.arrivals, "_max_bytes", 250)
    (first, to_first), (second, to_second), (_, to_third) = [door.connect(b"GET /") for _ in range(3)]
    to_second.sendall(b"x" * 200)
    door.turn()
    door.turn()  # after which it does not come first any more
    assert door.parted == []
    for client in (to_first, to_second, to_third):  # in one turn, in which the second one is given up before it is read
        client.sendall(b"x" * 40)
    door.turn()
    assert door.parted == [second.sock]
    assert to_second.recv(100).startswith(b"HTTP/1.1 408 ")
    to_first.sendall(b" HTTP/1.1\r\nHost: x\r\n\r\n")
    door.turn()
    assert door.dispatched == [first]
    to_third.sendall(b"x" * 190)
    door.turn()
    assert door.parted == [second.sock], "what has been given up or dispatched does not count"


HALVES = [b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", WHOLE["a body"][:-1], WHOLE["chunks"][:-1], b""]


def test_half_requests_take_no_threads() -> None:
    options = (str(TINY), "--load-format", "dummy", "--workers", "1", "--threads", "4")
    with LiveServer.serve(*options) as server, ExitStack() as connections:
        host, port = server.url.removeprefix("http://").split(":")
        for half in HALVES * 3:
            connection = connections.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(half)
        start_s = time.monotonic()
        assert all(server.call("/health", timeout_s=5)[0] == 200 for _ in range(10))
        assert time.monotonic() - start_s < 2
        start_s = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - start_s < 8, "nor does anybody wait for them in the end"
