"""Streams written by one thread: in order, framed, never waiting for a client, and gone when they end."""

from __future__ import annotations

import gc
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from cupy_engine.server.api_errors import ClientGoneError
from cupy_engine.server.client_watcher import ClientWatcher
from cupy_engine.server.event_stream import EventStream
from cupy_engine.server.generation import Generation, Service
from cupy_engine.server.mailbox import Mail, Mailbox
from cupy_engine.server.responses import AnswerOptions, Envelope
from cupy_engine.server.server_config import ServerConfig
from cupy_engine.server.stream_loop import StreamLoop
from cupy_engine.server.stream_writer import StreamWriter
from cupy_engine.server.streaming import CompletionChunks
from fake_engine import FakeEngineClient
from live_server import wait_until

from cupy_engine.config import EngineConfig
from cupy_engine.errors import EngineDeadError
from cupy_engine.frontend import FrontEnd
from cupy_engine.messages import GenerateRequest, SequenceOutput
from cupy_engine.sampling_params import SamplingParams


@dataclass
class FakeResponse:
    """What gunicorn's response says about the connection."""

    chunked: bool = True
    must_close: bool = False

    def should_close(self) -> bool:
        return self.must_close


@dataclass
class Stream:
    """A stream in the loop: the engine's mailbox at one end, the client's socket at the other."""

    generation: Generation
    mailbox: Mailbox
    server_side: socket.socket
    client: socket.socket
    ends: list[bool] = field(default_factory=list)

    def say(self, token_id: int, finish_reason: str | None = None) -> None:
        self.mailbox.put([SequenceOutput(request_id="r", token_ids=[token_id], finish_reason=finish_reason)])

    def read(self, until: bytes = b"[DONE]\n\n") -> bytes:
        answer = b""
        while until not in answer and (piece := self.client.recv(65536)):
            answer += piece
        return answer

    def wait_for_end(self) -> bool:
        """Whether the connection may be used again."""
        wait_until(lambda: bool(self.ends), 5, "the stream ends")
        return self.ends[0]


Open = Callable[..., Stream]
WATCHER = ClientWatcher()


@pytest.fixture(scope="module")
def loop() -> StreamLoop:
    loop = StreamLoop()
    loop.start()
    return loop


class HeldEngine(FakeEngineClient):
    """Says nothing by itself."""

    def submit(self, requests: list[GenerateRequest]) -> Mailbox:
        self.mailbox = Mailbox()
        return self.mailbox


@pytest.fixture
def open_stream(loop: StreamLoop, front_end: FrontEnd) -> Iterator[Open]:
    opened: list[Stream] = []

    def open_one(
        response: FakeResponse | None = None,
        timeout_s: float = 60.0,
        first_token: int | None = None,
        first_is_last: bool = False,
        into: StreamLoop = loop,
        **options: float,
    ) -> Stream:
        config = ServerConfig(log_requests=False, **options)
        engine = HeldEngine(lambda request: [])
        service = Service(front_end, engine, WATCHER, EngineConfig(), config)
        request = front_end.make_request("Hi", SamplingParams(), request_id="r", timeout_s=timeout_s)
        server_side, client = socket.socketpair()
        client.settimeout(5)
        server_side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        generation = Generation(service, "r", [request], ["Hi"], server_side)
        chunks = CompletionChunks(Envelope("r", "text_completion", "m"), AnswerOptions(), 1, include_usage=True)
        stream = Stream(generation, engine.mailbox, server_side, client)
        if first_token is not None:
            stream.say(first_token, "length" if first_is_last else None)
        first = [] if first_token is None else generation.receive()
        body = EventStream(generation, first, chunks, config, response or FakeResponse())
        into.take_over(body, server_side, stream.ends.append)
        opened.append(stream)
        return stream

    yield open_one
    for stream in opened:
        stream.generation.close()
        stream.server_side.close()
        stream.client.close()


def texts(answer: bytes) -> list[str]:
    chunks = [json.loads(event) for event in re.findall(rb"data: (\{.*\})\n\n", answer)]
    return [choice["text"] for chunk in chunks for choice in chunk.get("choices", ())]


def test_what_has_come_is_sent_before_the_streams_thread_has_a_turn(open_stream: Open, paris: list[int]) -> None:
    resting = StreamLoop()
    stream = open_stream(first_token=paris[0], into=resting)
    assert texts(stream.read(b"\n\n")) == [" Paris"]
    resting.start()
    stream.say(2, "stop")
    assert stream.read(b"0\r\n\r\n").count(b"text_completion") == 2, "the end and the usage"
    assert stream.wait_for_end() is True


def test_an_answer_that_has_come_whole_ends(open_stream: Open, paris: list[int]) -> None:
    stream = open_stream(first_token=paris[0], first_is_last=True)
    assert texts(stream.read(b"0\r\n\r\n")) == [" Paris"]
    assert stream.wait_for_end() is True


def test_tokens_become_chunks_as_they_come(open_stream: Open, paris: list[int]) -> None:
    stream = open_stream()
    stream.say(paris[0])
    assert texts(stream.read(b"\n\n")) == [" Paris"]
    stream.say(paris[1])
    stream.say(2, "stop")
    answer = stream.read(b"0\r\n\r\n")
    assert "".join(texts(answer)) == ","
    assert b'"completion_tokens":3' in answer
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert stream.wait_for_end() is True


def test_chunk_lengths_are_right(open_stream: Open, paris: list[int]) -> None:
    stream = open_stream()
    stream.say(paris[0])
    stream.say(2, "stop")
    rest, body = stream.read(b"0\r\n\r\n"), b""
    while rest:
        size, rest = rest.split(b"\r\n", 1)
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) :]
        assert rest[:2] == b"\r\n"
        rest = rest[2:]
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


def test_without_chunks_the_end_closes_the_connection(open_stream: Open, paris: list[int]) -> None:
    stream = open_stream(FakeResponse(chunked=False, must_close=True))
    stream.say(2, "stop")
    assert stream.read().startswith(b"data: {")
    assert stream.wait_for_end() is False


def say_apart(stream: Stream, token_ids: list[int]) -> None:
    """More than the connection takes, a token at a time."""
    for token_id in token_ids:
        stream.say(token_id)
        time.sleep(0.001)


def test_a_client_that_does_not_read_holds_up_nobody_and_gets_merged_chunks(
    open_stream: Open, paris: list[int]
) -> None:
    slow, quick = open_stream(), open_stream()
    num_said = 200
    say_apart(slow, [paris[0]] * num_said)
    slow.say(2, "stop")
    start_s = time.monotonic()
    quick.say(paris[0])
    quick.say(2, "stop")
    quick.read()
    assert time.monotonic() - start_s < 2
    assert not slow.ends, "it has not been read yet"
    shown = texts(slow.read())
    assert "".join(shown) == " Paris" * num_said, "nothing is lost, and the end comes without another token"
    assert len(shown) < num_said / 2
    assert slow.wait_for_end() is True


def test_a_client_that_never_reads_is_given_up_on(open_stream: Open, paris: list[int]) -> None:
    stream = open_stream(client_write_timeout_s=0.1)
    say_apart(stream, [paris[0]] * 100)
    assert stream.wait_for_end() is False


def test_a_client_that_leaves_ends_the_stream(open_stream: Open, paris: list[int]) -> None:
    stream = open_stream()
    stream.say(paris[0])
    stream.read(b"\n\n")
    stream.client.close()
    assert stream.wait_for_end() is False


def test_a_waiting_client_gets_comments(open_stream: Open) -> None:
    stream = open_stream(keep_alive_comment_s=0.05)
    assert b": keep-alive\n\n" in stream.read(b"\n\n")


def test_an_engine_that_is_silent_past_the_deadline_is_an_error_event(
    open_stream: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cupy_engine.server.generation.DEADLINE_GRACE_S", 0.0)
    stream = open_stream(timeout_s=0.1)
    assert b'"code":"deadline_exceeded"' in stream.read()
    assert stream.wait_for_end() is True


def test_a_failure_is_an_error_event_after_what_has_come(open_stream: Open, paris: list[int]) -> None:
    stream = open_stream()
    stream.say(paris[0])
    stream.mailbox.put(lambda: EngineDeadError("the engine process has ended"))
    answer = stream.read()
    assert answer.index(b" Paris") < answer.index(b'"code":"engine_unavailable"')
    assert stream.wait_for_end() is True


def test_nothing_is_said_after_the_end(open_stream: Open, paris: list[int]) -> None:
    stream = open_stream()
    stream.mailbox.put(ClientGoneError)
    stream.say(paris[0])
    assert stream.wait_for_end() is False
    assert len(stream.ends) == 1


@pytest.mark.parametrize(
    "last_words",
    [
        [SequenceOutput(request_id="r", token_ids=[2], finish_reason="stop")],
        [SequenceOutput(request_id="r", finish_reason="error", error="late", error_kind="deadline")],
        ClientGoneError,
        lambda: EngineDeadError("the engine process has ended"),
    ],
    ids=["a whole answer", "a failure", "a client that left", "a lost engine"],
)
def test_a_writer_goes_with_its_stream(open_stream: Open, last_words: Mail) -> None:
    gc.collect()
    gc.disable()
    num_before = num_writers()
    stream = open_stream()
    stream.mailbox.put(last_words)
    stream.wait_for_end()
    wait_until(lambda: num_writers() <= num_before, 2, "nothing waits for the garbage collector")
    gc.enable()


def num_writers() -> int:
    return sum(type(each) is StreamWriter for each in gc.get_objects())


def test_many_streams_need_one_thread(open_stream: Open, paris: list[int]) -> None:
    before = threading.active_count()
    streams = [open_stream() for _ in range(100)]
    assert threading.active_count() <= before + 1, "the client watcher, if no test before has started it"
    for stream in streams:
        stream.say(paris[0])
    for stream in streams:
        stream.say(2, "stop")
    for stream in streams:
        assert "".join(texts(stream.read())) == " Paris"
