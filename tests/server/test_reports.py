"""What is told of requests: lines as text and JSON, refusals, texts only if asked for."""

from __future__ import annotations

import json
import logging

import pytest
from api_client import MakeApi
from cupy_engine.server.logs import JsonFormatter, Line, line
from cupy_engine.server.server_config import ServerConfig
from fake_engine import fails

from cupy_engine.errors import ConfigError


def told(caplog: pytest.LogCaptureFixture, event: str) -> list[Line]:
    return [r.msg for r in caplog.records if isinstance(r.msg, Line) and r.msg.event == event]


@pytest.fixture(autouse=True)
def hear_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_texts_are_told_only_if_asked_for(make_api: MakeApi, caplog: pytest.LogCaptureFixture) -> None:
    make_api().complete(prompt="my secret")
    make_api(log_prompts=True).complete(prompt="my secret")
    without, with_texts = told(caplog, "request")
    assert "texts" not in without.values
    assert with_texts.values["texts"] == [["my secret", " Paris, café 🦥."]]


def test_refusals_are_told(make_api: MakeApi, caplog: pytest.LogCaptureFixture) -> None:
    api = make_api(api_keys=("k",))
    refused = api.complete()
    api.http.get("/v1/models")
    api.post("/v1/completions", {"prompt": 5}, headers={"Authorization": "Bearer k"})
    first, second = told(caplog, "refused")
    assert (first.values["status"], first.values["path"]) == (401, "/v1/completions")
    assert first.values["id"] == refused.headers["X-Request-Id"]
    assert second.values["status"] == 400


def test_what_an_engine_refuses_is_told_once(make_api: MakeApi, caplog: pytest.LogCaptureFixture) -> None:
    response = make_api(fails("queue_full")).complete(request_id="r9")
    assert response.status_code == 429
    (record,) = told(caplog, "request")
    assert (record.values["id"], record.values["finish"]) == ("cmpl-r9", "QueueFullError")
    assert not told(caplog, "refused")


def test_no_lines_if_none_are_wanted(make_api: MakeApi, caplog: pytest.LogCaptureFixture) -> None:
    api = make_api(log_requests=False)
    api.complete()
    api.complete(max_tokens=-1)
    assert not told(caplog, "request")
    assert not told(caplog, "refused")


def as_json(message: object, *args: object, **more: object) -> dict[str, object]:
    record = logging.LogRecord("cupy_engine.x", logging.WARNING, "f", 1, message, args, more.get("exc_info"))
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_json_lines() -> None:
    found = as_json(line("request", id='a"b\n', ttft_ms=1.23456, prompts=2, other=ValueError("x")))
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "warning",
        "logger": "cupy_engine.x",
        "event": "request",
        "id": 'a"b\n',
        "ttft_ms": 1.235,
        "prompts": 2,
        "other": "x",
    }
    assert as_json("worker %s is gone", "7")["event"] == "worker 7 is gone"
    try:
        raise RuntimeError("broken")
    except RuntimeError as error:
        info = (type(error), error, error.__traceback__)
    assert "RuntimeError: broken" in str(as_json("failed", exc_info=info)["exception"])


def test_bad_options() -> None:
    from cupy_engine.server.listen_config import ListenConfig

    with pytest.raises(ConfigError, match="log_format: must be one of 'text', 'json', got 'xml'"):
        ListenConfig(log_format="xml")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="otlp_traces_endpoint: must be an HTTP URL, got 'localhost:4317'"):
        ServerConfig(otlp_traces_endpoint="localhost:4317")
