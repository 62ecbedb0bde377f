"""Connections between requests: kept as announced, closed as announced, and nobody waits for another's client."""

from __future__ import annotations

import re
import selectors
import socket
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from cupy_engine.server.descriptors import SPARE_DESCRIPTORS
from cupy_engine.server.lingering import LingeringConnections
from cupy_engine.server.stream_worker import MAX_SKIPPED_BYTES, StreamWorker
from live_server import LiveServer, long_model_options

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
GET_AND_CLOSE = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def connect(server: LiveServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def ask(connection: socket.socket, request: bytes) -> bytes:
    """The head of the answer, whose body must be there too."""
    connection.sendall(request)
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = connection.recv(65536)
        assert piece, "closed without an answer"
        answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    num_bytes = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < num_bytes:
        body += connection.recv(65536)
    return head


def test_clients_that_keep_their_end_open_hold_up_nobody(server: LiveServer) -> None:
    with ExitStack() as connections:
        for _ in range(8):
            assert b"Connection: close" in ask(connections.enter_context(connect(server)), GET_AND_CLOSE)
        start_s = time.monotonic()
        for _ in range(4):
            with connect(server) as connection:
                ask(connection, GET)
        assert time.monotonic() - start_s < 1.5, "gunicorn gives each of them two seconds"


def unread_body(num_bytes: int, *, is_chunked: bool = False) -> bytes:
    """A request that is refused before its body is read."""
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\n"
    if is_chunked:
        return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (num_bytes, b"x" * num_bytes)
    return head + b"Content-Length: %d\r\n\r\n%b" % (num_bytes, b"x" * num_bytes)


def test_a_short_body_that_nobody_read_leaves_the_connection_usable(server: LiveServer) -> None:
    with connect(server) as connection:
        assert b"Connection: keep-alive" in ask(connection, unread_body(MAX_SKIPPED_BYTES))
        assert ask(connection, GET).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_long_body_that_nobody_read_closes_the_connection_and_says_so(server: LiveServer, is_chunked: bool) -> None:
    with connect(server) as connection:
        head = ask(connection, unread_body(1 << 20, is_chunked=is_chunked))
        assert head.startswith(b"HTTP/1.1 404")
        assert b"Connection: close" in head
        assert connection.recv(1) == b"", "closed in an orderly way"


def test_clients_beyond_the_limit_of_open_files_wait_and_are_answered(tmp_path: Path) -> None:
    limit = SPARE_DESCRIPTORS + 20
    options = ("serve", "--port", "0", *long_model_options(tmp_path))
    command = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", sys.executable, "-m", "cupy_engine.server.cli"]
    with LiveServer([*command, *options]).opened(r"ready on (http://\S+)") as live, ExitStack() as connections:
        assert f"the limit of open files allows {limit - SPARE_DESCRIPTORS} connections" in live.log()
        waiting = [connections.enter_context(connect(live)) for _ in range(60)]
        for connection in waiting:
            connection.sendall(GET)
        for connection in waiting:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.close()
        assert "Too many open files" not in live.log()


def test_a_request_has_arrived_when_it_waits_for_a_thread(tmp_path: Path) -> None:
    body = {"prompt": [3, 4, 5], "ignore_eos": True}
    with LiveServer.serve(*long_model_options(tmp_path), "--threads", "1") as live, ThreadPoolExecutor() as clients:
        long = clients.submit(live.call, "/v1/completions", body | {"max_tokens": 1500})
        time.sleep(0.1)
        start_s = time.monotonic()
        waiting = [
            clients.submit(live.call, "/v1/completions", body | {"max_tokens": 1, "timeout_s": timeout_s})
            for timeout_s in (60, 0.01)
        ]
        assert long.result()[0] == 200
        waited_s = time.monotonic() - start_s
        assert [each.result()[0] for each in waiting] == [200, 504]
        ttfts_ms = [float(found) for found in re.findall(r"ttft_ms=(\S+)", live.log()) if found != "-"]
    assert waited_s > 0.2
    assert ttfts_ms[1] > 0.8e3 * waited_s > 2 * ttfts_ms[0]


def test_a_request_that_comes_at_the_end_of_keep_alive_is_answered() -> None:
    """The worker closes the connections that have been idle too long, after it has looked for requests."""
    worker = StreamWorker.__new__(StreamWorker)
    worker.poller, worker.keepalived_conns, worker.nr_conns = selectors.DefaultSelector(), deque(), 2
    dispatched: list[object] = []
    worker.enqueue_req = dispatched.append
    ends = [socket.socketpair() for _ in range(2)]
    connections = [SimpleNamespace(sock=end, timeout=time.monotonic() - 1, close=end.close) for end, _ in ends]
    for connection in connections:
        worker.keepalived_conns.append(connection)
        callback = partial(worker.on_client_socket_readable, connection)
        worker.poller.register(connection.sock, selectors.EVENT_READ, callback)
    (_, idle_client), (_, busy_client) = ends
    busy_client.sendall(GET)
    worker.murder_keepalived()
    assert dispatched == [connections[1]]
    assert idle_client.recv(1) == b""
    assert worker.nr_conns == 1
    for connection, client in zip(connections, (idle_client, busy_client), strict=True):
        connection.close()
        client.close()
    worker.poller.close()


def test_a_lingering_connection_goes_with_its_client_or_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    poller, num_closed = selectors.DefaultSelector(), 0

    def count() -> None:
        nonlocal num_closed
        num_closed += 1

    lingering = LingeringConnections(poller, count)
    (first, leaving), (second, staying) = socket.socketpair(), socket.socketpair()
    lingering.add(first)
    leaving.close()
    for key, _ in poller.select(1):
        key.data(key.fileobj)
    assert num_closed == 1
    monkeypatch.setattr("cupy_engine.server.lingering.LINGER_S", 0.0)
    staying.sendall(b"more")
    lingering.add(second)
    assert num_closed == 1
    assert staying.recv(1) == b"", "its end is closed already"
    lingering.close_late()
    assert num_closed == 2
    assert not poller.get_map()
    lingering.add(second)
    assert num_closed == 3, "one that is closed already only counts"
    staying.close()
    poller.close()
