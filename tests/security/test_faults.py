"""What breaks below the engine fails the requests it touches, says so without telling secrets, and nothing else."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from breakable_server import FAULTS, Breakable
from live_server import TINY, LiveServer, wait_until

REQUEST = {"prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0, "ignore_eos": True}


def ask(server: LiveServer, **fields: object) -> tuple[int, str]:
    """Status and, if it failed, what was said."""
    status, answer = server.call("/v1/completions", REQUEST | fields)
    return status, "" if status == 200 else answer["error"]["message"]


def assert_well(server: LiveServer, expected: list[int]) -> None:
    """It answers, rightly, and holds nothing of what was before."""
    wait_until(lambda: server.status("/health") == 200, 30, "well")
    status, answer = server.call("/v1/completions", REQUEST)
    assert status == 200
    assert answer["choices"][0]["token_ids"] == expected
    wait_until(server.is_idle, 5, "blocks and queues are empty")


@pytest.fixture(scope="module")
def expected(breakable: Breakable) -> list[int]:
    return breakable.server.call("/v1/completions", REQUEST)[1]["choices"][0]["token_ids"]


@pytest.mark.parametrize("step", [1, 10])
@pytest.mark.parametrize("kind", ["exception", "memory", "nan"])
def test_a_step_that_breaks(breakable: Breakable, expected: list[int], kind: str, step: int) -> None:
    server, engine = breakable.server, breakable.server.engine_pid()
    breakable.arm(kind, step)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(server), range(4)))
    statuses = {status for status, _ in answers}
    assert statuses <= {200, 500}
    assert kind == "memory" or 500 in statuses, "a step too large for memory may be taken in parts"
    assert not breakable.file.exists(), "it has happened"
    for _, message in answers:
        assert not any(secret in message for secret in ("secret", "Traceback", ".py", "/", "0x")), message
    assert server.engine_pid() == engine, "the engine went on"
    assert_well(server, expected)


@pytest.mark.parametrize("kind", ["hang", "exit"])
def test_an_engine_that_breaks(breakable: Breakable, expected: list[int], kind: str) -> None:
    server, engine = breakable.server, breakable.server.engine_pid()
    breakable.arm(kind, 10)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(server), range(4)))
    assert {status for status, _ in answers} == {200}, "nothing was told yet, so it was computed afresh"
    assert server.engine_pid() != engine
    assert_well(server, expected)
    if kind == "hang":
        assert "has made no progress for" in server.log()
        assert "faulty_llama.py" in server.log(), "where it hung is written down"


def test_a_worker_that_is_killed(breakable: Breakable, expected: list[int]) -> None:
    server = breakable.server
    (worker,) = server.worker_pids()
    with server.open_running_stream(REQUEST | {"max_tokens": 100_000}):
        os.kill(worker, signal.SIGKILL)
    wait_until(lambda: server.worker_pids() not in ([], [worker]), 10, "it is replaced")
    assert_well(server, expected)


def test_a_clock_that_jumps() -> None:
    with LiveServer.serve(str(TINY), PYTHONPATH=FAULTS, CLOCK_STEPS="1") as server:
        for _ in range(4):
            assert ask(server, timeout_s=20)[0] == 200
        assert server.status("/health") == 200
        assert server.metric("deadline_exceeded_total") == 0
        assert server.end() == 0


def test_a_model_folder_s_code_is_never_run(tmp_path: Path) -> None:
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    trap = f"open({str(tmp_path / 'trapped')!r}, 'w')"
    for name in (
        "modeling_llama.py",
        "tokenization_llama.py",
        "sitecustomize.py",
        "__init__.py",
        "json.py",
        "numpy.py",
    ):
        (tmp_path / name).write_text(trap)
    config = (tmp_path / "config.json").read_text().rstrip().removesuffix("}")
    auto_map = '"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}, "trust_remote_code": true'
    (tmp_path / "config.json").write_text(f"{config}, {auto_map}}}")
    with LiveServer.serve(str(tmp_path)) as server:
        assert ask(server)[0] == 200
    assert not (tmp_path / "trapped").exists()


def test_another_key_s_prompts_are_not_found_in_the_cache() -> None:
    with LiveServer.serve(str(TINY), "--api-key", "ann", "--api-key", "bob") as server:
        assert server.call("/v1/completions", REQUEST)[0] == 401

        def num_cached(key: str) -> int:
            server.key = key
            status, answer = server.call("/v1/completions", REQUEST | {"prompt": list(range(5, 105)), "max_tokens": 1})
            assert status == 200
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [num_cached(key) for key in ("ann", "bob", "ann", "bob")] == [0, 0, 96, 96]
