"""Servers start fast, end cleanly, and die without leaving anything."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from live_server import TINY, LiveServer, long_model_options, wait_until

PROMPT = {"prompt": [5, 6, 7]}
LONG = {**PROMPT, "max_tokens": 200_000, "ignore_eos": True}


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    while piece := connection.recv(65536):
        answer += piece
    return answer


class BackgroundCall(threading.Thread):
    """A request that waits for its answer."""

    def __init__(self, server: LiveServer, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._server, self._body = server, body
        self.answer: tuple[int, Any] = (0, None)
        self.start()

    def run(self) -> None:
        self.answer = self._server.call("/v1/completions", self._body)


@pytest.fixture
def long_model(tmp_path: Path) -> tuple[str, ...]:
    return long_model_options(tmp_path)


def test_sigterm_when_idle(tmp_path: Path) -> None:
    before = shared_memory()
    with LiveServer.serve(str(TINY), "--workers", "2") as server:
        wait_until(lambda: len(server.pids()) == 5, 5, "main, supervisor, engine, two workers")
        assert server.call("/v1/completions", PROMPT)[0] == 200
        assert server.end(signal.SIGTERM) == 0
        server.assert_no_trace()
    assert shared_memory() <= before


def test_sigterm_lets_requests_finish(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model) as server:
        with server.open_running_stream(LONG | {"max_tokens": 400}) as stream:
            server.process.send_signal(signal.SIGTERM)
            answer = read_all(stream)
        assert b'"finish_reason":"length"' in answer
        assert b"data: [DONE]" in answer
        assert server.process.wait(10) == 0
        server.assert_no_trace()


def test_ctrl_c_drains_and_a_second_one_ends_at_once(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model) as server:
        with server.open_running_stream(LONG):
            os.killpg(server.process.pid, signal.SIGINT)  # what a terminal does: all processes of the group
            server.wait_for_log(r"stopping: running requests may take 30 s; Ctrl-C again ends them now")
            time.sleep(0.5)
            assert server.process.poll() is None, "it waits for the stream"
            start_s = time.monotonic()
            os.killpg(server.process.pid, signal.SIGINT)
            server.process.wait(10)
        assert time.monotonic() - start_s < 3
        server.assert_no_trace()


def test_kill_9_of_the_main_process(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model) as server, server.open_running_stream(LONG):
        server.end(signal.SIGKILL)
        server.assert_no_trace()


def read_until_done(stream: socket.socket) -> bytes:
    answer = b""
    while b"[DONE]" not in answer and (piece := stream.recv(65536)):
        answer += piece
    return answer


def test_health_tells_that_the_model_is_loading(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model, wait=False) as server:
        seen = set()
        while not server.url:
            wait_until(lambda: b":" in listening(server), 20, "listening")
            server.url = "http://127.0.0.1:" + listening(server).decode().split(":")[1]
        while (answer := server.call("/health"))[0] != 200:
            seen.add((answer[0], answer[1]["status"]))
            time.sleep(0.02)
        assert seen
        assert seen <= {(503, "starting"), (503, "loading")}
        assert server.call("/ready")[0] == 200


def listening(server: LiveServer) -> bytes:
    """``:PORT`` once the server listens."""
    links = []
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(link))
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = row.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
            return f":{int(fields[1].split(':')[1], 16)}".encode()
    return b""


def test_a_killed_worker_is_replaced_and_its_requests_are_aborted(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model) as server:
        (worker,) = server.worker_pids()
        with server.open_running_stream(LONG) as stream:
            os.kill(worker, signal.SIGKILL)
            assert read_all(stream) is not None
        wait_until(lambda: server.status("/health") == 200, 10, "a new worker answers")
        wait_until(server.is_idle, 2, "the request of the dead worker is gone")
        assert server.call("/v1/completions", PROMPT)[0] == 200


GUNICORN = ("-w", "2", "--threads", "16", "-c", "python:cupy_engine.server.gunicorn_conf")


@pytest.mark.parametrize("options", [(), ("--preload",), ("-k", "gthread")], ids=["plain", "preload", "gthread"])
def test_plain_gunicorn_shares_one_engine(options: tuple[str, ...]) -> None:
    with LiveServer.gunicorn(*GUNICORN, *options, app=f"model={str(TINY)!r}, strict=True") as server:
        assert len(server.worker_pids()) == 2
        engine = server.engine_pid()
        for _ in range(8):
            assert server.call("/v1/completions", PROMPT)[0] == 200
        assert server.call("/v1/completions", {**PROMPT, "foo": 1})[0] == 400
        with server.open_stream(PROMPT) as stream:
            assert b"data: [DONE]" in read_until_done(stream)
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        wait_until(lambda: len(server.worker_pids()) == 2, 10, "the worker is replaced")
        wait_until(lambda: server.call("/v1/completions", PROMPT)[0] == 200, 10, "served")
        assert server.engine_pid() == engine
        assert server.end() == 0
        server.assert_no_trace()


def test_plain_gunicorn_without_a_supervisor_leaves_nothing() -> None:
    with LiveServer.gunicorn(*GUNICORN, app=f"{str(TINY)!r}") as server:
        os.kill(server.supervisor_pid(), signal.SIGKILL)
        assert server.end() == 0
        server.assert_no_trace()


def test_plain_gunicorn_killed() -> None:
    with LiveServer.gunicorn(*GUNICORN, app=f"{str(TINY)!r}") as server:
        server.end(signal.SIGKILL)
        server.assert_no_trace()


@pytest.mark.parametrize(
    ("app", "words"),
    [("model='no-such-model'", "no model 'no-such-model'"), ("max_nonsense=3", "max_nonsense: no such option")],
)
def test_plain_gunicorn_says_what_is_wrong(app: str, words: str) -> None:
    with LiveServer.gunicorn(*GUNICORN, app=app, wait=False) as server:
        assert server.process.wait(20) != 0
        assert words in server.log()
        server.assert_no_trace()


def test_a_model_that_does_not_load_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    with LiveServer.serve(str(tmp_path), wait=False) as server:
        assert server.process.wait(20) == 1
        *before, last = server.log().splitlines()
        assert last.startswith("error: ")
        assert not re.search("error|stopping|Traceback", "\n".join(before)), server.log()
        server.assert_no_trace()


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with LiveServer.serve(str(TINY), "--host", "0.0.0.0", "--port", port, wait=False) as server:
            assert server.process.wait(20) == 1
            assert server.log().count("\n") == 1
            assert f"cannot listen on 0.0.0.0:{port}" in server.log()
            server.assert_no_trace()


def test_a_client_that_reads_nothing_is_given_up_on(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model, "--client-write-timeout-s", "0.2") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect((host, int(port)))
            server.send_stream(stalled, LONG | {"n": 16})
            wait_until(lambda: server.metric("num_requests_running") > 0, 10, "running")
            wait_until(server.is_idle, 30, "aborted")


def test_queue_full_is_429(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model, "--max-num-seqs", "1", "--max-queue-len", "1") as server:
        streams = [server.open_running_stream(LONG)]
        streams.append(server.open_stream(LONG))
        wait_until(lambda: server.metric("num_requests_waiting") == 1, 5, "one waits")
        status, answer = server.call("/v1/completions", PROMPT)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        wait_until(lambda: server.call("/load")[1]["expected_wait_s"] > 0, 5, "the queue's pace is known")
        assert server.call("/v1/completions", PROMPT)[0] == 429
        pattern = r'admission_rejections_total\{.*reason="queue_full"\} 2\.0'
        wait_until(lambda: re.search(pattern, server.call("/metrics")[1]) is not None, 5, "both are counted")
        for stream in streams:
            stream.close()
        wait_until(server.is_idle, 2, "both are gone, also the one that waited")
