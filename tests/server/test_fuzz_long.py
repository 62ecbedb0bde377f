"""Whatever comes, the answer is a 2xx or a 4xx, and the engine lives and is right afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from live_server import LiveServer
from request_fuzz import RequestFuzz
from tiny_twin import make_tiny_twin

from cupy_engine.model_source import ModelFiles

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
NUM_SCHEMA_CASES = 650  # per operation
NUM_REQUESTS = 250
COUNT = [0]


@pytest.fixture(scope="module")
def twin(default_model: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The default model's tiny twin, with few blocks, so that sequences make room for each other."""
    folder = make_tiny_twin(tmp_path_factory.mktemp("twin"), default_model)
    options = ["--load-format", "dummy", "--max-model-len", "256", "--num-kv-blocks", "40", "--max-num-seqs", "16"]
    with LiveServer.serve(str(folder), *options, "--max-num-batched-tokens", "64") as live:
        yield live


@pytest.fixture(autouse=True)
def _alive_and_right(twin: LiveServer) -> Iterator[None]:
    def ask() -> Any:
        return twin.call("/v1/completions", {"prompt": "It is", "temperature": 0, "max_tokens": 8})[1]["choices"]

    before = ask()
    yield
    assert ask() == before
    assert twin.status("/health") == 200
    assert twin.is_idle()


def test_requests_by_the_schema(twin: LiveServer) -> None:
    schema = schemathesis.openapi.from_url(twin.url + "/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/responses", "/tokenize"} <= {operation.path for operation in operations}
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=NUM_SCHEMA_CASES,
            derandomize=False,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def answers(case: Any) -> None:
            COUNT[0] += 1
            response = case.call(timeout=60)
            was_late = response.status_code == 504 and "timeout_s" in case.body
            assert response.status_code < 500 or was_late, (case.body, response.text)

        answers()
    print("cases", COUNT)


def test_requests_that_are_mostly_right(twin: LiveServer) -> None:
    fuzz = RequestFuzz(seed=7)
    requests = [fuzz.request() for _ in range(NUM_REQUESTS)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda request: twin.call(*request), requests))
    statuses = Counter(status for status, _ in answers)
    for (path, body), (status, answer) in zip(requests, answers, strict=True):
        is_late = status == 504 and "timeout_s" in body
        assert status in (200, 400) or is_late, (path, body, answer)
        assert "internal_error" not in str(answer), (path, body)
    assert statuses[200] > NUM_REQUESTS / 4, statuses
