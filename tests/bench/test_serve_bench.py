"""The load on a server: answers are read right, times are those that happened, failures are counted."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cupy_engine.bench import end_to_end
from cupy_engine.bench.fake_server import answer_pieces, fake_server
from cupy_engine.bench.http_stream import StreamReader
from cupy_engine.bench.load import Load, Target, run_load, summarize
from cupy_engine.bench.load_client import Answer
from cupy_engine.bench.prompts import PromptMaker

from cupy_engine.errors import EngineError
from cupy_engine.model_source import ModelFiles

LOAD = Load(num_clients=3, duration_s=0.5, prompt_words=5, output_len=6)
SIZED = b"HTTP/1.1 400 BAD REQUEST\r\nContent-Length: 9\r\n\r\nno\r\n such"


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    end_to_end.add_arguments(parser)
    return end_to_end.run(parser.parse_args(options))


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_streams_are_read_in_any_pieces(size: int) -> None:
    stream, reader = b"".join(answer_pieces(3)), StreamReader()
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    *tokens, usage, done = [event for piece in pieces for event in reader.feed(piece)]
    assert [json.loads(token)["choices"][0]["text"] for token in tokens] == [" word"] * 3
    assert json.loads(usage)["usage"]["completion_tokens"] == 3
    assert (done, reader.status, reader.is_done, reader.keeps_alive) == (b"[DONE]", 200, True, True)


def test_comments_and_carriage_returns_are_dropped() -> None:
    reader = StreamReader()
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    assert reader.feed(head + b": keep-alive\n\ndata: {}\r\n\r\ndata: {") == [b"{}"]
    assert (reader.is_done, reader.keeps_alive) == (False, False)


def test_an_answer_that_is_no_stream() -> None:
    reader = StreamReader()
    assert reader.feed(SIZED) == []
    assert (reader.status, reader.is_done, reader.text) == (400, True, "no\n such")


def test_times_are_those_that_happened() -> None:
    with fake_server(num_tokens=6, ttft_s=0.3, itl_s=0.1) as target:
        answers, cpu_share = run_load(target, LOAD, num_processes=2)
    figures = summarize(answers, [50])
    assert figures["num_failed"] == 0
    assert len(answers) == 3  # an answer takes longer than the load lasts, so that each client asks once
    assert figures["output_tokens_per_s"] == pytest.approx(6 * figures["requests_per_s"])
    assert figures["ttft_s_p50"] == pytest.approx(0.35, abs=0.05)  # late by what a busy machine takes
    assert figures["itl_s_p50"] == pytest.approx(0.1, abs=0.03)
    assert 0 < cpu_share < 1


def test_arrivals_by_chance_do_not_wait_for_answers() -> None:
    load = Load(num_clients=0, duration_s=0.5, prompt_words=5, output_len=2, request_rate=40)
    with fake_server(num_tokens=2, ttft_s=1.0, itl_s=0.0) as target:
        answers, _ = run_load(target, load, num_processes=1)
    assert len(answers) == pytest.approx(20, abs=12)  # the same ones every time; one client would send one
    assert all(answer.error is None for answer in answers)


def test_rates_and_latencies() -> None:
    answers = [
        Answer(10.0, [11.0, 11.5, 12.5], 13.0, 7, 3),
        Answer(12.0, [12.5, 13.0, 15.0], 15.0, 9, 3),
        Answer(13.0, [], 13.5, error="status 503"),
    ]
    figures = summarize(answers, [0, 100])
    assert (figures["num_requests"], figures["num_failed"], figures["prompt_tokens"]) == (2, 1, 8)
    assert (figures["requests_per_s"], figures["output_tokens_per_s"]) == (2 / 5, 6 / 5)
    assert (figures["ttft_s_p0"], figures["ttft_s_p100"]) == (0.5, 1.0)
    assert (figures["itl_s_p0"], figures["itl_s_p100"]) == (0.5, 2.0)
    assert figures["time_per_output_token_s"] == (0.75 + 1.25) / 2


def one_shot_server(answer: bytes) -> tuple[Target, Callable[[], None]]:
    """Answers one request with these bytes and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as peer:
            peer.recv(1 << 16)
            peer.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return Target("127.0.0.1", listener.getsockname()[1], "m"), thread.join


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (SIZED, "status 400: no\n such"),
        (b"".join(answer_pieces(2))[:-1], "the connection ended before the answer"),
        (b"", "the connection was closed without an answer"),
        (b"nonsense\r\n\r\n", "this is no HTTP: 'nonsense'"),
    ],
)
def test_failures_say_why(answer: bytes, error: str) -> None:
    target, join = one_shot_server(answer)
    load = Load(num_clients=1, duration_s=0.01, prompt_words=1, output_len=2)
    (got,), _ = run_load(target, load, num_processes=1)
    join()
    assert got.error == error


def test_prompts_differ_and_come_again_with_the_seed() -> None:
    first, second, again = PromptMaker(9, 1), PromptMaker(9, 2), PromptMaker(9, 1)
    texts = [first.next(), first.next(), second.next()]
    assert len(set(texts)) == 3
    assert again.next() == texts[0]
    assert len(texts[0].split()) == 9


def test_urls_are_checked() -> None:
    with pytest.raises(EngineError, match=r"must be like http://127\.0\.0\.1:8000"):
        run("--url", "127.0.0.1:8000")


def test_a_server_that_cannot_start_is_quoted() -> None:
    with pytest.raises(EngineError, match=r"ended with status 1 before it was ready:\nerror: no model 'nonsense'"):
        run("--model", "nonsense")


def test_a_real_server(default_model: ModelFiles, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("--concurrent-requests", "2", "--duration", "0.2", "--input-len", "9", "--output-len", "5", "--json") == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"] == "smollm2-135m"
    assert 0 < printed["ready_s"] < printed["first_answer_s"]
    (load,) = printed["results"]
    assert load["num_requests"] >= 2
    assert (load["num_failed"], load["prompt_tokens"]) == (0, 9)
    assert load["output_tokens_per_s"] == pytest.approx(5 * load["requests_per_s"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_nothing_is_left_behind(default_model: ModelFiles, tmp_path: Path, number: signal.Signals, status: int) -> None:
    command = [sys.executable, "-m", "cupy_engine.bench.end_to_end", "--duration", "60", "--concurrent-requests", "1"]
    bench = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, start_new_session=True)
    log = wait_for(lambda: next((f for f in tmp_path.glob("*/log") if "ready on" in f.read_text()), None))
    assert log is not None
    bench.send_signal(number)
    assert bench.wait(30) == status
    assert list(tmp_path.iterdir()) == []
    assert wait_for(lambda: not processes_of(bench.pid))


def wait_for(look: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """The first true answer, or the last one."""
    end_s = time.monotonic() + timeout_s
    while not (seen := look()) and time.monotonic() < end_s:
        time.sleep(0.05)
    return seen


def processes_of(session: int) -> list[str]:
    """Live processes of a session; the engine has one of its own, but ends with the server."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            stat = file.read_text()
            if int(stat.rpartition(")")[2].split()[3]) == session:
                found.append(stat)
    return found
