"""Clients that leave, stall or talk nonsense: the server stays well and holds nothing of theirs."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
from live_server import LiveServer, wait_until

LONG = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True}


def connect(server: LiveServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def exchange(server: LiveServer, payload: bytes) -> bytes:
    """Send bytes and read the answer up to its end, or up to a full answer on a kept-alive connection."""
    with connect(server) as connection:
        try:
            connection.sendall(payload)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server need not read to the end what it refuses
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
        return answer


def test_a_stream_that_is_dropped_is_aborted_at_once(server: LiveServer) -> None:
    connection = server.open_running_stream(LONG)
    assert server.metric("num_requests_running") == 1
    assert server.metric("kv_cache_usage_perc") > 0
    connection.close()
    wait_until(server.is_idle, 1.0, "blocks and queue are empty")


def test_a_client_that_leaves_while_it_waits_is_aborted_at_once(server: LiveServer) -> None:
    connection = server.open_stream(LONG | {"stream": False})
    wait_until(lambda: server.metric("num_requests_running") == 1, 5, "running")
    connection.close()
    wait_until(server.is_idle, 1.0, "blocks and queue are empty")


def test_fifty_dropped_streams_leave_nothing(server: LiveServer) -> None:
    server.call("/v1/completions", {"prompt": "x", "max_tokens": 1})
    pids = server.worker_pids()
    before = count_descriptors(pids)
    connections = [server.open_stream(LONG | {"prompt": f"{n} apples"}) for n in range(50)]
    wait_until(lambda: server.metric("num_requests_running") > 0, 10, "running")
    for connection in connections:
        connection.close()
    wait_until(server.is_idle, 5.0, "blocks and queue are empty")
    wait_until(lambda: count_descriptors(pids) <= before + 2, 5.0, "no descriptor stays open")


def count_descriptors(pids: list[int]) -> int:
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)


def test_a_stopped_stop_string_frees_its_blocks(server: LiveServer) -> None:
    status, answer = server.call(
        "/v1/completions", {"prompt": "1, 2, 3,", "max_tokens": 400, "stop": ",", "n": 2, "top_k": 1}
    )
    assert status == 200
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    wait_until(server.is_idle, 1.0, "the engine does not go on")


BODY = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("payload", "statuses"),
    [
        (b"\x00\x01\x02\x03\r\n\r\n", {400}),
        (b"GET / HTTP/9.9\r\n\r\n", {400, 505}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400, None}),
        (b"GET " + b"/x" * 5000 + b" HTTP/1.1\r\n\r\n", {400, 414}),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 10_000 + b"\r\n\r\n", {400, 431}),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-%d: y\r\n" * 200 + b"\r\n", {400, 431}),
        (b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n", {400}),
        (HEAD + b"Content-Length: -1\r\n\r\n" + BODY, {400}),
        (HEAD + b"Content-Length: nonsense\r\n\r\n" + BODY, {400}),
        (HEAD + b"Content-Length: 99999999\r\n\r\n" + BODY, {413}),
        (HEAD + b"Content-Length: 30\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {400}),
        (HEAD + b"Transfer-Encoding: gzip, nonsense\r\n\r\n" + BODY, {400, 501}),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nx\r\n0\r\n\r\n", {400}),
        (HEAD + b"Content-Length: 500\r\n\r\n" + BODY, {400, None}),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else "",
)
def test_garbage_on_the_wire(server: LiveServer, payload: bytes, statuses: set[int | None]) -> None:
    answer = exchange(server, payload)
    status = int(answer.split(b" ", 2)[1]) if answer else None
    assert status in statuses, answer[:200]
    assert b"Traceback" not in answer
    assert server.status("/health") == 200


def test_no_header_says_which_path_is_meant(server: LiveServer) -> None:
    head = b"GET %b HTTP/1.1\r\nHost: x\r\nSCRIPT_NAME: /open\r\nPATH_INFO: /version\r\n\r\n"
    assert exchange(server, head % b"/health").startswith(b"HTTP/1.1 200 ")
    assert exchange(server, head % b"/open/version").startswith(b"HTTP/1.1 404 ")


def test_a_chunked_body_meets_the_limit_too(server: LiveServer) -> None:
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    answer = exchange(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 80 + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 "), answer[:200]
    assert server.status("/health") == 200


def test_a_chunked_body_within_the_limit(server: LiveServer) -> None:
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    with connect(server) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunked)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_streams_over_http_1_0(server: LiveServer) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2, "stream": True}).encode()
    with connect(server) as connection:
        head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.endswith(b"data: [DONE]\n\n")


def test_only_http_listens_and_only_on_loopback(server: LiveServer) -> None:
    inodes = {
        os.readlink(link)
        for pid in server.pids()
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink() and os.readlink(link).startswith("socket:")
    }
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                listening.append(fields[1])
    port = int(server.url.rsplit(":", 1)[1])
    assert listening == [f"0100007F:{port:04X}"]


def test_sockets_are_private(server: LiveServer) -> None:
    (folder,) = server.tmp.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "e0").stat().st_mode & 0o777 == 0o700
    assert {path.name for path in folder.rglob("*.sock")} == {"control.sock", "engine.sock", "status.sock"}


def test_throughput_of_small_requests(server: LiveServer) -> None:
    start_s = time.monotonic()
    for _ in range(20):
        assert server.call("/v1/models")[0] == 200
    assert time.monotonic() - start_s < 2
