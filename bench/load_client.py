"""One process of a load of streaming clients.

    python -m cupy_engine.bench.load_client    stdin: a spec in one line, then the time to start; stdout: \n, a result

Times of an answer count from when its request was due.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import msgspec

from .http_client import Exchange, post
from .loops import closed_loop, open_loop
from .prompts import PromptMaker

_GRACE_S = 120.0  # for answers under way when no more requests are sent


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


def answer_of(exchange: Exchange) -> Answer:
    """What an exchange says: its last event has the usage, or what went wrong, and no token."""
    answer = Answer(exchange.start_s, exchange.event_times_s, exchange.end_s, error=exchange.error)
    try:
        last = _decoder.decode(exchange.last_event or b"{}")
    except msgspec.DecodeError as error:
        answer.error = answer.error or str(error)
        return answer
    if exchange.last_event and not last.choices:
        answer.event_times_s.pop()
    if last.usage is not None:
        answer.num_prompt_tokens = last.usage.prompt_tokens
        answer.num_output_tokens = last.usage.completion_tokens
    if last.error is not None:
        answer.error = bytes(last.error).decode()
    elif not answer.event_times_s:
        answer.error = answer.error or "the answer has no tokens"
    return answer


def run(spec: LoadSpec, start_s: float) -> LoadResult:
    """Keep the requests of a spec going, until every answer has ended or has had time enough.

    Args:
        start_s: on the monotonic clock.
    """
    cpu_s, address, requests = time.process_time(), (spec.host, spec.port), _requests(spec)
    if spec.request_rate is None:
        done = closed_loop(address, requests, spec.num_clients, spec.duration_s, start_s=start_s, grace_s=_GRACE_S)
    else:
        done = open_loop(
            address, requests, spec.request_rate, spec.duration_s, start_s=start_s, grace_s=_GRACE_S, seed=spec.seed
        )
    cpu_share = (time.process_time() - cpu_s) / (time.monotonic() - start_s)
    return LoadResult([answer_of(exchange) for exchange in done], cpu_share)


def _requests(spec: LoadSpec) -> Iterator[bytes]:
    prompts = PromptMaker(spec.prompt_words, spec.seed)
    body = {
        "model": spec.model,
        "max_tokens": spec.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    while True:
        yield post("/v1/completions", {**body, "prompt": prompts.next()}, spec.api_key)


def main() -> int:
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=LoadSpec)
    sys.stdout.buffer.write(b"\n")  # ready
    sys.stdout.buffer.flush()
    result = run(spec, float(sys.stdin.buffer.readline()))
    sys.stdout.buffer.write(msgspec.json.encode(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
