"""Loops of clients against servers that misbehave: every request is accounted for."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat

from cupy_engine.bench.fake_server import fake_server
from cupy_engine.bench.http_client import Address, Crowd, Exchange, post
from cupy_engine.bench.loops import closed_loop, open_loop, quantile

REQUESTS = repeat(post("/v1/completions", {"prompt": "x"}))
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
REFUSED = b"HTTP/1.1 429 TOO MANY REQUESTS\r\nContent-Length: 2\r\n\r\nno"
Answer = Callable[[int], bytes | None]


@contextmanager
def server(answer: Answer) -> Iterator[Address]:
    """Sends ``answer(number)`` to a connection's requests, counted from 0; ``None`` closes it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(peer: socket.socket) -> None:
        with peer, contextlib.suppress(ConnectionError):
            number = 0
            while peer.recv(1 << 16) and (data := answer(number)) is not None:
                peer.sendall(data)
                number += 1

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(peer,), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_a_closed_loop_keeps_its_connections() -> None:
    with server(lambda number: OK) as address:
        done = closed_loop(address, REQUESTS, num_clients=3, duration_s=0.3)
    assert len(done) > 30
    assert all(each.error is None and each.is_whole and each.status == 200 for each in done)
    assert sum(each.is_first for each in done) == 3


def test_a_connection_that_closes_without_an_answer_is_told_from_one_that_was_idle() -> None:
    with server(lambda number: OK if number < 2 else None) as address:
        lost = [each for each in closed_loop(address, REQUESTS, num_clients=1, duration_s=0.3) if each.is_lost]
    assert lost
    assert not any(each.is_first for each in lost), "it was the third request"
    assert lost[0].error == "the connection was closed without an answer"
    with server(lambda number: None) as address:
        done = closed_loop(address, REQUESTS, num_clients=1, duration_s=0.15)
    assert done
    assert all(each.is_lost and each.is_first for each in done)


def test_a_connection_that_was_closed_while_idle_loses_no_request() -> None:
    closes = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with server(lambda number: closes if number == 0 else None) as address:
        done = closed_loop(address, REQUESTS, num_clients=2, duration_s=0.2)
    assert len(done) > 10
    assert all(each.error is None and each.is_first for each in done)


def test_who_is_refused_waits_before_asking_again() -> None:
    with server(lambda number: REFUSED) as address:
        done = closed_loop(address, REQUESTS, num_clients=1, duration_s=0.35)
    assert 1 <= len(done) <= 4
    assert {each.error for each in done} == {"status 429: no"}


def test_an_answer_that_does_not_end_is_kept_with_grace_only() -> None:
    with server(lambda number: OK[:-1]) as address:
        assert closed_loop(address, REQUESTS, num_clients=1, duration_s=0.1) == []
        cut, *_ = open_loop(address, REQUESTS, per_s=20, duration_s=0.1, grace_s=0.1, seed=3)
    assert (cut.error, cut.is_whole, cut.status) == ("no end of the answer", False, 200)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    failed, *_ = open_loop(address, REQUESTS, per_s=20, duration_s=0.1, seed=3)
    assert "refused" in str(failed.error)


def test_events_are_timed_and_counted() -> None:
    with fake_server(num_tokens=5, ttft_s=0.05, itl_s=0.02) as target:
        done: list[Exchange] = []
        crowd = Crowd((target.host, target.port), lambda connection: done.append(connection.exchange))
        crowd.open(next(REQUESTS))
        while not done:
            crowd.poll(1.0)
        crowd.close_all()
    (exchange,) = done
    assert len(exchange.event_times_s) == 6, "five tokens and the usage"
    assert b'"completion_tokens": 5' in exchange.last_event
    assert 0.05 <= exchange.ttft_s < 0.2
    assert len(exchange.gaps_s()) <= 5
    assert exchange.total_s >= 0.05 + 4 * 0.02


def test_quantiles() -> None:
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 2.0, 3.0, 3.0]
    assert quantile([], 0.5) != quantile([], 0.5)
