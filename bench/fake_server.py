"""A server that computes nothing: completions of prepared events, at given times or as fast as they can be sent.

Against it the clients of a load show their own ceiling, and whether what they measure is what happened.

    python -m cupy_engine.bench.fake_server PORT NUM_TOKENS TTFT_S ITL_S
"""

from __future__ import annotations

import heapq
import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .load import Target

MODEL = "fake"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_LAST = b"0\r\n\r\n"
_RECEIVE_BYTES = 1 << 16


@contextmanager
def fake_server(num_tokens: int, ttft_s: float, itl_s: float, num_processes: int = 1) -> Iterator[Target]:
    """Processes that share one port."""
    with _listener(0) as placeholder:  # holds the port; does not listen
        port = placeholder.getsockname()[1]
        command = [sys.executable, "-m", "cupy_engine.bench.fake_server", *map(str, (port, num_tokens, ttft_s, itl_s))]
        servers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(num_processes)]
        try:
            for server in servers:
                assert server.stdout is not None
                server.stdout.readline()
            yield Target("127.0.0.1", port, MODEL)
        finally:
            for server in servers:
                server.kill()
                server.communicate()


def _listener(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    return listener


@dataclass(slots=True)
class _Peer:
    """A connection, and how many pieces of the answer it has got."""

    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)
    num_sent: int = 0


class FakeServer:
    """Answers every POST with the same stream. ``ttft_s``: until the first token; ``itl_s``: from one to the next."""

    def __init__(self, listener: socket.socket, num_tokens: int, ttft_s: float, itl_s: float) -> None:
        self._listener = listener
        self._pieces = answer_pieces(num_tokens)
        self._ttft_s = ttft_s
        self._itl_s = itl_s
        self._due: list[tuple[float, int, _Peer]] = []
        self._num_pushed = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)

    def run(self) -> None:
        """Serve until killed."""
        while True:
            wait_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for key, _ in self._selector.select(wait_s):
                self._accept() if key.data is None else self._receive(key.data)
            now_s = time.monotonic()
            while self._due and self._due[0][0] <= now_s:
                self._send(*heapq.heappop(self._due))

    def _accept(self) -> None:
        peer = _Peer(self._listener.accept()[0])
        peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(peer.socket, selectors.EVENT_READ, peer)

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(_RECEIVE_BYTES)
        except ConnectionError:  # it left in the middle of its answer
            data = b""
        if not data:
            self._selector.unregister(peer.socket)
            peer.socket.close()
            return
        peer.received += data
        head, _, body = peer.received.partition(b"\r\n\r\n")
        _, _, length = head.lower().partition(b"content-length: ")
        if length and len(body) >= int(length.split(b"\r\n")[0]):
            peer.received.clear()
            peer.num_sent = 0
            self._push(time.monotonic() + self._ttft_s, peer)

    def _push(self, due_s: float, peer: _Peer) -> None:
        self._num_pushed += 1
        heapq.heappush(self._due, (due_s, self._num_pushed, peer))

    def _send(self, due_s: float, _order: int, peer: _Peer) -> None:
        try:
            peer.socket.sendall(self._pieces[peer.num_sent])
        except OSError:  # the client has left; its end of the connection says so too
            return
        peer.num_sent += 1
        if peer.num_sent < len(self._pieces):
            self._push(due_s + self._itl_s if self._itl_s else time.monotonic(), peer)


def answer_pieces(num_tokens: int) -> list[bytes]:
    """What is sent for each token: its event; the head comes with the first one, usage and end with the last."""
    pieces = [_chunk(_event({"index": 0, "text": " word", "logprobs": None, "finish_reason": None}))] * num_tokens
    usage = {"prompt_tokens": 1, "completion_tokens": num_tokens, "total_tokens": num_tokens + 1}
    pieces[0] = _HEAD + pieces[0]
    pieces[-1] += _chunk(_event(None, usage=usage)) + _chunk(b"data: [DONE]\n\n") + _LAST
    return pieces


def _event(choice: dict[str, object] | None, **more: object) -> bytes:
    body = {"id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 1_700_000_000, "model": MODEL}
    return b"data: " + json.dumps(body | {"choices": [choice] if choice else []} | more).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def main(arguments: list[str]) -> None:
    port, num_tokens, ttft_s, itl_s = arguments
    listener = _listener(int(port))
    listener.listen(1024)
    print(flush=True)
    FakeServer(listener, int(num_tokens), float(ttft_s), float(itl_s)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
