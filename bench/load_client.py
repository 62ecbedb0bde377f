"""Streaming clients in one process, light enough not to be what is measured: raw sockets, one loop, no threads.

    python -m cupy_engine.bench.load_client    stdin: a spec in one line, then the time to start; stdout: \n, a result

Requests wait in line by the time at which they are due. In a closed loop a client's next request is due when its last
one ends; in an open one the times are drawn beforehand. Times of an answer count from when its request was due.
"""

from __future__ import annotations

import heapq
import random
import selectors
import socket
import sys
import time

import msgspec

from .http_stream import StreamReader
from .prompts import PromptMaker

_GRACE_S = 120.0  # for answers under way when no more requests are sent
_RETRY_S = 0.1
_TIMEOUT_S = 10.0
_RECEIVE_BYTES = 1 << 16


class LoadSpec(msgspec.Struct, kw_only=True):
    """What one process does. Times in seconds.

    ``num_clients`` clients in a closed loop or, with a ``request_rate`` per second, as many as arrivals by chance
    (Poisson) make. ``prompt_words`` is a prompt's length; another ``seed`` makes other prompts and arrivals.
    """

    host: str
    port: int
    model: str
    api_key: str | None
    num_clients: int
    duration_s: float
    request_rate: float | None
    prompt_words: int
    output_len: int
    seed: int


class Answer(msgspec.Struct, array_like=True):
    """One request: when it was due, when its tokens came, when it ended, and how many tokens the server counted."""

    due_s: float
    event_times_s: list[float]
    end_s: float
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None


class LoadResult(msgspec.Struct):
    """Every answer, and the share of a core that the process took."""

    answers: list[Answer]
    cpu_share: float


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decoder = msgspec.json.Decoder(_Chunk)


class Connection:
    """A connection to the server; carries one request at a time."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, _TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answer = Answer(0.0, [], 0.0)
        self._reader = StreamReader()

    @property
    def keeps_alive(self) -> bool:
        return self._reader.is_done and self._reader.keeps_alive

    def send(self, request: bytes, due_s: float) -> None:
        self.answer = Answer(due_s, [], 0.0)
        self._reader = StreamReader()
        self.socket.sendall(request)

    def receive(self, now_s: float) -> bool:
        """Take in what has arrived; whether the answer has ended."""
        data = self.socket.recv(_RECEIVE_BYTES)
        for event in self._reader.feed(data):
            if event != b"[DONE]":
                self._take(_decoder.decode(event), now_s)
        if not data or self._reader.is_done:
            self.answer.end_s = now_s
            self._check(bool(data))
            return True
        return False

    def _take(self, chunk: _Chunk, now_s: float) -> None:
        if chunk.choices:
            self.answer.event_times_s.append(now_s)
        if chunk.usage is not None:
            self.answer.num_prompt_tokens = chunk.usage.prompt_tokens
            self.answer.num_output_tokens = chunk.usage.completion_tokens
        if chunk.error is not None:
            self.answer.error = bytes(chunk.error).decode()

    def _check(self, is_open: bool) -> None:
        if self._reader.status != 200 and self._reader.status is not None:
            self.answer.error = f"status {self._reader.status}: {self._reader.text[:300]}"
        elif not (is_open or self._reader.is_done) or not self.answer.event_times_s:
            self.answer.error = self.answer.error or "the connection ended before the answer"


class LoadClient:
    """Keeps the requests of a spec going. ``start_s`` is on the monotonic clock."""

    def __init__(self, spec: LoadSpec, start_s: float) -> None:
        self._spec = spec
        self._start_s = start_s
        self._stop_s = start_s + spec.duration_s
        self._prompts = PromptMaker(spec.prompt_words, spec.seed)
        self._selector = selectors.DefaultSelector()
        self._idle: list[Connection] = []
        self._answers: list[Answer] = []
        self._due_s = self._first_due_s()
        self._num_live = 0

    def run(self) -> LoadResult:
        """Until every answer has ended, or has had time enough."""
        cpu_s = time.process_time()
        while (self._due_s or self._num_live) and time.monotonic() < self._stop_s + _GRACE_S:
            for key, _ in self._selector.select(self._wait_s()):
                self._receive(key.data)
            while self._due_s and self._due_s[0] <= time.monotonic():
                self._start(heapq.heappop(self._due_s))
        self._give_up()
        return LoadResult(self._answers, (time.process_time() - cpu_s) / (time.monotonic() - self._start_s))

    def _first_due_s(self) -> list[float]:
        """The requests known beforehand, as a heap."""
        spec = self._spec
        if spec.request_rate is None:
            return [self._start_s] * spec.num_clients
        gaps_s, due_s, times_s = random.Random(spec.seed), self._start_s, []
        while (due_s := due_s + gaps_s.expovariate(spec.request_rate)) < self._stop_s:
            times_s.append(due_s)
        return times_s

    def _wait_s(self) -> float:
        return max(0.0, self._due_s[0] - time.monotonic()) if self._due_s else 1.0

    def _start(self, due_s: float) -> None:
        try:
            connection = self._idle.pop() if self._idle else Connection((self._spec.host, self._spec.port))
            connection.send(self._request(), due_s)
        except OSError as error:
            now_s = time.monotonic()
            self._finish(Answer(due_s, [], now_s, error=str(error)))
            return
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        self._num_live += 1

    def _receive(self, connection: Connection) -> None:
        try:
            has_ended = connection.receive(time.monotonic())
        except (OSError, msgspec.DecodeError, ValueError) as error:
            connection.answer.error, connection.answer.end_s, has_ended = str(error), time.monotonic(), True
        if not has_ended:
            return
        self._selector.unregister(connection.socket)
        self._num_live -= 1
        if connection.keeps_alive and connection.answer.error is None:
            self._idle.append(connection)
        else:
            connection.socket.close()
        self._finish(connection.answer)

    def _finish(self, answer: Answer) -> None:
        """Keep the answer; in a closed loop its client asks again."""
        self._answers.append(answer)
        next_s = answer.end_s + (_RETRY_S if answer.error else 0.0)
        if self._spec.request_rate is None and next_s < self._stop_s:
            heapq.heappush(self._due_s, next_s)

    def _give_up(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.data.answer.error, key.data.answer.end_s = "no end of the answer", time.monotonic()
            self._answers.append(key.data.answer)
            key.data.socket.close()
        for connection in self._idle:
            connection.socket.close()
        self._selector.close()

    def _request(self) -> bytes:
        body = {
            "model": self._spec.model,
            "prompt": self._prompts.next(),
            "max_tokens": self._spec.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        payload = msgspec.json.encode(body)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._spec.host}\r\nContent-Type: application/json\r\n"
        if self._spec.api_key:
            head += f"Authorization: Bearer {self._spec.api_key}\r\n"
        return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


def main() -> int:
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=LoadSpec)
    sys.stdout.buffer.write(b"\n")  # ready
    sys.stdout.buffer.flush()
    client = LoadClient(spec, float(sys.stdin.buffer.readline()))
    sys.stdout.buffer.write(msgspec.json.encode(client.run()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
