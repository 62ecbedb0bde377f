"""Loads: clients that ask again and again (a closed loop), or requests that come by chance (an open one)."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Iterable, Iterator, Sequence

from .http_client import Address, Connection, Crowd, Exchange

_RETRY_S = 0.1
_GRACE_S = 60.0  # for what is under way at the end of an open loop
_TICK_S = 1.0


def closed_loop(
    address: Address,
    requests: Iterator[bytes],
    num_clients: int,
    duration_s: float,
    *,
    start_s: float | None = None,
    grace_s: float = 0.0,
) -> list[Exchange]:
    """The exchanges of clients that send a request when the answer to their last has ended.

    After ``duration_s`` none is begun; what is under way has ``grace_s`` to end, and is left out where that is 0.
    Whoever is refused or cut off waits for a moment.
    """
    start_s = time.monotonic() if start_s is None else start_s
    line = _Line(address, requests, [start_s] * num_clients, again_until_s=start_s + duration_s)
    return line.run(start_s + duration_s + grace_s, keeps_unended=grace_s > 0)


def open_loop(
    address: Address,
    requests: Iterator[bytes],
    per_s: float,
    duration_s: float,
    *,
    start_s: float | None = None,
    grace_s: float = _GRACE_S,
    seed: int = 0,
) -> list[Exchange]:
    """The exchanges of requests that arrive at random, ``per_s`` on average, whatever becomes of those before."""
    start_s = time.monotonic() if start_s is None else start_s
    line = _Line(address, requests, _arrivals_s(per_s, start_s, duration_s, seed))
    return line.run(start_s + duration_s + grace_s, keeps_unended=True)


def _arrivals_s(per_s: float, start_s: float, duration_s: float, seed: int) -> Iterator[float]:
    rng, arrival_s = random.Random(seed), start_s
    while (arrival_s := arrival_s + rng.expovariate(per_s)) < start_s + duration_s:
        yield arrival_s


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie; NaN if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class _Line:
    """Requests that wait for the time at which they are due, from which their latencies count.

    Args:
        due_s: of those that are known beforehand, in order.
        again_until_s: until then each client asks again.
    """

    def __init__(
        self, address: Address, requests: Iterator[bytes], due_s: Iterable[float], again_until_s: float | None = None
    ) -> None:
        self._requests = requests
        self._due_s = list(due_s)  # a heap
        self._again_until_s = again_until_s
        self._crowd = Crowd(address, self._end)
        self._idle: list[Connection] = []
        self._num_busy = 0
        self._done: list[Exchange] = []

    def run(self, end_s: float, *, keeps_unended: bool) -> list[Exchange]:
        """What has become of the requests by ``end_s`` at the latest."""
        while (self._due_s or self._num_busy) and (now_s := time.monotonic()) < end_s:
            while self._due_s and self._due_s[0] <= now_s:
                self._start(heapq.heappop(self._due_s))
            next_s = min(end_s, self._due_s[0] if self._due_s else now_s + _TICK_S)
            self._crowd.poll(max(0.0, next_s - now_s))
        if keeps_unended:
            self._done += map(_without_end, filter(lambda each: each.is_busy, self._crowd.connections.values()))
        self._crowd.close_all()
        return self._done

    def _start(self, due_s: float) -> None:
        self._num_busy += 1
        while self._idle:
            connection = self._idle.pop()
            if self._crowd.is_open(connection) and connection.can_go_on:
                connection.send(next(self._requests), due_s)
                return
        try:
            self._crowd.open(next(self._requests), start_s=due_s)
        except OSError as error:
            self._finish(Exchange(due_s, end_s=time.monotonic(), error=str(error)))

    def _end(self, connection: Connection) -> None:
        if connection.can_go_on:
            self._idle.append(connection)
        else:
            self._crowd.close(connection)
        self._finish(connection.exchange)

    def _finish(self, exchange: Exchange) -> None:
        """Keep it; in a closed loop its client asks again."""
        self._num_busy -= 1
        self._done.append(exchange)
        if self._again_until_s is not None:
            next_s = exchange.end_s + (_RETRY_S if exchange.error else 0.0)
            if next_s < self._again_until_s:
                heapq.heappush(self._due_s, next_s)


def _without_end(connection: Connection) -> Exchange:
    exchange = connection.exchange
    exchange.end_s, exchange.error = time.monotonic(), "no end of the answer"
    return exchange
