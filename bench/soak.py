"""Thousands of requests of every kind, also bad ones, and what the server still holds afterwards.

python -m cupy_engine.bench.soak --requests 20000

Half of the requests run to their end; the others are aborted by clients that leave at a random moment, have a deadline
that passes, or are malformed. Memory, threads and descriptors are taken when the server is idle, first after a tenth of
the requests, which fills its pools and caches.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass

from .http_client import Connection, Crowd, post
from .server_process import ServerProcess, Usage, usage_of
from .twin import common_words, serve_twin

NUM_CLIENTS = 32
IDLE_TIMEOUT_S = 30.0
SERVER_OPTIONS = ("--num-kv-blocks", "2048", "--max-model-len", "2048", "--max-num-seqs", "24")
_MALFORMED = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: nonsense\r\n\r\n{}",
    b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"prompt"',
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 10_000 + b"\r\n\r\n",
    b"POST /v1/comple",
    post("/v1/completions", {"prompt": [[1, -5], ["x"]]}),
    post("/v1/completions", {"prompt": "x", "max_tokens": -1}),
    post("/v1/completions", {"prompt": ["a"] * 1000}),
    post("/v1/chat/completions", {"messages": "x"}),
    post("/nowhere", {}),
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the idle server holds after ``num_requests``. ``is_idle``: no request and no block is left."""

    num_requests: int
    is_idle: bool
    workers: Usage
    engine: Usage


class Soak:
    """Sends requests; ``outcomes`` counts statuses, and "left" for those whose client hung up."""

    def __init__(self, server: ServerProcess, words: list[str], seed: int = 0) -> None:
        self._server = server
        self._words = words
        self._random = random.Random(seed)
        self._crowd = Crowd(server.address, self._end)
        self._leaving: list[tuple[float, int, Connection]] = []  # when clients hang up, earliest first
        self._order = itertools.count()
        self._num_opened = 0
        self.outcomes: Counter[str] = Counter()

    def run(self, num_requests: int) -> Snapshot:
        """Send that many more, and wait until all of them are over."""
        last = self._num_opened + num_requests
        while self._num_opened < last or self._crowd.connections:
            while self._num_opened < last and len(self._crowd.connections) < NUM_CLIENTS:
                self._open()
            self._crowd.run_until(time.monotonic() + 0.002)
            self._hang_up()
        return self._snapshot()

    def _open(self) -> None:
        self._num_opened += 1
        kind = self._random.random()
        if kind < 0.1:
            connection, patience_s = self._crowd.open(self._random.choice(_MALFORMED)), 0.2
        elif kind < 0.35:
            connection, patience_s = self._crowd.open(self._request(500)), self._random.expovariate(1 / 0.05)
        elif kind < 0.5:
            connection, patience_s = (
                self._crowd.open(self._request(500, timeout_s=self._random.uniform(0.001, 0.2))),
                30,
            )
        else:
            connection, patience_s = self._crowd.open(self._request(self._random.randint(1, 24))), 30
        heapq.heappush(self._leaving, (time.monotonic() + patience_s, next(self._order), connection))

    def _request(self, max_tokens: int, **fields: object) -> bytes:
        rng = self._random
        prompt = " " + " ".join(rng.choices(self._words, k=rng.randint(1, 100)))
        body = {"max_tokens": max_tokens, "stream": rng.random() < 0.7, "ignore_eos": True, **fields}
        if rng.random() < 0.2:
            body["n"] = rng.randint(2, 4)
        if rng.random() < 0.1:
            body["stop"] = rng.choices(self._words, k=2)
        return post("/v1/completions", {"prompt": prompt, **body})

    def _end(self, connection: Connection) -> None:
        self.outcomes[str(connection.exchange.status)] += 1
        self._crowd.close(connection)

    def _hang_up(self) -> None:
        while self._leaving and self._leaving[0][0] <= time.monotonic():
            connection = heapq.heappop(self._leaving)[2]
            if self._crowd.is_open(connection):
                self.outcomes["left"] += 1
                self._crowd.close(connection)

    def _snapshot(self) -> Snapshot:
        deadline_s = time.monotonic() + IDLE_TIMEOUT_S
        while not (is_idle := self._server.is_idle()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        time.sleep(0.5)  # for connections to be closed on the server's side
        server = self._server
        return Snapshot(self._num_opened, is_idle, usage_of(server.worker_pids()), usage_of(server.engine_pids()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="(default: 20000)")
    parser.add_argument("--workers", type=int, default=1, help="gunicorn workers (default: 1)")
    arguments = parser.parse_args()
    with serve_twin(*SERVER_OPTIONS, "--workers", str(arguments.workers)) as server:
        soak, start_s = Soak(server, common_words()), time.monotonic()
        for _ in range(10):
            print(json.dumps(asdict(soak.run(arguments.requests // 10))), flush=True)
        print(json.dumps({"outcomes": soak.outcomes, "seconds": round(time.monotonic() - start_s)}))
        print(server.log()[-1000:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
