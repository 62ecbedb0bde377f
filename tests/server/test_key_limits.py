"""What a key may ask of the server, counted over all workers, also those that were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_client import MakeApi
from cupy_engine.server.api_errors import ApiError
from cupy_engine.server.key_limits import KeyLimits
from cupy_engine.server.server_config import ServerConfig
from fake_engine import Script, fails, says
from live_server import TINY, LiveServer, wait_until

from cupy_engine.errors import ConfigError, EngineError
from cupy_engine.messages import GenerateRequest, SequenceOutput


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr("cupy_engine.server.key_limits.time.monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def limits(folder: Path, **options: Any) -> KeyLimits:
    return KeyLimits(folder, ServerConfig(api_keys=("a", "b"), **options))


def refusal(limits: KeyLimits, key: str = "a") -> ApiError:
    with pytest.raises(ApiError) as caught:
        limits.enter(key)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    return caught.value


def test_requests_at_a_time(tmp_path: Path) -> None:
    both = limits(tmp_path, key_max_requests=2)
    leases = [both.enter("a"), both.enter("a")]
    assert "2 requests at a time (key_max_requests)" in str(refusal(both))
    both.enter("b").close(0)
    leases[0].close(5)
    both.enter("a")
    refusal(both)


def test_requests_per_minute(tmp_path: Path, clock: Clock) -> None:
    limited = limits(tmp_path, key_requests_per_minute=3)
    for _ in range(3):
        limited.enter("a").close(10)
    assert refusal(limited).retry_after_s == pytest.approx(20)
    limited.enter("b")
    clock.now_s += 20
    limited.enter("a")
    refusal(limited)
    clock.now_s += 86400
    for _ in range(3):
        limited.enter("a")
    refusal(limited)  # a budget holds no more than a minute's worth


def test_tokens_per_minute_are_charged_at_the_end(tmp_path: Path, clock: Clock) -> None:
    limited = limits(tmp_path, key_tokens_per_minute=60)
    first, second = limited.enter("a"), limited.enter("a")
    first.close(50)
    second.close(40)
    assert refusal(limited).retry_after_s == pytest.approx(31)
    clock.now_s += 29
    refusal(limited)
    clock.now_s += 2
    limited.enter("a")


def test_workers_share_the_accounts_and_a_killed_one_gives_back(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from cupy_engine.server.key_limits import KeyLimits
from cupy_engine.server.server_config import ServerConfig
limits = KeyLimits(Path({str(tmp_path)!r}), ServerConfig(api_keys=("a", "b"), key_max_requests=1))
limits.enter("a")
print("in", flush=True)
input()
"""
    here = limits(tmp_path, key_max_requests=1)
    here.enter("b").close(0)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        refusal(here)
        other.send_signal(signal.SIGKILL)
        other.wait()
        here.enter("a")
        refusal(here)


def test_more_workers_than_can_be_counted_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = limits(tmp_path, key_max_requests=1)
    monkeypatch.setattr(KeyLimits, "_is_alive", lambda self, worker: True)
    with pytest.raises(ApiError, match="256 HTTP workers"):
        limited.enter("a")
    monkeypatch.undo()
    limited.enter("a")


def test_no_room_for_the_accounts_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_room)
    with pytest.raises(EngineError, match="No space left"):
        limits(tmp_path, key_max_requests=1)


def test_limits_need_keys() -> None:
    with pytest.raises(ConfigError, match="api_keys"):
        ServerConfig(key_max_requests=1)
    with pytest.raises(ConfigError, match="key_tokens_per_minute"):
        ServerConfig(api_keys=("a",), key_tokens_per_minute=0)


def test_the_api_refuses_counts_and_gives_back(make_api: MakeApi, paris: list[int]) -> None:
    api = make_api(says(paris, eos=2), api_keys=("k",), key_max_requests=1, key_tokens_per_minute=1000)
    key = {"Authorization": "Bearer k"}

    def ask(**fields: object) -> Any:
        return api.post("/v1/completions", {"prompt": "Hello", **fields}, headers=key)

    for _ in range(3):
        assert ask().status_code == 200
        with ask(stream=True) as streamed:
            assert streamed.get_data().endswith(b"data: [DONE]\n\n")
    held = api.key_limits.enter("k")
    refused = ask()
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    assert refused.get_json()["error"]["type"] == "rate_limit_error"
    assert api.engine.refusals == ["key_limit"]
    held.close(2000)
    assert "tokens per minute" in ask().get_json()["error"]["message"]


def spent(make_api: MakeApi, script: Script, path: str, body: dict[str, Any]) -> float:
    """Tokens that a request takes from its key's budget."""
    api = make_api(script, api_keys=("k",), key_tokens_per_minute=1 << 30)
    with api.post(path, body, headers={"Authorization": "Bearer k"}) as answer:
        answer.get_data()
    limits = api.key_limits
    assert limits is not None
    return (1 << 30) - limits._cells[limits._rows["k"] + 1]


def embeds(request: GenerateRequest) -> list[SequenceOutput]:
    vector = np.ones(4, np.float32).tobytes()
    return [SequenceOutput(request_id=request.request_id, embedding=vector, finish_reason="stop")]


@pytest.mark.parametrize(
    ("script", "path", "fields", "expected"),
    [
        (says([7, 8], eos=2), "completions", {"prompt": [5, 6, 7]}, 3 + 3),
        (says([7, 8], eos=2), "completions", {"prompt": [[5, 6, 7], [5]], "n": 2}, 4 + 4 * 3),
        (says([7, 8], eos=2), "completions", {"prompt": [5, 6, 7], "best_of": 4}, 3 + 4 * 3),
        (embeds, "embeddings", {"input": [[5, 6, 7], [8, 9]]}, 5),
        (lambda _: [], "completions", {"prompt": [5, 6, 7], "timeout_s": 0.001}, 3),
        (fails("deadline"), "completions", {"prompt": [5, 6, 7]}, 3),
        (fails("internal"), "completions", {"prompt": [5, 6, 7]}, 0),
        (fails("queue_full"), "completions", {"prompt": [5, 6, 7]}, 0),
    ],
    ids=["plain", "n", "best_of", "embeddings", "late", "deadline", "failed", "refused"],
)
def test_what_requests_take(
    make_api: MakeApi,
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    path: str,
    fields: dict[str, Any],
    expected: int,
) -> None:
    monkeypatch.setattr("cupy_engine.server.generation.DEADLINE_GRACE_S", 0.1)
    assert spent(make_api, script, f"/v1/{path}", fields) == expected


def test_spreading_requests_over_workers_models_and_replicas_gains_nothing(tmp_path: Path) -> None:
    table = '[[models]]\nname = "%s"\nmodel = "%s"\nreplicas = %d\n'
    (tmp_path / "models.toml").write_text(table % ("one", TINY, 2) + table % ("two", TINY, 1))
    options = ("--workers", "2", "--api-key", "k", "--api-key", "other", "--key-requests-per-minute", "2")
    with LiveServer.serve("--config", str(tmp_path / "models.toml"), *options) as server:

        def ask(number: int) -> int:
            body = {"model": ("one", "two")[number % 2], "prompt": [5, 6], "max_tokens": 1}
            return server.call("/v1/completions", body)[0]

        server.key = "k"
        assert ask(0) == 200
        workers = server.worker_pids()
        os.kill(workers[0], signal.SIGKILL)
        wait_until(lambda: len(set(server.worker_pids()) - set(workers)) == 1, 10, "the worker is replaced")
        with ThreadPoolExecutor(12) as pool:
            assert Counter(pool.map(ask, range(12))) == {200: 1, 429: 11}
        server.key = "other"
        assert ask(0) == 200


@pytest.mark.parametrize("state", ["ready", "dead"])
def test_requests_that_fail_give_their_place_back(make_api: MakeApi, state: str) -> None:
    api = make_api(fails("internal"), api_keys=("k",), key_max_requests=1)
    api.engine.fake_state = state
    for _ in range(3):
        status = api.post("/v1/completions", {"prompt": "x"}, headers={"Authorization": "Bearer k"}).status_code
        assert status == (500 if state == "ready" else 503)
