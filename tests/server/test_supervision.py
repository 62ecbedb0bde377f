"""Engines that die, hang or cannot be started: what clients and ``/health`` see until all is well again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_server import TINY, LiveServer, long_model_options, wait_until

PROMPT = {"prompt": [5, 6, 7]}
SHORT = {**PROMPT, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
LONG = {**PROMPT, "max_tokens": 200_000, "ignore_eos": True}


@pytest.fixture
def long_model(tmp_path: Path) -> tuple[str, ...]:
    return long_model_options(tmp_path)


class HealthWatch(threading.Thread):
    """Asks for ``/health`` all the time and keeps what it says, with the time."""

    def __init__(self, server: LiveServer) -> None:
        super().__init__(daemon=True)
        self._server, self._is_over = server, False
        self.seen: list[tuple[float, int, str]] = []
        self.start()

    def run(self) -> None:
        while not self._is_over:
            status, body = self._server.call("/health", timeout_s=10)
            self.seen.append((time.monotonic(), status, body["status"]))
            time.sleep(0.01)

    def stop(self) -> None:
        self._is_over = True
        self.join()

    def well_again_s(self) -> float:
        """When it was well after it had not been."""
        last_bad_s = max(at_s for at_s, status, _ in self.seen if status != 200)
        return min(at_s for at_s, status, _ in self.seen if status == 200 and at_s > last_bad_s)


def stream_to_end(server: LiveServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a stream; the last is followed by [DONE]."""
    with server.open_stream(body) as connection:
        connection.settimeout(60)
        answer = b""
        while b"data: [DONE]" not in answer:
            piece = connection.recv(65536)
            assert piece, answer[-300:]
            answer += piece
    return [json.loads(event) for event in re.findall(rb"data: (\{.*\})\n\n", answer)]


def start_up_s(options: tuple[str, ...]) -> float:
    """How long a server takes now, from the command to being ready."""
    start_s = time.monotonic()
    with LiveServer.serve(*options):
        return time.monotonic() - start_s


def test_kill_9_under_64_streams(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model) as server:
        expected = server.call("/v1/completions", SHORT)[1]["choices"][0]["token_ids"]
        watch = HealthWatch(server)
        bodies = [SHORT | {"stream": True, "max_tokens": 32 if n % 2 else 20_000} for n in range(64)]
        with ThreadPoolExecutor(80) as pool:
            streams = [pool.submit(stream_to_end, server, body) for body in bodies]
            whole = [pool.submit(server.call, "/v1/completions", SHORT | {"max_tokens": 500}) for _ in range(8)]
            wait_until(lambda: server.metric("generation_tokens_total") > 500, 20, "under load")
            killed_s = time.monotonic()
            os.kill(server.engine_pid(), signal.SIGKILL)
            another = pool.submit(start_up_s, long_model)  # at the same time: whatever else the machine does, both bear
            answers = [each.result(60) for each in whole]
            ends = [each.result(60) for each in streams]
        wait_until(server.is_idle, 10, "blocks and queues are empty")
        watch.stop()
        for status, answer in answers:
            assert status == 200, "nothing of it had been told, so it was computed afresh"
            assert answer["choices"][0]["token_ids"][:32] == expected
            assert answer["usage"]["completion_tokens"] == 500
        for events in ends:
            tokens = [t for event in events for choice in event.get("choices", ()) for t in choice["token_ids"]]
            assert tokens[:32] == expected[: len(tokens)]
            if "error" in events[-1]:
                assert events[-1]["error"]["code"] == "engine_unavailable"
                assert tokens, "it had told something, or it would have been computed afresh"
            else:
                assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert any("error" in events[-1] for events in ends)
        assert watch.well_again_s() - killed_s < another.result() + 2
        assert {(status, state) for _, status, state in watch.seen} <= {
            (200, "ok"),
            (503, "restarting"),
            (503, "loading"),
            (503, "starting"),
        }
        assert server.metric("engine_restarts_total") == 1
        assert server.end() == 0
        server.assert_no_trace()


def test_a_stopped_engine_is_replaced(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model, "--stall-timeout-s", "1.5") as server:
        with ThreadPoolExecutor(2) as pool, server.open_running_stream(LONG) as stream:
            whole = pool.submit(server.call, "/v1/completions", SHORT | {"max_tokens": 500})
            wait_until(lambda: server.metric("num_requests_running") == 2, 5, "both run")
            stopped = server.engine_pid()
            os.kill(stopped, signal.SIGSTOP)
            wait_until(lambda: server.status("/health") == 503, 10, "not well")
            wait_until(lambda: server.status("/health") == 200, 20, "well again")
            assert server.engine_pid() != stopped
            assert whole.result(30)[0] == 200
            assert b'"code":"engine_unavailable"' in read_rest(stream)
        assert "has not answered for" in server.log()
        wait_until(server.is_idle, 5, "nothing is left")


def read_rest(connection: Any) -> bytes:
    answer = b""
    while b"[DONE]" not in answer and (piece := connection.recv(65536)):
        answer += piece
    return answer


def test_an_engine_that_keeps_dying_stays_down(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model, "--max-engine-restarts", "1") as server:
        waiting = ThreadPoolExecutor(1).submit(server.call, "/v1/completions", LONG)
        wait_until(lambda: server.metric("num_requests_running") == 1, 5, "running")
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_until(lambda: server.status("/health") == 503, 5, "not well")
        wait_until(lambda: server.status("/health") == 200, 20, "well again")
        wait_until(lambda: server.metric("num_requests_running") == 1, 5, "the request has come back")
        os.kill(server.engine_pid(), signal.SIGKILL)
        status, answer = waiting.result(10)
        assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
        assert server.call("/health") == (503, {"status": "failed"})
        assert server.call("/v1/completions", PROMPT)[0] == 503
        assert "engine_up" in server.call("/metrics")[1]
        assert "it stays down" in server.log()
        assert server.end() == 0
        server.assert_no_trace()


def test_a_request_that_ends_every_engine_does_so_three_times_at_most(long_model: tuple[str, ...]) -> None:
    with LiveServer.serve(*long_model) as server, ThreadPoolExecutor(1) as pool:
        poison = pool.submit(server.call, "/v1/completions", LONG)
        for _ in range(3):
            wait_until(lambda: server.status("/health") == 200 and not server.is_idle(), 20, "it runs")
            os.kill(server.engine_pid(), signal.SIGKILL)
            wait_until(lambda: server.status("/health") != 200, 5, "not well")
        assert poison.result(5)[0] == 503


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_supervisor_that_ends_has_a_successor(number: signal.Signals) -> None:
    with LiveServer.serve(str(TINY), "--workers", "2") as server:
        killed = server.supervisor_pid()
        (folder,) = server.tmp.iterdir()
        (folder / "note").touch()
        os.kill(killed, number)
        wait_until(lambda: server.status("/health") == 503, 10, "not well")
        wait_until(lambda: server.status("/health") == 200, 20, "well again")
        assert server.supervisor_pid() != killed
        assert (folder / "note").exists(), "what was written down, such as the accounts of keys, is there still"
        assert server.call("/v1/completions", PROMPT)[0] == 200
        assert server.end() == 0
        server.assert_no_trace()


def test_a_successor_does_not_give_up_a_model_that_was_served(tmp_path: Path) -> None:
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(TINY, model)
    with LiveServer.serve(str(model)) as server:
        model.rename(elsewhere)
        os.kill(server.supervisor_pid(), signal.SIGKILL)
        server.wait_for_log(r"restart 2 of at most 10 in a row, in 0.5 s")
        assert server.status("/health") == 503
        elsewhere.rename(model)
        wait_until(lambda: server.status("/health") == 200, 20, "well again")


def test_an_engine_that_is_told_to_end_is_started_again() -> None:
    with LiveServer.serve(str(TINY)) as server:
        ended = server.engine_pid()
        os.kill(ended, signal.SIGTERM)
        wait_until(lambda: server.status("/ready") == 503, 5, "it ends")
        wait_until(lambda: server.status("/ready") == 200, 20, "well again")
        assert ended not in server.pids()
        assert server.call("/v1/completions", PROMPT)[0] == 200
