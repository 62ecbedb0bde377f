"""A load of streaming clients, spread over processes, and what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median

import msgspec
from tqdm import tqdm

from cupy_engine.errors import EngineError

from .load_client import Answer, LoadResult, LoadSpec
from .report import Figures, percentiles

_START_DELAY_S = 0.05  # between telling the clients when to start and that time
_TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and the model to ask it for."""

    host: str
    port: int
    model: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """``num_clients`` in a closed loop or ``request_rate`` requests a second, for ``duration_s``.

    ``prompt_words`` and ``output_len`` (tokens) are each request's size.
    """

    num_clients: int
    duration_s: float
    prompt_words: int
    output_len: int
    request_rate: float | None = None
    seed: int = 0

    def describe(self) -> str:
        return f"C = {self.num_clients}" if self.request_rate is None else f"{self.request_rate:g} requests/s"


def default_num_processes(num_clients: int) -> int:
    """A quarter of the cores: the server needs the others."""
    return min(num_clients, 8, max(1, (os.cpu_count() or 1) // 4))


def run_load(target: Target, load: Load, num_processes: int) -> tuple[list[Answer], float]:
    """Every answer, and the share of a core that the busiest client process took.

    Raises:
        EngineError: a client process failed.
    """
    with _clients(_specs(target, load, num_processes)) as clients:
        for client in clients:
            assert client.stdout is not None
            client.stdout.readline()
        start_s = time.monotonic() + _START_DELAY_S
        for client in clients:
            assert client.stdin is not None
            client.stdin.write(f"{start_s}\n".encode())
            client.stdin.flush()
        _show_time(load, start_s)
        results = [_result_of(client) for client in clients]
    return [answer for result in results for answer in result.answers], max(result.cpu_share for result in results)


def _specs(target: Target, load: Load, num_processes: int) -> Iterator[LoadSpec]:
    for index in range(num_processes):
        yield LoadSpec(
            host=target.host,
            port=target.port,
            model=target.model,
            api_key=target.api_key,
            num_clients=len(range(index, load.num_clients, num_processes)),
            duration_s=load.duration_s,
            request_rate=None if load.request_rate is None else load.request_rate / num_processes,
            prompt_words=load.prompt_words,
            output_len=load.output_len,
            seed=load.seed * 1000 + index,
        )


@contextmanager
def _clients(specs: Iterator[LoadSpec]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that have been given their spec; ended with the context."""
    clients: list[subprocess.Popen[bytes]] = []
    command = [sys.executable, "-m", "cupy_engine.bench.load_client"]
    try:
        for spec in specs:
            clients.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            stdin = clients[-1].stdin
            assert stdin is not None
            stdin.write(msgspec.json.encode(spec) + b"\n")
            stdin.flush()
        yield clients
    finally:
        for client in clients:
            client.kill()
            client.communicate()


def _show_time(load: Load, start_s: float) -> None:
    """A bar that fills while the clients work."""
    with tqdm(total=load.duration_s, unit="s", desc=load.describe(), disable=None, leave=False) as bar:
        while (passed_s := time.monotonic() - start_s) < load.duration_s:
            bar.update(max(0.0, passed_s) - bar.n)
            time.sleep(min(_TICK_S, load.duration_s - passed_s))


def _result_of(client: subprocess.Popen[bytes]) -> LoadResult:
    output, _ = client.communicate()
    if client.returncode:
        raise EngineError(f"a client process of the load failed with status {client.returncode}; see above")
    return msgspec.json.decode(output, type=LoadResult)


def summarize(answers: Sequence[Answer], which: Sequence[float]) -> Figures:
    """Rates over the time from the first request to the end of the last answer, and percentiles of the latencies.

    Failed requests count as such and as nothing else. Percentiles of ITL are over all pairs of neighbouring events.
    """
    good = [answer for answer in answers if answer.error is None]
    figures: Figures = {"num_requests": len(good), "num_failed": len(answers) - len(good)}
    if not good:
        return figures
    span_s = max(answer.end_s for answer in answers) - min(answer.due_s for answer in answers)
    num_tokens = sum(answer.num_output_tokens or len(answer.event_times_s) for answer in good)
    figures |= {
        "prompt_tokens": mean(answer.num_prompt_tokens for answer in good),
        "requests_per_s": len(good) / span_s,
        "output_tokens_per_s": num_tokens / span_s,
    }
    figures |= percentiles("ttft_s", [answer.event_times_s[0] - answer.due_s for answer in good], which)
    gaps_s = [later - earlier for answer in good for earlier, later in pairwise(answer.event_times_s)]
    figures |= percentiles("itl_s", gaps_s, which)
    spread = [answer for answer in good if len(answer.event_times_s) > 1]
    if spread:
        figures["time_per_output_token_s"] = median(map(_time_per_token, spread))
    return figures


def _time_per_token(answer: Answer) -> float:
    num_tokens = answer.num_output_tokens or len(answer.event_times_s)
    return (answer.event_times_s[-1] - answer.event_times_s[0]) / (num_tokens - 1)
