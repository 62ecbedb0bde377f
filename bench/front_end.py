"""What the HTTP side costs: requests per second, streams held, latency, CPU time per token.

python -m cupy_engine.bench.front_end --workers 1 --streams 256 1000

The server runs the default model's dummy twin (its tokenizer, but next to nothing to compute), so that the front end
is what is measured. CPU time is that of the gunicorn workers, as the kernel counts it. Latency is that of
``POST /tokenize`` with a chat of 100 tokens, which never reaches the engine: alone, and while all streams run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from .http_client import Connection, Crowd, post
from .loops import closed_loop, quantile
from .server_process import ServerProcess, usage_of
from .twin import common_words, random_texts, serve_twin

PROMPT_LEN = 64
CHAT_LEN = 100
NUM_CLIENTS = 16
MAX_TOKENS = 8000
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class RequestFigures:
    """Requests of one token, not streamed, from 16 clients that wait for each answer. Latencies of /tokenize, idle."""

    requests_per_s: float
    cpu_us_per_request: float
    latency_p50_ms: float
    latency_p99_ms: float


@dataclass(frozen=True, slots=True)
class StreamFigures:
    """``num_streams`` at once. ``num_held``: how many ran at the same time. Latencies of /tokenize beside them."""

    num_streams: int
    num_held: int
    num_slow: int
    tokens_per_s: float
    cpu_us_per_token: float
    gap_p50_ms: float
    gap_p99_ms: float
    latency_p50_ms: float
    latency_p99_ms: float
    num_threads: int
    rss_mib: float


class FrontEndBench:
    """Measures one server."""

    def __init__(self, server: ServerProcess, words: list[str], seconds: float) -> None:
        self._server = server
        self._workers = server.worker_pids()
        self._texts = random_texts(words, PROMPT_LEN)
        self._chats = random_texts(words, CHAT_LEN)
        self._seconds = seconds

    def requests(self) -> RequestFigures:
        self._run_requests(1.0)
        cpu_s = usage_of(self._workers).cpu_s
        num_done = self._run_requests(self._seconds)
        cpu_s = usage_of(self._workers).cpu_s - cpu_s
        latency_p50_ms, latency_p99_ms = self._latency(self._seconds / 2)
        return RequestFigures(num_done / self._seconds, cpu_s / num_done * 1e6, latency_p50_ms, latency_p99_ms)

    def streams(self, num_streams: int, num_slow: int = 0) -> StreamFigures:
        """Open streams, wait until all of them run, and measure; the first ``num_slow`` clients read nothing."""
        crowd = Crowd(self._server.address, on_end=lambda connection: None)
        body = {"stream": True, "max_tokens": MAX_TOKENS, "ignore_eos": True}
        for number in range(num_streams):
            crowd.open(post("/v1/completions", {"prompt": next(self._texts), **body}), reads=number >= num_slow)
        try:
            return self._measure(crowd, num_streams, num_slow)
        finally:
            crowd.close_all()

    def _measure(self, crowd: Crowd, num_streams: int, num_slow: int) -> StreamFigures:
        readers = [each.exchange for each in crowd.connections.values() if each.reads]
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not all(each.event_times_s for each in readers) and time.monotonic() < deadline_s:
            crowd.run_until(time.monotonic() + 0.2)
        for each in readers:
            del each.event_times_s[:-1]
        num_tokens = self._server.metric("generation_tokens_total")
        before, start_s = usage_of(self._workers), time.monotonic()
        crowd.run_until(start_s + self._seconds)
        after, seconds = usage_of(self._workers), time.monotonic() - start_s
        num_tokens = self._server.metric("generation_tokens_total") - num_tokens
        num_held = int(self._server.metric("num_requests_running"))
        gaps_s = [gap_s for each in readers for gap_s in each.gaps_s()]
        latency_p50_ms, latency_p99_ms = self._latency_beside(crowd)
        return StreamFigures(
            num_streams,
            num_held,
            num_slow,
            num_tokens / seconds,
            (after.cpu_s - before.cpu_s) / num_tokens * 1e6,
            quantile(gaps_s, 0.5) * 1e3,
            quantile(gaps_s, 0.99) * 1e3,
            latency_p50_ms,
            latency_p99_ms,
            after.num_threads,
            after.rss_bytes / 2**20,
        )

    def _run_requests(self, seconds: float) -> int:
        done = closed_loop(self._server.address, self._completions(), NUM_CLIENTS, seconds)
        return sum(each.error is None for each in done)

    def _completions(self) -> Iterator[bytes]:
        for text in self._texts:
            yield post("/v1/completions", {"prompt": text, "max_tokens": 1})

    def _tokenizations(self) -> Iterator[bytes]:
        for text in self._chats:
            yield post("/tokenize", {"messages": [{"role": "user", "content": text}]})

    def _latency(self, seconds: float) -> tuple[float, float]:
        """p50 and p99 of one client, in milliseconds."""
        done = closed_loop(self._server.address, self._tokenizations(), 1, seconds)
        times_s = [each.total_s for each in done]
        return quantile(times_s, 0.5) * 1e3, quantile(times_s, 0.99) * 1e3

    def _latency_beside(self, crowd: Crowd) -> tuple[float, float]:
        """The same while the streams of ``crowd`` go on."""
        requests = self._tokenizations()
        times_s: list[float] = []

        def again(connection: Connection) -> None:
            times_s.append(connection.exchange.total_s)
            connection.send(next(requests))

        crowd.open(next(requests), on_end=again)
        crowd.run_until(time.monotonic() + self._seconds / 2)
        return quantile(times_s, 0.5) * 1e3, quantile(times_s, 0.99) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="gunicorn workers (default: 1)")
    parser.add_argument("--worker-class", help="gunicorn worker class (default: the server's)")
    parser.add_argument("--streams", type=int, nargs="+", default=[256, 1000], help="(default: 256 1000)")
    parser.add_argument("--slow", type=int, default=0, help="streams whose clients read nothing (default: 0)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default: 10)")
    arguments = parser.parse_args()
    num_seqs = max(arguments.streams)
    options = ["--workers", str(arguments.workers), "--max-num-seqs", str(num_seqs)]
    options += ["--max-num-mixed-tokens", str(2 * num_seqs)]
    if arguments.worker_class:
        options += ["--worker-class", arguments.worker_class]
    with serve_twin(*options) as server:
        bench = FrontEndBench(server, common_words(), arguments.seconds)
        _show(bench.requests())
        for num_streams in arguments.streams:
            _show(bench.streams(num_streams, arguments.slow))
    return 0


def _show(figures: RequestFigures | StreamFigures) -> None:
    plain = {name: round(value, 2) for name, value in dataclasses.asdict(figures).items()}
    print(json.dumps(plain), flush=True)


if __name__ == "__main__":
    sys.exit(main())
