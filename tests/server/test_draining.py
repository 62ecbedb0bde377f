"""The drain limit: workers keep it by themselves, also when the supervisor, and with it the engines, are gone."""

from __future__ import annotations

import os
import queue
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cupy_engine.server.draining import Drain
from cupy_engine.server.mailbox import Mailbox
from live_server import LiveServer, long_model_options, wait_until
from mail import failure_in

from cupy_engine.errors import EngineDeadError

LONG = {"prompt": [5, 6, 7], "max_tokens": 200_000, "ignore_eos": True}


@pytest.fixture
def long_model(tmp_path: Path) -> tuple[str, ...]:
    return long_model_options(tmp_path)


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    while piece := connection.recv(65536):
        answer += piece
    return answer


def assert_whole_and_failed(answer: bytes) -> None:
    assert b'data: {"error":{"message":' in answer
    assert answer.rstrip().endswith(b"data: [DONE]\n\n\r\n0"), "the response itself is whole"


def test_open_requests_fail_at_the_end_and_so_do_late_ones() -> None:
    drain = Drain()
    done, running, late = Mailbox(), Mailbox(), Mailbox()
    drain.enter(done)
    drain.enter(running)
    drain.leave(done)
    assert drain.end() == 1
    drain.enter(late)
    for mailbox in (running, late):
        assert isinstance(failure_in(mailbox), EngineDeadError)
    with pytest.raises(queue.Empty):
        done.get_nowait()


def drain(server: LiveServer, limit_s: float, *, kill_supervisor: bool = False) -> None:
    """SIGTERM under a stream and a whole answer: both are told of the end, in time, and nothing is left."""
    with ThreadPoolExecutor(1) as pool, server.open_running_stream(LONG) as stream:
        whole = pool.submit(server.call, "/v1/completions", LONG)
        wait_until(lambda: server.metric("num_requests_running") == 2, 10, "both run")
        start_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        if kill_supervisor:
            os.kill(server.supervisor_pid(), signal.SIGKILL)
        streamed = read_all(stream)
        status, answer = whole.result(10)
        assert limit_s <= time.monotonic() - start_s < limit_s + 3
    assert_whole_and_failed(streamed)
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
    assert server.process.wait(10) == 0
    server.assert_no_trace()


def test_with_a_supervisor(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model, "--drain-timeout-s", "0.5") as server:
        drain(server, 0.5)
        assert "2 requests did not finish within 0.5 s, and were ended" in server.log()


def test_with_a_supervisor_s_successor(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model, "--drain-timeout-s", "0.5") as server:
        os.kill(server.supervisor_pid(), signal.SIGKILL)
        wait_until(lambda: server.status("/health") == 503, 10, "not well")
        wait_until(lambda: server.status("/health") == 200, 20, "well again")
        drain(server, 0.5)


def test_without_a_supervisor(long_model: tuple[str, ...]) -> None:
    """Its engines end with it: the stream at once, and what waits for other engines at the limit."""
    with LiveServer.serve(*long_model, "--drain-timeout-s", "1") as server:
        drain(server, 1, kill_supervisor=True)
        assert "Traceback" not in server.log()


GUNICORN = ("-c", "python:cupy_engine.server.gunicorn_conf", "-w", "1", "--threads", "8")


def app(model: tuple[str, ...], more: str = "") -> str:
    return f"{model[0]!r}, load_format='dummy', kv_cache_memory_bytes={1 << 28}{more}"


def test_under_plain_gunicorn(long_model: tuple[str, ...]) -> None:
    options = ("--preload", "-k", "gthread")
    with LiveServer.gunicorn(*GUNICORN, *options, app=app(long_model, ", drain_timeout_s=0.5")) as server:
        drain(server, 0.5)


def test_gunicorn_s_own_limit_counts_if_it_comes_first(long_model: tuple[str, ...]) -> None:
    with LiveServer.gunicorn(*GUNICORN, "--graceful-timeout", "4", app=app(long_model)) as server:
        drain(server, 1)
